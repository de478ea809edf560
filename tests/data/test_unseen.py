"""Nothing made from an unseen benchmark is trained on: neither by name nor by text."""

import dataclasses

import pytest

from lorax_gen.data.benchmarks import find_benchmark, load_questions
from lorax_gen.data.instructions import NaturalSource, NaturalTask, load_tasks
from lorax_gen.data.own_tasks import RowSource, load_row_tasks
from lorax_gen.data.sources import QuestionSource
from lorax_gen.data.unseen import UNSEEN, refuse_name, refuse_unseen, unseen_texts
from lorax_gen.errors import UserError
from lorax_gen.frames import IO
from tests.data.rows import make_rows, write_lines

CLEAN = NaturalTask("task500_seasons", "Name it.", (("a", "b"),), (("c", ("d",)),))


def test_the_unseen_are_the_papers_three():
    assert set(UNSEEN) == {"hellaswag", "winogrande", "piqa"}


@pytest.mark.parametrize(
    "name",
    [
        "hellaswag",
        "HellaSwag train",
        "hella-swag",
        "winogrande_xl",
        "Wino_Grande",
        "PIQA",
        "data/piqa.train.jsonl",
        "physical_iqa",
        "subtask029_winogrande_full_object",
        *(f"subtask0{i}_renamed" for i in range(29, 36)),
        "task031_renamed",
    ],
)
def test_names_that_are_refused(name):
    with pytest.raises(UserError, match=r"must not be trained on: (hellaswag|winogrande|piqa)"):
        refuse_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "arc_easy",
        "social_iqa",
        "subtask028_x",
        "subtask036_qasc",
        "task290_x",
        "task0350_x",
        "swag",
    ],
)
def test_names_that_are_not(name):
    refuse_name(name)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "task1_hellaswag_completion"},
        {"name": "subtask032_person"},
        {"source": '{"Source": ["winogrande (https://example.org)"]}'},
        {"definition": "This task is made from the PIQA data set."},
    ],
)
def test_a_task_made_from_one_is_refused(change):
    with pytest.raises(UserError, match="must not be trained on"):
        NaturalSource([CLEAN, dataclasses.replace(CLEAN, **change)])
    assert len(NaturalSource([CLEAN])) == 1


def test_rows_called_so_are_refused():
    with pytest.raises(UserError, match="must not be trained on: piqa"):
        RowSource([], "piqa.train", IO)


def test_every_real_task_from_winogrande_is_refused(shared_data):
    (path,) = (shared_data / "multitask").glob("natural_instructions_v1*")
    tasks = load_tasks(path, only=["subtask029*", "subtask03[1-5]*"])
    assert len(tasks) == 6
    for task in tasks:
        with pytest.raises(UserError, match="must not be trained on: winogrande"):
            NaturalSource([task])


# --- texts ---------------------------------------------------------------------------------------


def test_texts_of_the_unseen_come_from_the_files_that_are_there(tmp_path):
    assert unseen_texts(tmp_path) == []
    write_lines(tmp_path / "winogrande.test.jsonl", make_rows("winogrande", 1))
    write_lines(tmp_path / "piqa.train.jsonl", make_rows("piqa", 2))
    write_lines(tmp_path / "arc_easy.test.jsonl", make_rows("arc_easy", 2))
    sentence = "The cup did not fit into the box because {} was too big."
    assert unseen_texts(tmp_path) == [
        sentence.format("_"),
        sentence.format("the cup"),
        sentence.format("the box"),
        "open a jar",
        "turn the lid",
        "turn the table ",
        "Which of these is hard, goal 1",
        "Which of these is hard, one 1",
        "Which of these is hard, two 1",
    ]


def test_a_planted_question_is_found_whatever_its_punctuation():
    unseen = ["The cup did not fit into the box because the cup was too big."]
    planted = 'Explain: "the CUP did not fit -- into the box, because the cup was too big"?'
    refuse_unseen(["The cup did not fit into the box", "because it was big " * 20], unseen)
    refuse_unseen([planted.replace("too", "very")], unseen)
    with pytest.raises(UserError, match=r"alpaca holds a question of an unseen.*'the cup did"):
        refuse_unseen(["clean", planted], unseen, "alpaca")


@pytest.mark.parametrize(
    "planted",
    [
        "Fill in: The cup did not fit into the box because _ was too big. Options: cup, box",
        "A woman kneads dough on a table. She",  # without the activity
        "puts all of it into the oven for an hour",  # an ending alone
        "Turn the lid with a wet cloth until it gives.",  # a solution, whose goal is short
    ],
)
def test_a_question_is_found_in_the_other_forms_that_data_have_it_in(tmp_path, planted):
    ending = "puts all of it into the oven for an hour."
    hellaswag, piqa = make_rows("hellaswag", 1), make_rows("piqa", 1)
    hellaswag[0]["endings"] = [ending, *hellaswag[0]["endings"][1:]]
    piqa[0]["sol1"] = "turn the lid with a wet cloth until it gives"
    write_lines(tmp_path / "hellaswag.test.jsonl", hellaswag)
    write_lines(tmp_path / "winogrande.test.jsonl", make_rows("winogrande", 1))
    write_lines(tmp_path / "piqa.test.jsonl", piqa)
    with pytest.raises(UserError, match="holds a question of an unseen benchmark"):
        refuse_unseen([planted], unseen_texts(tmp_path))


def test_the_task_that_holds_one_is_named():
    unseen = ["the cup did not fit into the box because it was too big"]
    task = dataclasses.replace(CLEAN, instances=((unseen[0], ("d",)),))
    with pytest.raises(UserError, match="in 'task500_seasons: the cup did"):
        refuse_unseen(NaturalSource([task]).texts(), unseen)


def test_short_texts_are_not_looked_for():
    refuse_unseen(["How do I open a jar?"], ["open a jar"])


def test_the_real_training_sets_hold_no_unseen_question(shared_data):
    """And what is made from one holds some: the search can find them."""
    unseen = unseen_texts(shared_data / "reasoning")
    for name in ("arc_challenge", "arc_easy", "openbookqa", "boolq", "social_iqa"):
        record = find_benchmark(name)
        train = load_questions(record, "train", shared_data / "reasoning")
        refuse_unseen(QuestionSource(record, train).texts(), unseen)
    (path,) = (shared_data / "alpaca").glob("*.jsonl.gz")
    refuse_unseen(RowSource(load_row_tasks(path)[0], "alpaca", IO).texts(), unseen)
    (path,) = (shared_data / "multitask").glob("natural_instructions_v1*")
    (task,) = load_tasks(path, only=["subtask033*"])
    with pytest.raises(UserError, match="holds a question of an unseen benchmark"):
        refuse_unseen((text for text, _ in task.instances), unseen)
