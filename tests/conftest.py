"""What every test shares: 8 simulated CPU devices, no network, and a tiny untrained system."""

import gc
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

# Read once, when jax and huggingface_hub are imported, so they come first. Processes that a test
# starts inherit them. JAX_PLATFORMS=cuda,cpu in the environment runs the tests on a GPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
# Compiling takes most of the time of a test. jaxlib 0.11 does not know this flag, and ends the
# process at an unknown one.
if version("jaxlib").startswith("0.10."):
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_gen.data.tokens import Encoder
from lorax_gen.data.world import World, make_world, vocabulary
from lorax_gen.method import GeneratorConfig, init_generator
from lorax_gen.models import decoder
from lorax_gen.models.decoder import DecoderConfig, kernel_shapes
from lorax_gen.models.model import Model
from lorax_gen.system import GeneratorSpec
from lorax_gen.tokenizers import word_level

ROOT = Path(__file__).resolve().parent.parent
MOST_MAPS = 25_000

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)  # programs compile six times as fast

# Nearly all the time of a test is XLA compiling. Kept on disk, its results make later runs several
# times faster and let parallel workers share one compilation; `make clean` forgets them. The folder
# is not bounded: with a bound, jax rereads all of it, under a lock, whenever it adds an entry.
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


@pytest.fixture(autouse=True, scope="module")
def few_memory_maps():
    """Forgets compiled programs before they are too many: each is some memory maps, Linux allows a
    process 65,530, and XLA ends the process where it gets no more."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def rng_key() -> jax.Array:
    """A fixed PRNG key; split it where more than one is needed."""
    return jax.random.key(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real benchmarks and checkpoints beside the repository; not part of it."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("needs the data folder ../shared/data, which is not part of the repository")
    return path


def random_params(config: DecoderConfig, seed: int = 0) -> decoder.Params:
    """Decoder parameters with nothing at its initial value, norms and biases included.

    Filled by numpy: compiling `init_params` for every config of a test would take longer.
    """
    rng = np.random.default_rng(seed)

    def fill(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name, noise = path[-1].key, rng.normal(size=leaf.shape)
        if name.endswith("norm"):
            value = 0.2 * noise + (0 if config.rms_norm_offset else 1)
        elif name.endswith("bias"):
            value = 0.5 * noise
        else:
            value = noise * leaf.shape[-1 if name in ("embed", "positions") else -2] ** -0.5
        return jnp.asarray(value, leaf.dtype)

    shapes = jax.eval_shape(lambda: decoder.init_params(jax.random.key(0), config))
    return jax.tree_util.tree_map_with_path(fill, shapes)


@pytest.fixture(scope="session", name="random_params")
def random_params_fixture():
    """`random_params(config, seed=0)`: test files cannot import this one."""
    return random_params


class TinySystem(NamedTuple):
    """A whole LoRA-Gen system in the embedded world, untrained but with no part at zero."""

    world: World
    cloud: Model
    edge: Model
    encoder: Encoder
    spec: GeneratorSpec
    params: dict[str, Any]
    stats: dict[str, Any]

    @property
    def frozen(self) -> dict[str, Any]:
        return {"cloud": self.cloud.params, "edge": self.edge.params}


@pytest.fixture(scope="session")
def tiny_world_system() -> TinySystem:
    """Cloud of width 48 and edge of width 32, two layers each, and a generator between them."""
    world = make_world(0)
    tokenizer = word_level(vocabulary(world))
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    common = heads | {"vocab_size": len(tokenizer), "tie_word_embeddings": True}
    cloud, edge = (
        Model(config, random_params(config, seed=config.hidden_size), tokenizer)
        for config in (
            DecoderConfig(hidden_size=48, intermediate_size=96, head_dim=12, **common),
            DecoderConfig(hidden_size=32, intermediate_size=64, head_dim=8, **common),
        )
    )
    generator = GeneratorConfig(
        n_experts=4, top_k=2, rank=4, alpha=4.0, router_width=16, cloud_rank=4, cloud_alpha=4.0
    )

    @jax.jit
    def init(key):
        params, stats = init_generator(
            key,
            generator,
            edge_layers=edge.config.num_hidden_layers,
            edge_shapes=kernel_shapes(edge.config),
            cloud_layers=cloud.config.num_hidden_layers,
            cloud_shapes=kernel_shapes(cloud.config),
            cloud_embedding=cloud.params["embed"][tokenizer.eos_token_id],
        )
        return params, stats

    params, stats = init(jax.random.key(0, impl="unsafe_rbg"))
    # A fresh B is zero: then no gradient reaches the router, and any LoRA is as good as none.
    rng = np.random.default_rng(0)
    for tree in (params["cloud_lora"], params["pool"]):
        for pair in tree.values():
            pair["b"] = jnp.asarray(rng.normal(0, 0.3, pair["b"].shape), jnp.float32)
    spec = GeneratorSpec(generator, cloud.config, edge.config)
    return TinySystem(world, cloud, edge, Encoder(tokenizer), spec, params, stats)
