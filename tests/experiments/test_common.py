"""What the experiments share: which runs there are, what they are asked, and the report of them."""

import importlib
import json
import statistics
import sys
from pathlib import Path

import pytest

from lorax_gen.errors import UserError
from lorax_gen.evaluation.paper import TABLES
from lorax_gen.evaluation.tables import print_report
from lorax_gen.recipes.registry import load_config

FOLDER = Path(__file__).resolve().parents[2] / "experiments"
if not FOLDER.is_dir():
    pytest.skip("experiments/ is not part of an installed package", allow_module_level=True)
TABLE_FILES = [
    path.stem
    for path in sorted(FOLDER.glob("*.py"))
    if path.stem != "common" and not path.stem.startswith("world_")
]


@pytest.fixture
def load(monkeypatch):
    """`load(name)`: a module of experiments/, as its own directory sees it."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for name in ("common", *TABLE_FILES):
        sys.modules.pop(name, None)


@pytest.fixture
def common(load):
    return load("common")


@pytest.fixture
def commands(common, monkeypatch):
    """Commands are noted, not run: training releases, and an evaluation gives drawn scores."""
    asked = []

    def command(words, run_dir, core):
        asked.append(words)
        if words[0] == "train":
            released = Path(words[words.index("--run-dir") + 1]) / "released"
            released.mkdir(parents=True)
            rows = [{"step": s, "examples_per_second": 512.0} for s in (50, 100)]
            text = "".join(f"{json.dumps(row)}\n" for row in rows)
            (released.parent / "metrics.jsonl").write_text(text)
            (released.parent / "config.yaml").write_text(Path(words[1]).read_text())
            return
        directory, mode = (
            Path(words[words.index(f"--{each}") + 1]) for each in ("run-dir", "modes")
        )
        path = directory / "report.json"
        score = (
            0.5 + 0.1 * int(run_dir.name[-1]) - 0.2 * (words[words.index("--split") + 1] == "seen")
        )
        row = {
            "cells": {"sort": {"score": score}}, "average": score, "context_tokens": 3.0,
            "prompt_tokens": 0.0, "flops": 1e6, "cloud_flops": 0.0,
            "latency_ms": {"median": 1.0, "p90": 2.0, "questions": 5},
        }  # fmt: skip
        rows = json.loads(path.read_text())["rows"] if path.exists() else {}
        directory.mkdir(parents=True, exist_ok=True)
        report = {"edge": "e", "device": "cpu", "versions": {}, "rows": rows | {str(mode): row}}
        path.write_text(json.dumps(report))

    monkeypatch.setattr(common, "lorax_gen", command)
    return asked


def make(common, tmp_path, variants, **options):
    return common.experiment(
        "mine", "Mine", variants, common.Options(runs=tmp_path, jobs=1, **options), "5"
    )


def test_each_variant_is_trained_with_each_seed_and_asked_about_unseen_and_seen_tasks(
    common, commands, tmp_path
):
    variants = [
        common.Variant("four", "n = 4", changes={"generator.n_experts": 4}, steps=100),
        common.Variant("plain", "plain", method=None, mode="plain"),
    ]
    report = make(common, tmp_path, variants, seeds=(0, 1, 3))
    trained = [words for words in commands if words[0] == "train"]
    configs = [load_config(words[1])[1] for words in trained]
    assert [config.run.seed for config in configs] == [0, 1, 3]
    assert {config.generator.n_experts for config in configs} == {4}
    assert {config.run.steps for config in configs} == {100}
    asked = [words for words in commands if words[0] == "evaluate" and "plain" not in words]
    assert [words[words.index("--split") + 1] for words in asked] == ["unseen", "seen"] * 3
    assert all("--generator" in words for words in asked)

    cell = report["rows"]["four"]["cells"]["unseen"]
    scores = [0.5, 0.6, 0.8]
    assert cell["score"] == pytest.approx(statistics.mean(scores)) and cell["n"] == 3
    assert cell["stderr"] == pytest.approx(statistics.stdev(scores) / 3**0.5)
    seen = report["rows"]["four"]["cells"]["seen"]["score"]
    assert seen == pytest.approx(cell["score"] - 0.2)
    training = report["rows"]["four"]["training"]
    assert training["steps"] == 100
    assert training["seconds"] == pytest.approx(100 * 32 * 8 / 512)
    assert report["rows"]["plain"]["cells"]["unseen"] == {"score": 0.5, "stderr": 0.0, "n": 1}
    assert "training" not in report["rows"]["plain"]


def test_what_is_complete_is_not_run_again_and_equal_runs_are_shared(common, commands, tmp_path):
    variants = [
        common.Variant("own", "own", steps=100),
        common.Variant("other", "other prompt", steps=100, mode="shuffled"),
    ]
    make(common, tmp_path, variants, seeds=(0,))
    assert [words[0] for words in commands] == ["train", *["evaluate"] * 4]
    before = list(commands)
    make(common, tmp_path, variants, seeds=(0,))
    assert commands == before


def test_lorahub_is_asked_after_its_parts_are_trained(common, commands, tmp_path):
    parts = tuple(
        common.Variant(f, f, method="lora", changes={"data.families": [f]}, steps=10)
        for f in ("sort", "clock")
    )
    hub = common.Variant("lorahub", "hub", method=None, mode="lorahub", parts=parts)
    report = make(common, tmp_path, [hub], seeds=(0, 1))
    trained = [load_config(words[1])[1] for words in commands if words[0] == "train"]
    assert [c.data.families for c in trained] == [("sort",), ("clock",), ("sort",), ("clock",)]
    last = commands[-1]
    adapters = [Path(word) for word in last[last.index("--lorahub") + 1 :]]
    assert len(adapters) == 2 and all(path.is_dir() for path in adapters)
    assert report["rows"]["lorahub"]["cells"]["unseen"]["n"] == 2


@pytest.mark.parametrize("name", TABLE_FILES)
def test_every_variant_of_every_experiment_has_a_config_that_its_recipe_takes(
    name, load, common, tmp_path
):
    module = load(name)
    variants = module.VARIANTS
    assert len({variant.name for variant in variants}) == len(variants)
    options = common.Options(runs=tmp_path)
    for variant in [part for each in variants for part in (*each.parts, each) if part.method]:
        path = tmp_path / "config.yaml"
        path.write_text(common.yaml.safe_dump(common.config_of(variant, 3, options)))
        method, config = load_config(str(path))
        assert (method, config.run.seed) == (variant.method, 3)
        for key, value in variant.changes.items():
            found = config
            for part in key.split("."):
                found = getattr(found, part)
            assert found == (tuple(value) if isinstance(value, list) else value)


def test_runs_that_differ_have_different_directories(load, common):
    options, names = common.Options(), {}
    for file in TABLE_FILES:
        for variant in load(file).VARIANTS:
            for each in variant.parts or (variant,):
                key = (each.method, json.dumps(dict(each.changes), sort_keys=True), each.steps)
                if each.method:
                    assert names.setdefault(each.run_name(options), key) == key


def test_the_report_can_be_printed_and_names_the_papers_table(common, commands, tmp_path, capsys):
    report = make(common, tmp_path, [common.Variant("own", "n = 32", steps=100)], seeds=(0, 1))
    assert report["paper"] in TABLES
    print_report(report)
    out = capsys.readouterr().out
    for text in ("Mine (mean and standard error of 2 seeds)", "0.550 ± 0.050", "n = 32", "100"):
        assert text in out


def test_a_command_that_fails_is_named_with_its_log_and_last_line(common, tmp_path):
    with pytest.raises(
        UserError, match=r"lorax-gen train failed, see .*run\.log: .*no config file"
    ):
        common.lorax_gen(["train", "nothing.yaml"], tmp_path / "run", None)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"seeds": ()}, "one seed or more"),
        ({"steps": 0.0}, "--steps above 0"),
        ({"jobs": 0}, "--jobs of 1"),
        ({"cloud": "a"}, "--cloud, --edge and --data belong together"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message, common):
    with pytest.raises(UserError, match=message):
        common.Options(**options)
