"""Settings that every test shares: 8 simulated CPU devices, no network."""

import os
from pathlib import Path

# Read once, when jax and huggingface_hub are imported, so they come first. Processes that a test
# starts inherit them. JAX_PLATFORMS=cuda,cpu in the environment runs the tests on a GPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import pytest

ROOT = Path(__file__).resolve().parent.parent

jax.config.update("jax_num_cpu_devices", 8)


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
