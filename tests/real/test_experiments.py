"""The paper's runs, as they are shipped, on small random models with real data and tokenizers:
trained, checkpointed, specialised and evaluated by the documented commands."""

import json

import pytest

from lorax_gen import cli
from lorax_gen.models.decoder import DecoderConfig
from lorax_gen.models.huggingface import save_model
from lorax_gen.models.model import Model
from lorax_gen.recipes.registry import load_config, shipped_configs

RUNS = [name for name in shipped_configs() if name.startswith(("reasoning-", "agent-"))]
SHAPE = {
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 4096, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def models(llama3_tokenizer, llama2_tokenizer, random_params, tmp_path_factory):
    """A cloud with LLaMA 3's tokenizer and an edge with LLaMA 2's, as TinyLLaMA has it."""
    folder = tmp_path_factory.mktemp("small")
    for name, tokenizer, width in (("cloud", llama3_tokenizer, 48), ("edge", llama2_tokenizer, 32)):
        config = DecoderConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, **SHAPE
        )
        save_model(folder / name, Model(config, random_params(config), tokenizer))
    return folder


def run(*words):
    with pytest.raises(SystemExit) as stop:
        cli.main([str(word) for word in words])
    assert stop.value.code == 0


@pytest.mark.parametrize("name", RUNS)
def test_the_config_is_the_papers(name):
    method, config = load_config(name)
    generator = config.generator
    assert method == "lora_gen" and config.prompts == 64
    assert (generator.n_experts, generator.top_k, generator.rank, generator.alpha) == (8, 2, 16, 16)
    assert config.optimizer.learning_rate == 2e-5 and config.data.prompt_length == 2048


def test_the_reasoning_run_from_data_to_evaluation(models, shared_data, tmp_path, capsys):
    run_dir, common = tmp_path / "run", ["--cloud", models / "cloud", "--edge", models / "edge"]
    run(
        "train", "reasoning-tinyllama", *common, "--run-dir", run_dir,
        "--data.directory", shared_data, "--dtype", "float32", "--prompts", 8,
        "--run.steps", 2, "--run.log-every", 1, "--run.evaluate-every", 2,
        "--data.evaluate-questions", 4, "--data.prompt-buckets", 2048,
        "--data.question-buckets", 1024,
    )  # fmt: skip
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert rows[1]["data/samples"] == 16 and rows[1]["gate_distance"] > 0
    assert {"accuracy/seen", "accuracy/unseen"} <= set(rows[2])

    common += ["--generator", run_dir / "released"]
    card = tmp_path / "boolq.card.safetensors"
    run("specialize", "Answer with yes or no.", *common, "--output", card)
    run(
        "evaluate", "boolq", "hellaswag", *common, "--data-dir", shared_data, "--limit", 4,
        "--shots", 1, "--modes", "plain", "lora_gen", "card", "--card", card,
        "--run-dir", tmp_path / "evaluation",
    )  # fmt: skip
    assert "HellaS" in capsys.readouterr().out
    report = json.loads((tmp_path / "evaluation" / "report.json").read_text())
    assert [found["cells"]["boolq"]["n"] for found in report["rows"].values()] == [4] * 3
    prompt = report["rows"]["lora_gen"]["cells"]["boolq"]["prompt_tokens"]
    assert prompt > 20 and report["rows"]["plain"]["cells"]["boolq"]["prompt_tokens"] == 0


def test_the_agent_run_from_data_to_evaluation(models, shared_data, tmp_path, capsys):
    run_dir, common = tmp_path / "run", ["--cloud", models / "cloud", "--edge", models / "edge"]
    train = shared_data / "gpt4tools" / "tyshiwo1_annotations_261.json.gz"
    data = tmp_path / "data"
    data.mkdir()
    (data / "gpt4tools_71k.json.gz").symlink_to(train)
    run(
        "train", "agent-gemma2", *common, "--run-dir", run_dir,
        "--data.directory", data, "--dtype", "float32", "--prompts", 8, "--run.steps", 1,
        "--data.prompt-buckets", 2048, "--data.question-buckets", 1024,
    )  # fmt: skip
    run(
        "evaluate", "gpt4tools", *common, "--generator", run_dir / "released", "--limit", 3,
        "--data-dir", shared_data, "--max-new-tokens", 8, "--run-dir", tmp_path / "evaluation",
    )  # fmt: skip
    out = capsys.readouterr().out
    assert "the edge sees previous conversation" in out and "x fewer tokens" in out
    report = json.loads((tmp_path / "evaluation" / "report.json").read_text())
    assert report["rows"]["icl"]["compression"] == 1.0
    assert report["rows"]["lora_gen"]["compression"] > 3
