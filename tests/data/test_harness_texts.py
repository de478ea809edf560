"""Our texts are those of lm-evaluation-harness: its own tasks, on rows that hold every oddity."""

from functools import partial

import pytest

from lorax_gen.data.benchmarks import REASONING, few_shot, find_benchmark, harness_shots
from tests.data.rows import make_questions, make_rows

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'lorax-gen[harness]'")

from datasets import Dataset
from lm_eval.tasks import TaskManager

ITEMS, TRAIN = 12, 40


@pytest.fixture(scope="module")
def manager():
    return TaskManager()


@pytest.fixture
def requests(manager, monkeypatch):
    """`requests(name, train, items, shots)`: what the harness asks a model for.

    That is `(context, continuation)` of each choice of each item; and the right choice of each.
    """
    return partial(ask, manager, monkeypatch)


def ask(manager, monkeypatch, name, train, items, shots):
    record = find_benchmark(name)
    splits = {record.hub.splits["train"]: train, record.hub.splits["test"]: items}
    data = {split: Dataset.from_list(rows) for split, rows in splits.items()}
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: data)
    task = manager.load([name])["tasks"][name]
    task.set_config("num_fewshot", shots)
    task.set_fewshot_seed(1234)
    task.build_all_requests()
    found = [[] for _ in items]
    for instance in task.instances:
        found[instance.doc_id].append(instance.args)
    gold = [
        task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
        for doc in task.eval_docs
    ]
    return found, [int(answer) for answer in gold]


@pytest.mark.parametrize("shots", [0, 5])
@pytest.mark.parametrize("name", REASONING)
def test_contexts_and_choices_are_those_of_the_harness(requests, tmp_path, name, shots):
    train, items = make_rows(name, TRAIN), make_rows(name, ITEMS, first=TRAIN - 2)
    expected, gold = requests(name, train, items, shots)
    record = find_benchmark(name)
    questions = make_questions(tmp_path, name, ITEMS, first=TRAIN - 2)
    drawn = harness_shots(record, make_questions(tmp_path, name, TRAIN), shots, questions)
    assert [question.answer for question in questions] == gold
    for question, chosen, found in zip(questions, drawn, expected, strict=True):
        contexts, continuations = few_shot(record, chosen, question), record.continuations(question)
        if len(contexts) == 1:
            contexts *= len(continuations)
        assert list(zip(contexts, continuations, strict=True)) == found


@pytest.mark.parametrize("name", ["arc_easy", "boolq", "piqa"])
def test_an_item_among_the_shots_is_left_out_where_the_harness_does(requests, tmp_path, name):
    """Items that stand in the training split too, and are often among the 6 rows of 8 drawn."""
    rows = make_rows(name, 8)
    expected, _ = requests(name, rows, rows, 5)
    record, questions = find_benchmark(name), make_questions(tmp_path, name, 8)
    drawn = harness_shots(record, questions, 5, questions)
    assert [few_shot(record, c, q)[0] for c, q in zip(drawn, questions, strict=True)] == [
        found[0][0] for found in expected
    ]
