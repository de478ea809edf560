"""LoraHub on an edge: fitted to a few examples, it answers as the edge with the sum merged."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_gen.artifacts.peft import load_adapter, save_adapter
from lorax_gen.baselines import lorahub as search
from lorax_gen.errors import UserError
from lorax_gen.evaluation.answerers import System
from lorax_gen.evaluation.exact import score_answers
from lorax_gen.evaluation.world import WorldCases
from lorax_gen.frames import IO
from lorax_gen.models.decoder import kernel_shapes
from lorax_gen.recipes.lorahub import load_loras, make_lorahub, shot_batch, shot_loss
from tests.tiny import write_system


def draw(score, count, budget, seed):
    """The best of zero and of random weights, in place of nevergrad."""
    rng = np.random.default_rng(seed)
    tried = [np.zeros(count), *rng.uniform(-1.5, 1.5, (budget - 1, count))]
    return min(tried, key=score)


@pytest.fixture(scope="module")
def loras(tiny_world_system):
    config, rng = tiny_world_system.edge.config, np.random.default_rng(0)
    shapes, layers = kernel_shapes(config), config.num_hidden_layers
    fill = lambda *shape: jnp.asarray(rng.normal(0, 0.4, shape), jnp.float32)  # noqa: E731
    own = {name: shapes[name] for name in ("q", "up")}
    return [
        {name: {"a": fill(layers, d, 2), "b": fill(layers, 2, f)} for name, (d, f) in own.items()}
        for _ in range(2)
    ]


@pytest.fixture(scope="module")
def shots(tiny_world_system, loras):
    """Questions with the first word that the edge with the first LoRA would write."""
    task, edge = tiny_world_system.world.tasks[0], tiny_world_system.edge
    words = sorted({answer for _, answer in task.questions})
    cases = WorldCases(
        [""], [(0, (question, w)) for question, _ in task.questions[:4] for w in words]
    )
    first = System(edge, lora=loras[0]).answerer("lora")
    scores = score_answers(first, cases, cases.answers)
    best = {}
    for (_, (question, word)), score in zip(cases.questions, scores, strict=True):
        best[question] = max(best.get(question, (-np.inf, "")), (score.loglikelihoods[0], word))
    return [(question, f" {word}") for question, (_, word) in best.items()]


@pytest.fixture(scope="module")
def hub(tiny_world_system, loras):
    return make_lorahub(tiny_world_system.edge, loras, "ab", budget=20, minimise=draw)


def test_unfitted_it_is_the_edge(hub, tiny_world_system):
    assert not hub.weights.any() and not any(leaf.any() for leaf in jax.tree.leaves(hub.lora)[1:])
    assert hub.fit.__self__ is hub and not hub.reads_prompts


def test_fitted_it_has_a_lower_loss_and_answers_as_merged(hub, shots, loras, tiny_world_system):
    edge = tiny_world_system.edge
    fitted, batch = hub.fit("task", shots), shot_batch(edge, shots)

    def penalised(weights):
        found = shot_loss(edge.params, edge.config, batch, hub.loras, np.float32(weights))
        return float(found) + 0.05 * np.abs(weights).mean()

    assert 0 < np.abs(fitted.weights).max() <= 1.5 and not hub.weights.any()
    assert penalised(fitted.weights) < penalised(np.zeros(2)) - 0.05
    cases = WorldCases([""], [(0, (question, answer[1:])) for question, answer in shots])
    merged = System(edge, lora=fitted.lora).answerer("lora")
    found = score_answers(fitted, cases, cases.answers)
    for own, other in zip(found, score_answers(merged, cases, cases.answers), strict=True):
        np.testing.assert_allclose(own.loglikelihoods, other.loglikelihoods, atol=1e-3)
    # The loss is the mean over the answers' tokens, each with the end of text.
    total = -sum(score.loglikelihoods[0] for score in found) / batch["answer"].sum()
    own = shot_loss(edge.params, edge.config, batch, hub.loras, fitted.weights)
    np.testing.assert_allclose(own, total, atol=1e-4)
    assert fitted.identity() != hub.identity()


def test_nothing_to_fit_to_or_to_combine_is_refused(hub, tiny_world_system):
    with pytest.raises(UserError, match="task: no solved examples"):
        hub.fit("task", [])
    with pytest.raises(UserError, match="needs one LoRA or more"):
        make_lorahub(tiny_world_system.edge, [], [])


@pytest.fixture
def files(tiny_world_system, loras, tmp_path):
    """A folder of the edge, two adapters of it, and rows of two tasks."""
    models = write_system(tmp_path, tiny_world_system)
    for name, lora in zip("ab", loras, strict=True):
        save_adapter(
            tmp_path / name / "released",
            lora,
            tiny_world_system.edge.config,
            base_model=str(models / "edge"),
        )
    rows = [
        {"task": task.name, "instruction": "Say .", "input": question, "output": answer}
        for task in tiny_world_system.world.tasks[:2]
        for question, answer in task.questions[:6]
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_the_command_writes_the_sum_as_an_adapter(
    files, loras, tiny_world_system, monkeypatch, capsys
):
    from lorax_gen import cli

    monkeypatch.setattr(search, "ng_opt", draw)
    monkeypatch.chdir(files)
    task = tiny_world_system.world.tasks[1].name
    words = ["lorahub", "rows.jsonl", "sum", "--adapters", "a/released", "b/released"]
    words += ["--edge", "edge", "--shots", "3", "--budget", "6"]
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2 and "has 2 tasks; choose one with --task" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        cli.main([*words, "--task", task])
    out = capsys.readouterr()
    assert stop.value.code == 0, out.err
    told = json.loads((files / "sum" / "provenance.json").read_text())
    assert told["adapters"] == ["a/released", "b/released"]
    assert (told["task"], told["shots"], told["budget"]) == (task, 3, 6)
    expected = search.combine(search.stack_loras(loras, "ab"), np.float32(told["weights"]))
    loaded = load_adapter(files / "sum", tiny_world_system.edge.config)
    for own, other in zip(jax.tree.leaves(loaded), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(own, other, atol=1e-5)
    assert f"{told['weights'][0]:+.3f}  a/released" in out.out


def test_adapters_of_different_frames_or_with_prompts_in_context_are_refused(
    files, loras, tiny_world_system
):
    edge = tiny_world_system.edge
    save_adapter(files / "framed", loras[0], edge.config, frame=IO)
    save_adapter(files / "after", loras[0], edge.config, provenance={"in_context": True})
    trees, frame = load_loras([files / "framed"], edge)
    assert len(trees) == 1 and frame == IO
    with pytest.raises(UserError, match="give adapters of one frame"):
        load_loras([files / "a" / "released", files / "framed"], edge)
    with pytest.raises(UserError, match="was trained on questions after their prompts"):
        load_loras([files / "after"], edge)


def test_an_example_longer_than_the_edge_is_refused(tiny_world_system):
    edge = tiny_world_system.edge
    small = dataclasses.replace(edge.config, max_position_embeddings=8)
    with pytest.raises(UserError, match=r"an example of .* is longer than the 8 positions"):
        shot_batch(dataclasses.replace(edge, config=small), [("alpha " * 9, " beta")])
