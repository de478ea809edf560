"""The baseline starts as the edge model, trains its LoRA alone, and comes back as it was."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_gen.artifacts.export import specialised
from lorax_gen.artifacts.peft import load_adapter
from lorax_gen.data.config import MixtureConfig, WorldConfig
from lorax_gen.data.world import FAMILIES
from lorax_gen.errors import UserError
from lorax_gen.frames import PLAIN, Frame
from lorax_gen.method import merge, scaled
from lorax_gen.models import decoder
from lorax_gen.models.adapter import Adapter
from lorax_gen.models.huggingface import load_model
from lorax_gen.recipes.lora import LoraConfig, experiment, lora_loss
from lorax_gen.tensors import tree_hash
from lorax_gen.training.optimizer import OptimizerConfig, make_optimizer
from lorax_gen.training.state import init_state
from lorax_gen.training.step import answer_loss, make_train_step
from tests.tiny import write_system

TARGETS = ("q", "v", "gate", "down")


@pytest.fixture(scope="module")
def edge_directory(tiny_world_system, tmp_path_factory):
    return write_system(tmp_path_factory.mktemp("system"), tiny_world_system) / "edge"


@pytest.fixture(scope="module")
def config(edge_directory):
    return LoraConfig(
        edge=str(edge_directory),
        rank=2,
        alpha=6.0,
        targets=TARGETS,
        batch_size=8,
        data=WorldConfig(families=FAMILIES[:1]),
        optimizer=OptimizerConfig(learning_rate=0.1, warmup_steps=0),
    )


@pytest.fixture(scope="module")
def trained(config):
    """`(experiment, fresh state, state after three steps, losses)`."""
    made = experiment(config)
    optimizer = make_optimizer(made.optimizer, 10)
    fresh = jax.jit(lambda: init_state(*made.init(), optimizer, seed=0))()
    step = jax.jit(make_train_step(made.loss, optimizer))
    state, losses = fresh, []
    for _ in range(3):  # on one batch
        state, metrics = step(state, made.frozen, made.batch(0))
        losses.append(float(metrics["loss_lm"]))
    return made, fresh, state, losses


def test_at_step_zero_it_is_the_base_model(config, trained, tiny_world_system):
    made, fresh, _, _ = trained
    edge, batch = tiny_world_system.edge, made.batch(0)
    loss = lora_loss(config, edge.config)
    # Dropout is on: it acts on a branch that is still zero.
    both = jax.jit(
        lambda lora, params, key: (
            loss(lora, {}, {"edge": params}, batch, key, None)[0],
            answer_loss(params, edge.config, batch)[0],
        )
    )
    with_lora, base = both(fresh["params"], edge.params, jax.random.key(1))
    np.testing.assert_allclose(with_lora, base, rtol=1e-6)


def test_only_the_lora_is_trained(trained, edge_directory):
    made, fresh, state, losses = trained
    assert set(state["params"]) == set(TARGETS)
    for name, pair in state["params"].items():
        for factor in ("a", "b"):
            assert np.abs(pair[factor] - fresh["params"][name][factor]).max() > 1e-3
    chex.assert_trees_all_equal(made.frozen, {"edge": load_model(edge_directory).params})
    assert losses[-1] < losses[0]


def test_batches_mix_tasks_and_follow_the_step(config, trained):
    made, *_ = trained
    chex.assert_trees_all_equal(made.batch(3), made.batch(3))
    assert not np.array_equal(made.batch(3)["tokens"], made.batch(4)["tokens"])
    assert made.batch(3)["tokens"].shape == (8, config.data.question_length)


@pytest.fixture(scope="module")
def released(trained, tmp_path_factory):
    made, _, state, _ = trained
    directory = tmp_path_factory.mktemp("run") / "released"
    made.release(state, directory, {"metrics": {"loss": 0.5}})
    return directory


def test_a_released_lora_comes_back_with_its_scale(trained, released, tiny_world_system):
    _, _, state, _ = trained
    loaded = load_adapter(released, tiny_world_system.edge.config)
    chex.assert_trees_all_equal(loaded, jax.device_get(scaled(state["params"], 3.0)))
    described = json.loads((released / "provenance.json").read_text())
    assert described == {"metrics": {"loss": 0.5}}


def test_the_shipped_lora_is_an_adapter_of_the_shipped_edge():
    edge = load_model("world/edge")
    # Of the values that training ended with, in fp32 and with their scale.
    assert tree_hash(load_adapter("world/lora", edge.config)) == "c70345f68c20198c"


def test_merged_it_answers_as_it_did_unmerged(released, tiny_world_system):
    edge = tiny_world_system.edge
    lora = load_adapter(released, edge.config)
    tokens = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)
    params = {**edge.params, "layers": merge(edge.params["layers"], lora)}
    hidden = jax.jit(decoder.hidden_states, static_argnums=1)
    unmerged = hidden(edge.params, edge.config, tokens, adapter=Adapter(lora))
    np.testing.assert_allclose(hidden(params, edge.config, tokens), unmerged, atol=1e-4)
    assert np.abs(unmerged - hidden(edge.params, edge.config, tokens)).max() > 0.1


def test_a_release_replaces_nothing(trained, released):
    made, _, state, _ = trained
    with pytest.raises(UserError, match="already exists"):
        made.release(state, released, {})


def test_a_target_that_the_edge_lacks_is_named(edge_directory):
    with pytest.raises(UserError, match="targets names 'fc1', which the edge model lacks"):
        experiment(LoraConfig(edge=str(edge_directory), targets=("q", "fc1")))


def test_a_baseline_of_rows_in_a_frame_is_released_with_it(config, edge_directory, tmp_path):
    rows = [
        {"instruction": f"Say {word} .", "input": thing, "output": word}
        for word in ("alpha", "beta")
        for thing in ("apple", "bell", "king")
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = MixtureConfig(sources=(str(path),), frame="thing {input} box :", evaluate_on=())
    made = experiment(dataclasses.replace(config, data=data))
    params, _ = made.init()
    made.release({"params": params}, tmp_path / "released", {"config": {}})
    edge = load_model(edge_directory)
    assert specialised(tmp_path / "released", edge).frame == Frame("thing {input} box :")
    made = experiment(config)
    made.release({"params": params}, tmp_path / "plain", {"config": {}})
    assert specialised(tmp_path / "plain", edge).frame == PLAIN
