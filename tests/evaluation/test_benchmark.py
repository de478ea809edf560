"""A benchmark gets the numbers that its items have one by one, in one go or in two."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from lorax_gen import load_model, specialize
from lorax_gen.artifacts.generator import load_generator
from lorax_gen.cost import generator_macs, prefill_macs
from lorax_gen.data.benchmarks import Benchmark, few_shot, harness_shots, system_prompt
from lorax_gen.data.hub_rows import HubData
from lorax_gen.data.questions import Question
from lorax_gen.data.tokens import Encoder
from lorax_gen.data.world import make_world
from lorax_gen.errors import UserError
from lorax_gen.evaluation.answerers import Answerer, System
from lorax_gen.evaluation.benchmark import BenchmarkCases, evaluate_benchmark
from lorax_gen.frames import IO, PLAIN, Frame
from lorax_gen.inference.cards import gates_of_prompts
from lorax_gen.inference.choices import encode_items, score_items
from lorax_gen.mesh.sharding import MeshConfig, make_mesh
from tests.tiny import PROMPTS, make_generator

N = 24
SMALL = {"tokens_per_batch": 128}  # several batches


def make_benchmark(name, description, template="{question} :", **options):
    hub = HubData(name, None, None, {"train": "train", "test": "validation"})
    return Benchmark(name, name, description, template, hub, columns=dict, **options)


SORTING = make_benchmark("sorting", "Grade each thing by its color and say the grade in tikaish .")
COUNTING = make_benchmark("counting", "Look at the place of each thing .", blank="_")


@pytest.fixture(scope="module")
def words(tiny_world_system):
    names = sorted({word for task in tiny_world_system.world.tasks for q, _ in task.questions
                    for word in q.split()})  # fmt: skip
    return [word for word in names if word.isalpha()]


@pytest.fixture(scope="module")
def make_questions(words):
    def make(count, seed, blank=""):
        rng = np.random.default_rng(seed)
        draw = lambda n: " ".join(rng.choice(words, n))  # noqa: E731
        return [
            Question(
                id=f"q{seed}-{i}",
                question=f"{draw(rng.integers(1, 9))} {blank} {draw(2)}",
                choices=tuple(draw(rng.integers(1, 4)) for _ in range(rng.integers(2, 5))),
                answer=int(rng.integers(0, 2)),
            )
            for i in range(count)
        ]

    return make


@pytest.fixture(scope="module")
def questions(make_questions):
    return make_questions(N, 0)


@pytest.fixture(scope="module")
def train(make_questions):
    return make_questions(30, 1)


@pytest.fixture(scope="module")
def system(tiny_world_system):
    generator = make_generator(tiny_world_system)
    return System(tiny_world_system.edge, tiny_world_system.cloud, generator)


@pytest.fixture(scope="module")
def other(make_questions):
    return COUNTING, make_questions(30, 2, blank="_")


def rows_of(path):
    """Items of a file by their index; the settings in front are no item."""
    first, *lines = map(json.loads, path.read_text().splitlines())
    assert set(first) == {"settings"}
    return {row["index"]: row for row in lines}


def likelihoods(path):
    rows = rows_of(path)
    return [rows[i]["loglikelihoods"] for i in sorted(rows)]


def assert_near(found, expected, atol=1e-4):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=atol)


# --- the edge alone ------------------------------------------------------------------------------


def test_accuracies_are_those_of_the_items(system, questions, tmp_path):
    path = tmp_path / "plain.jsonl"
    result = evaluate_benchmark(SORTING, questions, system.answerer("plain"), path=path, **SMALL)
    rows = rows_of(path)
    assert sorted(rows) == list(range(N))
    texts = [(SORTING.contexts(q), SORTING.continuations(q)) for q in questions]
    items = encode_items(system.edge, texts)
    for i, score in enumerate(score_items(system.edge, items)):
        row, question = rows[i], questions[i]
        np.testing.assert_allclose(row["loglikelihoods"], score.loglikelihoods, atol=1e-5)
        assert row["pred"] == score.loglikelihoods.argmax()
        per_character = score.loglikelihoods / [len(choice) for choice in question.choices]
        assert row["pred_norm"] == per_character.argmax()
        assert row["id"] == question.id and row["answer"] == question.answer
        assert row["acc"] == (row["pred"] == question.answer)
        assert row["context_tokens"] == len(items[i].choices[0][0])
    acc = np.array([rows[i]["acc"] for i in range(N)])
    norm = np.array([rows[i]["acc_norm"] for i in range(N)])
    assert 0 < acc.sum() < N and (acc != norm).any()
    assert (result.acc, result.acc_norm) == (acc.mean(), norm.mean())
    assert result.acc_stderr == pytest.approx(acc.std(ddof=1) / N**0.5)
    assert result.acc_norm_stderr == pytest.approx(norm.std(ddof=1) / N**0.5)
    assert (result.n, result.scored, result.truncated) == (N, N, 0)
    tokens = [rows[i]["context_tokens"] for i in range(N)]
    assert result.context_tokens == pytest.approx(np.mean(tokens))
    flops = [prefill_macs(system.edge.config, count, logits=1).flops for count in tokens]
    assert result.flops == pytest.approx(np.mean(flops))
    assert (result.prompt_tokens, result.cloud_flops, result.shots) == (0, 0, 0)


def test_shots_stand_before_the_question(system, questions, train, tmp_path):
    icl = system.answerer("icl")
    path = tmp_path / "icl.jsonl"
    result = evaluate_benchmark(SORTING, questions, icl, shots=2, train=train, path=path)
    drawn = harness_shots(SORTING, train, 2, questions)
    texts = [
        (few_shot(SORTING, shots, question), SORTING.continuations(question))
        for shots, question in zip(drawn, questions, strict=True)
    ]
    expected = score_items(system.edge, encode_items(system.edge, texts))
    assert_near(likelihoods(tmp_path / "icl.jsonl"), [s.loglikelihoods for s in expected])
    assert result.context_tokens == np.mean([s.context_tokens for s in expected])
    assert result.shots == 2


def test_contexts_longer_than_the_model_are_cut_and_counted(system, questions, train):
    short = dataclasses.replace(system, max_length=24)
    result, whole = (
        evaluate_benchmark(SORTING, questions, own.answerer("icl"), shots=3, train=train)
        for own in (short, system)
    )
    assert 0 < result.truncated <= N and whole.truncated == 0
    assert result.context_tokens <= 24 < whole.context_tokens


def test_a_choice_in_the_sentence_is_scored_by_what_follows_it(system, other, tmp_path):
    benchmark, questions = other
    path = tmp_path / "blank.jsonl"
    result = evaluate_benchmark(benchmark, questions, system.answerer("plain"), path=path)
    assert result.acc == result.acc_norm  # the same text is scored behind every choice
    question, row = questions[0], rows_of(path)[0]
    before, behind = question.question.split("_")
    texts = [([f"{before}{choice}"], [behind]) for choice in question.choices]
    expected = score_items(system.edge, encode_items(system.edge, texts))
    found = [score.loglikelihoods[0] for score in expected]
    np.testing.assert_allclose(row["loglikelihoods"], found, atol=1e-4)


# --- with the cloud ------------------------------------------------------------------------------


def test_every_item_is_answered_with_the_lora_of_its_own_prompt(system, questions, train, tmp_path):
    path = tmp_path / "lora_gen.jsonl"
    own = system.answerer("lora_gen")
    options = {"shots": 2, "train": train, "path": path, **SMALL}
    result = evaluate_benchmark(SORTING, questions, own, **options)
    rows, drawn = rows_of(path), harness_shots(SORTING, train, 2, questions)
    prompts = [system_prompt(SORTING, shots) for shots in drawn]
    for i in (0, 7):
        card = specialize(prompts[i], system.cloud, system.edge, system.generator)
        merged = dataclasses.replace(system, card=card.lora(system.generator)).answerer("card")
        evaluate_benchmark(SORTING, questions[i : i + 1], merged, path=tmp_path / f"{i}.jsonl")
        assert_near([rows[i]["loglikelihoods"]], likelihoods(tmp_path / f"{i}.jsonl"), 1e-3)
    counts = [len(Encoder.of(system.cloud).ids(prompt)) for prompt in prompts]
    assert [rows[i]["prompt_tokens"] for i in range(N)] == counts
    assert result.prompt_tokens == np.mean(counts)
    spec = system.generator.spec(system.cloud, system.edge)
    flops = [generator_macs(spec, count).flops for count in counts]
    assert result.cloud_flops == pytest.approx(np.mean(flops))
    assert result.context_tokens < result.prompt_tokens  # the shots are not in the edge's context


def test_controls_change_what_the_cloud_reads_and_nothing_else(
    system, questions, train, other, tmp_path
):
    options = {"train": train, "other": other}
    found = {}
    for mode in ("lora_gen", "shuffled", "empty", "random", "plain"):
        path = tmp_path / f"{mode}.jsonl"
        answerer = system.answerer(mode)
        evaluate_benchmark(SORTING, questions, answerer, shots=1, path=path, **options)
        found[mode] = np.concatenate(likelihoods(path))
    for one in found:
        for two in set(found) - {one}:
            assert np.abs(found[one] - found[two]).max() > 1e-2, (one, two)


def read_by_cloud(system, questions, train, other, mode, shots=1):
    cases = BenchmarkCases(SORTING, questions, train, shots, other=other)
    return system.answerer(mode).prompts(cases)


def test_the_cloud_reads_what_the_control_says(system, questions, train, other):
    own, shuffled, empty, drawn = (
        [prompt.ids for prompt in read_by_cloud(system, questions, train, other, mode)]
        for mode in ("lora_gen", "shuffled", "empty", "random")
    )
    encoder = Encoder.of(system.cloud)
    shots = harness_shots(COUNTING, other[1], 1, questions)
    assert shuffled == [encoder.ids(system_prompt(COUNTING, each)) for each in shots]
    assert empty == [encoder.ids("")] * N
    assert list(map(len, drawn)) == list(map(len, own))
    special = set(system.cloud.tokenizer.all_special_ids)
    for a, b in zip(own, drawn, strict=True):
        assert a[0] == b[0]  # BOS
        assert not special & set(b[1:])
    assert len(set(map(tuple, drawn))) == N
    assert drawn == [
        prompt.ids for prompt in read_by_cloud(system, questions, train, other, "random")
    ]


def test_prompts_longer_than_the_cloud_are_cut_and_counted(system, questions, train):
    short = dataclasses.replace(system, max_length=20)
    prompts = read_by_cloud(short, questions, train, None, "lora_gen", 3)
    whole = read_by_cloud(system, questions, train, None, "lora_gen", 3)
    layers = system.edge.config.num_hidden_layers
    for cut, prompt in zip(prompts, whole, strict=True):
        assert cut.ids == prompt.ids[-(20 - layers) :]
        assert cut.truncated == len(prompt.ids) - (20 - layers) > 0
    result = evaluate_benchmark(
        SORTING, questions, short.answerer("lora_gen"), shots=3, train=train
    )
    assert result.prompts_truncated == N


@pytest.mark.parametrize("mesh", [None, (2, 2, 2)], ids=["alone", "mesh"])
def test_gates_of_many_prompts_are_those_of_each(system, mesh):
    mesh = mesh and make_mesh(MeshConfig(*mesh), jax.devices()[:8])
    cards = specialize(PROMPTS, system.cloud, system.edge, system.generator)
    expected = [card.dense_gates(system.generator.config.n_experts) for card in cards]
    encoder, order, done = Encoder.of(system.cloud), [0, 1, 2, 1, 0] * 4, []
    found = gates_of_prompts(
        [encoder.ids(PROMPTS[i]) for i in order],
        system.cloud,
        system.edge,
        system.generator,
        tokens_per_batch=32,
        mesh=mesh,
        progress=done.append,
    )
    np.testing.assert_allclose(found, [expected[i] for i in order], atol=1e-5)
    assert sum(done) == len(order)


# --- resuming ------------------------------------------------------------------------------------


class Interrupting:
    """A bar that stops the run at the second batch of questions, as Ctrl-C would."""

    def reset(self, total):
        self.batches = 0

    def set_description(self, text):
        self.text = text

    def update(self, count):
        self.batches += count > 0
        if self.batches == 2 and "prompts" not in self.text:
            raise KeyboardInterrupt


@pytest.mark.parametrize("mode", ["plain", "lora_gen"])
def test_an_interrupted_run_goes_on_where_it_was(mode, system, questions, train, tmp_path):
    options = {"shots": 1, "train": train, **SMALL}
    answerer = system.answerer(mode)
    whole = evaluate_benchmark(
        SORTING, questions, answerer, path=tmp_path / "whole.jsonl", **options
    )
    path = tmp_path / "part.jsonl"
    with pytest.raises(KeyboardInterrupt):
        evaluate_benchmark(SORTING, questions, answerer, path=path, bar=Interrupting(), **options)
    done = rows_of(path)
    assert 0 < len(done) < N
    path.write_bytes(path.read_bytes() + b'{"index": 1, "logli')
    resumed = evaluate_benchmark(SORTING, questions, answerer, path=path, **options)
    assert resumed.scored == N - len(done)
    assert {i: row for i, row in rows_of(path).items() if i in done} == done
    assert_near(likelihoods(path), likelihoods(tmp_path / "whole.jsonl"))
    varying = {"scored": N, "seconds": whole.seconds}
    assert dataclasses.replace(resumed, **varying) == whole
    again = evaluate_benchmark(SORTING, questions, answerer, path=path, **options)
    assert again.scored == 0 and dataclasses.replace(again, **varying) == whole


def test_another_run_does_not_go_on_in_the_file(system, questions, train, other, tmp_path):
    path = tmp_path / "items.jsonl"
    own = {"shots": 1, "train": train, "answerer": system.answerer("lora_gen")}
    evaluate_benchmark(SORTING, questions[:3], path=path, **own)
    before = path.read_bytes()
    answer = dataclasses.replace(questions[0], answer=1 - questions[0].answer)
    lora = {"up": {"a": np.ones((2, 32, 1), "f"), "b": np.ones((2, 1, 64), "f")}}
    edge = dataclasses.replace(system, edge=system.edge.merged(lora))
    shorter = dataclasses.replace(system, max_length=100)
    config = dataclasses.replace(system.generator.config, alpha=3.0)
    generator = dataclasses.replace(system.generator, config=config)
    for message, change in {
        "shots 1, this one has 2": {"shots": 2},
        "answerer 'lora_gen', this one has 'random'": {"answerer": system.answerer("random")},
        "seed 1234, this one has 5": {"seed": 5},
        "questions '": {"questions": [answer, *questions[1:3]]},
        "train '": {"train": train[1:]},
        "model '": {"answerer": edge.answerer("lora_gen")},
        "generator '": {
            "answerer": dataclasses.replace(system, generator=generator).answerer("lora_gen")
        },
        "max_length None, this one has 100": {"answerer": shorter.answerer("lora_gen")},
    }.items():
        asked = {"questions": questions[:3], **own}
        with pytest.raises(UserError, match=message):
            evaluate_benchmark(SORTING, path=path, **(asked | change))
    assert path.read_bytes() == before


# --- errors --------------------------------------------------------------------------------------


def test_what_a_mode_lacks_is_said(system, questions, train, other):
    bare = System(system.edge)
    for message, name, options in (
        ("shuffled needs another benchmark", "shuffled", {"train": train}),
        ("3 shots of sorting need more than 0", "icl", {"train": []}),
    ):
        with pytest.raises(UserError, match=message):
            evaluate_benchmark(SORTING, questions, system.answerer(name), shots=3, **options)
    with pytest.raises(UserError, match="lora_gen needs a cloud model and a generator"):
        bare.answerer("lora_gen")
    with pytest.raises(UserError, match="sorting has no questions"):
        evaluate_benchmark(SORTING, [], bare.answerer("plain"))
    with pytest.raises(UserError, match="unknown mode 'few'; choose one of plain, icl"):
        bare.answerer("few")
    with pytest.raises(UserError, match="shots=-1: choose 0 or more"):
        evaluate_benchmark(SORTING, questions, bare.answerer("icl"), shots=-1)


def test_scores_that_are_no_numbers_are_refused(system, questions):
    edge = system.edge
    broken = dataclasses.replace(
        edge, params={**edge.params, "final_norm": edge.params["final_norm"] * np.nan}
    )
    with pytest.raises(UserError, match=r"q0-\d+: a log-likelihood is nan"):
        evaluate_benchmark(SORTING, questions, Answerer("plain", "", broken))


# --- the shipped system --------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["grade", "clock"])
def test_the_shipped_generator_serves_unseen_tasks_and_the_controls_do_not(family):
    edge, cloud = load_model("world/edge"), load_model("world/cloud")
    system = System(edge, cloud, load_generator("world/generator"))
    task, another = (make_world(0).select("unseen", name)[0] for name in (family, "sort"))
    benchmarks = [
        make_benchmark(t.name, t.prompt(), template="{question}") for t in (task, another)
    ]
    answers = tuple(sorted({answer for _, answer in task.questions}))
    questions = [
        Question(str(i), question, answers, answers.index(answer))
        for i, (question, answer) in enumerate(task.questions[:24])
    ]
    found = {}
    for mode in ("plain", "lora_gen", "shuffled", "empty", "random"):
        options = {"shots": 0, "other": (benchmarks[1], [])}
        answerer = system.answerer(mode)
        found[mode] = evaluate_benchmark(benchmarks[0], questions, answerer, **options).acc
    assert found.pop("lora_gen") > 0.9
    assert max(found.values()) < 0.7, found


# --- killed again and again ----------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["plain", "icl", "lora_gen", "shuffled"])
def test_killed_eight_times_it_has_the_scores_of_an_uninterrupted_one(
    mode, system, questions, train, other, tmp_path
):
    """Bit for bit: batches are the same. A kill leaves any number of complete lines, and part of
    the next."""
    answerer, whole, path = system.answerer(mode), tmp_path / "whole", tmp_path / "killed"
    options = {"shots": 2, "train": train, "other": other, **SMALL}
    expected = evaluate_benchmark(SORTING, questions, answerer, path=whole, **options)
    rng, lines = np.random.default_rng(0), whole.read_bytes().splitlines(True)
    kept = lines[:1]
    for kill in range(8):
        path.write_bytes(b"".join(kept) + lines[-1][: kill * 9])
        evaluate_benchmark(SORTING, questions, answerer, path=path, **options)
        assert rows_of(path) == rows_of(whole)
        items = path.read_bytes().splitlines(True)[1:]
        rng.shuffle(items)  # kills at other batch sizes would leave them in another order
        kept = [lines[0], *items[: rng.integers(0, len(items))]]
    result = evaluate_benchmark(SORTING, questions, answerer, path=path, **options)
    for name in ("acc", "acc_norm", "acc_stderr", "context_tokens", "prompt_tokens"):
        assert getattr(result, name) == getattr(expected, name)


# --- frames --------------------------------------------------------------------------------------


CHAT = Frame("<u>{input}<a>\n", "", turn=True)


def test_every_mode_reads_questions_in_the_frame(questions, train, other):
    """Shots are in it too, a chat's as the other frames have them; the plain frame adds nothing."""
    question, shots = questions[0], harness_shots(SORTING, train, 1, questions[:1])[0]
    (context,), (shot,) = SORTING.contexts(question), shots
    asked, answer = SORTING.pair(shot)
    for frame, bare, solved, continuation in (
        (PLAIN, context, f"{asked}{answer}", " x"),
        (IO, f"Input: {context}\nOutput:", f"Input: {asked}\nOutput:{answer}", " x"),
        (CHAT, f"<u>{context}<a>\n", f"Input: {asked}\nOutput:{answer}", "x"),
    ):
        cases = BenchmarkCases(SORTING, [question], train, 1, other=other, frame=frame)
        assert cases.bare() == [(bare,)]
        (prompted,) = cases.prompted()
        before = f"<u>{solved}\n\n{context}<a>\n" if frame.turn else f"{solved}\n\n{bare}"
        assert prompted == (before,)
        assert cases.prompts() == [f"{SORTING.description}\n\n{solved}"]
        assert dataclasses.replace(cases, shots=0).prompted() == [(bare,)]
        two = dataclasses.replace(question, choices=("x", "y"), answer=0)
        assert cases.continuations(two)[0] == continuation


def test_a_frame_that_leaves_benchmarks_as_they_are_is_none(system, questions, tmp_path):
    found = {}
    own = dataclasses.replace(IO, benchmarks=False)
    for name, frame in (("plain", PLAIN), ("io", IO), ("own", own)):
        path = tmp_path / f"{name}.jsonl"
        evaluate_benchmark(SORTING, questions, system.answerer("plain"), frame=frame, path=path)
        found[name] = np.concatenate(likelihoods(path))
    np.testing.assert_array_equal(found["own"], found["plain"])
    assert np.abs(found["io"] - found["plain"]).max() > 1e-2
    with pytest.raises(UserError, match="is of a run with frame"):
        evaluate_benchmark(SORTING, questions, system.answerer("plain"), path=tmp_path / "io.jsonl")
