"""A baseline's run that is interrupted and resumed releases the bytes of one that is not."""

import dataclasses
import os
import signal

import pytest

from lorax_gen import config as configs
from lorax_gen.recipes.registry import RECIPES
from lorax_gen.training.loop import fit
from lorax_gen.training.signals import Interrupted
from tests.tiny import write_system

SIZES = {"prompts": 8, "queries_per_prompt": 1}
OWN = {
    "autocompressor": {"compressor": {"vectors": 2, "segments": 2, "rank": 2}, **SIZES},
    "direct": {"generator": {"units": 3, "rank": 2, "cloud_rank": 2}, **SIZES},
}


@pytest.mark.parametrize("method", OWN)
def test_resumed_it_releases_the_same_bytes(method, tiny_world_system, tmp_path):
    models = write_system(tmp_path / "models", tiny_world_system)
    recipe, names = RECIPES[method], {"edge": str(models / "edge")}
    names |= {"cloud": str(models / "cloud")} if method == "direct" else {}
    values = names | OWN[method] | {"data": {"kind": "world", "families": ["sort"]}}
    values |= {"run": {"steps": 4, "evaluate_every": 4, "checkpoint_every": 1}}
    config = configs.from_dict(recipe.config, values, "test")
    plain, made = configs.to_dict(config), recipe.experiment(config)

    def interrupting(step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return made.batch(step)

    entire = fit(made, tmp_path / "entire", plain)
    with pytest.raises(Interrupted, match="stopped at step 3 of 4"):
        fit(dataclasses.replace(made, batch=interrupting), tmp_path / "resumed", plain)
    resumed = fit(made, tmp_path / "resumed", plain)
    name = "baseline.safetensors"
    assert (resumed / name).read_bytes() == (entire / name).read_bytes()
