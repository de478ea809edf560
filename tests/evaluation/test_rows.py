"""Rows get the metrics that can be counted by hand, floors that never saw their outputs, and the
same results in one go or in two."""

import dataclasses
import json
import math
import subprocess
import sys

import jax
import numpy as np
import pytest

from lorax_gen.data.own_tasks import Item, RowTask
from lorax_gen.errors import UserError
from lorax_gen.evaluation.answerers import System
from lorax_gen.evaluation.floors import floors, majorities
from lorax_gen.evaluation.metrics import exact_match, rouge_l
from lorax_gen.evaluation.rows import (
    Asked,
    RowCases,
    ask_rows,
    cells_of,
    costs_of,
    evaluate_rows,
    row_results,
    scored,
    stop_of,
)
from lorax_gen.frames import IO, PLAIN, Frame
from lorax_gen.inference.choices import ChoiceItem
from lorax_gen.mesh.sharding import MeshConfig, make_mesh
from tests.tiny import make_generator

LABELS = ("alpha", "beta", "gamma")


def task_of(name, *pairs, choices=()):
    items = (Item(text, own if isinstance(own, tuple) else (own,), choices) for text, own in pairs)
    return RowTask(name, (f"Look at the {name} .", f"Put each thing by {name} ."), tuple(items))


COLOR = task_of("color", ("apple :", "alpha"), ("sky :", ("beta", "gamma beta")), ("five :", "red"))
SIZE = task_of("size", ("big :", "beta"), ("tiny :", "alpha"), choices=LABELS)


@pytest.fixture(scope="module")
def system(tiny_world_system):
    return System(
        tiny_world_system.edge, tiny_world_system.cloud, make_generator(tiny_world_system)
    )


def loglikelihood(model, context, continuation):
    """From the logits of one forward pass, and the number of tokens."""
    before, both = model.encode(context), model.encode(context + continuation)
    logits = jax.nn.log_softmax(np.asarray(model(np.array([both]))[0]), -1)
    found = [logits[i - 1, both[i]] for i in range(len(before), len(both))]
    return float(sum(found)), len(found)


# --- scores of texts -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer, outputs, exact, rouge",
    [
        ("a b c d", ["a x c"], False, 4 / 7),  # a c: precision 2/4, recall 2/3
        (" Green\n", ["green"], True, 1.0),
        ("green", ["red", "green"], True, 1.0),
        ("the cat", ["a dog", "the black cat"], False, 0.8),  # the best: precision 1, recall 2/3
        ("b a", ["a b"], False, 0.5),  # a subsequence keeps its order
        ("", ["green"], False, 0.0),
        ("das Übermaß", ["Übermaß, das"], False, 0.5),
        ("🙂", ["🙂"], True, 0.0),  # no word in it
    ],
)
def test_texts_are_scored_by_the_best_of_the_correct_ones(answer, outputs, exact, rouge):
    assert exact_match(answer, outputs) == exact
    assert rouge_l(answer, outputs) == pytest.approx(rouge)


def test_rouge_is_loaded_with_the_first_text_and_needs_no_download():
    script = (
        "import sys; from lorax_gen.evaluation import metrics, rows;"
        "assert 'rouge_score' not in sys.modules;"
        "import socket; socket.socket = None; print(metrics.rouge_l('a b', ['a']))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, str(2 / 3)), done.stderr


# --- rows ----------------------------------------------------------------------------------------


def test_every_task_gets_as_many_rows_and_wordings_take_turns():
    large = task_of("place", *((f"thing {i} :", "alpha") for i in range(9)))
    asked = ask_rows([COLOR, large], 8)
    assert [case.task.name for case in asked] == ["color", "place"] * 3 + ["place"] * 2
    assert [case.wording for case in asked if case.task is large] == [
        large.instructions[n % 2] for n in range(5)
    ]
    assert len({case.item for case in asked}) == 8
    assert len(ask_rows([COLOR, large])) == 12 and ask_rows([COLOR, large], 8) == asked


def test_other_rows_have_other_inputs():
    twice = task_of("color", ("apple :", "alpha"), ("apple :", "beta"), ("sky :", "red"))
    for case in ask_rows([twice]):
        inputs = [item.input for item in case.others]
        assert case.item.input not in inputs and len(set(inputs)) == len(inputs) == 1


def test_more_shots_than_rows_were_kept_for_are_refused_but_a_task_may_have_fewer():
    asked = ask_rows([task_of("color", *((f"thing {i} :", "red") for i in range(9)))], others=2)
    assert all(len(case.others) == 2 for case in asked)
    with pytest.raises(UserError, match="3 shots, but only 2 of 8 other rows are kept"):
        RowCases(asked, PLAIN, shots=3)
    prompts = RowCases(ask_rows([SIZE]), PLAIN, shots=3).prompts()
    assert [prompt.count(" :") for prompt in prompts] == [1, 1]


def test_models_read_inputs_in_the_frame_and_prompts_before_it():
    chat = Frame("<u>{input}</u>", "", turn=True)
    case = Asked(COLOR, "Look .", COLOR.items[0], COLOR.items[1:])
    for frame, bare, prompted in (
        (PLAIN, "apple :", "Look .\n\nsky : beta\n\napple :"),
        (IO, "Input: apple :\nOutput:",
         "Look .\n\nInput: sky :\nOutput: beta\n\nInput: apple :\nOutput:"),
        (chat, "<u>apple :</u>", "<u>Look .\n\nInput: sky :\nOutput: beta\n\napple :</u>"),
    ):  # fmt: skip
        cases = RowCases([case], frame, shots=1)
        assert cases.bare() == [(bare,)] and cases.prompted() == [(prompted,)]


def test_the_control_reads_the_prompt_of_the_next_task():
    cases = RowCases(ask_rows([COLOR, SIZE]), PLAIN)
    for case, other in zip(cases.asked, cases.other_prompts(), strict=True):
        assert other in (SIZE if case.task is COLOR else COLOR).instructions
    with pytest.raises(UserError, match="needs rows of two tasks"):
        RowCases(ask_rows([COLOR]), PLAIN).other_prompts()


# --- floors --------------------------------------------------------------------------------------


def test_floors_are_counted_by_hand():
    pairs = ("a", "x"), ("b", "x"), ("c", "x"), ("d", "d")
    task = task_of("word", *pairs)
    found = floors(ask_rows([task]))
    halves = majorities(task)
    assert found["majority/exact_match"] == np.mean([halves[text] == own for text, own in pairs])
    assert found["input/exact_match"] == found["input/rouge_l"] == 1 / 4
    assert "chance" not in found and "majority/choice_accuracy" not in found


def test_the_example_floor_is_the_output_of_another_row():
    case = Asked(COLOR, "Look .", COLOR.items[1], (Item("apple :", ("beta red",)),))
    alone = Asked(SIZE, "Look .", SIZE.items[0], ())
    found = floors([case, alone])
    assert found["example/exact_match"] == 0
    assert found["example/rouge_l"] == pytest.approx((2 / 3 + 0) / 2)  # beta of `beta red`
    assert found["chance"] == pytest.approx(1 / 3)


def test_chance_and_floors_of_choices_are_over_the_rows_that_have_some():
    two = task_of("box", ("red :", "alpha"), ("blue :", "alpha"), choices=("alpha", "beta"))
    found = floors(ask_rows([COLOR, SIZE, two]))
    assert found["chance"] == pytest.approx((2 / 3 + 2 / 2) / 4)
    # Each half of `two` has alpha; the halves of `size` have one row each, of different outputs.
    assert found["majority/choice_accuracy"] == pytest.approx(2 / 4)


def test_floors_never_see_the_rows_own_output():
    """Changing the outputs of all rows with an input changes no answer for that input."""
    names = [f"thing {i} :" for i in range(9)]
    before = majorities(task_of("color", *((text, LABELS[len(text) % 2]) for text in names)))
    for own in names:
        changed = task_of("color", *((t, "red" if t == own else LABELS[len(t) % 2]) for t in names))
        assert majorities(changed)[own] == before[own]


def test_the_majority_of_equally_frequent_outputs_is_right_half_of_the_time():
    pairs = [(f"thing {i} :", LABELS[i % 2]) for i in range(400)]
    found = floors(ask_rows([task_of("color", *pairs)]))
    assert abs(found["majority/exact_match"] - 0.5) < 0.1


# --- evaluation ----------------------------------------------------------------------------------


def test_the_loss_is_per_token_of_the_likeliest_output(system):
    """From the logits: of several outputs the likeliest per token, of choices the answer."""
    cases = RowCases(ask_rows([COLOR, SIZE]), IO)
    nll = tokens = correct = 0
    for case in cases.asked:
        context = f"Input: {case.item.input}\nOutput:"
        options = case.item.choices or case.item.outputs
        found = [loglikelihood(system.edge, context, f" {text}") for text in options]
        best = max(range(len(found)), key=lambda i: found[i][0] / found[i][1])
        if case.item.choices:
            correct += max(range(3), key=lambda i: found[i][0]) == case.item.answer
            best = case.item.answer
        nll, tokens = nll - found[best][0], tokens + found[best][1]
    result = evaluate_rows(system.answerer("plain"), cases, generate=False)
    assert result["loss"] == pytest.approx(nll / tokens, abs=1e-4)
    assert result["choice_accuracy"] == correct / 2 and result["n"] == 5
    assert set(result) == {"n", "loss", "choice_accuracy", "choice_accuracy_norm"}


def test_choices_are_also_compared_by_character():
    task = RowTask("x", ("Look .",), (Item("a", ("bb",), ("c", "bb")),))
    (asked,) = ask_rows([task])
    score = type("Score", (), {"loglikelihoods": np.array([-3.0, -4.0]), "context_tokens": 1,
                               "truncated": 0})  # fmt: skip
    row = scored(asked, ChoiceItem((([1], [2]), ([1], [3, 4]))), score, None)
    assert (row["choice_accuracy"], row["choice_accuracy_norm"]) == (0, 1)  # -3 / 1 < -4 / 2
    assert (row["nll"], row["tokens"]) == (4.0, 2)


def test_means_and_their_errors_are_over_rows():
    rows = [
        {"nll": 2.0, "tokens": 1, "exact_match": 1, "rouge_l": 1.0},
        {"nll": 4.0, "tokens": 3, "exact_match": 0, "rouge_l": 0.5},
    ]
    cells = cells_of(rows)
    assert cells["loss"]["score"] == 1.5
    # Residuals 2 - 1.5 and 4 - 4.5 over 2 tokens a row: deviation sqrt(2)/4, error that / sqrt(2).
    assert cells["loss"]["stderr"] == pytest.approx(0.25)
    assert cells["rouge_l"] == {"score": 0.75, "stderr": 0.25, "n": 2}
    assert list(cells) == ["loss", "exact_match", "rouge_l"]


def test_greedy_answers_are_compared_with_the_outputs(system):
    """An edge's own greedy answers as the correct outputs are matched exactly."""
    cases = RowCases(ask_rows([COLOR, SIZE]), PLAIN)
    written = row_results(system.answerer("plain"), cases, max_new_tokens=3)
    asked = [
        dataclasses.replace(case, item=Item(case.item.input, (row["answer"],)))
        for case, row in zip(cases.asked, written, strict=True)
    ]
    assert all(row["answer"].strip() for row in written)
    result = evaluate_rows(system.answerer("plain"), RowCases(asked, PLAIN), max_new_tokens=3)
    assert result["exact_match"] == result["rouge_l"] == 1


def test_an_answer_ends_where_outputs_of_its_form_would():
    one_line, lines, paragraphs = (
        [Asked(COLOR, "Look .", Item("a", (text,)), ())] for text in ("a b", "a\nb", "a\n\nb")
    )
    assert stop_of(one_line) == ("\n",)
    assert stop_of(one_line + lines) == ("\n\n",)
    assert stop_of(lines + paragraphs) == ()


@pytest.mark.parametrize("mode", ["plain", "icl", "lora_gen", "shuffled"])
def test_a_resumed_evaluation_equals_an_uninterrupted_one(system, tmp_path, mode):
    cases, path = RowCases(ask_rows([COLOR, SIZE]), IO, shots=1), tmp_path / "rows.jsonl"
    options = {"path": path, "tokens_per_batch": 64}
    whole = row_results(system.answerer(mode), cases, **options)
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 2 * 5  # settings, then scores and answers
    for kept in (1, 3, 7, 11):
        path.write_text("".join(lines[:kept]))
        assert row_results(system.answerer(mode), cases, **options) == whole
        assert sorted(path.read_text().splitlines(keepends=True)) == sorted(lines)
    costs = costs_of(system.answerer(mode), whole)
    assert costs["flops"] > 0 and (costs["cloud_flops"] > 0) == (mode in ("lora_gen", "shuffled"))


def test_results_of_other_rows_are_refused(system, tmp_path):
    path, answerer = tmp_path / "rows.jsonl", system.answerer("plain")
    row_results(answerer, RowCases(ask_rows([COLOR]), IO), path=path)
    before = path.read_text()
    for cases, key in (
        (RowCases(ask_rows([SIZE]), IO), "n"),
        (RowCases(ask_rows([COLOR]), PLAIN), "frame"),
        (RowCases(ask_rows([COLOR], seed=3), IO), "rows"),
    ):
        with pytest.raises(UserError, match=f"is of a run with {key} "):
            row_results(answerer, cases, path=path)
    assert path.read_text() == before
    line = json.loads(before.splitlines()[1])
    path.write_text(before + json.dumps(line | {"index": 3}) + "\n")
    with pytest.raises(UserError, match="holds a row 3 of another run"):
        row_results(answerer, RowCases(ask_rows([COLOR]), IO), path=path)
    for change in ({"tokens": None}, {"nll": "1"}, {"index": True}):
        path.write_text(before + json.dumps(line | change) + "\n")
        with pytest.raises(UserError, match=r"holds a row \w+ of another run"):
            row_results(answerer, RowCases(ask_rows([COLOR]), IO), path=path)


@pytest.mark.parametrize("mode", ["icl", "lora_gen"])
def test_rows_are_evaluated_over_a_mesh_as_on_one_device(system, mode):
    mesh = make_mesh(MeshConfig(2, 2, 2), jax.devices()[:8])
    cases = RowCases(ask_rows([COLOR, SIZE]), IO, shots=1)
    alone, found = (evaluate_rows(system.answerer(mode), cases, mesh=m) for m in (None, mesh))
    assert found == pytest.approx(alone, abs=1e-4)


def test_a_model_that_overflows_and_no_rows_are_refused(system):
    params = system.edge.params | {"final_norm": system.edge.params["final_norm"] * math.nan}
    broken = System(dataclasses.replace(system.edge, params=params)).answerer("plain")
    with pytest.raises(UserError, match=r"color, '.*: a log-likelihood is nan"):
        evaluate_rows(broken, RowCases(ask_rows([COLOR]), IO))
    with pytest.raises(UserError, match="no rows to evaluate"):
        evaluate_rows(system.answerer("plain"), RowCases([], IO))
