"""Memory, collectives and time of a train step on devices that are not attached.

plan       the plan of a recipe for a topology, and whether it fits
compiling  a compiler that takes minutes, aloud
topology   TPU slices and GPUs by name
memory     bytes of the generator's train step, estimated
hlo        collectives of a compiled program, from its HLO
table      a plan as tables on the terminal
"""
