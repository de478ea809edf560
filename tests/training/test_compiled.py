"""The compiled step: what it gathers, what is built into it, and what it gives back."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from lorax_gen.data.config import WorldConfig
from lorax_gen.data.world_batches import generator_batch
from lorax_gen.mesh.sharding import (
    MeshConfig,
    init_sharded,
    keep_rows,
    make_mesh,
    put_batch,
    tree_shardings,
)
from lorax_gen.models.decoder import Execution
from lorax_gen.planning import hlo
from lorax_gen.training.optimizer import OptimizerConfig, make_optimizer
from lorax_gen.training.state import init_state
from lorax_gen.training.step import generator_loss, make_train_step

LAYERS = 3  # no other dimension of the tiny system has this size
PROMPTS = 20  # nor the numbers of prompts that a device, or several together, can have


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


def compile_step(system, mesh, prompts: int = PROMPTS) -> str:
    """HLO of the step on 8 devices, frozen weights and trainables in shards."""
    shape, encoder = WorldConfig(), system.encoder
    batch = generator_batch(
        system.world.select("seen"), encoder, encoder, seed=0, step=0, prompts=prompts, queries=1,
        prompt_length=shape.prompt_length, question_length=shape.question_length,
    )  # fmt: skip
    optimizer = make_optimizer(OptimizerConfig(), 10)
    with jax.set_mesh(mesh):
        state = init_sharded(lambda: init_state(system.params, system.stats, optimizer, 0), mesh)
        frozen = jax.device_put(system.frozen, tree_shardings(system.frozen, mesh))
        loss = generator_loss(system.spec, execution=Execution(constrain=keep_rows(mesh)))
        step = make_train_step(loss, optimizer)
        jitted = jax.jit(step, donate_argnums=0)
        return jitted.lower(state, frozen, put_batch(batch, mesh)).compile().as_text()


@pytest.fixture(scope="module")
def compiled(system):
    return compile_step(system, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))


def shapes(hlo: str, operation: str) -> set[tuple[int, ...]]:
    """Shapes of the results of an operation, wherever it stands in a program."""
    lines = re.findall(rf"= (.*?) {operation}(?:-start)?\(", hlo)
    dims = [found for line in lines for found in re.findall(r"\w+\[([\d,]*)\]", line)]
    return {tuple(int(n) for n in found.split(",") if n) for found in dims}


def test_weights_are_gathered_one_layer_at_a_time(compiled, system):
    """Frozen kernels and pools lie stacked over layers; no gather brings a whole stack together.

    Only the router's may come whole: it serves all layers in one product.
    """
    width = system.params["router"]["w1"].shape[-1]
    router = {(LAYERS, 48, width // 2), (LAYERS, width, 4), (LAYERS, 48, width)}
    gathered = shapes(compiled, "all-gather") - router
    assert gathered, "kernels in shards must be gathered to be used"
    of_prompts = {PROMPTS, PROMPTS // 2, PROMPTS // 4}  # states and gates may come together
    weights = [shape for shape in gathered if not of_prompts & {*shape}]
    assert not [shape for shape in weights if len(shape) >= 3 and shape[0] == LAYERS]


def test_only_gradients_are_added_up_over_devices(system):
    """Where weights are split over `fsdp`, states keep to their rows: no sum of activations."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    sent = hlo.collectives(compile_step(system, mesh, prompts=32))["all-reduce"].bytes
    gradients = sum(leaf.nbytes for leaf in jax.tree.leaves(system.params))
    assert sent < 1.1 * (2 * 7 / 8) * gradients


def test_no_weight_is_built_into_the_program(compiled):
    sizes = [np.prod(shape) for shape in shapes(compiled, "constant")]
    assert max(sizes, default=0) * 4 < 2**14  # the smallest kernel alone has 4 KiB a layer


def test_the_frozen_kernels_are_in_shards(system):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    shardings = tree_shardings(system.frozen, mesh)
    for model in ("cloud", "edge"):
        for name in ("q", "k", "v", "o", "gate", "up", "down"):
            assert set(shardings[model]["layers"][name].spec) >= {"fsdp", "tensor"}, name
