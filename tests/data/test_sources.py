"""Batches of real tasks: a function of (seed, step), each sample of an epoch once, none cut."""

import dataclasses
from collections import Counter

import chex
import numpy as np
import pytest

from lorax_gen.data.benchmarks import find_benchmark, load_questions, system_prompt
from lorax_gen.data.mixture import Mixture
from lorax_gen.data.questions import Question
from lorax_gen.data.sources import Episode, QuestionSource
from lorax_gen.data.tokens import Encoder
from lorax_gen.errors import UserError
from lorax_gen.tokenizers import word_level
from tests.data.rows import make_questions

WORDS = [f"{kind}{i}" for kind in ("q", "a", "s", "task") for i in range(40)]


@dataclasses.dataclass
class Numbered:
    """Sample i: asks `qi`, answer `ai`, shots `s0 ... s0`, `s1 ... s1`; two words more if long."""

    name: str
    size: int
    tasks: int = 1
    long: dict = dataclasses.field(default_factory=dict)  # index to which part is too long
    shot_words: int = 1

    def __len__(self):
        return self.size

    def episode(self, index, rng, shots, queries):
        part = self.long.get(index)
        asked = (index + rng.integers(0, 2, queries) * (np.arange(queries) > 0)) % self.size
        return Episode(
            task=self.name if self.tasks == 1 else f"{self.name}{index}",
            instruction=" ".join([self.name] * (30 if part == "prompt" else 1)),
            shots=tuple(" ".join([f"s{i}"] * self.shot_words) for i in range(shots)),
            questions=tuple(
                (
                    " ".join([f"q{i}"] * (30 if part == "question" else 1)),
                    " " + " ".join([f"a{i}"] * (5 if part == "answer" else 1)),
                )
                for i in asked.tolist()
            ),
        )

    def texts(self):
        return (f"{self.name} q{i} a{i}" for i in range(self.size))


@pytest.fixture(scope="module")
def encoder():
    return Encoder(word_level(WORDS))


def mix(encoder, sources, weights=None, **changes):
    options = {
        "seed": 0,
        "prompts": 4,
        "queries": 2,
        "shots": 1,
        "prompt_length": 16,
        "question_length": 16,
        "answer_length": 4,
    } | changes
    return Mixture(sources, weights or [1] * len(sources), encoder, encoder, **options)


def words(encoder, ids):
    found = encoder.tokenizer.convert_ids_to_tokens(np.asarray(ids).tolist())
    return [word for word in found if not word.startswith("<")]


def drawn(encoder, mixture, steps):
    """Counts of `(source, leading question)` over batches."""
    found = Counter()
    for step in steps:
        batch = mixture.batch(step)
        for i, row in enumerate(batch["prompt"]):
            asked = words(encoder, batch["tokens"][i * mixture.queries])[0]
            found[words(encoder, row)[0], int(asked[1:])] += 1
    return found


def two(size=12, **options):
    return [Numbered("task0", size, **options), Numbered("task1", size)]


# --- drawing -------------------------------------------------------------------------------------


def test_a_batch_is_a_function_of_seed_and_step_alone(encoder):
    mixture = mix(encoder, two(), min_shots=0, shots=3)
    later = [mixture.batch(step) for step in (7, 3)]  # over the end of an epoch, and back
    for step, batch in zip((7, 3), later, strict=True):
        chex.assert_trees_all_equal(mix(encoder, two(), min_shots=0, shots=3).batch(step), batch)
    other = mix(encoder, two(), min_shots=0, shots=3, seed=1).batch(7)
    assert not all(np.array_equal(other[name], later[0][name]) for name in other)


def test_an_epoch_takes_every_sample_as_often_as_its_weight_says(encoder):
    mixture = mix(encoder, two(12), [2, 0.5], prompts=30)
    assert mixture.samples_per_epoch == 30
    epochs = [drawn(encoder, mixture, [e]) for e in range(4)]
    for found in epochs:
        assert [found["task0", i] for i in range(12)] == [2] * 12
        assert sorted(found["task1", i] for i in range(12)) == [0] * 6 + [1] * 6
    halves = {tuple(found["task1", i] for i in range(12)) for found in epochs}
    assert len(halves) > 1  # the fraction is drawn anew


def test_epochs_have_different_orders(encoder):
    mixture = mix(encoder, two(12), prompts=24)
    first, second = (mixture.batch(step)["tokens"] for step in (0, 1))
    assert (first != second).any()


def test_rows_are_asked_under_their_prompt(encoder):
    batch = mix(encoder, two(), queries=3).batch(0)
    assert batch["prompt"].shape[0] == 4
    assert batch["tokens"].shape == batch["answer"].shape == (12, 4)
    assert batch["prompt"].dtype == batch["tokens"].dtype == np.int32
    assert batch["prompt_lengths"].tolist() == (batch["prompt"] != encoder.pad_id).sum(1).tolist()
    for row, mask in zip(batch["tokens"], batch["answer"], strict=True):
        (question, answer) = words(encoder, row)
        assert question[1:] == answer[1:]
        assert words(encoder, row[mask]) == [answer]
        assert row[mask][-1] == encoder.tokenizer.eos_token_id


def test_the_whole_row_can_be_marked(encoder):
    batch = mix(encoder, two(), full_sequence=True).batch(0)
    np.testing.assert_array_equal(batch["answer"], batch["tokens"] != encoder.pad_id)


def test_every_batch_mixes_tasks(encoder):
    """A small task beside a large one: a batch of the large one alone has its last one replaced."""
    mixture = mix(encoder, [Numbered("task0", 39), Numbered("task1", 1)], prompts=4)
    for step in range(30):
        found = {words(encoder, row)[0] for row in mixture.batch(step)["prompt"]}
        assert found == {"task0", "task1"}
    assert mixture.counts["replaced_to_mix"] == 27  # one of ten batches has the small one
    assert mixture.counts["samples"] == 120
    chex.assert_trees_all_equal(
        mixture.batch(3), mix(encoder, [Numbered("task0", 39), Numbered("task1", 1)]).batch(3)
    )


def test_shots_are_as_many_as_asked_for_or_drawn(encoder):
    def lengths(**options):
        mixture = mix(encoder, two(), prompts=24, **options)
        return set(mixture.batch(0)["prompt_lengths"].tolist())

    assert lengths(shots=3) == {5}  # <bos>, the task and three shots
    assert lengths(shots=3, min_shots=1) == {3, 4, 5}


# --- lengths -------------------------------------------------------------------------------------


def test_lengths_fall_into_buckets(encoder):
    def shapes(**options):
        mixture = mix(encoder, two(24, **options), shots=2, buckets=(4, 7, 16))
        batches = [mixture.batch(step) for step in range(8)]
        return {(b["prompt"].shape[1], b["tokens"].shape[1]) for b in batches}

    assert shapes() == {(4, 4)}
    assert shapes(shot_words=2) == {(7, 4)}
    assert shapes(shot_words=4) == {(16, 4)}
    mixture = mix(encoder, two(), question_buckets=(5, 16))
    assert mixture.batch(0)["tokens"].shape[1] == 5
    assert mix(encoder, two()).buckets == (4, 8, 16)


def test_shots_are_left_out_of_a_long_prompt_from_the_end(encoder):
    mixture = mix(encoder, two(shot_words=4), shots=5, prompt_length=11)
    prompts = [words(encoder, row) for row in mixture.batch(0)["prompt"]]
    for prompt in prompts:
        shown = ["s0"] * 4 + ["s1"] * 4 if prompt[0] == "task0" else [f"s{i}" for i in range(5)]
        assert prompt[1:] == shown
    shortened = sum(prompt[0] == "task0" for prompt in prompts)
    assert 0 < shortened < 4
    assert mixture.counts["prompts_shortened"] == shortened
    assert mixture.counts["shots_left_out"] == 3 * shortened
    assert f"{3 * shortened} shots left out of {shortened} prompts" in mixture.summary()


@pytest.mark.parametrize("part", ["prompt", "question", "answer"])
def test_what_is_too_long_is_dropped_and_replaced_by_its_own_source(encoder, part):
    long = {i: part for i in range(0, 12, 3)}
    mixture = mix(encoder, two(12, long=long), prompts=24)
    found = drawn(encoder, mixture, [0])
    assert not any(found["task0", i] for i in long)
    assert sum(count for (name, _), count in found.items() if name == "task0") == 12
    assert mixture.counts[f"dropped_{part}s"] >= len(long)
    assert {f"dropped_{part}s"} == {name for name in mixture.counts if name.startswith("dropped")}
    again = mix(encoder, two(12, long=long), prompts=24)
    chex.assert_trees_all_equal(again.batch(0), mixture.batch(0))
    assert f"{again.counts[f'dropped_{part}s']:,} {part}s" in again.summary()


@pytest.mark.parametrize("part", ["instruction", "questions", "shots"])
def test_a_huge_text_is_dropped_before_it_is_tokenised(encoder, part, monkeypatch):
    def episode(self, index, rng, shots, queries):
        found, huge = Numbered.episode(self, index, rng, shots, queries), "a0 " * 10**6
        text = {"instruction": huge, "questions": ((huge, " a0"),) * queries, "shots": (huge,)}
        return found if index % 2 else dataclasses.replace(found, **{part: text[part]})

    def encode(self, text):
        assert len(text) < 10**6
        return encoded(self, text)

    encoded = Encoder.encode
    monkeypatch.setattr(Encoder, "encode", encode)
    sources = [type("Huge", (Numbered,), {"episode": episode})("task0", 8), Numbered("task1", 8)]
    mixture = mix(Encoder(encoder.tokenizer), sources, prompts=16)
    mixture.batch(0)
    named = {"instruction": "dropped_prompts", "questions": "dropped_questions"}
    assert mixture.counts[named.get(part, "shots_left_out")] >= 4


def test_a_source_that_never_fits_is_an_error(encoder):
    long = dict.fromkeys(range(12), "question")
    with pytest.raises(UserError, match="samples of task0 in a row are too long for prompt_length"):
        mix(encoder, two(12, long=long), prompts=24).batch(0)


def test_shots_that_a_source_does_not_have_are_counted(encoder):
    class Shy(Numbered):
        def episode(self, index, rng, shots, queries):
            return super().episode(index, rng, min(shots, 1), queries)

    mixture = mix(encoder, [Shy("task0", 12), Shy("task1", 12)], shots=3)
    mixture.batch(0)
    assert mixture.counts["shots_missing"] == 8


# --- samples of a benchmark ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["arc_easy", "boolq", "social_iqa"])
def test_a_benchmarks_sample_asks_what_evaluation_scores(tmp_path, name):
    record, train = find_benchmark(name), make_questions(tmp_path, name, 30)
    train = [dataclasses.replace(q, question=f"{q.question} {i}") for i, q in enumerate(train)]
    source = QuestionSource(record, train)
    assert (source.name, len(source), source.tasks) == (name, 30, 1)
    for index in range(30):
        episode = source.episode(index, np.random.default_rng(index), shots=4, queries=3)
        assert episode.questions[0] == record.pair(train[index])
        assert len(set(episode.questions)) == 3
        shown = [q for q in train if record.solved(q) in episode.shots]
        assert len(episode.shots) == 4
        assert not {record.pair(q)[0] for q in shown} & {q for q, _ in episode.questions}
        assert episode.prompt == system_prompt(record, []) + "".join(
            f"\n\n{shot}" for shot in episode.shots
        )


def test_a_question_is_not_shown_with_its_answer_though_it_occurs_twice():
    choices = [("a", "b", "c"), ("a", "d", "e")]
    train = [Question(f"{i}", "why", choices[i], 0, context="one") for i in range(2)]
    train += [Question("2", "why", choices[0], 0, context="two")]
    source = QuestionSource(find_benchmark("social_iqa"), train)
    for seed in range(10):
        episode = source.episode(0, np.random.default_rng(seed), shots=2, queries=1)
        assert episode.shots == ("Q: two why\nA: a",)


def test_questions_without_a_passage_are_asked_but_not_shown():
    train = [Question(str(i), f"is it {i}", ("no", "yes"), 0) for i in range(8)]
    whole = [dataclasses.replace(q, passage="Text.") for q in train[:4]]
    source = QuestionSource(find_benchmark("boolq"), [*whole, *train[4:]])
    for index in range(8):
        episode = source.episode(index, np.random.default_rng(index), shots=3, queries=1)
        assert all(shot.startswith("Text.\n") for shot in episode.shots)
        assert len(episode.shots) == 3
    assert source.episode(7, np.random.default_rng(0), 1, 1).questions[0][0].startswith("Question")
    bare = QuestionSource(find_benchmark("boolq"), train)
    assert len(bare.episode(0, np.random.default_rng(0), shots=3, queries=1).shots) == 3


# --- the unseen, and numbers that make no sense --------------------------------------------------


@pytest.mark.parametrize("name", ["hellaswag", "winogrande", "piqa"])
def test_an_unseen_benchmark_is_no_source(tmp_path, encoder, name):
    train = make_questions(tmp_path, name, 3)
    with pytest.raises(UserError, match=f"must not be trained on: {name}"):
        QuestionSource(find_benchmark(name), train)
    with pytest.raises(UserError, match="must not be trained on"):
        mix(encoder, [*two(), Numbered(f"my-{name}", 3)])


def test_a_source_that_holds_a_question_of_an_unseen_benchmark_is_refused(encoder):
    planted = "q1 q2 q3 q4 q5 q6 q7 q8 q9"

    class Planted(Numbered):
        def texts(self):
            yield "nothing"
            yield "Some say: Q1 q2, q3 (q4) q5 q6 q7 q8 q9!"

    sources = [*two(), Planted("task2", 3)]
    with pytest.raises(UserError, match="task2 holds a question of an unseen benchmark: 'q1 q2"):
        mix(encoder, sources, unseen=["other words", planted])
    mix(encoder, sources, unseen=["other words", planted + " q10"])
    mix(encoder, two(), unseen=[planted])


@pytest.mark.parametrize(
    ("sources", "changes", "message"),
    [
        (1, {}, "the mixture holds a single task \\(task0\\)"),
        (2, {"weights": [1]}, "2 sources but 1 weights"),
        (2, {"weights": [1, 0]}, "the weight of task1 is 0; it must be above 0"),
        (2, {"weights": [1, float("nan")]}, "the weight of task1 is nan"),
        (2, {"weights": [0.01, 0.01]}, "an epoch of the mixture holds no sample"),
        (2, {"prompts": 1}, "a batch needs two prompts or more"),
        (2, {"queries": 0}, "and a question each"),
        (2, {"min_shots": 2}, "min_shots=2 must lie between 0 and 1"),
        (2, {"buckets": (4, 8)}, r"\(4, 8\) must increase from 1 or more to the longest, 16"),
        (2, {"buckets": (8, 4, 16)}, "must increase"),
        (2, {"question_length": 0}, "a length of 0 tokens is too short"),
    ],
)
def test_numbers_that_make_no_sense(encoder, sources, changes, message):
    changes = dict(changes)
    with pytest.raises(UserError, match=message):
        mix(encoder, two()[:sources], changes.pop("weights", None), **changes)


def test_one_source_of_many_tasks_is_mixed_enough(encoder):
    mixture = mix(encoder, [Numbered("task", 12, tasks=12)])
    mixture.batch(0)
    assert not mixture.counts["replaced_to_mix"]


def test_an_empty_source_is_an_error(encoder):
    with pytest.raises(UserError, match="task2 holds no sample"):
        mix(encoder, [*two(), Numbered("task2", 0)])


def test_counts_of_the_papers_five_training_sets(shared_data, encoder):
    names = ("arc_challenge", "arc_easy", "openbookqa", "boolq", "social_iqa")
    sources = [
        QuestionSource(r, load_questions(r, "train", shared_data / "reasoning"))
        for r in map(find_benchmark, names)
    ]
    assert mix(encoder, sources).samples_per_epoch == 51_164
