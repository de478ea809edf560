"""`lorax-gen evaluate`."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_gen.artifacts.baseline import Baseline, save_baseline
from lorax_gen.artifacts.generator import load_generator, save_generator
from lorax_gen.artifacts.identity import identify
from lorax_gen.baselines.mixlora import MixLoraConfig, init_mixlora
from lorax_gen.cli.evaluate import Evaluate, frame_of, models_of, modes_of, timing
from lorax_gen.config import to_dict
from lorax_gen.documents import to_yaml
from lorax_gen.errors import UserError
from lorax_gen.evaluation.world import NAMES
from lorax_gen.frames import IO, PLAIN, Frame
from lorax_gen.models.huggingface import load_model
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
        (["boolq", "--modes", "plain", "lora"], "mode lora needs --lora"),
        (["boolq", "--modes", "lora_gen", "--edge", "x"], "mode lora_gen needs --cloud and --gen"),
        (["boolq", "--modes", "cloud_icl", "--edge", "x"], "mode cloud_icl needs --cloud\n"),
        (["boolq", "--modes", "plain", "--card", "x"], "--card is given, but --modes has no card"),
        (["boolq", "--modes", "plain", "--lora", "x"], "--lora is given, but --modes has no lora"),
        (["boolq", "--edge", "x", "--generator", "y"], "--generator needs --cloud"),
        (["boolq", "--card", "a/x", "b/x.card.safetensors"], "two cards are called x; rename one"),
        (["boolq", "--columns", "input=x"], "--columns are those of files of rows"),
        (["world", "--frame", "io"], "--frame is for benchmarks and rows, not world"),
        (["gpt4tools", "--raw"], "--raw is for benchmarks and rows, not gpt4tools"),
        (["none.jsonl"], "cannot read none.jsonl"),
        (["none.yaml"], "no such file: none.yaml"),
        (["boolq", "--timed", "-1"], "timed is -1; expected"),
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


# --- own rows, own benchmarks, cards -------------------------------------------------------------

ROWS = [
    {"task": "size", "instruction": "Put each thing by its size .", "word": f"{word} :",
     "choices": ["alpha", "beta"], "answer": i % 2}
    for i, word in enumerate(("tiny", "small", "big"))
] + [
    {"task": "place", "instruction": "Look at the place .", "word": f"{word} :", "output": "beta"}
    for word in ("garden", "attic")
]  # fmt: skip


@pytest.fixture
def mine(tmp_path):
    """Rows, a benchmark of one's own, and two questions of a known one."""
    rows.write_lines(tmp_path / "mine.jsonl", ROWS)
    rows.write_lines(tmp_path / "words.jsonl", [{"q": row["word"], "a": 0} for row in ROWS])
    spec = {"name": "words", "description": "Say it .", "template": "{q}",
            "choices": ["alpha", "beta"], "answer": "a", "test": "words.jsonl",
            "train": "words.jsonl"}  # fmt: skip
    (tmp_path / "mine.yaml").write_text(to_yaml(spec))
    rows.write_lines(tmp_path / "arc_easy.test.jsonl", rows.make_rows("arc_easy", 2))
    return ["mine.jsonl", "--columns", "input=word", "--shots", 0, "--timed", 0]


def save_baseline_of(models, directory, seed, in_context):
    """MixLoRA of the tiny edge, as if trained."""
    edge, config = load_model(models / "edge"), MixLoraConfig(n_experts=3, rank=2)
    shapes = jax.eval_shape(lambda: init_mixlora(jax.random.key(0), config, edge.config))
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda x: jnp.float32(rng.normal(0, 0.3, x.shape)), shapes)
    own = identify(edge, reads=False)
    save_baseline(
        directory, Baseline("mixlora", to_dict(config), params, own, in_context=in_context)
    )


def test_released_baselines_are_evaluated_beside_the_other_modes(call, models, mine, tmp_path):
    for seed, name in enumerate(("bare", "prompted")):
        (tmp_path / name).mkdir()
        save_baseline_of(models, tmp_path / name / "released", seed, name == "prompted")
    words = ["--edge", models / "edge"]
    both = ["--baseline", "bare/released", "--baseline", "prompted/released"]
    code, out, err = call("evaluate", "--questions", 1, "--timed", 2, *words, *both,
                          "--run-dir", "world")  # fmt: skip
    assert (code, err) == (0, "") and "edge + MixLoRA (prompted)" in out
    rows = json.loads((tmp_path / "world" / "report.json").read_text())["rows"]
    bare, prompted = rows["mixlora:bare"], rows["mixlora:prompted"]
    assert bare["context_tokens"] == rows["plain"]["context_tokens"]
    assert prompted["context_tokens"] == rows["icl"]["context_tokens"]
    assert bare["flops"] > rows["plain"]["flops"] and prompted["flops"] > rows["icl"]["flops"]
    assert bare["latency_ms"]["median"] > 0

    words += ["--baseline", "prompted/released", "--run-dir", "rows"]
    words += ["--modes", "plain", "icl", "mixlora"]
    code, out, err = call("evaluate", *mine, *words)  # answers are generated
    assert (code, err) == (0, "")
    rows = json.loads((tmp_path / "rows" / "report.json").read_text())["rows"]
    assert list(rows) == ["plain", "icl", "mixlora"]
    assert rows["mixlora"]["context_tokens"] == rows["icl"]["context_tokens"]
    losses = {rows[name]["cells"]["mine/loss"]["score"] for name in rows}
    assert len(losses) == 3


def test_what_is_no_baseline_is_refused(refused, models, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "has no baseline.json; give the directory" in refused("evaluate", "--baseline", "empty")
    save_baseline_of(models, tmp_path / "own", 0, in_context=False)
    message = refused("evaluate", "--baseline", "own", "--edge", models / "edge2")
    assert "the mixlora baseline was trained with the edge model" in message
    words = ["--edge", models / "edge", "--baseline", "own", "own"]
    assert "two baselines are called mixlora:own" in refused("evaluate", *words)
    words = ["--edge", models / "edge", "--baseline", "own", "--modes", "plain"]
    assert "given, but --modes has no mixlora; add it" in refused("evaluate", *words)


def test_lorahub_is_for_the_world(refused):
    message = refused("evaluate", "boolq", "--lorahub", "a")
    assert "--lorahub is for world; for other tasks lorax-gen lorahub makes" in message


def test_a_file_of_rows_is_evaluated_beside_benchmarks(call, models, mine, tmp_path):
    words = ["evaluate", "arc_easy", "mine.yaml", *mine, "--data-dir", ".", "--run-dir", "run"]
    words += [f"--{role}={models / role}" for role in ("cloud", "edge", "generator")]
    code, out, err = call(*words)
    assert (code, err) == (0, "")
    for word in ("ARC-e", "words", "acc_norm", "mine (2 tasks)", "ROUGE-L", "most frequent output",
                 "chance", "edge + LoRA-Gen"):  # fmt: skip
        assert word in out
    assert "p90" not in out and max(map(len, out.splitlines())) <= 80
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert list(report["rows"]) == ["plain", "icl", "lora_gen"]
    assert report["columns"]["mine/loss"]["n"] == 5

    item = tmp_path / "run" / "items" / "mine.lora_gen.jsonl"
    lines = item.read_text().splitlines()
    item.write_text("\n".join(lines[:4]) + "\n" + lines[4][:9])  # as if killed while writing
    code, again, err = call(*words)
    assert (code, err) == (0, "") and again == out
    assert sorted(item.read_text().splitlines()) == sorted(lines)


def test_modes_follow_what_was_given(call, models, card, mine, tmp_path):
    edge = f"--edge={models / 'edge'}"
    words = ["evaluate", "mine.yaml", "--shots", 1, "--timed", 0]
    parts = [f"--{role}={models / role}" for role in ("cloud", "generator")]
    for more, modes in (
        ([edge], ["plain", "icl"]),
        ([edge, parts[0]], ["plain", "icl"]),
        ([edge, *parts], ["plain", "icl", "lora_gen"]),
        ([edge, *parts, "--card", card], ["plain", "icl", "lora_gen", "card"]),
        ([], ["plain", "icl", "lora_gen"]),
        (["--lora", "world/lora"], ["plain", "icl", "lora_gen", "lora"]),
    ):
        run = tmp_path / str(len(list(tmp_path.iterdir())))
        code, _, err = call(*words, *more, "--run-dir", run)
        assert (code, err) == (0, ""), more
        assert list(json.loads((run / "report.json").read_text())["rows"]) == modes


def test_every_card_has_a_row_called_as_its_file(call, models, card, specialize, mine, tmp_path):
    assert call(*specialize("Look at the place .", "--output", "other.card.safetensors"))[0] == 0
    words = ["evaluate", "mine.yaml", "--run-dir", "run", "--timed", 0, "--modes", "plain", "card"]
    words += [f"--{role}={models / role}" for role in ("edge", "generator")]
    code, out, err = call(*words, "--card", card, "other.card.safetensors")
    assert (code, err) == (0, "")
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    labels = {name: row["label"] for name, row in report["rows"].items()}
    assert labels == {"plain": "edge, no prompt", "card:task": "task", "card:other": "other"}
    items = sorted(path.name for path in (tmp_path / "run" / "items").glob("*.jsonl"))
    assert items == ["words.card.other.jsonl", "words.card.task.jsonl", "words.plain.jsonl"]
    code, again, _ = call(*words, "--card", card, "--card", "other.card.safetensors")
    assert code == 0 and again == out


def test_inputs_are_in_the_frame_of_an_option_or_of_the_generator(call, models, mine, tmp_path):
    generator = load_generator(models / "generator")
    metadata = generator.metadata | {"frame": dataclasses.asdict(IO)}
    save_generator(tmp_path / "framed", dataclasses.replace(generator, metadata=metadata))
    words = ["evaluate", *mine, "--edge", models / "edge", "--modes", "plain", "--run-dir"]
    options = {
        None: [],
        "It : {input}": ["--frame", "It : {input}"],
        IO.template: ["--generator", "framed"],
    }
    options |= {"raw": [*options[IO.template], "--raw"]}
    for i, (template, more) in enumerate(options.items()):
        code, out, err = call(*words, f"run{i}", *more)
        assert (code, err) == (0, "")
        settings = json.loads((tmp_path / f"run{i}" / "report.json").read_text())["settings"]
        assert settings.get("frame", {"template": "raw" if more else None})["template"] == template
        assert ("inputs are read in the frame" in out) == ("frame" in settings)


def test_the_generators_frame_is_used_unless_an_option_says_otherwise():
    stored = [PLAIN, IO, IO]
    assert frame_of(Evaluate(), stored, None) == IO
    assert frame_of(Evaluate(raw=True), stored, None) == PLAIN
    assert frame_of(Evaluate(frame="plain"), stored, None) == PLAIN
    assert frame_of(Evaluate(), [PLAIN], None) == PLAIN
    with pytest.raises(UserError, match="--frame and --raw exclude each other"):
        frame_of(Evaluate(frame="io", raw=True), stored, None)
    with pytest.raises(UserError, match=r"different frames, .*choose one by --frame"):
        frame_of(Evaluate(), [IO, Frame("Q: {input}")], None)


@pytest.mark.parametrize(
    "given, models, modes",
    [
        ({}, "edge", "plain icl"),
        ({}, "edge cloud", "plain icl cloud_icl"),
        ({}, "edge cloud generator", "plain icl cloud_icl lora_gen shuffled"),
        ({"lora": "l"}, "edge cloud generator", "plain icl lora cloud_icl lora_gen shuffled"),
        ({"card": ((Path("a"),),)}, "edge cloud generator", "plain icl cloud_icl card"),
        ({"card": ((Path("a"),),), "generator": "z"}, "edge cloud generator",
         "plain icl cloud_icl lora_gen shuffled card"),
        ({"modes": ("card", "plain"), "card": ((Path("a"), Path("b")),)}, "edge",
         "card:a card:b plain"),
    ],
)  # fmt: skip
def test_modes_of_the_world_follow_what_was_given(given, models, modes):
    there = dict.fromkeys(("generator", "cloud", "edge")) | dict.fromkeys(models.split(), "x")
    assert modes_of(Evaluate(**given), there, NAMES) == modes.split()


def test_models_are_the_given_ones_and_those_that_artifacts_name(models, card, tmp_path):
    def found(**given):
        return [name and str(name) for name in models_of(Evaluate(**given)).values()]

    shipped = ["world/generator", "world/cloud", "world/edge"]
    assert sorted(found()) == sorted(found(edge="world/edge")) == sorted(shipped)
    assert found(edge="x") == [None, None, "x"]
    assert sorted(found(generator="world/generator")) == sorted(shipped)
    assert found(card=((card,),), edge="x", generator="z", cloud="y") == ["z", "y", "x"]


@pytest.mark.parametrize("timed, options", [(None, {}), (0, {"timed": 0}), (3, {"timed": 3})])
def test_what_is_timed_is_the_evaluations_default_unless_said(timed, options):
    assert timing(Evaluate(timed=timed)) == options
