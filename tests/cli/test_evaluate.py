"""`lorax-gen evaluate`."""

import json

import pytest

from tests.data import rows


def test_evaluate_refuses_a_directory_that_holds_something_else(refused, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "report.json").write_text("mine")
    for task in ("world", "arc_easy"):
        message = refused("evaluate", task, "--run-dir", "mine")
        assert "mine exists and is not an evaluation" in message
    assert (tmp_path / "mine" / "report.json").read_text() == "mine"


@pytest.mark.parametrize(
    "words, message",
    [
        (["arc_esy"], "unknown benchmark 'arc_esy'; did you mean arc_easy"),
        (["world", "arc_easy"], "world is evaluated by itself"),
        (["gpt4tools", "arc_easy"], "gpt4tools is evaluated by itself"),
        (["gpt4tools"], "give --data-dir"),
        (["boolq", "--modes", "card"], "mode card needs --card"),
        (["boolq", "--modes", "plane", "--data-dir", "."], "unknown mode 'plane'"),
        (["boolq", "--modes", "plain", "--data-dir", "."], "no file boolq.test.jsonl"),
        (["boolq", "--modes", "plain", "--data-dir", "nowhere"], "no such data directory"),
        (["boolq", "--modes", "plain"], "cannot load aps/super_glue from the hub"),
        (["world", "--questions", "0"], "questions is 0; expected int >= 1"),
        (["boolq", "--seed", "-1"], "seed is -1; expected int >= 0"),
        (["boolq", "--limit", "-1"], "limit is -1; expected int >= 1"),
        (["boolq", "--tokens-per-batch", "0"], "tokens_per_batch is 0; expected int >= 1"),
        (["boolq", "--fsdp", "3"], "does not fit"),
        (["boolq", "--tensor", "0"], "tensor is 0; expected int >= 1"),
    ],
    ids=" ".join,
)
def test_an_evaluation_that_cannot_be_is_refused(refused, words, message):
    assert message in refused("evaluate", *words)


def test_evaluate_prints_benchmarks_by_modes_and_goes_on_where_it_stopped(call, models, tmp_path):
    for split, first in (("test", 0), ("train", 9)):
        for name in ("arc_easy", "winogrande"):
            rows.write_lines(
                tmp_path / f"{name}.{split}.jsonl", rows.make_rows(name, 4 + first // 3, first)
            )
    words = ["evaluate", "arc_easy", "winogrande", "--data-dir", ".", "--run-dir", "run"]
    words += ["--shots", 1, "--modes", "plain", "icl", "lora_gen", "--limit", 3]
    words += [f"--{role}={models / role}" for role in ("cloud", "edge", "generator")]
    code, out, err = call(*words)
    assert (code, err) == (0, "")
    for word in ("ARC-e", "WinoG", "AVE", "HAR", "edge, prompted", "edge + LoRA-Gen", "cpu"):
        assert word in out
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    item = tmp_path / "run" / "items" / "arc_easy.lora_gen.jsonl"
    lines = item.read_text().splitlines()
    assert len(lines) == 1 + 3
    for mode in ("plain", "icl", "lora_gen"):
        found = report["rows"][mode]
        shares = [found["cells"][name]["score"] for name in ("arc_easy", "winogrande")]
        assert found["average"] == pytest.approx(sum(shares) / 2)
    means = (tmp_path / "run" / "report.csv").read_text().splitlines()
    assert sum(",AVE," in line for line in means) == 3

    item.write_text("\n".join(lines[:2]) + "\n" + lines[2][:30])  # as if killed while writing
    code, _, err = call(*words)
    assert (code, err) == (0, "")
    assert sorted(item.read_text().splitlines()[1:]) == sorted(lines[1:])
    assert str(tmp_path) not in (tmp_path / "run" / "report.json").read_text()


def test_modes_of_the_world_may_come_in_several_calls(call, refused, models, tmp_path):
    words = ["evaluate", "--run-dir", "run", "--questions", 1]
    words += [f"--{role}={models / role}" for role in ("cloud", "edge", "generator")]
    for mode, label in (("plain", "edge, no prompt"), ("lora_gen", "edge + LoRA-Gen")):
        code, out, err = call(*words, "--modes", mode)
        assert (code, err) == (0, "") and label in out
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["kind"] == "world" and list(report["rows"]) == ["plain", "lora_gen"]
    assert "this evaluation of" in refused(*words, "--modes", "plain", "--split", "seen")
    assert report == json.loads((tmp_path / "run" / "report.json").read_text())
