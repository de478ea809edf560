"""A run on real tasks' formats: invented rows in files, trained on, checkpointed and released."""

import json

import pytest
import yaml

from lorax_gen import cli, load_generator
from lorax_gen.artifacts.baseline import load_baseline
from lorax_gen.artifacts.peft import load_adapter
from tests.data.rows import make_rows, write_lines
from tests.tiny import write_system

DATA = {
    "kind": "mixture", "sources": ["arc_easy", "boolq", "alpaca=0.5"], "shots": 2,
    "prompt_length": 128, "question_length": 64, "prompt_buckets": [128], "question_buckets": [64],
    "evaluate_on": ["boolq", "winogrande"], "evaluate_questions": 3,
}  # fmt: skip
RECIPES = {
    "lora_gen": {
        "prompts": 4, "queries_per_prompt": 1,
        "generator": {"n_experts": 4, "rank": 4, "alpha": 4, "router_width": 16},
    },
    "lora": {"rank": 2, "batch_size": 4},
    "mixlora": {"adapter": {"n_experts": 3, "rank": 2}, "batch_size": 4, "in_context": True},
    "autocompressor": {
        "prompts": 4, "queries_per_prompt": 1,
        "compressor": {"vectors": 4, "segments": 3, "rank": 2},
    },
    "direct": {"prompts": 4, "queries_per_prompt": 1, "generator": {"units": 4, "rank": 2}},
}  # fmt: skip
PROMPTED = ("lora_gen", "direct")  # whose prompts the cloud reads
RUN = {"steps": 3, "log_every": 1, "checkpoint_every": 2, "evaluate_every": 3}


@pytest.fixture
def train(tiny_world_system, tmp_path, capsys):
    """`train(recipe, **data) -> (run directory, stderr)`: a tiny system on two benchmarks and
    triples of instructions."""
    models = write_system(tmp_path / "models", tiny_world_system)
    data = tmp_path / "data"
    data.mkdir()
    for name in ("arc_easy", "boolq", "winogrande"):
        write_lines(data / f"{name}.train.jsonl", make_rows(name, 8))
        write_lines(data / f"{name}.test.jsonl", make_rows(name, 4, first=8))
    triples = [{"instruction": f"Say {i}", "input": "now", "output": "yes"} for i in range(4)]
    write_lines(data / "alpaca.jsonl", triples)

    def train(recipe, run=None, **changes):
        cloud = {"cloud": str(models / "cloud")} if recipe in PROMPTED else {}
        values = {
            "method": recipe, **cloud, "edge": str(models / "edge"), **RECIPES[recipe],
            "data": DATA | {"directory": str(data)} | changes, "run": RUN | (run or {}),
            "mesh": {"data": 2, "fsdp": 2, "tensor": 2},
        }  # fmt: skip
        path = tmp_path / "mixed.yaml"
        path.write_text(yaml.safe_dump(values))
        with pytest.raises(SystemExit) as stop:
            cli.main(["train", str(path), "--run-dir", str(tmp_path / "run")])
        said = capsys.readouterr().err
        assert stop.value.code == 0, said
        return tmp_path / "run", said

    return train


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_mixture_trains_and_what_it_trained_is_released(
    train, recipe, tmp_path, tiny_world_system
):
    run, said = train(recipe)
    assert "there are no files of hellaswag, piqa: whether the training data hold" in said
    *steps, evaluation = rows_of(run)
    assert [row["data/samples"] for row in steps] == [4, 8, 12]
    assert all(row["tokens_per_second"] > 0 for row in steps)
    assert set(evaluation) == {
        "step", "accuracy/boolq", "accuracy/winogrande", "accuracy/seen", "accuracy/unseen",
        "truncated/questions", "truncated/prompts",
    }  # fmt: skip
    assert evaluation["accuracy/unseen"] == evaluation["accuracy/winogrande"]
    if recipe == "lora_gen":
        assert load_generator(run / "released").config.n_experts == 4
    elif recipe != "lora":
        made = load_baseline(run / "released")
        assert (made.method, made.in_context) == (recipe, recipe == "mixlora")
    else:
        lora = load_adapter(run / "released", tiny_world_system.edge.config)
        assert {pair["a"].shape[-1] for pair in lora.values()} == {2}
    released = "".join(path.read_text() for path in (run / "released").glob("*.json*"))
    assert str(tmp_path) not in released


def test_a_recipe_without_prompts_may_train_on_a_single_task(train):
    """That batches mix tasks is the router's rule, and prompts that are too long are not read."""
    run, _ = train("lora", sources=["boolq"], prompt_length=1, prompt_buckets=[])
    assert [row["data/samples"] for row in rows_of(run)[:-1]] == [4, 8, 12]


OWN = [
    {"instruction": f"Say which of {name} fits.", "input": f"{i} apples", "choices": ["one", "two"],
     "answer": i % 2}
    for name in ("these", "those", "them")
    for i in range(6)
]  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES)
def test_rows_that_are_held_out_are_evaluated_beside_their_floors(train, tmp_path, recipe):
    write_lines(tmp_path / "own.jsonl", OWN)
    free = [{"instruction": "Count.", "input": f"{i} pears", "output": f"{i}"} for i in range(4)]
    write_lines(tmp_path / "counts.jsonl", free)
    run, _ = train(
        recipe,
        sources=["arc_easy", f"{tmp_path / 'own.jsonl'}=1"],
        evaluate_on=["boolq", str(tmp_path / "counts.jsonl")],
        held_out={"tasks": 0.3, "rows": 0.2},
        evaluate_new_tokens=4,
    )
    [evaluation] = [row for row in rows_of(run) if "loss" not in row]
    assert {name for name in evaluation if name.endswith("/held_out_rows")} == {
        f"{name}/held_out_rows"
        for metric in ("choice_accuracy", "exact_match", "rouge_l")
        for name in (metric, f"floor/{metric}")
    } | {f"{name}/held_out_rows" for name in ("loss", "choice_accuracy_norm", "chance")}
    assert evaluation["chance/held_out_tasks"] == 0.5
    assert evaluation["loss/counts"] > 0 and "chance/counts" not in evaluation
    # The input contains the number, but is not the number.
    assert evaluation["floor/exact_match/counts"] == 0
    assert evaluation["floor/rouge_l/counts"] == pytest.approx(2 / 3)
    assert 0 <= evaluation["accuracy/boolq"] <= 1


def test_a_run_keeps_the_best_by_a_metric_of_held_out_rows(train, tmp_path):
    write_lines(tmp_path / "own.jsonl", OWN)
    run, _ = train(
        "lora_gen",
        sources=[str(tmp_path / "own.jsonl")],
        evaluate_on=[],
        held_out={"rows": 0.2},
        evaluate_new_tokens=0,
        run={"best": "loss/held_out_rows", "best_is": "lowest", "evaluate_every": 1, "keep": 1},
    )
    losses = {row["step"]: row["loss/held_out_rows"] for row in rows_of(run) if "loss" not in row}
    assert list(losses) == [1, 2, 3]
    kept = {int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit()}
    assert kept == {3, min(losses, key=losses.get)}


def test_what_is_evaluated_on_cannot_be_trained_on(train, tmp_path):
    write_lines(tmp_path / "own.jsonl", OWN)
    write_lines(tmp_path / "again.jsonl", OWN[3:4])
    with pytest.raises(AssertionError, match="holds a row of again, which is to be evaluated on"):
        train(
            "lora_gen",
            sources=[str(tmp_path / "own.jsonl")],
            evaluate_on=[str(tmp_path / "again.jsonl")],
        )


def test_without_the_hub_own_rows_are_checked_by_name_with_a_warning(train, tmp_path):
    write_lines(tmp_path / "own.jsonl", OWN)
    own = str(tmp_path / "own.jsonl")
    run, said = train("lora_gen", sources=[own], evaluate_on=[], directory="")
    assert "no files of hellaswag, winogrande, piqa: whether the training data hold" in said
    assert all("loss" in row for row in rows_of(run))  # nothing to evaluate on leaves no empty row
    with pytest.raises(AssertionError, match=r"cannot load .* from the hub"):
        train("lora_gen", sources=[own, "boolq"], directory="")


def test_two_sets_of_one_name_are_refused(train, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_lines(tmp_path / name / "own.jsonl", OWN)
    with pytest.raises(AssertionError, match="two sets called own; rename a file"):
        train("lora", evaluate_on=[str(tmp_path / name / "own.jsonl") for name in "ab"])
