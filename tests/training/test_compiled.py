"""The compiled step: what it gathers, what is built into it, and what it gives back."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from lorax_gen.data.batches import generator_batch
from lorax_gen.data.sources import WorldConfig
from lorax_gen.training.optimizer import OptimizerConfig, make_optimizer
from lorax_gen.training.sharding import (
    MeshConfig,
    init_sharded,
    make_mesh,
    put_batch,
    tree_shardings,
)
from lorax_gen.training.state import init_state
from lorax_gen.training.step import generator_loss, make_train_step

LAYERS = 3  # no other dimension of the tiny system has this size


@pytest.fixture(scope="module")
def system(tiny_world_system, random_params):
    def deeper(model):
        config = dataclasses.replace(model.config, num_hidden_layers=LAYERS)
        return dataclasses.replace(model, config=config, params=random_params(config))

    cloud, edge = deeper(tiny_world_system.cloud), deeper(tiny_world_system.edge)
    spec = dataclasses.replace(tiny_world_system.spec, cloud=cloud.config, edge=edge.config)
    params = jax.tree.map(lambda x: np.repeat(x[:1], LAYERS, 0), tiny_world_system.params)
    stats = jax.tree.map(lambda x: np.repeat(x[:1], LAYERS, 0), tiny_world_system.stats)
    return tiny_world_system._replace(cloud=cloud, edge=edge, spec=spec, params=params, stats=stats)


@pytest.fixture(scope="module")
def compiled(system):
    """HLO of the step on 8 devices, frozen weights and trainables in shards."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    shape, encoder = WorldConfig(), system.encoder
    batch = generator_batch(
        system.world.select("seen"), encoder, encoder, seed=0, step=0, prompts=8, queries=1,
        prompt_length=shape.prompt_length, question_length=shape.question_length,
    )  # fmt: skip
    optimizer = make_optimizer(OptimizerConfig(), 10)
    with jax.set_mesh(mesh):
        state = init_sharded(lambda: init_state(system.params, system.stats, optimizer, 0), mesh)
        frozen = jax.device_put(system.frozen, tree_shardings(system.frozen, mesh))
        step = make_train_step(generator_loss(system.spec), optimizer)
        jitted = jax.jit(step, donate_argnums=0)
        return jitted.lower(state, frozen, put_batch(batch, mesh)).compile().as_text()


def shapes(hlo: str, operation: str) -> set[tuple[int, ...]]:
    """Shapes of the results of an operation, wherever it stands in a program."""
    lines = re.findall(rf"= (.*?) {operation}(?:-start)?\(", hlo)
    dims = [found for line in lines for found in re.findall(r"\w+\[([\d,]*)\]", line)]
    return {tuple(int(n) for n in found.split(",") if n) for found in dims}


def test_weights_are_gathered_one_layer_at_a_time(compiled):
    """Frozen kernels and pools lie stacked over layers; no gather brings a whole stack together."""
    gathered = shapes(compiled, "all-gather")
    assert gathered, "kernels in shards must be gathered to be used"
    assert not [shape for shape in gathered if len(shape) >= 3 and shape[0] == LAYERS]


def test_no_weight_is_built_into_the_program(compiled):
    sizes = [np.prod(shape) for shape in shapes(compiled, "constant")]
    assert max(sizes, default=0) * 4 < 2**14  # the smallest kernel alone has 4 KiB a layer


def test_the_frozen_kernels_are_in_shards(system):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    shardings = tree_shardings(system.frozen, mesh)
    for model in ("cloud", "edge"):
        for name in ("q", "k", "v", "o", "gate", "up", "down"):
            assert set(shardings[model]["layers"][name].spec) >= {"fsdp", "tensor"}, name
