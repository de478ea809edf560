"""Several benchmarks and answerers: means, costs, files, and the tables on the terminal."""

import contextlib
import csv
import json
import logging

import jax
import pytest

from lorax_gen import specialize
from lorax_gen.data.agent import AgentItem
from lorax_gen.data.benchmarks import BENCHMARKS
from lorax_gen.data.own_benchmarks import load_benchmark
from lorax_gen.data.own_tasks import load_row_tasks
from lorax_gen.documents import to_yaml
from lorax_gen.errors import UserError
from lorax_gen.evaluation.answerers import ANSWERERS, System
from lorax_gen.evaluation.metrics import harmonic_mean
from lorax_gen.evaluation.rows import RowCases, ask_rows, evaluate_rows
from lorax_gen.evaluation.suite import evaluate_agent_suite, evaluate_suite, other_of
from lorax_gen.evaluation.tables import print_report
from lorax_gen.frames import IO, PLAIN
from lorax_gen.inference.choices import encode_items, score_items
from lorax_gen.locks import only_writer
from tests.data.rows import make_rows, write_lines
from tests.tiny import PROMPTS, make_generator

NAMES = ("boolq", "piqa")
MODES = ("plain", "icl", "lora_gen", "shuffled")


@pytest.fixture(scope="module")
def system(tiny_world_system):
    generator = make_generator(tiny_world_system)
    return System(tiny_world_system.edge, tiny_world_system.cloud, generator)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Invented rows, also of the benchmarks whose prompts the controls read."""
    folder = tmp_path_factory.mktemp("data")
    for name in (*NAMES, "social_iqa", "arc_challenge", "arc_easy"):
        for split, first in (("train", 0), ("test", 6)):
            write_lines(folder / f"{name}.{split}.jsonl", make_rows(name, 6, first))
    return folder


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def report(system, directory, run_dir):
    return evaluate_suite(
        system, NAMES, MODES, shots=1, limit=4, directory=directory, run_dir=run_dir, timed=3
    )


def test_means_are_over_benchmarks(report):
    assert list(report["rows"]) == list(MODES)
    for found in report["rows"].values():
        shares = [found["cells"][name]["score"] for name in NAMES]
        assert [found["cells"][name]["n"] for name in NAMES] == [4, 4]
        assert found["average"] == pytest.approx(sum(shares) / 2)
        assert found["harmonic"] == pytest.approx(harmonic_mean(shares))


def test_a_question_costs_the_edge_what_it_reads(report):
    modes = report["rows"]
    assert modes["icl"]["context_tokens"] > modes["plain"]["context_tokens"]
    assert modes["icl"]["flops"] > modes["lora_gen"]["flops"] == modes["plain"]["flops"] > 0
    assert modes["plain"]["cloud_flops"] == 0 < modes["lora_gen"]["cloud_flops"]
    for found in modes.values():
        assert 0 < found["latency_ms"]["median"] <= found["latency_ms"]["p90"]
        assert found["latency_ms"]["questions"] == 3 and found["memory_bytes"] > 0


def test_a_second_evaluation_in_the_directory_is_refused(system, directory, tmp_path):
    with (
        only_writer(tmp_path / "items"),
        pytest.raises(UserError, match="items is in use by process"),
    ):
        evaluate_suite(system, NAMES, ["plain"], directory=directory, run_dir=tmp_path)
    assert [path.name for path in (tmp_path / "items").iterdir()] == [".lock"]


def test_modes_may_come_in_several_calls(system, directory, tmp_path):
    options = {"shots": 1, "limit": 2, "directory": directory, "run_dir": tmp_path, "timed": 1}
    alone = System(system.edge)
    first = evaluate_suite(alone, NAMES, ["plain"], **options)
    both = evaluate_suite(system, NAMES, ["lora_gen"], **options)
    assert list(both["rows"]) == ["plain", "lora_gen"]
    assert both["rows"]["plain"] == first["rows"]["plain"]
    again = evaluate_suite(alone, NAMES, ["plain"], **options)
    assert again["cloud"] == both["cloud"] and list(again["rows"]) == ["plain", "lora_gen"]
    with pytest.raises(UserError, match=r"of columns\.piqa \{.*, this evaluation of None"):
        evaluate_suite(alone, NAMES[:1], ["plain"], **options)


def test_the_report_is_in_files_too(report, run_dir):
    assert json.loads((run_dir / "report.json").read_text()) == report
    with (run_dir / "report.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["task"] for row in rows] == [*NAMES, "AVE", "HAR"] * len(MODES)
    for row in rows:
        if row["task"] == "AVE":
            found = report["rows"][row["answerer"]]
            assert float(row["score"]) == found["average"]
            assert float(row["latency_median_ms"]) == found["latency_ms"]["median"]
            assert float(row["latency_p90_ms"]) == found["latency_ms"]["p90"]
            for name in ("memory_bytes", "context_tokens", "prompt_tokens", "flops", "cloud_flops"):
                assert float(row[name]) == found[name]
    assert {path.name for path in (run_dir / "items").iterdir()} == {
        ".lock",
        *(f"{name}.{mode}.jsonl" for name in NAMES for mode in MODES),
    }


def test_the_table_is_the_papers(report, capsys):
    print_report(report)
    out = capsys.readouterr().out
    for word in ("BoolQ", "PIQA", "AVE", "HAR", "edge, prompted", "edge + LoRA-Gen", "GFLOPs"):
        assert word in out
    assert f"{100 * report['rows']['plain']['average']:.1f}" in out


def test_all_benchmarks_and_modes_fit_into_80_columns(report, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    found = report["rows"]["plain"]
    result = found["cells"]["boolq"] | {"score": 1.0, "stderr": 0.123}
    found = found | {"cells": dict.fromkeys(BENCHMARKS, result), "average": 1.0, "harmonic": 1.0}
    columns = {name: {"title": record.title, "n": 10042} for name, record in BENCHMARKS.items()}
    rows = {name: found | {"label": label} for name, (label, _) in ANSWERERS.items()}
    print_report(report | {"columns": columns, "rows": rows})
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and not any("…" in line for line in lines)
    titles, quoted = (line.split() for line in lines if "HellaS" in line)
    assert quoted == ["ARC-c", "ARC-e", "OBQA", "HellaS", "PIQA"]  # by acc_norm
    assert titles == [*(record.title for record in BENCHMARKS.values()), "AVE", "HAR"]
    (full,) = (
        line.split() for line in lines if line.startswith("edge + LoRA-Gen") and "100" in line
    )
    assert full == ["edge", "+", "LoRA-Gen", *["100.0"] * 10]


def test_what_was_cut_is_said_under_the_table(report, capsys):
    print_report(report)
    assert "truncated on the left" not in capsys.readouterr().out
    found = report["rows"]["lora_gen"]
    result = found["cells"]["boolq"] | {"truncated": 3, "prompts_truncated": 2}
    found = found | {"cells": found["cells"] | {"boolq": result}}
    print_report(report | {"rows": {"lora_gen": found}})
    out = capsys.readouterr().out
    assert "lora_gen: 3 questions too long for the model were truncated on the left" in out
    assert "lora_gen: 2 prompts too long for the model were truncated on the left" in out


@pytest.mark.parametrize(
    "name, other",
    [("arc_challenge", "arc_easy"), ("boolq", "social_iqa"), ("piqa", "arc_challenge")],
)
def test_the_control_reads_prompts_of_the_next_benchmark_that_is_trained_on(name, other, directory):
    found, questions = other_of(BENCHMARKS[name], directory)
    assert found.name == other and questions


def test_the_shuffled_control_needs_no_training_questions_of_its_own(system, directory, tmp_path):
    for name in ("piqa.test", "arc_challenge.train"):
        (tmp_path / f"{name}.jsonl").symlink_to(directory / f"{name}.jsonl")
    options = {"shots": 1, "directory": tmp_path, "timed": 1}
    assert evaluate_suite(system, ["piqa"], ["shuffled"], **options)["rows"]["shuffled"]


def test_what_cannot_be_is_said_before_anything_is_scored(system, directory):
    with pytest.raises(UserError, match="unknown benchmark 'bolq'"):
        evaluate_suite(system, ["bolq"], ["plain"], directory=directory)
    with pytest.raises(UserError, match="unknown mode 'none'"):
        evaluate_suite(system, ["boolq"], ["none"], directory=directory)
    with pytest.raises(UserError, match="needs a cloud model and a generator"):
        evaluate_suite(System(system.edge), ["boolq"], ["empty"], directory=directory)


def test_tools_are_called_by_answerers(system, tmp_path, capsys):
    items = [
        AgentItem(str(i), prompt, "bell :", "Thought: Do I need to use a tool? No\nAI: no")
        for i, prompt in enumerate(PROMPTS)
    ]
    report = evaluate_agent_suite(
        system, items, ("icl", "lora_gen"), run_dir=tmp_path, max_new_tokens=4
    )
    assert json.loads((tmp_path / "report.json").read_text()) == report
    full, lora_gen = report["rows"].values()
    assert full["compression"] == 1 < lora_gen["compression"]
    assert full["flops"] > lora_gen["flops"] > 0
    assert full["cloud_flops"] == full["prompt_tokens"] == 0
    assert lora_gen["cloud_flops"] > 0 < lora_gen["prompt_tokens"]
    with (tmp_path / "report.csv").open() as file:
        means = [row for row in csv.DictReader(file) if row["task"] == "AVE"]
    assert [row["answerer"] for row in means] == ["icl", "lora_gen"]
    assert [float(row["compression"]) for row in means] == [1.0, lora_gen["compression"]]
    print_report(report)
    out = capsys.readouterr().out
    assert "edge, prompted" in out and "the edge sees previous conversation" in out
    assert "cloud GFLOPs" in out


# --- files of rows, own benchmarks, cards --------------------------------------------------------


LABELS = ["alpha", "beta", "gamma"]
ROWS = [
    {"task": "size", "instruction": "Put each thing by its size .", "input": f"{word} :",
     "choices": LABELS, "answer": i % 3}
    for i, word in enumerate(("tiny", "small", "big", "huge"))
] + [
    {"task": "place", "instruction": "Look at the place .", "input": f"{word} :", "output": "beta"}
    for word in ("garden", "attic", "cellar")
]  # fmt: skip
METRICS = ("loss", "choice_accuracy", "choice_accuracy_norm", "exact_match", "rouge_l")


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    return write_lines(tmp_path_factory.mktemp("rows") / "mine.jsonl", ROWS)


@pytest.fixture(scope="module")
def mixed(system, directory, rows_file, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("mixed")
    options = {"shots": 1, "limit": 6, "directory": directory, "run_dir": run_dir, "timed": 0}
    tasks = ["arc_easy", str(rows_file)]
    return evaluate_suite(system, tasks, ("plain", "icl", "lora_gen"), **options), run_dir


def test_rows_have_a_column_for_each_metric_beside_benchmarks(mixed, system, rows_file):
    report, run_dir = mixed
    assert list(report["columns"]) == ["arc_easy", *(f"mine/{metric}" for metric in METRICS)]
    column = report["columns"]["mine/choice_accuracy"]
    assert (column["n"], column["chance"], column["tasks"]) == (3, pytest.approx(1 / 3), 2)
    assert report["columns"]["mine/exact_match"]["floors"].keys() == {
        "majority",
        "input",
        "example",
    }
    tasks, _ = load_row_tasks(rows_file)
    for name in ("plain", "lora_gen"):
        cases = RowCases(ask_rows(tasks, 6, report["settings"]["seed"]), PLAIN, shots=1)
        found = evaluate_rows(system.answerer(name), cases)
        row = report["rows"][name]
        for metric in METRICS:
            assert row["cells"][f"mine/{metric}"]["score"] == pytest.approx(found[metric], abs=1e-5)
        assert row["average"] == row["harmonic"] == row["cells"]["arc_easy"]["score"]
    items = {path.name for path in (run_dir / "items").glob("*.jsonl")}
    modes = ("plain", "icl", "lora_gen")
    assert items == {f"{task}.{mode}.jsonl" for task in ("arc_easy", "mine") for mode in modes}
    with (run_dir / "report.csv").open() as file:
        lines = [row["task"] for row in csv.DictReader(file) if row["answerer"] == "plain"]
    assert lines == [*report["columns"], "AVE", "HAR"]


def test_rows_alone_have_no_average(system, rows_file, tmp_path, capsys):
    options = {"run_dir": tmp_path, "timed": 0, "limit": 4, "shots": 1, "frame": IO}
    report = evaluate_suite(system, [str(rows_file)], ["plain"], **options)
    assert not {"average", "harmonic", "latency_ms"} & report["rows"]["plain"].keys()
    print_report(report)
    out = capsys.readouterr().out
    assert "AVE" not in out and "p90" not in out and "mine (2 tasks), in percent" in out
    assert evaluate_suite(system, [str(rows_file)], ["plain"], **options) == report
    with pytest.raises(UserError, match=r"is of settings\.frame"):
        evaluate_suite(system, [str(rows_file)], ["icl"], **options | {"frame": PLAIN})


def test_tables_of_benchmarks_and_rows_fit_into_80_columns(mixed, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    report, _ = mixed
    long = report["rows"]["plain"] | {"label": "a-card-with-a-name-that-is-longer-than-most"}
    print_report(report | {"rows": report["rows"] | {"card:long": long}})
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in out
    assert sum("ARC-e" in line for line in lines) == 2 and "acc_norm" in out
    (heads,) = (line.split() for line in lines if "ROUGE-L" in line)
    assert heads == ["loss", "choice", "norm", "exact", "ROUGE-L"]
    floors = report["columns"]["mine/rouge_l"]["floors"]
    for label, floor in (("most frequent output", "majority"), ("the input itself", "input")):
        (line,) = (line for line in lines if line.startswith(label))
        assert line.split()[-1] == f"{100 * floors[floor]:.1f}" and line.split()[-5] == "-"
    (chance,) = (line.split() for line in lines if line.startswith("chance"))
    assert chance == ["chance", "-", "33.3", "33.3", "-", "-"]


def test_rows_that_were_left_out_are_said_under_the_tables(system, tmp_path, capsys):
    path = write_lines(tmp_path / "mine.jsonl", [*ROWS[4:], ROWS[4] | {"output": ""}])
    print_report(evaluate_suite(system, [str(path)], ["plain"], timed=0))
    out = capsys.readouterr().out
    assert "mine: 1 rows without an instruction or an output were left out" in out
    assert "choice" not in out and "chance" not in out


def test_a_benchmark_of_ones_own_is_scored_as_any_other(system, directory, tmp_path):
    write_lines(tmp_path / "rows.jsonl", [{"q": row["input"], "a": 1} for row in ROWS])
    spec = {"name": "mine", "description": "Say it .", "template": "{q}", "choices": LABELS,
            "answer": "a", "test": "rows.jsonl", "train": "rows.jsonl"}  # fmt: skip
    (tmp_path / "mine.yaml").write_text(to_yaml(spec))
    options = {"shots": 1, "timed": 0, "directory": directory}
    tasks = [str(tmp_path / "mine.yaml"), "boolq"]
    report = evaluate_suite(system, tasks, ["plain", "lora_gen", "shuffled"], **options)
    assert list(report["columns"]) == ["mine", "boolq"]
    found = report["rows"]["plain"]["cells"]["mine"]
    texts = [((row["input"],), [f" {label}" for label in LABELS]) for row in ROWS]
    scores = score_items(system.edge, encode_items(system.edge, texts))
    assert found["score"] == sum(s.loglikelihoods.argmax() == 1 for s in scores) / len(ROWS)
    again = evaluate_suite(system, [load_benchmark(tmp_path / "mine.yaml")], ["plain"], timed=0)
    assert again["rows"]["plain"]["cells"]["mine"]["score"] == found["score"]


def test_two_tasks_of_one_name_are_refused(system, rows_file, tmp_path):
    other = write_lines(tmp_path / "mine.jsonl", ROWS)
    with pytest.raises(UserError, match="two tasks are called mine; rename one"):
        evaluate_suite(system, [str(rows_file), str(other)], ["plain"])


@contextlib.contextmanager
def capture_compiles():
    """Collects the programs that jax compiles."""
    found = []

    class Handler(logging.Handler):
        def emit(self, record):
            message = record.getMessage()
            if message.startswith("Compiling "):
                found.append(message.split(" with global")[0])

    logger, handler = logging.getLogger("jax"), Handler()
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)


def test_several_cards_have_rows_of_their_own_and_compile_nothing_again(system, directory, capsys):
    cards = specialize(PROMPTS, system.cloud, system.edge, system.generator)
    loras = {name: card.lora(system.generator) for name, card in zip("abc", cards, strict=True)}
    own = System(system.edge, cards=loras)
    options = {"directory": directory, "limit": 4, "timed": 0}
    jax.clear_caches()
    with jax.log_compiles(), capture_compiles() as compiled:
        evaluate_suite(own, ["boolq"], ["card:a"], **options)
    assert compiled
    with jax.log_compiles(), capture_compiles() as compiled:
        report = evaluate_suite(own, ["boolq"], ["card:b", "card:c"], **options)
    assert compiled == []
    assert list(report["rows"]) == ["card:b", "card:c"]
    assert [row["label"] for row in report["rows"].values()] == ["b", "c"]
    alone = System(system.edge, card=loras["b"])
    single = evaluate_suite(alone, ["boolq"], ["card"], **options)["rows"]["card"]
    pick = lambda row: {k: v for k, v in row["cells"]["boolq"].items() if k != "seconds"}  # noqa: E731
    assert pick(single) == pick(report["rows"]["card:b"])
    with pytest.raises(UserError, match="mode card:d needs a card of that name; there are a, b, c"):
        evaluate_suite(own, ["boolq"], ["card:d"], **options)
    with pytest.raises(UserError, match="unknown mode 'plain:a'"):
        evaluate_suite(own, ["boolq"], ["plain:a"], **options)


def test_a_bar_says_the_task_and_the_mode_with_their_total(system, directory, rows_file):
    seen = []

    class Bar:
        def reset(self, total):
            seen.append([total])

        def set_description(self, text):
            seen[-1] += [text, 0]

        def update(self, count):
            seen[-1][2] += count

    tasks = ["boolq", str(rows_file)]
    options = {"directory": directory, "shots": 0, "timed": 0}
    evaluate_suite(system, tasks, ["plain", "lora_gen"], bar=Bar(), **options)
    assert seen == [
        [6, "boolq, plain", 6],
        [7, "mine, plain", 7],
        [7, "mine, plain: answers", 7],
        [6, "boolq, lora_gen: prompts", 6],
        [6, "boolq, lora_gen", 6],
        [7, "mine, lora_gen: prompts", 7],
        [7, "mine, lora_gen", 7],
        [7, "mine, lora_gen: answers", 7],
    ]
