"""Texts: prompts from bytes and arguments to token ids, rows of data, chat templates, stop strings.

What is accepted is held against a statement of the rule that is independent of the code.
"""

import copy
import dataclasses
import gzip
import io
import json
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lorax_gen.data.agent import load_agent
from lorax_gen.data.benchmarks import BENCHMARKS, load_questions
from lorax_gen.data.config import split_weight
from lorax_gen.data.instructions import load_tasks
from lorax_gen.data.own_tasks import load_row_tasks
from lorax_gen.data.tokens import Encoder, question_batch
from lorax_gen.inference.cards import specialize
from lorax_gen.inference.stopping import Decoder, finished_text, settled_text
from lorax_gen.prompts import read_prompt
from lorax_gen.tokenizers import chat_ids, encode, word_level
from tests.data.rows import make_rows
from tests.fuzz.damage import damaged_bytes, damaged_json, fuzz, refused
from tests.tiny import make_generator

# --- prompts -------------------------------------------------------------------------------------

SPECIAL = [
    *"\0\n\r\t @-=\ufeff\u2028é\ud83d\udce9\u0301",
    "\r\n",
    "@@",
    "--",
    "😀",
    "<bos>",
    "<eos>",
]
ANY_TEXT = st.lists(st.text() | st.sampled_from(SPECIAL), max_size=6).map("".join)


def is_unicode(text):
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def bytes_of_file(text):
    """The text in a file of text, written by a program of another system."""
    return ("\ufeff" + text.replace("\n", "\r\n") + "\r\n").encode()


@fuzz
@given(data=st.binary() | ANY_TEXT.filter(is_unicode).map(bytes_of_file))
def test_a_file_and_standard_input_give_the_text_in_their_bytes(data, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "prompt.txt"
    path.write_bytes(data)
    before, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(data), "latin-1")
    try:
        found = []
        message = refused(lambda: found.extend(map(read_prompt, (f"@{path}", "-"))))
    finally:
        sys.stdin = before
    try:
        text = data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError:
        assert message is not None
        return
    lines = text.replace("\r\n", "\n").split("\n")
    assert message is None and found == ["\n".join(lines[:-1] if lines[-1] == "" else lines)] * 2


@fuzz
@given(text=ANY_TEXT)
def test_every_text_can_be_written_as_an_argument(text):
    """`@@` stands for an `@`; only `-` alone needs a file or standard input."""
    assume(text != "-")
    found = []
    argument = "@" + text if text.startswith("@") else text
    message = refused(lambda: found.append(read_prompt(argument)))
    assert found == ([text] if is_unicode(text) else []) and (message is None) == is_unicode(text)


@fuzz
@given(text=ANY_TEXT, context=ANY_TEXT)
def test_texts_are_encoded_within_the_vocabulary_or_refused(text, context, tiny_world_system):
    system = tiny_world_system
    encoder = Encoder.of(system.edge)
    message = refused(lambda: (encoder.encode(text), encoder.joined(context, text)))
    assert (message is None) == (is_unicode(text) and is_unicode(context))
    if message is None:
        ids, start = encoder.joined(context, text)
        bos, eos = system.edge.tokenizer.bos_token_id, system.edge.tokenizer.eos_token_id
        assert ids[0] == bos and ids[-1] == eos != ids[-2]
        assert all(0 <= token < system.edge.config.vocab_size for token in ids)
        # Word by word, by the vocabulary alone.
        vocabulary = system.edge.tokenizer.get_vocab()
        assert ids[1:start] == encoder.encode(context)[1:start]
        words = "".join((context, text)).lower().split()
        if words and all(word in vocabulary and word[0] != "<" for word in words):
            assert ids[1:-1] == [vocabulary[word] for word in words]


@fuzz
@given(text=ANY_TEXT, times=st.just(1) | st.integers(1, 100) | st.just(300_000))
def test_a_prompt_becomes_a_card_or_is_refused(text, times, short_system):
    text, (cloud, edge, generator) = text * times, short_system
    assume(len(text) < 100_000 or len(text) > 1 << 20)
    cards = []
    message = refused(lambda: cards.append(specialize(text, cloud, edge, generator)))
    fits = is_unicode(text) and text.strip() and len(text) < 1 << 20
    fits = fits and len(encode(cloud.tokenizer, text)) <= 64 - edge.config.num_hidden_layers
    assert (message is None) == bool(fits), message
    for card in cards:
        assert np.isfinite(card.gates).all() and np.allclose(card.gates.sum(-1), 1, atol=1e-5)


@pytest.fixture(scope="module")
def short_system(tiny_world_system):
    """A cloud of 64 positions, an edge and a generator."""
    system = tiny_world_system
    config = dataclasses.replace(system.cloud.config, max_position_embeddings=64)
    return dataclasses.replace(system.cloud, config=config), system.edge, make_generator(system)


@fuzz
@given(name=ANY_TEXT, weight=st.none() | st.floats(allow_nan=False) | st.integers(0, 10**6))
def test_every_name_of_a_source_can_be_written_with_its_weight(name, weight):
    if weight is None:
        assume("=" not in name)
        assert split_weight(name) == (name, 1.0)
    else:
        assert split_weight(f"{name}={weight}") == (name, weight)


# --- rows of data --------------------------------------------------------------------------------

TASK = {
    "Definition": ["Say the opposite ."],
    "Positive Examples": [{"input": "hot", "output": "cold"}, {"input": "wet", "output": "dry"}],
    "Instances": [{"input": "tall", "output": ["short"]}, {"input": "up", "output": "down"}],
}
TRIPLE = {"instruction": "Say it .", "input": "hot", "output": "cold"}
AGENT = {
    "id": "a", "input": "", "output": "Thought: no",
    "instruction": "You are it . one of [Cut, Draw]\n\nPrevious conversation: none\nInput: hi",
}  # fmt: skip


def check_texts(values):
    assert values and all(isinstance(value, str) and is_unicode(value) for value in values)


def load_rows(kind, folder):
    """The loaded rows of a file of a kind in a folder, each as a list of its texts."""
    if kind == "triples":
        (path,) = folder.iterdir()
        tasks, _ = load_row_tasks(path)
        assert all(item.input and item.outputs for task in tasks for item in task.items)
        return [
            [*t.instructions, *(x for i in t.items for x in (i.input, *i.outputs))] for t in tasks
        ]
    if kind == "agent":
        items = load_agent("test", folder)
        return [[item.id, item.prompt, item.request, item.output] for item in items]
    if kind == "task":
        return [
            [task.definition, *sum(task.examples, ()), *(x for x, _ in task.instances)]
            + [output for _, outputs in task.instances for output in outputs]
            for task in load_tasks(folder)
        ]
    found = load_questions(BENCHMARKS[kind], "test", folder)
    for question in found:
        assert 0 <= question.answer < len(question.choices) >= 2
        assert all(choice.strip() for choice in question.choices)
    return [[q.id, q.question, q.passage, q.context, *q.choices] for q in found]


ROWS = {
    "triples": [TRIPLE] * 2,
    "agent": [AGENT, AGENT | {"id": 7}],
    "task": TASK,
    **{name: make_rows(name, 2) for name in ("arc_easy", "boolq", "winogrande")},
    "hellaswag": [
        {"ind": 4, "activity_label": "A", "ctx_a": "he", "ctx_b": "she", "endings": list("abcd"),
         "label": "3"}
    ] * 2,
    "social_iqa": [
        {"context": "c", "question": "q", "answerA": "x", "answerB": "y", "answerC": "z",
         "label": "2"}
    ] * 2,
    "openbookqa": [
        {"id": "i", "question_stem": "q", "answerKey": "B",
         "choices": {"text": ["x", "y"], "label": ["A", "B"]}}
    ] * 2,
}  # fmt: skip
STEMS = {"triples": "rows", "agent": "gpt4tools_test_unseen", "task": "task"}


def write(folder, kind, data, ending):
    for path in folder.iterdir():
        path.unlink()
    (folder / f"{STEMS.get(kind, f'{kind}.test')}{ending}").write_bytes(data)


def packed(value, ending):
    """A value as the bytes of a file."""
    if ending.startswith(".jsonl"):
        data = "".join(json.dumps(row) + "\n" for row in value).encode()
    elif ending == ".parquet":
        out = io.BytesIO()
        pa.parquet.write_table(pa.Table.from_pylist(value), out)
        return out.getvalue()
    else:
        data = json.dumps(value).encode()
    return gzip.compress(data) if ending.endswith(".gz") else data


def endings_of(kind):
    own = {"triples": [".jsonl", ".json", ".jsonl.gz", ".parquet"], "task": [".json"]}
    own["agent"] = [".json", ".json.gz"]
    return own.get(kind, [".jsonl", ".jsonl.gz", ".parquet"])


KINDS = st.sampled_from(sorted(ROWS)).flatmap(
    lambda kind: st.tuples(st.just(kind), st.sampled_from(endings_of(kind)))
)


@pytest.fixture
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("rows")


@fuzz
@given(kind=KINDS, data=st.data())
def test_a_file_of_rows_with_damaged_bytes(kind, data, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "bytes"
    folder.mkdir(exist_ok=True)
    kind, ending = kind
    write(folder, kind, data.draw(damaged_bytes(packed(ROWS[kind], ending))), ending)
    found = []
    if refused(lambda: found.extend(load_rows(kind, folder))) is None:
        for texts in found:
            check_texts(texts)


@fuzz
@given(kind=KINDS, data=st.data())
def test_rows_with_a_changed_value(kind, data, tmp_path_factory):
    """What is accepted is text, and was text in the file: no number, list or nothing became one."""
    folder = tmp_path_factory.getbasetemp() / "values"
    folder.mkdir(exist_ok=True)
    kind, ending = kind
    value = data.draw(damaged_json(ROWS[kind]))
    try:
        write(folder, kind, packed(value, ending), ending)
    except (pa.ArrowException, TypeError, AttributeError, ValueError, OverflowError):
        assume(False)  # parquet has no such value, or JSON lines no such list
    found = []
    if refused(lambda: found.extend(load_rows(kind, folder))) is None:
        known = words_of(value)
        for texts in found:
            check_texts(texts)
            assert {word.strip(":").lower() for text in texts for word in text.split()} <= known


def words_of(value):
    """All words that may be in a text: those of the strings in a value, and numbers as names."""
    names = [f"{kind}-test-{i}" for kind in ROWS for i in range(9)]
    words, level = {"", "no", "yes", *map(str, range(9)), *names}, [value]
    while level:
        each = level.pop()
        if isinstance(each, dict):
            level += each.values()
        elif isinstance(each, list):
            level += each
        elif isinstance(each, str) or (isinstance(each, int) and not isinstance(each, bool)):
            words |= {word.strip(":").lower() for word in str(each).split()}
            words |= {f"boolq-{each}".lower(), f"hellaswag-{each}".lower()}
    return words


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 10**6, b'{"a":' * 10**5, b'{"instruction": ' + b"9" * 10**5 + b"}",
        b'{"instruction": NaN}', b'{"instruction": Infinity}', b'{"instruction": 1e999}',
        b'{"instruction": "a", "instruction": "b", "input": "", "output": "c"}',
        rb'{"instruction": "\ud800", "input": "", "output": "c"}', b"\xff", b"nul", b'"text"',
    ],
    ids=lambda line: line[:24].decode("latin-1"),
)  # fmt: skip
@pytest.mark.parametrize("ending", [".jsonl", ".json"])
def test_a_hostile_row_is_refused(line, ending, folder):
    good = json.dumps(TRIPLE).encode()
    data = b"\n".join([good, line]) if ending == ".jsonl" else b"[" + good + b"," + line + b"]"
    (folder / f"rows{ending}").write_bytes(data)
    assert refused(lambda: load_row_tasks(folder / f"rows{ending}"))


# --- chat templates ------------------------------------------------------------------------------

PIECES = [
    "red ", "\n", "{{ bos_token }}", "{{ eos_token }} ", "{{ messages[0].content }}",
    "{{ messages[1].content }}", "{{ messages[0]['role'] | upper }}", "{{ messages | tojson }}",
    "{{ missing }}", "{{ missing.more }}", "{{ raise_exception('no') }}", "{{ 1 / 0 }}",
    "{{ 'x' * 10 ** 9 }}", "{{ 9 ** (9 ** 9) }}", "{{ ''.__class__ }}", "{{", "%}", "{% if %}",
    "{% set x = 'red ' %}", "{{ x * 3 }}", "{{ messages | length }}", "{{ x | unknown }}",
]  # fmt: skip
TEMPLATES = st.recursive(
    st.sampled_from(PIECES),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        inner.map(lambda t: "{% for m in messages %}" + t + "{{ m.content }}{% endfor %}"),
        inner.map(lambda t: "{% for i in range(99999) %}" + t + "{% endfor %}"),
        inner.map(lambda t: "{% if add_generation_prompt %}" + t + "{% endif %}"),
        inner.map(lambda t: "{% macro f() %}" + t + "{{ f() }}{% endmacro %}{{ f() }}"),
    ),
    max_leaves=6,
)
WORDS = word_level(["red", "green", "user", "system"])


@pytest.fixture
def little_time(monkeypatch):
    from lorax_gen import chat

    monkeypatch.setattr(chat, "SECONDS", 0.5)


@fuzz
@given(template=TEMPLATES, user=ANY_TEXT, system=ANY_TEXT)
def test_a_chat_template_is_rendered_or_refused(template, user, system, little_time):
    """What is rendered is what transformers renders without limits."""
    tokenizer = copy.deepcopy(WORDS)
    tokenizer.chat_template = template
    found = []
    if refused(lambda: found.append(chat_ids(tokenizer, user, system))) is None:
        assert is_unicode(user) and is_unicode(system)
        turns = [{"role": "system", "content": system}] if system else []
        turns.append({"role": "user", "content": user})
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert found == [tokenizer(text, add_special_tokens=False)["input_ids"]]


# --- stop strings --------------------------------------------------------------------------------

LETTERS = ["a", "b", "ab", "c", " ", "é", "\n"]
MARKS = ["<e>", "<|x|>", "<a>"]  # special; the first ends a text


def byte_level():
    """Bytes as tokens, pieces of several letters, and special tokens."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    ids = {letter: i for i, letter in enumerate(sorted(alphabet))} | {"ab": 256}
    tokenizer = Tokenizer(models.BPE(ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return with_marks(tokenizer)


def metaspace():
    """As LLaMA's: a space is part of the word after it, and left out at the beginning."""
    words = ["▁a", "▁b", "ab", "c", "▁", "é", "\n", "a", "b"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="c"))
    tokenizer.decoder = decoders.Metaspace()
    return with_marks(tokenizer)


def spaced():
    """Words joined by spaces, special tokens too."""
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(LETTERS)}, unk_token="c"))
    return with_marks(tokenizer)


def with_marks(tokenizer):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=MARKS[0])
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS[1:]})
    return tokenizer


DECODERS = [Decoder(t, (t.eos_token_id,)) for t in (byte_level(), metaspace(), spaced())]


@st.composite
def cases(draw):
    """A decoder, a text of few different tokens, and parts of the text, or nearly, as stops."""
    decoder = draw(st.sampled_from(DECODERS))
    vocabulary = decoder.tokenizer.get_vocab()
    likely = [
        token for token in [*"abcÃ©Ċ", "ab", "▁a", "▁", " ", *MARKS[1:]] if token in vocabulary
    ]
    few = draw(st.lists(st.sampled_from([vocabulary[t] for t in likely]), min_size=1, max_size=3))
    ids = draw(st.lists(st.sampled_from(few), min_size=1, max_size=12))
    ids = ids + [decoder.tokenizer.eos_token_id] * draw(st.sampled_from([0, 0, 1, 2]))
    stop = []
    for _ in range(draw(st.integers(0, 3))):
        text = decoder.tokenizer.decode(ids, skip_special_tokens=draw(st.booleans()))
        start = draw(st.integers(0, max(len(text) - 1, 0)))
        part = text[start : start + draw(st.integers(1, 14))] + draw(st.sampled_from(["", "", "b"]))
        stop += [part] if part.strip("\ufffd") == part != "" else []
    return decoder, ids, stop


def read_by_hand(decoder, ids, stop):
    """Token by token: a text ends as soon as it holds a stop string, with or without its special
    tokens. Returns the ids up to there, and whether there is one."""
    tokenizer = decoder.tokenizer
    for count in range(1, len(ids) + 1):
        texts = (tokenizer.decode(ids[:count], skip_special_tokens=skip) for skip in (False, True))
        if any(string in text for text in texts for string in stop):
            return ids[:count], True
        if ids[count - 1] == tokenizer.eos_token_id:
            return ids[:count], False
    return ids, False


def cut_by_hand(text, stop):
    """What stands before the stop string that is complete first, the longest of several."""
    for end in range(1, len(text) + 1):
        found = [string for string in stop if text[:end].endswith(string)]
        if found:
            return text[: end - max(map(len, found))]
    return text


@fuzz
@given(case=cases())
def test_a_streamed_text_is_the_cut_of_the_full_text(case):
    decoder, ids, stop = case
    tokenizer = decoder.tokenizer
    text, ended = finished_text(decoder, ids, stop)
    read, stopped = read_by_hand(decoder, ids, stop)
    assert ended == (stopped or tokenizer.eos_token_id in ids)
    plain = tokenizer.decode(read, skip_special_tokens=True)
    assert plain.startswith(text) and not any(string in text for string in stop)
    if not stopped:
        assert text == plain
    elif tokenizer is DECODERS[0].tokenizer and "\ufffd" not in tokenizer.decode(read):
        # Here each token's text stands by itself: cut with special tokens, then leave them out.
        kept = cut_by_hand(tokenizer.decode(read), stop)
        parts = (tokenizer.decode(part) for part in pieces_of(read, tokenizer))
        expected, at = "", 0
        for part in parts:
            expected += "" if part in MARKS else part[: max(len(kept) - at, 0)]
            at += len(part)
        assert text == cut_by_hand(expected, stop)
    # However the tokens arrive, what is shown only grows, up to the same text.
    shown = ""
    for count in range(1, len(ids) + 1):
        part, ended = finished_text(decoder, ids[:count], stop)
        if ended:
            assert part == text
            break
        settled = settled_text(decoder, ids[:count], stop)
        assert text.startswith(settled), (text, settled)
        shown = max(shown, settled, key=len)
        if count > 12 and not stop:  # nothing is held back for nothing
            assert len(settled) >= len(part) - 3
    assert text.startswith(shown)


def pieces_of(ids, tokenizer):
    """The ids in runs of ordinary tokens and single special ones."""
    runs = [[]]
    for token in ids:
        special = tokenizer.decode([token]) in MARKS
        runs += [[token], []] if special else []
        runs[-1] += [] if special else [token]
    return runs


@fuzz
@given(
    pairs=st.lists(st.tuples(ANY_TEXT, ANY_TEXT), min_size=1, max_size=4), length=st.integers(1, 30)
)
def test_a_batch_of_rows_marks_answers_up_to_one_end_of_text(pairs, length, tiny_world_system):
    encoder = Encoder.of(tiny_world_system.edge)
    batches = []
    if refused(lambda: batches.append(question_batch(encoder, pairs, length))) is None:
        (batch,), eos = batches, encoder.tokenizer.eos_token_id
        for tokens, answer in zip(batch["tokens"], batch["answer"], strict=True):
            last = np.flatnonzero(answer)[-1]
            assert tokens[last] == eos != tokens[last - 1]
            assert (tokens[last + 1 :] == encoder.pad_id).all()
            assert answer[answer.argmax() : last + 1].all()
