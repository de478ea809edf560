"""A run on real tasks' formats: invented rows in files, trained on, checkpointed and released."""

import json

import pytest
import yaml

from lorax_gen import cli, load_generator
from tests.data.rows import make_rows, write_lines
from tests.tiny import write_system


@pytest.fixture
def config_file(tiny_world_system, tmp_path):
    """Two benchmarks and triples of instructions, for a tiny system."""
    models = write_system(tmp_path / "models", tiny_world_system)
    data = tmp_path / "data"
    data.mkdir()
    for name in ("arc_easy", "boolq", "winogrande"):
        write_lines(data / f"{name}.train.jsonl", make_rows(name, 8))
        write_lines(data / f"{name}.test.jsonl", make_rows(name, 4, first=8))
    triples = [{"instruction": f"Say {i}", "input": "now", "output": "yes"} for i in range(4)]
    write_lines(data / "alpaca.jsonl", triples)
    path = tmp_path / "mixed.yaml"
    path.write_text(yaml.safe_dump({
        "method": "lora_gen", "cloud": str(models / "cloud"), "edge": str(models / "edge"),
        "prompts": 4, "queries_per_prompt": 1,
        "data": {
            "kind": "mixture", "sources": ["arc_easy", "boolq", "alpaca=0.5"],
            "directory": str(data), "shots": 2,
            "prompt_length": 128, "question_length": 64, "prompt_buckets": [128],
            "question_buckets": [64], "evaluate_on": ["boolq", "winogrande"],
            "evaluate_questions": 3,
        },
        "generator": {"n_experts": 4, "rank": 4, "alpha": 4, "router_width": 16},
        "run": {"steps": 3, "log_every": 1, "checkpoint_every": 2, "evaluate_every": 3},
        "mesh": {"data": 2, "fsdp": 2, "tensor": 2},
    }))  # fmt: skip
    return path


def test_a_mixture_trains_and_its_generator_is_released(config_file, tmp_path, capsys):
    run = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", str(config_file), "--run-dir", str(run)])
    said = capsys.readouterr().err
    assert stop.value.code == 0, said
    assert "has no files of hellaswag, piqa: whether the training data holds" in said
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    *steps, evaluation = rows
    assert [row["data/samples"] for row in steps] == [4, 8, 12]
    assert all(row["tokens_per_second"] > 0 for row in steps)
    assert set(evaluation) == {
        "step", "accuracy/boolq", "accuracy/winogrande", "accuracy/seen", "accuracy/unseen",
    }  # fmt: skip
    assert evaluation["accuracy/unseen"] == evaluation["accuracy/winogrande"]
    assert load_generator(run / "released").config.n_experts == 4
    released = "".join(path.read_text() for path in (run / "released").glob("*.json*"))
    assert str(tmp_path) not in released
