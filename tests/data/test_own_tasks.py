"""Rows of one's own become tasks, whatever form they have, and samples that repeat no row."""

import gzip
import json
import tarfile

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from lorax_gen.data.config import MixtureConfig
from lorax_gen.data.held_out import HeldOut, keep_back, refuse_held_out, split
from lorax_gen.data.own_tasks import ASSISTANT, Item, RowSource, RowTask, load_row_tasks
from lorax_gen.errors import UserError
from lorax_gen.frames import IO, PLAIN, Frame
from tests.data.rows import write_lines


def rng(seed=0):
    return np.random.default_rng(seed)


def load(tmp_path, *rows, columns=()):
    return load_row_tasks(write_lines(tmp_path / "mine.jsonl", rows), columns)[0]


COLOR = {"instruction": "Name the color.", "input": "grass", "output": "green"}
GREEN = (Item("grass", ("green",)),)


# --- forms ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        COLOR,
        COLOR | {"input": " grass\n", "output": ["green ", "green"], "id": 7},
        {"messages": [
            {"role": "system", "content": "Name the color."},
            {"role": "user", "content": "grass"},
            {"role": "assistant", "content": "green"},
        ]},
        {"instruction": "Name the color.", "prompt": "grass", "completion": "green"},
        {
            "prompt": [
                {"role": "system", "content": "Name the color."},
                {"role": "user", "content": "grass"},
            ],
            "completion": [{"role": "assistant", "content": "green"}],
        },
    ],
)  # fmt: skip
def test_every_form_gives_the_same_task(tmp_path, row):
    assert load(tmp_path, row) == [RowTask("mine: Name the color.", ("Name the color.",), GREEN)]


def test_choices_have_a_correct_one_by_its_index_or_its_text(tmp_path):
    row = {"instruction": "Name it.", "input": "grass", "choices": ["red", "green"]}
    for answer in (1, "green", " green "):
        [task] = load(tmp_path, row | {"answer": answer})
        assert task.items == (Item("grass", ("green",), ("red", "green")),)
        assert task.items[0].answer == 1


def test_columns_are_named_by_the_config(tmp_path):
    row = {"system": "Name the color.", "question": "grass", "label": "green", "input": "unread"}
    columns = ("instruction=system", "input=question", "output=label")
    assert load(tmp_path, row, columns=columns)[0].items == GREEN


def test_rows_of_a_task_or_of_an_instruction_are_one_task(tmp_path):
    rows = [COLOR | {"input": f"thing {i}"} for i in range(3)]
    other = {"instruction": "Name the shape.", "input": "ball", "output": "round"}
    assert [len(task.items) for task in load(tmp_path, *rows, other)] == [3, 1]
    named = [row | {"task": "a", "instruction": f"Wording {i}."} for i, row in enumerate(rows)]
    [task] = load(tmp_path, *named)
    assert task.instructions == ("Wording 0.", "Wording 1.", "Wording 2.")
    [again] = load(tmp_path, *(row | {"instruction": list(task.instructions)} for row in named))
    assert again == task


def test_rows_without_an_instruction_or_an_input_are_requests(tmp_path):
    rows = [
        {"instruction": "Write a word.", "input": "", "output": "word"},
        {"instruction": "Write a number.", "input": "Noinput.", "output": "seven"},
        {"prompt": "Write a sum.", "completion": "1 + 1"},
        {"messages": [
            {"role": "user", "content": "Say hello."}, {"role": "assistant", "content": "hello"},
        ]},
    ]  # fmt: skip
    [task] = load(tmp_path, *rows)
    assert (task.name, task.instructions) == ("mine", (ASSISTANT,))
    asked = ["Write a word.", "Write a number.", "Write a sum.", "Say hello."]
    assert [item.input for item in task.items] == asked


def test_a_row_given_twice_is_one_and_rows_without_an_answer_are_counted(tmp_path):
    path = write_lines(tmp_path / "mine.jsonl", [COLOR, COLOR, COLOR | {"output": " "}])
    [task], left_out = load_row_tasks(path)
    assert (task.items, left_out) == (GREEN, 1)


# --- a thousand rows of each form, in each kind of file ------------------------------------------


def turn(role, content):
    return {"role": role, "content": content}


FORMS = {
    "input and output": lambda task, text, out: {
        "instruction": task, "input": text, "output": out,
    },
    "choices": lambda task, text, out: {
        "instruction": task, "input": text, "choices": ["no", out], "answer": 1,
    },
    "messages": lambda task, text, out: {
        "messages": [turn("system", task), turn("user", text), turn("assistant", out)],
    },
    "prompt and completion": lambda task, text, out: {
        "instruction": task, "prompt": text, "completion": out,
    },
    "turns of prompt and completion": lambda task, text, out: {
        "prompt": [turn("system", task), turn("user", text)],
        "completion": [turn("assistant", out)],
    },
}  # fmt: skip
WRITERS = {
    "jsonl": lambda path, rows: write_lines(path, rows),
    "jsonl.gz": lambda path, rows: path.write_bytes(
        gzip.compress("".join(f"{json.dumps(row)}\n" for row in rows).encode())
    ),
    "json": lambda path, rows: path.write_text(json.dumps(rows)),
    "json.gz": lambda path, rows: path.write_bytes(gzip.compress(json.dumps(rows).encode())),
    "parquet": lambda path, rows: parquet.write_table(pyarrow.Table.from_pylist(rows), path),
}
THOUSAND = [(f"Task {i % 10}.", f"input {i}", f"output {i % 7}") for i in range(1000)]


def drawn(source):
    """Every sample's instruction, input and output, drawn once."""
    episodes = [source.episode(i, rng(i), shots=2, queries=3) for i in range(len(source))]
    assert all(len(e.shots) == 2 and len(e.questions) == 3 for e in episodes)
    return sorted((e.instruction, *e.questions[0]) for e in episodes)


@pytest.mark.parametrize("file", WRITERS)
@pytest.mark.parametrize("form", FORMS)
def test_a_thousand_rows_in_are_a_thousand_samples(tmp_path, form, file):
    path = tmp_path / f"mine.{file}"
    WRITERS[file](path, [FORMS[form](*row) for row in THOUSAND])
    [source] = MixtureConfig(sources=(str(path),), frame="plain").open(None).sources
    assert (len(source), source.tasks, source.left_out) == (1000, 10, 0)
    assert drawn(source) == sorted((task, text, f" {out}") for task, text, out in THOUSAND)


@pytest.mark.parametrize("packed", [False, True])
def test_a_thousand_instances_of_natural_instructions_are_a_thousand_samples(tmp_path, packed):
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in sorted({task for task, _, _ in THOUSAND}):
        own = [row for row in THOUSAND if row[0] == name]
        task = {
            "Definition": [name],
            "Positive Examples": [{"input": f"shot {i}", "output": "x"} for i in range(2)],
            "Instances": [{"input": text, "output": [out]} for _, text, out in own],
        }
        (folder / f"{name.replace(' ', '-')}json").write_text(json.dumps(task))
    path = folder
    if packed:
        path = tmp_path / "mine.tar.gz"
        with tarfile.open(path, "w:gz") as archive:
            archive.add(folder, "mine")
    [source] = MixtureConfig(sources=(str(path),), frame="plain").open(None).sources
    assert (len(source), source.tasks, source.left_out) == (1000, 10, 0)
    assert drawn(source) == sorted((task, text, f" {out}") for task, text, out in THOUSAND)


# --- malformed rows ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row, message",
    [
        ({"output": "x"}, "no column instruction, messages or prompt; it has output"),
        ({}, "no column instruction, messages or prompt; it has none"),
        ({"instruction": "a", "input": "b"}, "no column 'output'"),
        (COLOR | {"input": 3}, "input should be a string, not 3"),
        (COLOR | {"output": 3}, "output should be a string or a list of strings, not 3"),
        (COLOR | {"output": ["a", 3]}, "output should be a string or a list of strings"),
        (COLOR | {"instruction": {"a": "b"}}, "instruction should be a string or a list"),
        (COLOR | {"task": ["a"]}, "task should be a string or a number"),
        (COLOR | {"task": "a", "input": ""}, "input is empty: the edge model would have nothing"),
        (COLOR | {"instruction": ["a", "b"], "input": ""}, "input is empty; give an input, or one"),
        (COLOR | {"instruction": ["a", " "]}, "instruction has an empty text; remove it"),
        (COLOR | {"task": "color", "instruction": " "}, "instruction is empty: the task would"),
        (COLOR | {"prompt": "x"}, "prompt and input are both there; keep one"),
        (COLOR | {"messages": []}, "messages and input are both there; keep one"),
        ({"prompt": "x"}, "no column 'completion'"),
        ({"messages": "x"}, "messages should be a list of turns"),
        ({"messages": [1]}, "messages should be a list of turns"),
        ({"messages": []}, "messages has the roles ; expected user and assistant"),
        ({"messages": [{"role": "user", "content": "x"}]}, "messages has the roles user; expected"),
        (
            {"messages": [{"role": "user", "content": None}, {"role": "assistant"}]},
            "the content of",
        ),
        (COLOR | {"choices": ["green"], "answer": 0}, "choices should be a list of two or more"),
        (COLOR | {"choices": ["green", 1], "answer": 0}, "choices should be a list of two or more"),
        (
            COLOR | {"choices": ["green", "green"], "answer": 0},
            "choices has an empty choice, or one",
        ),
        (COLOR | {"choices": ["green", " "], "answer": 0}, "choices has an empty choice, or one"),
        (COLOR | {"choices": ["green", "red"]}, "no column 'answer'"),
        (COLOR | {"choices": ["green", "red"], "answer": 2}, "answer is 2; expected an index"),
        (COLOR | {"choices": ["green", "red"], "answer": -1}, "answer is -1; expected an index"),
        (
            COLOR | {"choices": ["green", "red"], "answer": True},
            "answer is True; expected an index",
        ),
        (COLOR | {"choices": ["green", "red"], "answer": "blue"}, "answer is 'blue'; expected"),
        (
            COLOR | {"choices": ["green", "red"], "answer": 1},
            "output is not the choice that answer",
        ),
        ({"prompt": [turn("user", "x")]}, "no column 'completion'"),
        ({"prompt": [turn("user", "x")], "completion": "y"}, "completion should be a list of"),
        ({"prompt": "x", "completion": [turn("assistant", "y")]}, "completion should be a string"),
        ({"prompt": ["x"], "completion": [turn("assistant", "y")]}, "prompt should be a list of"),
        (
            {"prompt": [turn("system", "x")], "completion": [turn("assistant", "y")]},
            "prompt and completion has the roles system, assistant; expected",
        ),
        (
            {"messages": [turn("user", "x"), turn("assistant", "y"), turn("user", "z")]},
            "messages has the roles user, assistant, user; expected",
        ),
        (
            COLOR
            | {
                "input": None,
                "messages": [
                    turn("system", "a"),
                    turn("user", "x"),
                    turn("assistant", "y"),
                ],
            },
            "instruction and a system turn are both there; keep one",
        ),
    ],
)
def test_a_malformed_row_is_refused_with_file_line_and_column(tmp_path, row, message):
    for file, location in (("jsonl", "line"), ("json", "item")):
        path = tmp_path / f"mine.{file}"
        WRITERS[file](path, [COLOR, row])
        with pytest.raises(UserError) as error:
            load_row_tasks(path)
        assert f"mine.{file}, {location} 2: {message}" in str(error.value)


def test_a_named_task_has_choices_in_all_of_its_rows_or_in_none(tmp_path):
    path = tmp_path / "mine.jsonl"
    free = COLOR | {"task": "color"}
    chosen = free | {"input": "sky", "output": "blue", "choices": ["red", "blue"], "answer": 1}
    WRITERS["jsonl"](path, [free, chosen])
    with pytest.raises(UserError, match=r"line 2: task 'color' has rows with choices and rows"):
        load_row_tasks(path)
    WRITERS["jsonl"](path, [free, chosen | {"task": "another"}])
    assert [task.name for task in load_row_tasks(path)[0]] == ["another", "color"]


@pytest.mark.parametrize("line", ["{", '{"a": 1} {}', '["instruction"]', "3", '{"input": NaN}'])
def test_a_line_that_is_no_object_is_refused_with_file_and_line(tmp_path, line):
    path = tmp_path / "mine.jsonl"
    path.write_text(f"{json.dumps(COLOR)}\n\n{line}\n")
    with pytest.raises(UserError, match=r"mine\.jsonl, line 3\b"):
        load_row_tasks(path)


def test_a_malformed_row_of_a_parquet_file_is_refused_with_its_number(tmp_path):
    WRITERS["parquet"](tmp_path / "mine.parquet", [COLOR | {"n": 1}, {"output": "green", "n": 2}])
    with pytest.raises(UserError, match=r"mine\.parquet, row 2: no column instruction, messages"):
        load_row_tasks(tmp_path / "mine.parquet")


@pytest.mark.parametrize("entry", ["input", "inputs=x", "=x", "input="])
def test_a_wrong_name_of_a_column_is_refused(entry):
    with pytest.raises(UserError, match=r"data.columns has .*; expected FIELD=COLUMN"):
        MixtureConfig(sources=("mine.jsonl",), columns=(entry,))


# --- samples -------------------------------------------------------------------------------------


def task_of(rows, name="a", wordings=("Do it.",)):
    return RowTask(name, wordings, tuple(Item(f"in {i}", (f"out {i}",)) for i in range(rows)))


@pytest.mark.parametrize("rows, shots, asked", [(1, 0, 1), (2, 1, 1), (5, 3, 2), (9, 3, 4)])
def test_shots_come_first_and_no_row_is_there_twice(rows, shots, asked):
    source = RowSource([task_of(rows)], "mine", IO)
    for index in range(rows):
        for seed in range(20):
            episode = source.episode(index, rng(seed), shots=3, queries=4)
            inputs = [question for question, _ in episode.questions]
            assert (len(episode.shots), len(inputs)) == (shots, asked)
            assert inputs[0] == f"Input: in {index}\nOutput:"
            texts = [*("".join(pair) for pair in episode.questions), *episode.shots]
            assert len(set(texts)) == shots + asked


def test_rows_with_the_same_input_are_not_shown_beside_each_other():
    items = (Item("in", ("a",)), Item("in", ("b",)), Item("else", ("c",)))
    source = RowSource([RowTask("a", ("Do it.",), items)], "mine", PLAIN)
    for seed in range(10):
        episode = source.episode(1, rng(seed), shots=2, queries=1)
        assert episode.questions == (("in", " b"),)
        assert episode.shots == ("else c",)


def test_wordings_and_correct_outputs_are_drawn():
    task = RowTask("a", ("One.", "Two."), (Item("in", ("x", "y")), Item("other", ("z",))))
    source = RowSource([task], "mine", Frame("<{input}>", "="))
    drawn = [source.episode(0, rng(seed), 0, 1) for seed in range(30)]
    assert {episode.instruction for episode in drawn} == {"One.", "Two."}
    assert {episode.questions[0] for episode in drawn} == {("<in>", "=x"), ("<in>", "=y")}


# --- held out ------------------------------------------------------------------------------------

TASKS = [task_of(10, f"task {i}", (f"One {i}.", f"Two {i}.", f"Three {i}.")) for i in range(10)]


def test_tasks_wordings_and_rows_are_kept_back_from_training():
    train, held = split(TASKS, HeldOut(tasks=0.2, wordings=0.3, rows=0.1))
    assert len(train) == 8 and len(held["tasks"]) == 2
    names = {task.name for task in held["tasks"]}
    assert names.isdisjoint(task.name for task in train)
    for task, wordings, rows in zip(train, held["wordings"], held["rows"], strict=True):
        assert (len(task.instructions), len(wordings.instructions)) == (2, 1)
        assert (len(task.items), len(rows.items)) == (9, 1)
        assert wordings.items == task.items and rows.instructions == task.instructions
        assert set(task.instructions).isdisjoint(wordings.instructions)
        assert set(task.items).isdisjoint(rows.items)
    assert split(TASKS[::-1], HeldOut(tasks=0.2))[1]["tasks"] == held["tasks"][::-1]
    assert split(TASKS, HeldOut(tasks=0.2, seed=1))[1]["tasks"] != held["tasks"]


def test_one_of_two_is_kept_back_and_never_all():
    assert len(keep_back(["a", "b"], 0.01, 0)) == len(keep_back(["a", "b"], 0.99, 0)) == 1
    assert keep_back(["a"], 0.5, 0) == keep_back(["a", "b"], 0.0, 0) == set()
    with pytest.raises(UserError, match="there are no two wordings to keep one of"):
        split([task_of(3)], HeldOut(wordings=0.5))


def test_what_is_held_out_is_refused_where_it_enters_training(tmp_path):
    train, held = split(TASKS, HeldOut(tasks=0.2, rows=0.1))
    source = RowSource(train, "mine", IO)
    refuse_held_out(source.pairs(), held, "mine")
    for leaked in (held["tasks"][0], held["rows"][0]):
        with pytest.raises(UserError, match=r"mine holds a row of .* to be evaluated on"):
            refuse_held_out(RowSource([leaked], "mine", IO).pairs(), held, "mine")
    path = write_lines(tmp_path / "a.jsonl", [COLOR, COLOR | {"input": "snow"}])
    other = write_lines(tmp_path / "b.jsonl", [COLOR])
    config = MixtureConfig(sources=(str(path),), evaluate_on=(str(other),))
    with pytest.raises(UserError, match=r"a holds a row of b, .*'grass' under 'Name the color\.'"):
        config.open(None)


def test_a_config_of_own_rows_evaluates_on_nothing_that_is_not_named(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [COLOR, COLOR | {"input": "snow", "output": "white"}])
    config = MixtureConfig(sources=(str(path),))
    assert config.evaluate_on == ()
    assert MixtureConfig().evaluate_on == ("arc_challenge", "boolq", "hellaswag", "winogrande")
    opened = MixtureConfig(sources=(str(path),), held_out=HeldOut(rows=0.5), frame="plain").open(
        None
    )
    assert opened.frame == PLAIN
    assert [len(task.items) for task in opened.held["held_out_rows"]] == [1]
    assert len(opened.sources[0]) == 1
    with pytest.raises(UserError, match=r"data.held_out is of files of rows"):
        MixtureConfig(sources=("alpaca",), held_out=HeldOut(rows=0.5))


def test_counts_of_alpaca(shared_data):
    (path,) = (shared_data / "alpaca").glob("*.jsonl.gz")
    tasks, left_out = load_row_tasks(path)
    assert left_out == 10
    assert sum(len(task.items) for task in tasks) <= 20_668
    [requests] = [task for task in tasks if task.instructions == (ASSISTANT,)]
    assert 13_000 < len(requests.items) <= 13_568
