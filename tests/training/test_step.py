"""The train step: what moves and what is still, and that every layout takes the same step."""

import dataclasses
import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lorax_gen.data.config import WorldConfig
from lorax_gen.data.tokens import prompt_batch
from lorax_gen.data.world_batches import generator_batch
from lorax_gen.mesh.sharding import (
    MeshConfig,
    init_sharded,
    make_mesh,
    parallelize,
    tree_shardings,
)
from lorax_gen.method import count_params, generate, merge, router_logits, take_example
from lorax_gen.system import meta_states, prompt_gates
from lorax_gen.training.optimizer import OptimizerConfig, make_optimizer
from lorax_gen.training.state import init_state
from lorax_gen.training.step import answer_loss, generator_loss, make_train_step

PROMPTS, QUERIES, STEPS = 8, 2, 3
LAYOUTS = {
    "jit-1": (MeshConfig(), 1),
    "jit-8-data-8": (MeshConfig(), 8),
    "jit-8-fsdp-8": (MeshConfig(data=1, fsdp=8), 8),
    "jit-8-data-2-fsdp-2-tensor-2": (MeshConfig(data=2, fsdp=2, tensor=2), 8),
    "jit-8-fsdp-4-tensor-2": (MeshConfig(data=1, fsdp=4, tensor=2), 8),
    "pmap-8": (MeshConfig(mode="pmap"), 8),
}
# Not Adam: it would blow up the rounding of gradients that are zero, such as that of the router's
# b2, which BatchNorm cancels, and layouts of devices do round differently.
SGD = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9))


@pytest.fixture(scope="module")
def system(tiny_world_system):
    """Without dropout, whose noise is drawn by each device for itself under pmap."""
    still = dataclasses.replace(tiny_world_system.spec.generator, cloud_dropout=0.0)
    spec = dataclasses.replace(tiny_world_system.spec, generator=still)
    return tiny_world_system._replace(spec=spec)


@pytest.fixture(scope="module")
def batches(system):
    shape, encoder = WorldConfig(), system.encoder
    return [
        generator_batch(
            system.world.select("seen"),
            encoder,
            encoder,
            seed=0,
            step=step,
            prompts=PROMPTS,
            queries=QUERIES,
            prompt_length=shape.prompt_length,
            question_length=shape.question_length,
        )
        for step in range(STEPS)
    ]


class Run(NamedTuple):
    """What is left of some steps: everything on the host."""

    metrics: list[dict[str, Any]]
    states: list[dict[str, Any]]
    frozen: Any
    traces: int
    donated: bool


def train(system, batches, layout, optimizer=SGD) -> Run:
    config, count = LAYOUTS[layout]
    mesh = make_mesh(config, jax.devices("cpu")[:count])
    loss, traces = generator_loss(system.spec), []

    def counted(*arguments):
        traces.append(1)
        return loss(*arguments)

    def fresh():
        params, stats = jax.tree.map(jnp.copy, (system.params, system.stats))
        return init_state(params, stats, optimizer, seed=0)

    metrics, states = [], []
    with jax.set_mesh(mesh):
        first = state = init_sharded(fresh, mesh)
        states.append(jax.tree.map(np.array, state))
        frozen = jax.device_put(system.frozen, tree_shardings(system.frozen, mesh))
        step = parallelize(make_train_step(counted, optimizer), state, mesh, config.mode)
        for batch in batches:
            state, row = step(state, frozen, batch)
            metrics.append(jax.device_get(row))
            states.append(jax.tree.map(np.array, state))
        donated = all(leaf.is_deleted() for leaf in jax.tree.leaves(first))
        return Run(metrics, states, jax.device_get(frozen), len(traces), donated)


@pytest.fixture(scope="module")
def run(system, batches):
    """`run(layout)`: three steps, taken once for all tests."""
    return functools.cache(functools.partial(train, system, batches))


# --- every layout takes the same step ------------------------------------------------------------


@pytest.mark.parametrize("layout", list(LAYOUTS)[1:])
def test_eight_devices_take_the_steps_of_one(run, layout):
    """Up to rounding: sums over the batch are fp32 and in another order, a few 1e-7 of each
    value per step, and the steps carry it on."""
    one, eight = run("jit-1"), run(layout)
    for expected, found in zip(one.metrics, eight.metrics, strict=True):
        chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)
    for expected, found in zip(one.states, eight.states, strict=True):
        chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), *(
        one.states[i]["params"] for i in (0, STEPS)
    ))  # fmt: skip
    assert max(jax.tree.leaves(moved)) > 1e-2  # far more than the tolerance


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batch_norm_in_training_sees_the_global_batch(run, system, batches, layout):
    """Under pmap too, where a device holds one prompt, whose own variance is zero."""

    @jax.jit
    def raw_logits(params, frozen, prompt, lengths):
        states = meta_states(params, frozen["cloud"], system.spec, prompt, lengths)
        return router_logits(
            params["router"], system.stats, states, train=True, use_batch_norm=False
        )[0]

    first = batches[0]
    logits = np.asarray(
        raw_logits(system.params, system.frozen, first["prompt"], first["prompt_lengths"])
    )
    found = run(layout).states[1]["stats"]
    for name, batch in {"mean": logits.mean(0), "var": logits.var(0)}.items():
        expected = 0.9 * np.asarray(system.stats[name]) + 0.1 * batch
        np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_step_is_traced_once(run, layout):
    assert run(layout).traces == 1


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name.startswith("jit")])
def test_the_state_is_donated(run, layout):
    assert run(layout).donated


# --- what moves ----------------------------------------------------------------------------------


def test_every_trainable_moves_in_every_layer(run):
    """But for the router's b2: BatchNorm takes the mean off again."""
    before, after = (run("jit-1").states[i]["params"] for i in (0, STEPS))
    for (path, old), new in zip(
        jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True
    ):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        moved = (old != new).any(axis=tuple(range(1, old.ndim)))
        assert moved.all() or name == "router/b2", name


def test_frozen_weights_stay_bit_for_bit_and_out_of_the_state(run, system):
    result = run("jit-1")
    chex.assert_trees_all_equal(result.frozen, system.frozen)
    state = result.states[-1]
    chex.assert_trees_all_equal_shapes(state["opt_state"][1][0].trace, state["params"])
    step, key = 1, 2
    held = 2 * count_params(system.params) + count_params(system.stats) + step + key
    assert count_params(state) == held  # parameters and their momentum, and nothing more
    assert state["step"] == STEPS


def test_the_loss_falls_on_a_repeated_batch(tiny_world_system, batches):
    """With the real optimizer and with dropout."""
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=0), 100)
    result = train(tiny_world_system, [batches[0]] * 15, "jit-1", optimizer)
    losses = [row["loss_lm"] for row in result.metrics]
    assert losses[-1] < 0.7 * losses[0]
    for row in result.metrics:
        assert row["loss"] == pytest.approx(row["loss_lm"] + row["loss_cv"], rel=1e-5)


# --- the loss ------------------------------------------------------------------------------------


def test_each_question_is_answered_with_the_lora_of_its_own_prompt(run, system, batches):
    """The loss of the first step is the mean of that of the merged models, prompt by prompt."""
    first, edge = batches[0], system.edge

    @jax.jit
    def loras(params, stats, frozen, prompt, lengths):
        states = meta_states(params, frozen["cloud"], system.spec, prompt, lengths)
        return generate(params, stats, states, system.spec.generator, train=True).lora

    @jax.jit
    def loss_of_merged(params, lora, rows):
        params = {**params, "layers": merge(params["layers"], lora)}
        return answer_loss(params, edge.config, rows)[0]

    lora = jax.device_get(
        loras(system.params, system.stats, system.frozen, first["prompt"], first["prompt_lengths"])
    )
    losses = np.zeros((PROMPTS, PROMPTS))  # [questions of a prompt, LoRA of a prompt]
    for i in range(PROMPTS):
        rows = {name: first[name][i * QUERIES :][:QUERIES] for name in ("tokens", "answer")}
        for j in {i, (i + 1) % PROMPTS}:
            losses[i, j] = loss_of_merged(edge.params, take_example(lora, j), rows)
    found = run("jit-1").metrics[0]["loss_lm"]
    assert found == pytest.approx(losses.diagonal().mean(), rel=1e-5)
    next_ones = np.roll(losses, -1, axis=1).diagonal().mean()
    assert found != pytest.approx(next_ones, rel=1e-3)


def test_answers_weigh_alike_on_whatever_shard_they_lie(system):
    """Shards hold 1 to 7 answer tokens; the mean over shards is that over all tokens."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(4, 800, (8, 5)).astype(np.int32)
    answer = np.arange(5) >= np.array([4, 4, 3, 2, 1, 1, 4, 3])[:, None]
    answer[1] = False
    batch = {"tokens": tokens, "answer": answer}

    def loss(batch, axis_name=None):
        return answer_loss(system.edge.params, system.edge.config, batch, axis_name=axis_name)

    shards = jax.tree.map(lambda x: x.reshape(4, 2, 5), batch)
    on_shards = jax.vmap(functools.partial(loss, axis_name="shards"), axis_name="shards")
    expected, found = jax.jit(loss)(batch), jax.jit(on_shards)(shards)
    chex.assert_trees_all_close(jax.tree.map(jnp.mean, found), expected, rtol=1e-5)


# --- prompts -------------------------------------------------------------------------------------


def test_meta_tokens_see_the_whole_prompt_and_nothing_behind_them(system):
    """By gradient: the states of row 0 depend on the embeddings of exactly its own tokens, and
    each meta token on itself and those before it. Every token here occurs once."""
    prompt = np.arange(10, 34, dtype=np.int32).reshape(2, 12)
    lengths = np.array([7, 12], np.int32)
    width = system.cloud.config.hidden_size
    direction = np.random.default_rng(0).normal(size=width).astype(np.float32)

    @jax.jit
    @jax.jacrev
    def sensitivity(trained):
        params = {**system.params, "meta_tokens": trained["meta_tokens"]}
        cloud = {**system.cloud.params, "embed": trained["embed"]}
        return meta_states(params, cloud, system.spec, prompt, lengths)[0] @ direction

    trained = {
        "embed": system.cloud.params["embed"],
        "meta_tokens": system.params["meta_tokens"],
    }
    reached = jax.tree.map(lambda x: np.abs(x).max(-1) > 0, jax.device_get(sensitivity(trained)))
    layers = system.edge.config.num_hidden_layers
    for meta_token in reached["embed"]:  # [L, V]
        assert set(np.flatnonzero(meta_token)) == set(prompt[0, : lengths[0]])
    np.testing.assert_array_equal(reached["meta_tokens"], np.tri(layers, dtype=bool))


def test_padding_and_batch_mates_change_no_gate_at_inference(system):
    prompts = [task.prompt() for task in system.world.tasks[::160]]
    rng = np.random.default_rng(0)
    stats = {
        "mean": rng.normal(size=system.stats["mean"].shape).astype(np.float32),
        "var": rng.uniform(0.5, 2, system.stats["var"].shape).astype(np.float32),
    }

    def gates(batch):
        return np.asarray(
            prompt_gates(
                system.params,
                stats,
                system.cloud.params,
                system.spec,
                batch["prompt"],
                batch["prompt_lengths"],
            )
        )

    batch = prompt_batch(system.encoder, prompts, 40)
    together = gates(batch)
    assert len(np.unique(together.round(4), axis=0)) == len(prompts)
    longer = gates(prompt_batch(system.encoder, prompts, 48))
    np.testing.assert_allclose(longer, together, rtol=1e-4, atol=1e-6)
    behind = np.arange(40) >= batch["prompt_lengths"][:, None]
    noise = np.where(behind, rng.integers(4, 800, behind.shape), batch["prompt"])
    chex.assert_trees_all_equal(gates({**batch, "prompt": noise.astype(np.int32)}), together)
    alone = gates({name: value[1:2] for name, value in batch.items()})
    np.testing.assert_allclose(alone[0], together[1], rtol=1e-4, atol=1e-6)
    others = {name: np.roll(value, 1, axis=0)[:2] for name, value in batch.items()}
    np.testing.assert_allclose(gates(others)[1], together[0], rtol=1e-4, atol=1e-6)
