"""Orders: what is held out is held out, classes are balanced, bad files are refused by line, and
the controls are what they are called."""

import dataclasses
import gzip
import itertools
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from lorax_gen.cli.main import run
from lorax_gen.data.own_tasks import load_row_tasks
from lorax_gen.errors import UserError
from lorax_gen.models.huggingface import load_model

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "orders"
HELD = ("orders", "words", "attribute")


@pytest.fixture(scope="module")
def scripts():
    """The scripts as modules: they are run from their own folder."""
    sys.path.insert(0, str(FOLDER))
    try:
        import evaluate
        import make
        import wordings

        yield make, evaluate, wordings
    finally:
        sys.path.remove(str(FOLDER))
        for name in ("evaluate", "make", "wordings"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def made(scripts, tmp_path_factory):
    """A small set of orders about texts that say their label."""
    make, _, wordings = scripts
    folder = tmp_path_factory.mktemp("orders")
    labels = {wordings.NEWS: list(wordings.TOPICS), wordings.FILM: ["Good", "Bad"]}
    attributes = wordings.ATTRIBUTES.values()
    labels[wordings.THING] = [own for source, own, _ in attributes if source == wordings.THING]
    for source, split in itertools.product(labels, ("train", "test")):
        rows = [
            {"text": f"{split} text {i} of {label}", "label": label}
            for label in labels[source]
            for i in range(100 if source == wordings.THING else 20)
        ]
        with gzip.open(folder / f"{source}.{split}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    options = make.Options(folder, folder / "made", orders=30, rows=8, held_orders=8, held_rows=4)
    make.main(options)
    return make, options


def rows_of(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_nothing_that_is_held_out_is_trained_on(made, scripts):
    _, options = made
    *_, wordings = scripts
    train = rows_of(options.output, "train")
    inputs, tasks, said = ({row[key] for row in train} for key in ("input", "task", "instruction"))
    for name in ("texts", "wordings", "probe", *HELD):
        assert inputs.isdisjoint(row["input"] for row in rows_of(options.output, name)), name
    for name in HELD:
        assert tasks.isdisjoint(row["task"] for row in rows_of(options.output, name)), name
    for name in ("texts", "wordings", "probe"):
        assert tasks.issuperset(row["task"] for row in rows_of(options.output, name)), name
    assert said.isdisjoint(row["instruction"] for row in rows_of(options.output, "wordings"))
    unseen = {word for pair in wordings.UNSEEN_PAIRS for word in pair}
    assert unseen.isdisjoint(word for row in train for word in row["choices"])
    assert {word for row in rows_of(options.output, "words") for word in row["choices"]} <= unseen
    assert not any(task.startswith(wordings.UNSEEN_ATTRIBUTE) for task in tasks)


@pytest.mark.parametrize("name", ["train", "probe", *HELD])
def test_every_answer_of_an_order_is_as_frequent_and_correct(made, name):
    make, options = made
    for task in load_row_tasks(options.output / f"{name}.jsonl")[0]:
        order = make.parse(task.name)
        assert len(set(Counter(item.answer for item in task.items).values())) == 1
        for item in task.items:
            label = item.input.partition(" of ")[2]
            assert item.outputs == (order.words[order.answer(label)],)


def test_a_text_has_other_answers_in_other_orders(made):
    _, options = made
    answers = {}
    for row in rows_of(options.output, "train"):
        answers.setdefault(row["input"], []).append(row["choices"][row["answer"]])
    asked = [found for found in answers.values() if len(found) > 1]
    assert len(asked) > 20
    assert np.mean([len(set(found)) > 1 for found in asked]) > 0.9


def test_the_rows_depend_on_the_seed_alone_and_more_orders_hold_fewer(made):
    make, options = made
    assert make.make(options) == make.make(options)
    other = make.make(dataclasses.replace(options, seed=1))
    assert other["train.jsonl"] != make.make(options)["train.jsonl"]
    few, many = (make.split_orders(count, 0) for count in (50, 400))
    assert set(few.train) < set(many.train)
    assert set(few.orders) == set(many.orders)
    with pytest.raises(UserError, match="--orders is 4000; there are at most about"):
        make.split_orders(4000, 0)


def test_every_wording_names_all_words_once_and_is_unlike_the_others(scripts):
    make, _, wordings = scripts
    orders = [make.Order(name, ("red", "blue")) for name in wordings.ATTRIBUTES]
    for order in [*orders, make.Order("topic", wordings.FOURS[0])]:
        found = order.wordings()
        assert len(set(found)) == len(found) >= 20 + wordings.HELD
        for text in found:
            assert all(f'"{word}"' in text for word in order.words), text
            assert "{" not in text


EDITS = {
    "an input of both": ("texts", "input", "the input '"),
    "a wording of both": ("wordings", "instruction", "the wording '"),
    "a task of both": ("orders", "task", "the task '"),
}


@pytest.mark.parametrize("case", EDITS)
def test_what_is_trained_on_and_held_out_is_refused_by_file_and_line(made, tmp_path, case):
    make, options = made
    name, column, message = EDITS[case]
    trained = rows_of(options.output, "train")[0]
    rows = rows_of(options.output, name)
    if column == "task":  # all of its rows, so that nothing else is wrong
        first = rows[0]["task"]
        rows = [
            row | {"task": trained["task"], "choices": trained["choices"]}
            if row["task"] == first
            else row
            for row in rows
        ]
    else:
        rows[0][column] = trained[column]
    with pytest.raises(UserError, match=f"{name}.jsonl, line 1: {message}.*train.jsonl, line"):
        make.check(copy(options.output, tmp_path, name, rows))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"answer": "green"}, "answer is 'green'; expected an index"),
        ({"instruction": ""}, "instruction is empty: the task would have no prompt"),
        ({"instruction": ["One.", " "]}, "instruction has an empty text"),
        ({"task": ""}, "expected a task, an instruction and an answer"),
        ({"choices": None, "answer": None, "output": "red"}, "no column 'choices'"),
        ({"choices": ["up", "down"], "answer": 0}, "the choices up, down are not those of"),
    ],
)
def test_a_bad_row_is_refused_by_file_and_line(made, tmp_path, edit, message):
    make, options = made
    rows = rows_of(options.output, "train")
    rows[2] |= edit
    with pytest.raises(UserError, match=f"train.jsonl, line 3: {message}"):
        make.check(copy(options.output, tmp_path, "train", rows))


@pytest.mark.parametrize("kept", [0, 1])
def test_an_order_with_a_single_or_a_rarer_answer_is_refused(made, tmp_path, kept):
    make, options = made
    rows = rows_of(options.output, "train")
    first = rows[0]["task"]
    last = max(row["answer"] for row in rows if row["task"] == first)
    rare = [row for row in rows if row["task"] == first and row["answer"] == last]
    rows = [row for row in rows if row not in rare[kept:]]
    with pytest.raises(UserError, match=r"train.jsonl, line 1: the answers of .* not balanced"):
        make.check(copy(options.output, tmp_path, "train", rows))


def copy(source, target, name, rows):
    """A copy of the files, one with other rows."""
    for path in source.glob("*.jsonl"):
        (target / path.name).write_text(path.read_text())
    (target / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return target


# --- the controls --------------------------------------------------------------------------------


def test_the_other_order_has_as_many_answers_in_other_words(made, scripts):
    make, evaluate, _ = scripts
    tasks, _ = load_row_tasks(made[1].output / "train.jsonl")
    found = evaluate.others(tasks)
    assert set(found) == {task.name for task in tasks}
    for name, other in found.items():
        own, order = make.parse(name), make.parse(other.name)
        assert len(order.words) == len(own.words)
        assert not set(order.words) & set(own.words)


def test_a_swapped_prompt_is_that_of_the_exchanged_order(scripts):
    make, evaluate, _ = scripts
    order, exchanged = make.Order("sports", ("red", "blue")), make.Order("sports", ("blue", "red"))
    text = evaluate.swapped(order, 0)
    assert text != order.wordings()[0]
    assert text.index('"blue"') < text.index('"red"')
    assert evaluate.swapped(order, 0).count('"') == exchanged.wordings()[0].count('"')
    four = make.Order("topic", ("spring", "summer", "autumn", "winter"))
    assert all(f'"{word}"' in evaluate.swapped(four, 0) for word in four.words)


def test_a_held_wording_is_never_one_of_training(made, scripts):
    _, evaluate, _ = scripts
    tasks, _ = load_row_tasks(made[1].output / "texts.jsonl")
    asked = evaluate.asked_rows(tasks)
    assert evaluate.told("own", asked) == tuple(case.wording for case in asked)
    train = {row["instruction"] for row in rows_of(made[1].output, "train")}
    assert train.isdisjoint(evaluate.told("wording", asked))


def test_scores_are_means_over_orders_and_margins_their_differences(made, scripts):
    _, evaluate, _ = scripts
    tasks = load_row_tasks(made[1].output / "train.jsonl")[0][:3]
    own, other = ([1, 1, 1, 0], [1, 1], [0]), ([0, 0, 0, 0], [1, 1], [1])
    results = {
        mode: [
            {"task": task.name, "choice_accuracy": score}
            for task, scores in zip(tasks, values, strict=True)
            for score in scores
        ]
        for mode, values in (("own", own), ("other", other))
    }
    found = evaluate.report(results, tasks)["all"]
    assert found["own"]["score"] == pytest.approx(np.mean([0.75, 1, 0]))  # of rows: 5 / 7
    margins = [0.75, 0.0, -1.0]
    assert found["own - other"]["score"] == pytest.approx(np.mean(margins))
    assert found["own - other"]["stderr"] == pytest.approx(np.std(margins, ddof=1) / 3**0.5)
    assert found["own"]["orders"] == 3


def test_the_latest_checkpoint_of_a_run_is_the_generator_that_it_releases(scripts, tmp_path):
    _, evaluate, _ = scripts
    command = ["train", "own-tasks", "--run.steps", "2", "--run-dir", str(tmp_path / "run")]
    assert run([*command, "--run.evaluate-every", "2", "--data.evaluate-questions", "2"]) == 0
    cloud, edge = load_model("world/cloud"), load_model("world/edge")
    found = evaluate.open_generator(tmp_path / "run", cloud, edge)
    released = evaluate.open_generator(tmp_path / "run" / "released", cloud, edge)
    assert found.fingerprint == released.fingerprint
    assert found.frame == released.frame
    (tmp_path / "none" / "checkpoints").mkdir(parents=True)
    (tmp_path / "none" / "config.yaml").write_text((tmp_path / "run" / "config.yaml").read_text())
    with pytest.raises(UserError, match="has no checkpoint yet"):
        evaluate.open_generator(tmp_path / "none", cloud, edge)
