"""A YAML file describes a benchmark of one's own; what it does not say is refused, not guessed."""

import json

import pytest

from lorax_gen.data.benchmarks import (
    BENCHMARKS,
    few_shot,
    harness_shots,
    load_questions,
    load_shots,
)
from lorax_gen.data.own_benchmarks import load_benchmark
from lorax_gen.data.questions import Question
from lorax_gen.documents import to_yaml
from lorax_gen.errors import UserError
from tests.data.rows import write_lines

SPEC = {
    "name": "capitals",
    "description": "Choose the capital.",
    "template": "{hint}\nCountry {number}: {country}\nCapital:",
    "choices": "options",
    "answer": "label",
    "test": "rows.jsonl",
}
ROW = {"country": "{Chad}", "number": 1, "hint": "", "options": ["Oslo", "N'Djamena"], "label": 1}
QUESTION = Question("capitals-test-0", "Country 1: {Chad}\nCapital:", ("Oslo", "N'Djamena"), 1)


@pytest.fixture
def write(tmp_path):
    def write(*rows, **changes):
        spec = {key: value for key, value in (SPEC | changes).items() if value is not None}
        (tmp_path / "mine.yaml").write_text(to_yaml(spec))
        write_lines(tmp_path / "rows.jsonl", rows or [ROW])
        return tmp_path / "mine.yaml"

    return write


def test_questions_are_what_the_template_makes_of_a_row(write):
    record = load_benchmark(write())
    assert load_questions(record, "test") == [QUESTION]
    assert record.contexts(QUESTION) == (QUESTION.question,)
    assert record.continuations(QUESTION) == (" Oslo", " N'Djamena")
    assert (record.title, record.unseen) == ("capitals", False)


@pytest.mark.parametrize(
    "row, changes",
    [
        ({"label": "N'Djamena"}, {}),
        ({"hint": None}, {}),
        ({"a": "Oslo", "b": "Djamena"}, {"choices": ["{a}", "N'{b}"]}),
        ({"label": "N'Djamena"}, {"choices": ["Oslo", "N'Djamena"]}),
        ({"capital": 1}, {"answer": "capital"}),
    ],
)
def test_choices_and_answers_have_several_forms(write, row, changes):
    assert load_questions(load_benchmark(write(ROW | row, **changes)), "test") == [QUESTION]


def test_rows_in_the_projects_own_form_go_through_the_template_too(write):
    row = {"question": "Which?", "choices": ["a", "b"], "answer": 0, "id": "7"}
    changes = {"template": "Q: {question}", "choices": None, "answer": None}
    [question] = load_questions(load_benchmark(write(row, **changes)), "test")
    assert question == Question("7", "Q: Which?", ("a", "b"), 0)


def test_a_blank_is_replaced_by_the_choices(write):
    row = ROW | {"country": "It is _ here.", "options": ["warm", "cold"]}
    record = load_benchmark(write(row, template="{country}", blank="_"))
    [question] = load_questions(record, "test")
    assert record.contexts(question) == ("It is warm", "It is cold")
    assert record.continuations(question) == (" here.", " here.")


def test_shots_are_never_the_question_itself(write, tmp_path):
    rows = [ROW | {"number": i, "label": i % 2} for i in range(4)]
    record = load_benchmark(write(*rows, train="rows.jsonl"))
    asked, train = load_questions(record, "test"), load_shots(record)
    for shots, question in zip(harness_shots(record, train, 3, asked), asked, strict=True):
        assert question.question not in [shot.question for shot in shots]
        (text,) = few_shot(record, shots, question)
        assert text.count("Capital:") == 4 and text.count(f"Country {question.question[8]}") == 1
    write_lines(tmp_path / "other.jsonl", rows[:2])
    record = load_benchmark(write(*rows, train="other.jsonl"))
    assert [q.question for q in load_shots(record)] == [q.question for q in asked[:2]]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"descripton": "x"}, "unknown key descripton; did you mean description"),
        ({"template": None}, "template is missing"),
        ({"template": "Country:"}, "template names no column"),
        ({"template": "{country!r}"}, "should have only names of columns in braces"),
        ({"template": "{country:>9}"}, "should have only names of columns in braces"),
        ({"template": "{}"}, "should have only names of columns in braces"),
        ({"template": "{country"}, "is no template"),
        ({"name": "boolq"}, "there is a benchmark boolq; choose another name"),
        ({"name": "a/b"}, "expected letters, digits"),
        ({"description": " "}, "description is empty"),
        ({"test": None}, "expected either test, a file, or hub"),
        ({"choices": ["yes"]}, "choices has 1 texts; expected two or more"),
        ({"choices": 3}, "choices is 3; expected"),
        ({"hub": {"path": "a/b", "config": None, "revision": "main", "splits": {"test": "test"}}},
         "expected either test, a file, or hub"),
        ({"test": None, "hub": {"path": "a/b", "config": None, "revision": "x", "split": {}}},
         "unknown key hub.split; did you mean hub.splits"),
        ({"test": None, "hub": {"path": "a/b", "config": None, "revision": "x", "splits": {}}},
         "hub.splits should name the split of test"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_a_benchmark_is_refused(write, changes, message):
    with pytest.raises(UserError, match=r"mine\.yaml: ") as refusal:
        load_benchmark(write(**changes))
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"label": 2}, "answer 2 is out of range"),
        ({"label": True}, "label is True; expected the index of a choice, or one of Oslo"),
        ({"label": "Paris"}, "label is 'Paris'; expected the index"),
        ({"options": ["Oslo", "Oslo"]}, "all different"),
        ({"options": "Oslo"}, "options should be a list"),
        ({"country": ["Chad"]}, "country should be a string or a number"),
    ],
)
def test_a_malformed_row_is_refused_with_its_line(write, row, message):
    record = load_benchmark(write(ROW, ROW | row))
    with pytest.raises(UserError, match=r"rows\.jsonl, line 2: ") as refusal:
        load_questions(record, "test")
    assert message in str(refusal.value)


def test_what_the_file_lacks_is_named(write, tmp_path):
    record = load_benchmark(write({"country": "Chad"}))
    with pytest.raises(UserError, match=r"line 1: no column 'hint'; it has country"):
        load_questions(record, "test")
    with pytest.raises(UserError, match="capitals names no file of its split 'train'; shots are"):
        load_shots(record)
    with pytest.raises(UserError, match=r"cannot read .*none\.jsonl"):
        load_questions(load_benchmark(write(test="none.jsonl")), "test")
    (tmp_path / "mine.yaml").write_text(json.dumps([SPEC]))
    with pytest.raises(UserError, match="must map names to values"):
        load_benchmark(tmp_path / "mine.yaml")


def test_benchmarks_that_are_quoted_by_acc_norm_say_so():
    quoted = {name for name, record in BENCHMARKS.items() if record.per_character}
    assert quoted == {"arc_challenge", "arc_easy", "openbookqa", "hellaswag", "piqa"}
