"""Batches are a function of (seed, step), mark exactly what is trained, and cut nothing."""

import copy
from collections import Counter
from typing import ClassVar

import chex
import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lorax_gen.data.config import WorldConfig
from lorax_gen.data.tasks import Task, behind_prompt
from lorax_gen.data.tokens import Encoder, bucket, prompt_batch, question_batch
from lorax_gen.data.world import FAMILIES, make_world, vocabulary
from lorax_gen.data.world_batches import (
    document_batch,
    generator_batch,
    mixed_tasks,
    pretraining_batch,
)
from lorax_gen.errors import UserError
from lorax_gen.tokenizers import word_level

SHAPE = WorldConfig()
PROMPTS, QUERIES = 8, 3


@pytest.fixture(scope="module")
def world():
    return make_world(0)


@pytest.fixture(scope="module")
def encoder(world):
    return Encoder(word_level(vocabulary(world)))


def text_of(encoder, ids):
    """Words of a row, special tokens left out."""
    words = encoder.tokenizer.convert_ids_to_tokens(np.asarray(ids).tolist())
    return " ".join(word for word in words if not word.startswith("<"))


def draw(world, encoder, seed=0, step=0, tasks=None, **changes):
    options = {
        "prompts": PROMPTS,
        "queries": QUERIES,
        "prompt_length": SHAPE.prompt_length,
        "question_length": SHAPE.question_length,
    } | changes
    tasks = world.select("seen") if tasks is None else tasks
    return generator_batch(tasks, encoder, encoder, seed=seed, step=step, **options)


def differ(batch, other):
    return any((batch[name] != other[name]).any() for name in batch)


# --- drawing -------------------------------------------------------------------------------------


def test_a_batch_is_a_function_of_seed_and_step_alone(world, encoder):
    """Whatever was drawn before, and by which encoder: a resumed run gets what it would have."""
    batch = draw(world, encoder, seed=1, step=7)
    draw(world, encoder, seed=1, step=8)
    chex.assert_trees_all_equal(draw(world, Encoder(encoder.tokenizer), seed=1, step=7), batch)
    assert differ(batch, draw(world, encoder, seed=1, step=8))
    assert differ(batch, draw(world, encoder, seed=2, step=7))
    assert differ(draw(world, encoder, seed=8, step=1), draw(world, encoder, seed=1, step=8))


def test_pretraining_batches_are_a_function_of_seed_and_step_alone(world, encoder):
    def draw(step):
        return pretraining_batch(
            world, encoder, seed=0, step=step, lessons=8, exercises=4, questions=3, length=44
        )

    batch = draw(3)
    assert set(batch) == {"lessons", "exercises"}
    assert (len(batch["lessons"]["tokens"]), len(batch["exercises"]["tokens"])) == (8, 4)
    chex.assert_trees_all_equal(draw(3), batch)
    assert differ(batch["lessons"], draw(4)["lessons"])
    assert differ(batch["exercises"], draw(4)["exercises"])


@pytest.mark.parametrize("count", [4, 32, 30])
def test_a_batch_mixes_the_families_evenly(world, count):
    rng = np.random.default_rng(0)
    for _ in range(20):
        counts = Counter(t.family for t in mixed_tasks(rng, world.select("seen"), count))
        assert set(counts) == set(FAMILIES)
        assert max(counts.values()) - min(counts.values()) <= 1


def test_every_seen_task_is_drawn_sooner_or_later(world):
    rng, tasks = np.random.default_rng(0), world.select("seen", "grade")
    drawn = {task.name for task in mixed_tasks(rng, tasks, 1000)}
    assert drawn == {task.name for task in tasks}


# --- rows ----------------------------------------------------------------------------------------


def test_rows_are_asked_under_their_prompt(world, encoder):
    """Row b belongs to prompt b // Q: its question with that answer is one of the prompt's task."""
    grades = world.select("seen", "grade")
    batch = draw(world, encoder, tasks=grades)
    chex.assert_shape(batch["prompt"], (PROMPTS, SHAPE.prompt_length))
    chex.assert_shape(batch["tokens"], (PROMPTS * QUERIES, SHAPE.question_length))
    prompts = [text_of(encoder, row).split() for row in batch["prompt"]]
    assert len({tuple(prompt) for prompt in prompts}) > 1
    for b, row in enumerate(batch["tokens"]):
        prompt = prompts[b // QUERIES]
        (task,) = [t for t in grades if set(t.slots.values()) <= set(prompt)]
        assert text_of(encoder, row) in {f"{q} {a}" for q, a in task.questions}


def test_the_answer_mask_marks_the_answer_and_the_end_of_text(world, encoder):
    rng = np.random.default_rng(0)
    pairs = [task.questions[rng.integers(12)] for task in world.tasks]
    pairs += [("say the color of the apple in", "new young old"), ("", "red")]
    batch = question_batch(encoder, pairs, 12)
    eos, pad = encoder.tokenizer.eos_token_id, encoder.tokenizer.pad_token_id
    for (question, answer), row, mask in zip(pairs, batch["tokens"], batch["answer"], strict=True):
        assert text_of(encoder, row[mask]) == answer
        assert text_of(encoder, row[~mask]) == question
        assert row[mask][-1] == eos
        assert mask.sum() == len(answer.split()) + 1
        length = np.flatnonzero(row == eos)[0] + 1
        assert (row[length:] == pad).all()
        assert not mask[length:].any()


def test_an_answer_brings_what_parts_it_from_its_question(encoder):
    """And white space at the end of a question, where it is no token of its own."""
    for question, answer in (("say it", " red"), ("say it\n", "red"), ("say it ", "red")):
        assert encoder.joined(question, answer) == encoder.row("say it", "red")
    ids, start = encoder.joined("apple be", "ll red")
    assert (text_of(encoder, ids), start) == ("apple bell red", 2)  # `bell` is part of the answer


class Around:
    """Tokenizers of words that add something to a text by themselves."""

    IDS: ClassVar = {"<bos>": 0, "<eos>": 1, "<sep>": 2, "<unk>": 3, "say": 4, "it": 5, "red": 6}

    @classmethod
    def make(cls, around=None, before="", after=""):
        """`around`: a template of the post-processor; `before`, `after`: of the normaliser."""
        tokenizer = Tokenizer(models.WordLevel(cls.IDS, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        steps = [normalizers.Prepend(before)] if before else []
        steps += [normalizers.Replace(Regex("$"), after)] if after else []
        tokenizer.normalizer = normalizers.Sequence(steps)
        if around:
            special = [(name, cls.IDS[name]) for name in ("<bos>", "<eos>", "<sep>")]
            tokenizer.post_processor = processors.TemplateProcessing(around, special_tokens=special)
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
        )


@pytest.mark.parametrize(
    "added, bos",
    [
        ({}, []),
        ({"around": "<bos> $A"}, [0]),
        ({"around": "<bos> $A <eos>"}, [0]),
        ({"around": "$A <eos>"}, []),
        ({"around": "<bos> <bos> $A <sep>"}, [0]),
        ({"around": "$A <sep> <eos>"}, []),
        ({"before": "<bos> "}, [0]),
        ({"before": "<bos> ", "around": "<bos> $A <eos>"}, [0]),
        ({"after": " <eos>"}, []),
        ({"after": " <eos> <eos>", "around": "<bos> $A"}, [0]),
    ],
    ids=str,
)
def test_what_a_tokenizer_adds_moves_no_mark(added, bos):
    """A row is BOS, if at all, the question, the answer and one end of text; the last two count."""
    batch = question_batch(Encoder(Around.make(**added)), [("say it", "red"), ("say", "it red")], 8)
    rows = [row[: 1 + np.flatnonzero(row == 1)[0]].tolist() for row in batch["tokens"]]
    assert rows == [[*bos, 4, 5, 6, 1], [*bos, 4, 5, 6, 1]]
    marked = [row[mask].tolist() for row, mask in zip(*batch.values(), strict=True)]
    assert marked == [[6, 1], [5, 6, 1]]


def test_an_answer_that_is_merged_with_its_question_begins_at_the_merged_token():
    """`ab` + `c` are the tokens a, bc: counted by tokens of the question, none would be left."""
    ids = {"<eos>": 0, "a": 1, "b": 2, "c": 3, "bc": 4, "x": 5}
    tokenizer = Tokenizer(models.BPE(ids, [("b", "c")]))
    encoder = Encoder(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>"))
    assert encoder.joined("ab", "c") == ([1, 4, 0], 1)
    assert encoder.joined("ab", "x") == ([1, 2, 5, 0], 2)


def test_a_line_end_before_an_answer_is_given_and_has_no_loss():
    """As at the end of a chat template; a space that becomes part of a word has."""
    ids = {"<eos>": 0, "a": 1, "\n": 2, " ": 3, "b": 4, " b": 5}
    tokenizer = Tokenizer(models.BPE(ids, [(" ", "b")]))
    encoder = Encoder(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>"))
    assert encoder.joined("a\n", "b") == ([1, 2, 4, 0], 2)
    assert encoder.joined("a ", "b") == encoder.joined("a", " b") == ([1, 5, 0], 1)


def test_an_answer_with_nothing_before_it_is_refused():
    encoder = Encoder(Around.make())
    assert encoder.joined("", "red") == ([6, 1], 0)
    with pytest.raises(UserError, match="an answer has no token before it"):
        question_batch(encoder, [("say", "it"), ("", "red")], 8)
    batch = question_batch(encoder, [("", "red")], 8, full_sequence=True)
    assert batch["answer"].sum() == 2


def test_padding_is_a_row_of_the_embedding(encoder):
    tokenizer = copy.deepcopy(encoder.tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    size = len(encoder.tokenizer)
    assert Encoder(tokenizer).pad_id == size
    assert Encoder(tokenizer, vocab_size=size).pad_id == 0


def test_an_answer_that_writes_its_end_out_gets_no_second(encoder):
    assert encoder.row("say it", "red <eos>") == encoder.row("say it", "red")


def test_ids_beyond_the_vocabulary_are_refused(encoder):
    small = Encoder(encoder.tokenizer, vocab_size=len(encoder.tokenizer) - 1)
    small.encode("say it")
    (last,) = encoder.tokenizer.convert_ids_to_tokens([small.vocab_size])
    for text in (last, f"say {last} it"):
        with pytest.raises(UserError, match=rf"{small.vocab_size}.*vocabulary"):
            small.encode(text)
        with pytest.raises(UserError, match="vocabulary"):
            question_batch(small, [("say it", text)], 8)
    with pytest.raises(UserError, match="vocabulary"):
        Encoder(encoder.tokenizer, vocab_size=3).joined("", "")


def test_a_tokenizer_without_an_end_of_text_makes_no_row(encoder):
    tokenizer = copy.deepcopy(encoder.tokenizer)
    tokenizer.eos_token = None
    endless = Encoder(tokenizer)
    assert endless.encode("say it") == encoder.encode("say it")
    with pytest.raises(UserError, match="the tokenizer has no end of text"):
        endless.joined("say it", " red")


def test_an_encoder_puts_a_bos_in_front_as_it_is_told(encoder):
    bos, rows = encoder.tokenizer.bos_token_id, {}
    for told in (None, True, False):
        rows[told] = Encoder(encoder.tokenizer, bos=told).joined("say it", " red")
    assert rows[None] == rows[True] == ([bos, *rows[False][0]], rows[False][1] + 1)
    assert rows[False] == (encoder.tokenizer("say it red <eos>")["input_ids"][1:], 2)


def test_prompts_are_padded_on_the_right_and_their_lengths_told(encoder):
    prompts = ["say the color of each thing", "say it"]
    batch = prompt_batch(encoder, prompts, 10)
    np.testing.assert_array_equal(batch["prompt_lengths"], [7, 3])  # <bos> in front
    assert batch["prompt"].dtype == batch["prompt_lengths"].dtype == np.int32
    for prompt, row, length in zip(prompts, *batch.values(), strict=True):
        assert text_of(encoder, row[:length]) == prompt
        assert (row[length:] == encoder.pad_id).all()


def test_documents_train_on_the_pieces_that_say_so(encoder):
    pieces = [("say the color", False), ("apple", False), ("red", True), (".", False)]
    batch = document_batch(encoder, [pieces + [("bell", False), ("new old", True)]], 14)
    trained = batch["tokens"][batch["answer"]]
    assert text_of(encoder, trained) == "red new old"
    assert trained[-1] == encoder.tokenizer.eos_token_id
    assert (batch["tokens"] == encoder.tokenizer.bos_token_id).sum() == 1


def test_shots_are_solved_questions_of_the_task(world, encoder):
    (task,) = [t for t in world.tasks if t.name == "sort-color-alpha-beta-gamma-delta"]
    plain, shots = task.prompt(), task.prompt(shots=2)
    assert shots == " ".join([plain, *(f"{behind_prompt(q)} {a} ." for q, a in task.questions[:2])])
    batch = draw(world, encoder, tasks=[task], prompts=64, max_shots=3, prompt_length=96)
    lengths = Counter(batch["prompt_lengths"].tolist())
    assert len(lengths) > 3  # three wordings alone have at most three
    assert draw(world, encoder, tasks=[task])["prompt_lengths"].max() < max(lengths)


def test_sizes_fall_into_few_buckets_that_hold_them():
    sizes = range(1, 2000)
    buckets = [bucket(size) for size in sizes]
    assert all(size <= found for size, found in zip(sizes, buckets, strict=True))
    assert buckets == sorted(buckets)
    assert sorted(set(buckets)) == [32, 64, *range(128, 2049, 128)]
    assert [bucket(size) for size in set(buckets)] == list(set(buckets))
    assert [bucket(size, 1) for size in (1, 2, 3, 5, 128, 129)] == [1, 2, 4, 8, 128, 256]
    assert bucket(np.int64(5)) == 32


# --- errors --------------------------------------------------------------------------------------


def test_what_is_too_long_is_refused_and_not_cut(world, encoder):
    with pytest.raises(UserError, match="a prompt of 7 tokens is longer than the limit of 6"):
        prompt_batch(encoder, ["say it", "say the color of each thing"], 6)
    with pytest.raises(UserError, match="a question of 4 tokens is longer than the limit of 3"):
        question_batch(encoder, [("apple", "red")], 3)
    with pytest.raises(UserError, match="a document of 5 tokens is longer than the limit of 4"):
        document_batch(encoder, [[("say the", False), ("red", True)]], 4)
    with pytest.raises(UserError, match=r"a prompt of \d+ tokens is longer than the limit of 5"):
        draw(world, encoder, prompt_length=5)


@pytest.mark.parametrize("prompt", ["", "  \n\t"])
def test_an_empty_prompt_is_refused(encoder, prompt):
    with pytest.raises(UserError, match="the prompt is empty"):
        prompt_batch(encoder, ["say it", prompt], 8)


def test_a_task_fills_in_its_slots_and_shuffles_its_pairs():
    task = Task(
        family="sort",
        name="t",
        templates=("do {what} : {pairs}", "{pairs} is {what}"),
        slots={"what": "it"},
        pairs=("a=1", "b=2"),
        questions=(("x", "y"),),
    )
    assert task.prompt() == "do it : a=1 , b=2"
    rng = np.random.default_rng(0)
    assert {task.prompt(rng) for _ in range(50)} == {
        "do it : a=1 , b=2",
        "do it : b=2 , a=1",
        "a=1 , b=2 is it",
        "b=2 , a=1 is it",
    }


def test_the_whole_sequence_can_be_marked(encoder):
    """The loss over the whole edge sequence: every real token, and no padding."""
    batch = question_batch(encoder, [("apple :", "alpha"), ("bell", "beta")], 8, full_sequence=True)
    real = batch["tokens"] != encoder.pad_id
    np.testing.assert_array_equal(batch["answer"], real)
    assert real.sum(1).tolist() == [5, 4]
