"""Several benchmarks in several modes: means, costs, files, and the tables on the terminal."""

import csv
import json

import pytest

from lorax_gen.data.agent import AgentItem
from lorax_gen.data.benchmarks import BENCHMARKS
from lorax_gen.errors import UserError
from lorax_gen.evaluation.metrics import harmonic_mean
from lorax_gen.evaluation.suite import evaluate_agent_suite, evaluate_suite, other_of
from lorax_gen.evaluation.system import System
from lorax_gen.evaluation.tables import print_agent, print_suite
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
    assert list(report["modes"]) == list(MODES)
    for found in report["modes"].values():
        shares = [found["benchmarks"][name]["acc"] for name in NAMES]
        assert [found["benchmarks"][name]["n"] for name in NAMES] == [4, 4]
        assert found["average"] == pytest.approx(sum(shares) / 2)
        assert found["harmonic"] == pytest.approx(harmonic_mean(shares))


def test_a_question_costs_the_edge_what_it_reads(report):
    modes = report["modes"]
    assert modes["icl"]["context_tokens"] > modes["plain"]["context_tokens"]
    assert modes["icl"]["flops"] > modes["lora_gen"]["flops"] == modes["plain"]["flops"] > 0
    assert modes["plain"]["cloud_flops"] == 0 < modes["lora_gen"]["cloud_flops"]
    for found in modes.values():
        assert 0 < found["latency_ms"]["median"] <= found["latency_ms"]["p90"]
        assert found["latency_ms"]["questions"] == 3 and found["memory_bytes"] > 0


def test_the_report_is_in_files_too(report, run_dir):
    assert json.loads((run_dir / "report.json").read_text()) == report
    with (run_dir / "report.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["benchmark"] for row in rows] == [*NAMES, "AVE", "HAR"] * len(MODES)
    for row in rows:
        if row["benchmark"] == "AVE":
            assert float(row["acc"]) == report["modes"][row["mode"]]["average"]
    assert {path.name for path in (run_dir / "items").iterdir()} == {
        f"{name}.{mode}.jsonl" for name in NAMES for mode in MODES
    }


def test_the_table_is_the_papers(report, capsys):
    print_suite(report)
    out = capsys.readouterr().out
    for word in ("BoolQ", "PIQA", "AVE", "HAR", "edge, 1-shot", "edge + LoRA-Gen", "GFLOPs"):
        assert word in out
    assert f"{100 * report['modes']['plain']['average']:.1f}" in out


@pytest.mark.parametrize(
    "name, other",
    [("arc_challenge", "arc_easy"), ("boolq", "social_iqa"), ("piqa", "arc_challenge")],
)
def test_the_control_reads_prompts_of_the_next_benchmark_that_is_trained_on(name, other, directory):
    found, questions = other_of(BENCHMARKS[name], directory)
    assert found.name == other and questions


def test_what_cannot_be_is_said_before_anything_is_scored(system, directory):
    with pytest.raises(UserError, match="unknown benchmark 'bolq'"):
        evaluate_suite(system, ["bolq"], ["plain"], directory=directory)
    with pytest.raises(UserError, match="unknown mode 'none'"):
        evaluate_suite(system, ["boolq"], ["none"], directory=directory)
    with pytest.raises(UserError, match="needs a cloud model and a generator"):
        evaluate_suite(System(system.edge), ["boolq"], ["empty"], directory=directory)


def test_tools_are_called_in_modes(system, tmp_path, capsys):
    items = [
        AgentItem(str(i), prompt, "bell :", "Thought: Do I need to use a tool? No\nAI: no")
        for i, prompt in enumerate(PROMPTS)
    ]
    report = evaluate_agent_suite(
        system, items, ("full", "lora_gen"), run_dir=tmp_path, max_new_tokens=4
    )
    assert json.loads((tmp_path / "agent.json").read_text()) == report
    assert report["modes"]["full"]["compression"] == 1 < report["modes"]["lora_gen"]["compression"]
    with (tmp_path / "agent.csv").open() as file:
        assert [row["mode"] for row in csv.DictReader(file)] == ["full", "lora_gen"]
    print_agent(report)
    out = capsys.readouterr().out
    assert "edge, tools in context" in out and "the edge sees previous conversation" in out
