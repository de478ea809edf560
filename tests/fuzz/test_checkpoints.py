"""Checkpoints of which one file is damaged or missing: refused, or restored as they were saved."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorax_gen.training.checkpoint import Checkpoints
from lorax_gen.training.run import RunConfig
from tests.fuzz.damage import damaged_bytes, fuzz, refused

rng = np.random.default_rng(0)
STATE = jax.tree.map(
    jnp.asarray,
    {
        "step": np.int32(3),
        "key": np.array([0, 7], np.uint32),
        "params": {
            "up": rng.normal(size=(16, 32)).astype(np.float32),
            "half": rng.normal(size=(8, 8)).astype(jnp.bfloat16),
            "zeros": np.zeros((64, 64), np.float32),  # it shrinks to nothing
        },
        "stats": {},
        "opt_state": (rng.normal(size=(16, 32)).astype(np.float32), np.int32(3)),
    },
)
RUN = RunConfig(steps=6, keep=2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    with Checkpoints(directory, RUN) as checkpoints:
        checkpoints.save(3, STATE, force=True)
    return directory


@fuzz
@given(st.data())
def test_damaged_checkpoints(saved, tmp_path_factory, data):
    directory = tmp_path_factory.mktemp("damaged") / "checkpoints"
    shutil.copytree(saved, directory)
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    path = data.draw(st.sampled_from(files))
    if data.draw(st.integers(0, 9)):
        path.write_bytes(data.draw(damaged_bytes(path.read_bytes())))
    else:
        path.unlink()
    restored = []

    def load():
        with Checkpoints(directory, RUN) as checkpoints:
            restored.append(checkpoints.restore(jax.tree.map(jnp.zeros_like, STATE)))

    message = refused(load)
    if message is None:
        (state,) = restored
        same = jax.tree.map(
            lambda a, b: a.tobytes() == b.tobytes(), *map(jax.device_get, (state, STATE))
        )
        assert all(jax.tree.leaves(same))
    else:
        assert f"remove {directory / '3'}" in message
    shutil.rmtree(directory.parent)
