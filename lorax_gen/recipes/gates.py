"""The gates that a finished run's generator gives to prompts of its own data, for pictures."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lorax_gen.artifacts.generator import load_generator
from lorax_gen.data.config import WorldConfig
from lorax_gen.data.tokens import Encoder
from lorax_gen.files import AnyPath
from lorax_gen.inference.cards import gates_of_prompts
from lorax_gen.models.huggingface import load_model
from lorax_gen.models.model import Model
from lorax_gen.recipes.lora_gen import LoraGenConfig
from lorax_gen.recipes.preview import open_preview
from lorax_gen.recipes.registry import load_config

MOST_PROMPTS = 200


class Gates(NamedTuple):
    """`gates: [P, L, N]` fp32 of P prompts, the name and the group of the task of each, and the
    index of the first of these edge layers."""

    gates: np.ndarray
    names: list[str]
    groups: list[str]
    first: int = 0


def gates_of_run(run_dir: AnyPath) -> Gates | None:
    """Of up to `MOST_PROMPTS` prompts: in the world of unseen tasks, else of the training data.

    None where the run is of another method than lora_gen, or has released nothing yet.
    Raises UserError where its models or data are not to be found.
    """
    _, config = load_config(str(run_dir / "config.yaml"))
    released = run_dir / "released"
    if not isinstance(config, LoraGenConfig) or not released.is_dir():
        return None
    cloud, edge = (load_model(name, dtype=config.dtype) for name in (config.cloud, config.edge))
    names, groups, prompts = _prompts(config, cloud, edge)
    gates = gates_of_prompts(prompts, cloud, edge, load_generator(released))
    return Gates(gates, names, groups, edge.config.num_hidden_layers - gates.shape[1])


def _prompts(
    config: LoraGenConfig, cloud: Model, edge: Model
) -> tuple[list[str], list[str], list[list[int]]]:
    """Names and groups of tasks, and the token ids of a prompt of each."""
    if isinstance(config.data, WorldConfig):
        world = config.data.world()
        each = MOST_PROMPTS // len(config.data.families)
        tasks = [
            task
            for family in config.data.families
            for task in world.select("unseen", family)[:each]
        ]
        encode = Encoder.of(cloud).encode
        return (
            [task.name for task in tasks],
            [task.family for task in tasks],
            [encode(task.prompt()) for task in tasks],
        )
    preview = open_preview(config, load={config.cloud: cloud, config.edge: edge}.__getitem__)
    assert preview.mixed is not None
    mixture = preview.mixed.mixture
    chosen: dict[tuple[int, ...], str] = {}
    for step in range(min(preview.batches_per_epoch or 1, MOST_PROMPTS)):
        for sample in mixture.samples(step):
            chosen.setdefault(tuple(sample.prompt), sample.task)
        if len(chosen) >= MOST_PROMPTS:
            break
    rows = list(chosen.items())[:MOST_PROMPTS]
    tasks_of = [task for _, task in rows]
    return tasks_of, tasks_of, [list(ids) for ids, _ in rows]
