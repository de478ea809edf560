"""One layer's attention, forward and backward, compiled for a TPU v5e that is not there.

    python benchmarks/attention.py        # needs libtpu: pip install '.[plan]'

Rows of 4 x 511 positions in bf16, by XLA and by splash: peak of live buffers, and bytes accessed as
XLA counts them, without what happens inside of the kernel.
"""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lorax_gen.mesh.kernels import make_attention
from lorax_gen.mesh.sharding import MeshConfig, make_mesh
from lorax_gen.models import presets
from lorax_gen.planning.topology import find_devices

ROWS, TIME = 4, 511
MODELS = ("tinyllama_1b", "qwen2_1_5b", "gemma2_2b", "opt_2_7b")


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    mesh = make_mesh(MeshConfig(data=1), find_devices("v5e:2x2")[1][:1])
    for name in MODELS:
        config = getattr(presets, name)()
        q, k = (
            jax.ShapeDtypeStruct(
                (ROWS, TIME, heads, config.head_dim),
                jnp.bfloat16,
                sharding=NamedSharding(mesh, P()),
            )
            for heads in (config.num_attention_heads, config.num_key_value_heads)
        )
        for kernel in ("xla", "splash"):
            attention = make_attention(kernel, mesh)

            def total(q, k, v, attention=attention, cap=config.attn_logit_softcapping):
                return attention(q, k, v, scale=0.1, softcap=cap).astype(jnp.float32).sum()

            compiled = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(q, k, k).compile()
            peak = compiled.memory_analysis().peak_memory_in_bytes
            accessed = compiled.cost_analysis()["bytes accessed"]
            print(f"{name} {kernel}: {peak / 2**20:.1f} MiB at once, {accessed / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
