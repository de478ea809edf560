"""Benchmarks read from files or the hub, worded as the golden file shows them, refused when wrong.

`tests/data/golden/templates.txt` is written anew by `python -m tests.data.test_benchmarks`.
"""

import dataclasses
import gzip
import json
import sys
import tempfile
from pathlib import Path

import pytest

from lorax_gen.data.benchmarks import (
    BENCHMARKS,
    REASONING,
    few_shot,
    find_benchmark,
    harness_shots,
    load_questions,
    system_prompt,
)
from lorax_gen.data.questions import Question
from lorax_gen.errors import UserError
from lorax_gen.files import write_text
from tests.data.rows import make_questions, make_rows, write_lines

GOLDEN = Path(__file__).parent / "golden" / "templates.txt"
OWN = {"id": "q0", "question": "Is ice cold?", "choices": ["no", "yes"], "answer": 1}
# (evaluation, training) of the data folder; PIQA's training split is not there.
COUNTS = {
    "arc_challenge": (1172, 1119),
    "arc_easy": (2376, 2251),
    "openbookqa": (500, 4957),
    "boolq": (3270, 9427),
    "social_iqa": (1954, 33410),
    "hellaswag": (10042, 3368),
    "winogrande": (1267, 10234),
    "piqa": (1838, None),
}


def show_templates(directory):
    """Every text of the first made-up question of each benchmark, and a prompt with one shot."""
    parts = []
    for name in REASONING:
        record = find_benchmark(name)
        question, shot = make_questions(directory, name, 2)
        texts = [("context", text) for text in record.contexts(question)]
        texts += [("continuation", text) for text in record.continuations(question)]
        texts += [("one shot in front", text) for text in few_shot(record, [shot], question)]
        texts += [("system prompt", system_prompt(record, [shot]))]
        parts.append(f"==== {name} | {record.title}\n")
        parts += [f"--- {what}\n{text}|\n" for what, text in texts]  # a bar ends every text
    return "".join(parts)


def load(tmp_path, name="arc_easy", split="test"):
    return load_questions(find_benchmark(name), split, tmp_path)


# --- texts ---------------------------------------------------------------------------------------


def test_every_benchmark_is_worded_as_the_golden_file_shows(tmp_path):
    assert show_templates(tmp_path) == GOLDEN.read_text()


def test_the_benchmarks_stand_in_the_papers_order():
    assert [BENCHMARKS[name].title for name in REASONING] == (
        "ARC-c ARC-e OBQA BoolQ SIQA HellaS WinoG PIQA".split()
    )
    assert {name for name in REASONING if BENCHMARKS[name].unseen} == {
        "hellaswag",
        "winogrande",
        "piqa",
    }


def test_a_missing_passage_leaves_no_line_behind():
    boolq = find_benchmark("boolq")
    question = Question("q", "is ice cold", ("no", "yes"), 1)
    assert boolq.contexts(question) == ("Question: is ice cold?\nAnswer:",)
    assert not boolq.complete(question)
    whole = Question("q", "is ice cold", ("no", "yes"), 1, passage="One.\n\nTwo.")
    assert boolq.contexts(whole) == ("One.\n\nTwo.\nQuestion: is ice cold?\nAnswer:",)
    assert boolq.complete(whole)


def test_the_right_pair_is_a_shot_cut_in_two(tmp_path):
    for name in REASONING:
        record = find_benchmark(name)
        for question in make_questions(tmp_path, name, 6):
            context, continuation = record.pair(question)
            assert context in record.contexts(question)
            assert continuation == record.continuations(question)[question.answer]
            assert record.solved(question) == context + continuation
            assert continuation.startswith(" ")


@pytest.mark.parametrize("name", ["arc_easy", "boolq"])
def test_shots_depend_on_the_items_before_them_and_on_the_seed(tmp_path, name):
    record, train = find_benchmark(name), make_questions(tmp_path, name, 30)
    items = make_questions(tmp_path, name, 5, first=30)
    shots = harness_shots(record, train, 3, items)
    assert shots[:2] == harness_shots(record, train, 3, items[:2])
    assert shots[1:] != harness_shots(record, train, 3, items[1:])
    assert shots != harness_shots(record, train, 3, items, seed=1)
    assert harness_shots(record, train, 0, items) == [[]] * 5
    with pytest.raises(UserError, match=r"40 shots of .* need more than 30 questions"):
        harness_shots(record, train, 40, items)


# --- files and the hub ---------------------------------------------------------------------------


def write_parquet(path, rows):
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist(rows), path)


@pytest.mark.parametrize("name", REASONING)
def test_hub_rows_read_the_same_from_lines_parquet_and_the_hub(name, tmp_path, monkeypatch):
    rows, asked = make_rows(name, 7), []
    for kind in ("jsonl", "gz", "parquet"):
        (tmp_path / kind / "deeper").mkdir(parents=True)
    lines = write_lines(tmp_path / "jsonl" / "deeper" / f"{name}.test.jsonl", rows)
    packed = tmp_path / "gz" / f"{name}.test.jsonl.gz"
    packed.write_bytes(gzip.compress(lines.read_bytes()))
    write_parquet(tmp_path / "parquet" / f"{name}.test.parquet", rows)
    questions = load(tmp_path / "jsonl", name)
    assert len(questions) == 7
    assert load(tmp_path / "gz", name) == questions
    assert load(tmp_path / "parquet", name) == questions

    def load_dataset(path, config, *, split, revision):
        asked.append((path, config, split, len(revision)))
        return rows

    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    record = find_benchmark(name)
    assert load_questions(record, "test") == questions
    assert asked == [(record.hub.path, record.hub.config, record.hub.splits["test"], 40)]


def test_datasets_reads_a_repository_of_parquet_files(tmp_path, monkeypatch):
    """What stands in for the hub is a folder, which the library loads by the same call."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "repository" / "ARC-Easy"
    folder.mkdir(parents=True)
    for split, count in (("train", 3), ("test", 2)):
        rows = make_rows("arc_easy", count)
        write_parquet(folder / f"{split}-00000-of-00001.parquet", rows)
        write_lines(tmp_path / f"arc_easy.{split}.jsonl", rows)
    card = "configs:\n- config_name: ARC-Easy\n  data_files:\n" + "".join(
        f"  - split: {split}\n    path: ARC-Easy/{split}-*\n" for split in ("train", "test")
    )
    (folder.parent / "README.md").write_text(f"---\n{card}---\n")
    record = find_benchmark("arc_easy")
    hub = dataclasses.replace(record.hub, path=str(folder.parent))
    for split in ("train", "test"):
        found = load_questions(dataclasses.replace(record, hub=hub), split)
        assert found == load(tmp_path, split=split)


def test_rows_of_the_projects_own_form(tmp_path):
    write_lines(tmp_path / "boolq.test.jsonl", [OWN, OWN | {"passage": "Ice is cold."}])
    assert load(tmp_path, "boolq") == [
        Question("q0", "Is ice cold?", ("no", "yes"), 1),
        Question("q0", "Is ice cold?", ("no", "yes"), 1, passage="Ice is cold."),
    ]


def test_hellaswags_markup_goes_from_either_kind_of_row(tmp_path):
    ends = ["ends [step] here. ", "[a] b", "c  d", "e [title] f"]
    row = {"id": "h", "question": "Baking: knead [title] rest", "choices": ends, "answer": 0}
    write_lines(tmp_path / "hellaswag.test.jsonl", [row])
    (question,) = load(tmp_path, "hellaswag")
    assert question.question == "Baking: knead. rest"
    assert question.choices == ("ends here.", " b", "c d", "e. f")


def test_parts_stand_in_for_a_training_split_but_for_no_other(tmp_path):
    rows = make_rows("winogrande", 3)
    write_lines(tmp_path / "winogrande.train_debiased.jsonl", rows)
    assert len(load(tmp_path, "winogrande", "train")) == 3
    write_lines(tmp_path / "winogrande.train_l.jsonl", rows[:2])
    assert len(load(tmp_path, "winogrande", "train")) == 2  # the larger part comes first
    write_lines(tmp_path / "winogrande.train.jsonl", rows[:1])
    assert len(load(tmp_path, "winogrande", "train")) == 1
    with pytest.raises(UserError, match=r"no file winogrande.test.jsonl.*there is winogrande"):
        load(tmp_path, "winogrande")


@pytest.mark.parametrize("name", REASONING)
def test_counts_are_those_of_the_data_folder(shared_data, name):
    test, train = COUNTS[name]
    assert len(load(shared_data / "reasoning", name)) == test
    if train is None:
        with pytest.raises(UserError, match=f"no file {name}.train.jsonl"):
            load(shared_data / "reasoning", name, "train")
    else:
        assert len(load(shared_data / "reasoning", name, "train")) == train


def test_how_many_real_training_questions_of_boolq_have_their_passage(shared_data):
    boolq = find_benchmark("boolq")
    train = load(shared_data / "reasoning", "boolq", "train")
    assert sum(map(boolq.complete, train)) == 2020


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": 2}, "answer 2 is out of range: 2 choices have the indices 0 to 1"),
        ({"answer": -1}, "answer -1 is out of range"),
        ({"answer": "yes"}, "answer should be the index of a choice, not 'yes'"),
        ({"answer": True}, "answer should be the index of a choice, not True"),
        ({"choices": ["no", " "]}, "choice 1 is empty"),
        ({"choices": ["no"]}, "1 choices; a question needs two or more"),
        ({"choices": ["no", 1]}, "choices should be strings"),
        ({"choices": ["no", "\ud83d"]}, "half a surrogate pair"),
        ({"question": "half \ud83d"}, "half a surrogate pair"),
        ({"question": "  "}, "the question is empty"),
        ({"question": None}, "question should be a string, not None"),
        ({"passage": 3}, "passage should be a string, not 3"),
    ],
)
def test_a_wrong_row_is_named_by_file_and_line(tmp_path, change, message):
    write_lines(tmp_path / "arc_easy.test.jsonl", [OWN, OWN | change])
    with pytest.raises(UserError, match=r"arc_easy.test.jsonl, line 2: ") as error:
        load(tmp_path)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("arc_easy", {"answerKey": "Z"}, "answerKey 'Z' is not one of the labels A, B, C"),
        ("arc_easy", {"answerKey": None}, "answerKey should be a string, not None"),
        ("arc_easy", {"choices": {"text": "ab", "label": ["A", "B"]}}, "text should be a list"),
        ("arc_easy", {"choices": {"text": list("ab"), "label": list("ABC")}}, "a label each"),
        ("arc_easy", {"choices": {"text": list("ab"), "label": list("AA")}}, "a label each"),
        ("social_iqa", {"label": ""}, "label should be an index, not ''"),
        ("social_iqa", {"label": 1.7}, "label should be an index, not 1.7"),
        ("social_iqa", {"label": True}, "label should be an index, not True"),
        ("hellaswag", {"endings": "abcd"}, "endings should be a list, not 'abcd'"),
        ("hellaswag", {"activity_label": None}, "activity_label should be a string, not None"),
        ("boolq", {"passage": 0}, "passage should be a string, not 0"),
        ("social_iqa", {"label": "4"}, "answer 3 is out of range"),
        ("hellaswag", {"endings": ["a", "b", "[c]", "d"]}, "choice 2 is empty"),
        ("boolq", {"label": -1}, "answer -1 is out of range"),
        ("piqa", {"sol2": ""}, "choice 1 is empty"),
        ("winogrande", {"sentence": "No blank."}, "the question has no blank '_'"),
        ("winogrande", {"sentence": "It was _ "}, "no text follows the blank '_'"),
    ],
)
def test_a_wrong_hub_row_is_named_too(tmp_path, name, change, message):
    (row,) = make_rows(name, 1)
    write_lines(tmp_path / f"{name}.test.jsonl", [row | change])
    with pytest.raises(UserError, match=rf"{name}.test.jsonl, line 1: ") as error:
        load(tmp_path, name)
    assert message in str(error.value)


def test_a_missing_column_is_named_beside_those_that_are_there(tmp_path):
    write_lines(tmp_path / "piqa.test.jsonl", [{"goal": "x", "sol1": "y"}])
    with pytest.raises(UserError, match=r"line 1: no column 'sol2'; it has goal, sol1"):
        load(tmp_path, "piqa")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"id": 1}\n\n{"id": 1', r"line 1: no column 'choices'; it has id"),
        (b'\n{"id": "a", "quest', r"line 2 is not valid JSON"),
        (b"[1, 2]\n", r"line 1: expected an object, not a list"),
        (b"[" * 100_000, r"line 1: nested too deeply"),
        (b'{"answer": ' + b"1" * 5000 + b"}", r"line 1 is not valid JSON \(Exceeds the limit"),
        (b'{"answer": NaN}', r"line 1: NaN is not a finite number"),
        (b'{"answer": 0, "answer": 1}', r"line 1: the key 'answer' is there twice"),
        (b"\xff\xfe", r"is not UTF-8 text"),
        (b"", r"arc_easy has no questions in its split 'test'"),
    ],
)
def test_a_broken_file_is_an_error_that_says_where(tmp_path, content, message):
    (tmp_path / "arc_easy.test.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        load(tmp_path)


def test_files_of_other_systems_are_read_too(tmp_path):
    lines = (json.dumps(OWN) + "\r\n") * 2
    (tmp_path / "arc_easy.test.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    assert len(load(tmp_path)) == 2


def test_a_cut_off_archive_and_a_broken_parquet_file(tmp_path):
    packed = gzip.compress(json.dumps(OWN).encode())
    (tmp_path / "arc_easy.test.jsonl.gz").write_bytes(packed[:-12])
    with pytest.raises(UserError, match=r"arc_easy.test.jsonl.gz is truncated or broken"):
        load(tmp_path)
    (tmp_path / "piqa.test.parquet").write_bytes(b"nothing")
    pytest.importorskip("pyarrow")
    with pytest.raises(UserError, match=r"cannot read .*piqa.test.parquet"):
        load(tmp_path, "piqa")


def test_missing_files_and_splits(tmp_path):
    with pytest.raises(UserError, match=r"no such data directory"):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no file arc_easy.test.jsonl.*put one there"):
        load(tmp_path)
    write_lines(tmp_path / "arc_easy.test.jsonl", [OWN])
    (tmp_path / "copy").mkdir()
    write_lines(tmp_path / "copy" / "arc_easy.test.jsonl", [OWN])
    with pytest.raises(UserError, match=r"several files hold the split 'test' of arc_easy"):
        load(tmp_path)
    with pytest.raises(UserError, match=r"arc_easy on the hub has no split 'dev'"):
        load_questions(find_benchmark("arc_easy"), "dev")


def test_without_a_network_the_file_that_would_do_is_named(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach 'allenai/ai2_arc'\nmore")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError) as error:
        load_questions(find_benchmark("arc_easy"), "train")
    assert "Couldn't reach 'allenai/ai2_arc')" in str(error.value)
    assert "arc_easy.train.jsonl" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("hellswag", "did you mean hellaswag"),
        ("arc-challenge", "arc_challenge"),
        ("OBQA", "openbookqa"),
        ("zzz", "there are arc_challenge, arc_easy"),
    ],
)
def test_an_unknown_benchmark_brings_the_nearest_names(name, nearest):
    with pytest.raises(UserError, match=nearest):
        find_benchmark(name)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        write_text(GOLDEN, show_templates(Path(directory)))
    sys.stdout.write(GOLDEN.read_text())
