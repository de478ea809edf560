"""Devices: meshes, shardings, processes, attention kernels.

sharding   the mesh, and the sharding of every array on it
hosts      several processes that train one model
kernels    attention kernels: XLA, cuDNN, splash
chips      peak FLOPs, memory and links of accelerators
"""
