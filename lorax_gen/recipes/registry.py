"""The recipes of `lorax-gen train` and `plan`: a config class and its `experiment` function.

A config file names its recipe as `method:`, the usual word for it; its other keys are that recipe's
fields.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from lorax_gen import config as configs
from lorax_gen import documents, files
from lorax_gen.artifacts.baseline import Baseline
from lorax_gen.errors import UserError
from lorax_gen.evaluation.answerers import Answerer
from lorax_gen.models.model import Model
from lorax_gen.recipes import (
    autocompressor,
    direct,
    lora,
    lora_gen,
    loramoe,
    mixlora,
    pretrain,
)
from lorax_gen.training.experiment import Experiment

SHIPPED = Path(configs.__file__).parent / "configs"


class Recipe(NamedTuple):
    config: type
    experiment: Callable[..., Experiment]
    """`experiment(config, load=load_model, devices=None)`; see `recipes.base`."""
    answerer: Callable[[Baseline, Model, Model | None], Answerer] | None = None
    """`answerer(baseline, edge, cloud)`, of what the recipe releases as an `artifacts.baseline`.
    None: it releases something else."""


RECIPES = {
    "lora_gen": Recipe(lora_gen.LoraGenConfig, lora_gen.experiment),
    "lora": Recipe(lora.LoraConfig, lora.experiment),
    "loramoe": Recipe(loramoe.LoraMoeTraining, loramoe.experiment, loramoe.answerer),
    "mixlora": Recipe(mixlora.MixLoraTraining, mixlora.experiment, mixlora.answerer),
    "autocompressor": Recipe(
        autocompressor.AutoCompressorConfig, autocompressor.experiment, autocompressor.answerer
    ),
    "direct": Recipe(direct.DirectTraining, direct.experiment, direct.answerer),
    "pretrain": Recipe(pretrain.PretrainConfig, pretrain.experiment),
}


def answerer_of(baseline: Baseline, edge: Model, cloud: Model | None = None) -> Answerer:
    """The answerer of a released baseline, named like its method.

    Raises UserError where its models are others, a needed cloud is missing, or no recipe of this
    version has its method.
    """
    recipe = RECIPES.get(baseline.method)
    if recipe is None or recipe.answerer is None:
        known = ", ".join(name for name, own in RECIPES.items() if own.answerer is not None)
        raise UserError(
            f"the baseline {baseline.name!r} is of method {baseline.method!r}; this version of "
            f"lorax-gen knows {known}"
        )
    baseline.check_models(edge, cloud)
    return recipe.answerer(baseline, edge, cloud)


def recipe_of(config: Any) -> Recipe:
    """The recipe that a config belongs to."""
    return next(recipe for recipe in RECIPES.values() if type(config) is recipe.config)


def shipped_configs() -> list[str]:
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def load_config(name: str) -> tuple[str, Any]:
    """`(name of the recipe, its config)` of a YAML file, or of a shipped config by its name.

    Raises UserError for an unknown name, method or key, or a value of a wrong type.
    """
    path = files.to_path(name)
    if name in shipped_configs() and not path.exists():
        path = SHIPPED / f"{name}.yaml"
    if not path.is_file():
        known = shipped_configs()
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"shipped configs: {', '.join(known)}"
        raise UserError(f"no config file {name}; {hint}")
    values = documents.read_yaml(path)
    method = values.pop("method", None)
    if method not in list(RECIPES):  # a list, because a YAML value may be unhashable
        raise UserError(f"{path.name}: method is {method!r}; expected one of {', '.join(RECIPES)}")
    return method, configs.from_dict(RECIPES[method].config, values, path.name)
