"""Direct generation trains in the world, comes back as it was, and is evaluated like LoRA-Gen."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from lorax_gen import config as configs
from lorax_gen.artifacts.baseline import load_baseline
from lorax_gen.baselines.direct import DirectConfig
from lorax_gen.cost import Macs, generator_macs
from lorax_gen.data.config import WorldConfig
from lorax_gen.data.world import FAMILIES
from lorax_gen.errors import UserError
from lorax_gen.evaluation.answerers import System, control
from lorax_gen.evaluation.exact import score_answers
from lorax_gen.evaluation.world import WorldCases, evaluate_world
from lorax_gen.mesh.sharding import MeshConfig, make_mesh
from lorax_gen.method import lora_from_gates
from lorax_gen.recipes.direct import DirectTraining, experiment, prompt_units
from lorax_gen.recipes.registry import answerer_of
from lorax_gen.training.loop import fit
from lorax_gen.training.optimizer import OptimizerConfig
from lorax_gen.training.run import RunConfig
from lorax_gen.training.state import init_state
from lorax_gen.training.step import answer_loss, make_train_step
from tests.tiny import PROMPTS, write_system

DIRECT = DirectConfig(units=5, rank=2, alpha=2.0, cloud_rank=2, cloud_alpha=2.0)


@pytest.fixture(scope="module")
def config(tiny_world_system, tmp_path_factory):
    models = write_system(tmp_path_factory.mktemp("system"), tiny_world_system)
    return DirectTraining(
        cloud=str(models / "cloud"),
        edge=str(models / "edge"),
        generator=DIRECT,
        prompts=8,
        queries_per_prompt=2,
        data=WorldConfig(families=FAMILIES[:1]),
        optimizer=OptimizerConfig(learning_rate=0.03, warmup_steps=0),
        run=RunConfig(steps=4, log_every=1, evaluate_every=2, checkpoint_every=2),
        mesh=MeshConfig(data=2, fsdp=2, tensor=2),
    )


@pytest.fixture(scope="module")
def released(config, tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "run"
    return fit(experiment(config), directory, configs.to_dict(config))


@pytest.fixture(scope="module")
def answerer(released, tiny_world_system):
    system = tiny_world_system
    return answerer_of(load_baseline(released), system.edge, system.cloud)


@pytest.fixture(scope="module")
def cases(tiny_world_system):
    """Six questions under three prompts."""
    pairs = tiny_world_system.world.tasks[0].questions[:2]
    return WorldCases(PROMPTS, [(i, pair) for i in range(3) for pair in pairs])


def test_it_starts_as_the_edge_and_learns_its_batch(config, tiny_world_system):
    made, edge = experiment(config), tiny_world_system.edge
    optimizer = made.transformation()
    state = jax.jit(lambda: init_state(*made.init(), optimizer, seed=0))()
    step, losses = jax.jit(make_train_step(made.loss, optimizer)), []
    first = jax.device_get(state["params"])
    for _ in range(6):
        state, metrics = step(state, made.frozen, made.batch(0))
        losses.append(float(metrics["loss"]))
    base, _ = answer_loss(edge.params, edge.config, made.batch(0))
    np.testing.assert_allclose(losses[0], float(base), rtol=1e-5)
    assert losses[-1] < losses[0] - 0.1
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), first, state["params"])
    assert min(jax.tree.leaves(moved)) > 1e-4


def test_a_released_network_comes_back_and_names_both_models(released, tiny_world_system):
    stored = json.loads((released / "baseline.json").read_text())
    assert (stored["method"], stored["config"]) == ("direct", configs.to_dict(DIRECT))
    loaded = load_baseline(released)
    assert set(loaded.params) == {"meta_tokens", "cloud_lora", "network", "pool"}
    with pytest.raises(UserError, match="reads prompts with the cloud model"):
        answerer_of(loaded, tiny_world_system.edge)


@pytest.mark.parametrize("sizes", [None, (4, 2, 1)])
def test_it_answers_as_the_edge_with_the_lora_of_each_prompt_merged(
    answerer, cases, sizes, released, tiny_world_system
):
    mesh = sizes and make_mesh(MeshConfig(*sizes), jax.devices()[:8])
    scores = score_answers(answerer, cases, cases.answers, mesh=mesh)
    params, spec = load_baseline(released).params, answerer.spec
    for i, prompt in enumerate(answerer.prompts(cases)):
        ids = np.array([prompt.ids], np.int32)
        lengths = np.array([ids.shape[1]], np.int32)
        units = prompt_units(params, answerer.cloud.params, spec, ids, lengths)
        lora = lora_from_gates(params["pool"], units[0], spec.generator)
        alone = dataclasses.replace(cases, questions=[cases.questions[i]])
        merged = System(answerer.model, lora=lora).answerer("lora")
        (expected,) = score_answers(merged, alone, alone.answers)
        np.testing.assert_allclose(scores[i].loglikelihoods, expected.loglikelihoods, atol=1e-3)


def test_it_is_evaluated_in_the_world_and_has_the_same_controls(answerer, tiny_world_system):
    system = tiny_world_system
    empty = control(answerer, "empty")
    assert not empty.reads_prompts and empty.identity() != answerer.identity()
    others = {"direct": answerer, "empty": empty}
    report = evaluate_world(
        System(system.edge, system.cloud, others=others),
        WorldConfig(families=FAMILIES[:1]),
        ("plain", "direct", "empty"),
        questions=2,
        timed=1,
    )
    row = report["rows"]["direct"]
    assert row["label"] == "edge + direct LoRA" and row["prompt_tokens"] > 1
    assert row["flops"] == report["rows"]["plain"]["flops"] and row["cloud_flops"] > 0


def test_macs_are_the_clouds_and_those_of_two_layers(answerer):
    spec, edge = answerer.spec, answerer.model.config
    without = generator_macs(spec, 7, router=0)
    layers, factors = edge.num_hidden_layers, 2 * sum((32 + 64, 32 + 64, 64 + 32))  # rank 2
    two = layers * (48 * 5 + (5 + 1) * factors)
    assert answerer.prompt_macs(7) == dataclasses.replace(without, generator=0) + Macs(
        generator=two
    )
