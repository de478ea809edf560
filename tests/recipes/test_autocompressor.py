"""The compressing baseline trains in the world, comes back as it was, is evaluated like others."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_gen import config as configs
from lorax_gen import generate_text
from lorax_gen.artifacts.baseline import load_baseline
from lorax_gen.baselines.autocompressor import (
    CompressorConfig,
    compress,
    compressor_lora,
    soft_prompts,
)
from lorax_gen.cost import Macs, compress_macs, compressed_macs, prefill_macs
from lorax_gen.data.config import WorldConfig
from lorax_gen.data.tokens import Encoder
from lorax_gen.data.world import FAMILIES
from lorax_gen.errors import UserError
from lorax_gen.evaluation.answerers import System
from lorax_gen.evaluation.exact import score_answers
from lorax_gen.evaluation.world import WorldCases, evaluate_world
from lorax_gen.inference.continuations import continue_texts
from lorax_gen.mesh.sharding import MeshConfig, make_mesh
from lorax_gen.models import decoder
from lorax_gen.models.adapter import Adapter
from lorax_gen.models.huggingface import load_model
from lorax_gen.recipes import autocompressor
from lorax_gen.recipes.autocompressor import AutoCompressorConfig, experiment, prompt_loss
from lorax_gen.recipes.registry import answerer_of
from lorax_gen.training.loop import fit
from lorax_gen.training.optimizer import OptimizerConfig
from lorax_gen.training.run import RunConfig
from lorax_gen.training.state import init_state
from lorax_gen.training.step import answer_loss, make_train_step
from tests.tiny import PROMPTS, write_system

COMPRESSOR = CompressorConfig(vectors=3, segments=2, rank=2, alpha=4.0, targets=("q", "v", "down"))
MESH = MeshConfig(data=2, fsdp=2, tensor=2)


@pytest.fixture(scope="module")
def edge_directory(tiny_world_system, tmp_path_factory):
    return write_system(tmp_path_factory.mktemp("system"), tiny_world_system) / "edge"


@pytest.fixture(scope="module")
def config(edge_directory):
    return AutoCompressorConfig(
        edge=str(edge_directory),
        compressor=COMPRESSOR,
        prompts=8,
        queries_per_prompt=2,
        data=WorldConfig(families=FAMILIES[:1]),
        optimizer=OptimizerConfig(learning_rate=0.03, warmup_steps=0),
        run=RunConfig(steps=4, log_every=1, evaluate_every=2, checkpoint_every=2),
        mesh=MESH,
    )


@pytest.fixture(scope="module")
def released(config, tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "run"
    return fit(experiment(config), directory, configs.to_dict(config))


@pytest.fixture(scope="module")
def answerer(released, tiny_world_system):
    return answerer_of(load_baseline(released), tiny_world_system.edge)


@pytest.fixture(scope="module")
def cases(tiny_world_system):
    """Six questions under three prompts of different lengths."""
    pairs = tiny_world_system.world.tasks[0].questions[:2]
    return WorldCases(PROMPTS, [(i, pair) for i in range(3) for pair in pairs])


def test_it_learns_its_batch_and_starts_as_the_edge_after_a_soft_prompt(config):
    made = experiment(dataclasses.replace(config, dropout=0.0))
    optimizer = made.transformation()
    state = jax.jit(lambda: init_state(*made.init(), optimizer, seed=0))()
    step, losses = jax.jit(make_train_step(made.loss, optimizer)), []
    for _ in range(6):
        state, metrics = step(state, made.frozen, made.batch(0))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.1
    assert set(state["params"]) == {"summary", "lora"}
    np.testing.assert_allclose(losses[0], float(state_loss(made, config)), rtol=1e-5)


def state_loss(made, config):
    """The first loss, with the frozen edge alone: a fresh LoRA is none."""
    (params, _), edge = jax.jit(made.init)(), load_model(config.edge)
    batch, own = made.batch(0), config.compressor
    read = compress(
        edge.params,
        edge.config,
        params["summary"],
        batch["prompt"],
        batch["prompt_lengths"],
        segments=own.segments,
    )
    prefix = jnp.repeat(read.soft_prompt, config.queries_per_prompt, axis=0)
    lm, _ = answer_loss(edge.params, edge.config, batch, prefix=prefix)
    return lm + config.prompt_loss * prompt_loss(edge.params, edge.config, read, None)


def test_a_released_compressor_comes_back_and_names_its_method(released, config):
    stored = json.loads((released / "baseline.json").read_text())
    assert stored["method"] == "autocompressor"
    assert stored["config"] == configs.to_dict(COMPRESSOR) and not stored["in_context"]
    loaded = load_baseline(released)
    assert loaded.params["summary"].shape == (COMPRESSOR.vectors, 32)
    assert any(pair["b"].any() for pair in loaded.params["lora"].values())


def test_each_distinct_prompt_is_compressed_once_to_what_it_gives_alone(
    answerer, cases, monkeypatch
):
    prompts, read = answerer.prompts(cases), []

    def counted(params, config, summary, prompt, lengths, **options):
        read.append(int((lengths > 0).sum()))
        return soft_prompts(params, config, summary, prompt, lengths, **options)

    monkeypatch.setattr(autocompressor, "soft_prompts", counted)
    found = answerer.specialise(prompts).prefix
    assert sum(read) == 3 and found.shape == (6, 6, 32)
    np.testing.assert_array_equal(found[::2], found[1::2])
    for i in (0, 2, 4):
        ids = np.array([prompts[i].ids], np.int32)
        lengths, own = np.array([ids.shape[1]], np.int32), answerer.compressor
        alone = compress(
            answerer.model.params,
            answerer.model.config,
            answerer.summary,
            ids,
            lengths,
            segments=own.segments,
        )
        np.testing.assert_allclose(found[i], alone.soft_prompt[0], atol=1e-5)
    assert np.abs(found[0] - found[2]).max() > 0.01


@pytest.mark.parametrize("sizes", [None, (4, 2, 1)])
def test_it_answers_as_the_edge_with_its_lora_after_the_soft_prompt(
    answerer, cases, sizes, released, tiny_world_system
):
    """Scored in batches, over a mesh too; and question by question in one forward pass."""
    mesh = sizes and make_mesh(MeshConfig(*sizes), jax.devices()[:8])
    edge, loaded = tiny_world_system.edge, load_baseline(released)
    lora = compressor_lora(loaded.params, COMPRESSOR)
    scores = score_answers(answerer, cases, cases.answers, mesh=mesh)
    encoder, prefix = Encoder.of(edge), answerer.specialise(answerer.prompts(cases)).prefix
    for i, (_, (question, answer)) in enumerate(cases.questions):
        ids, start = encoder.row(question, answer)
        hidden = decoder.hidden_states(
            edge.params,
            edge.config,
            jnp.array([ids[:-1]]),
            prefix=prefix[i : i + 1],
            adapter=Adapter(lora),
        )
        found = jax.nn.log_softmax(decoder.logits(edge.params, edge.config, hidden))[0]
        expected = sum(found[j - 1, ids[j]] for j in range(start, len(ids)))
        np.testing.assert_allclose(scores[i].loglikelihoods, [expected], atol=1e-3)


def test_it_is_evaluated_in_the_world_beside_others(answerer, tiny_world_system):
    system = System(tiny_world_system.edge, others={"autocompressor": answerer})
    data = WorldConfig(families=FAMILIES[:1])
    report = evaluate_world(system, data, ("plain", "autocompressor"), questions=2, timed=1)
    plain, own = (report["rows"][name] for name in ("plain", "autocompressor"))
    assert own["label"] == "edge + AutoCompressor"
    assert own["prompt_tokens"] > 0 and own["context_tokens"] == plain["context_tokens"]
    assert own["flops"] > plain["flops"] and own["cloud_flops"] > 0


def test_it_generates_after_its_soft_prompt(answerer, cases):
    prompts = answerer.prompts(cases)[::2]
    ids = [answerer.model.encode(question) for _, (question, _) in cases.questions[::2]]
    options = {"max_new_tokens": 8}
    adapter = answerer.specialise(prompts)
    together = continue_texts(answerer.model, ids, adapter=adapter, **options)
    alone = [
        generate_text(answerer.model, [row], adapter=adapter.take_rows([i]), **options)[0]
        for i, row in enumerate(ids)
    ]
    assert together == alone
    assert together != continue_texts(answerer.model, ids, **options)


def test_what_it_reads_fits_the_positions_less_the_vectors(answerer, tiny_world_system):
    edge = tiny_world_system.edge
    most = edge.config.max_position_embeddings - 6
    assert (answerer.room, answerer.max_length) == (2 * most, most)
    assert dataclasses.replace(answerer, max_length=20).max_length == 20
    assert dataclasses.replace(answerer, max_length=None).max_length == most
    short = dataclasses.replace(
        edge, config=dataclasses.replace(edge.config, max_position_embeddings=10)
    )
    own = dataclasses.replace(answerer, model=short, max_length=None)
    (prompt, *_) = own.prompts(WorldCases(["alpha " * 20], [(0, ("alpha", "beta"))]))
    assert (len(prompt.ids), prompt.truncated) == (8, 21 - 8)
    assert np.isfinite(own.specialise([prompt]).prefix).all()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prompt_length": 85}, "data.prompt_length is 85, .* reads at most 84 tokens of a prompt"),
        ({"question_length": 43}, "data.question_length is 43, .* at most 42 tokens of a question"),
    ],
)
def test_lengths_that_leave_no_room_are_refused(
    config, tiny_world_system, tmp_path, changes, message
):
    edge = tiny_world_system.edge
    small = dataclasses.replace(edge.config, max_position_embeddings=48)
    directory = (
        write_system(
            tmp_path, tiny_world_system._replace(edge=dataclasses.replace(edge, config=small))
        )
        / "edge"
    )
    data = dataclasses.replace(config.data, **changes)
    with pytest.raises(UserError, match=message):
        experiment(dataclasses.replace(config, edge=str(directory), data=data))


def test_more_vectors_than_positions_are_refused(config):
    own = dataclasses.replace(COMPRESSOR, vectors=5000)
    with pytest.raises(UserError, match="2 segments of 5000 vectors leave no room for a text"):
        experiment(dataclasses.replace(config, compressor=own))


def test_a_target_that_the_edge_lacks_is_named(config):
    own = dataclasses.replace(COMPRESSOR, targets=("q", "fc1"))
    with pytest.raises(UserError, match="names 'fc1', which the edge model lacks"):
        experiment(dataclasses.replace(config, compressor=own))


def test_macs_are_those_of_each_forward_pass(answerer):
    config = answerer.model.config
    # 7 tokens in two segments: [3 | K], then [K | 4 | K].
    parts = prefill_macs(config, 3 + 3, logits=0) + prefill_macs(config, 3 + 4 + 3, logits=0)
    assert compress_macs(config, COMPRESSOR, 7) == answerer.prompt_macs(7) == parts
    assert answerer.macs(5) == prefill_macs(config, 6 + 5, logits=1)
    assert compressed_macs(config, COMPRESSOR, 5, logits=1) == answerer.macs(5)
    head = compress_macs(config, COMPRESSOR, 7, head=True)
    assert head == parts + Macs(head=7 * config.hidden_size * config.vocab_size)
    unmerged = dataclasses.replace(answerer, adapter=Adapter())
    assert unmerged.macs(5).lora > 0 and unmerged.macs(5).kernels == answerer.macs(5).kernels
