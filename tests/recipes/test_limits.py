"""What a method needs of its models is asked before the first step, of every recipe alike."""

import copy
import dataclasses
import json

import pytest

from lorax_gen import load_model, specialize
from lorax_gen.config import from_dict
from lorax_gen.data.config import MixtureConfig
from lorax_gen.errors import UserError
from lorax_gen.models.huggingface import save_model
from lorax_gen.recipes.registry import RECIPES
from tests.tiny import PROMPTS, make_generator, write_system

POSITIONS = 64
META = 2  # one for each layer of the edge


@pytest.fixture(scope="module")
def models(tiny_world_system, tmp_path_factory):
    """`cloud` and `edge` of 64 positions, and each without an end of text (`-endless`)."""
    system = tiny_world_system
    models = {}
    for role in ("cloud", "edge"):
        model = getattr(system, role)
        config = dataclasses.replace(model.config, max_position_embeddings=POSITIONS)
        models[role] = dataclasses.replace(model, config=config)
    path = write_system(tmp_path_factory.mktemp("models"), system._replace(**models))
    for role, model in models.items():
        tokenizer = copy.deepcopy(model.tokenizer)
        tokenizer.eos_token = None
        save_model(path / f"{role}-endless", dataclasses.replace(model, tokenizer=tokenizer))
    return path


@pytest.fixture
def data(tmp_path):
    """The data of a config, of either kind, by the length of its prompts and questions."""
    rows = [{"instruction": f"Sort {i}", "input": "apple", "output": "alpha"} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    mixture = {"sources": [str(tmp_path / "rows.jsonl")], "directory": str(tmp_path)}
    mixture |= {"evaluate_on": [], "shots": 0}
    return {"world": {"kind": "world"}, "mixture": {"kind": "mixture", **mixture}}


def open_experiment(models, method, data, **names):
    names = {role: str(models / name) for role, name in names.items()}
    sizes = {"prompts": 8, "queries_per_prompt": 1} if method == "lora_gen" else {"batch_size": 8}
    recipe = RECIPES[method]
    return recipe.experiment(from_dict(recipe.config, {**names, **sizes, "data": data}, "test"))


PAIRS = {"lora_gen": {"cloud": "cloud", "edge": "edge"}, "lora": {"edge": "edge"}}


@pytest.mark.parametrize("kind", ["world", "mixture"])
@pytest.mark.parametrize(
    "method, key, most",
    [
        ("lora_gen", "prompt_length", POSITIONS - META),
        ("lora_gen", "question_length", POSITIONS),
        ("lora", "question_length", POSITIONS),
    ],
)
def test_rows_longer_than_a_model_reads_are_refused(models, data, kind, method, key, most):
    lengths = {"prompt_length": 32, "question_length": 32}

    def experiment(length):
        values = data[kind] | lengths | {key: length}
        return open_experiment(models, method, values, **PAIRS[method])

    message = rf"data\.{key} is {most + 1}, .*{POSITIONS} positions, max_position_embeddings"
    with pytest.raises(UserError, match=message):
        experiment(most + 1)
    batch = experiment(most).batch(0)
    assert batch["prompt" if key == "prompt_length" else "tokens"].shape[1] <= most


def test_the_usual_length_of_prompts_is_not_cut_in_silence(models, data):
    assert MixtureConfig().prompt_length > POSITIONS
    with pytest.raises(UserError, match=r"data\.prompt_length is 2048, .* set .* to 62 or less"):
        open_experiment(
            models, "lora_gen", data["mixture"] | {"question_length": 64}, **PAIRS["lora_gen"]
        )


def test_documents_longer_than_the_pretrained_model_reads_are_refused():
    recipe = RECIPES["pretrain"]
    with pytest.raises(UserError, match="document_length is 513, but the model reads at most 512"):
        recipe.experiment(recipe.config(document_length=513))


@pytest.mark.parametrize("kind", ["world", "mixture"])
@pytest.mark.parametrize(
    "method, role", [("lora_gen", "cloud"), ("lora_gen", "edge"), ("lora", "edge")]
)
def test_training_needs_an_end_of_text(models, data, kind, method, role):
    values = data[kind] | {"prompt_length": 32, "question_length": 32}
    if kind == "mixture":  # asked before the data are read
        values |= {"sources": ["missing.jsonl"]}
    names = PAIRS[method] | {role: f"{role}-endless"}
    with pytest.raises(UserError, match=f"the {role} model's tokenizer has no end of text"):
        open_experiment(models, method, values, **names)


def test_reading_a_prompt_needs_no_end_of_text(models, tiny_world_system):
    generator = make_generator(tiny_world_system)
    endless, usual = (load_model(models / name) for name in ("cloud-endless", "cloud"))
    edge = load_model(models / "edge")
    found, expected = (specialize(PROMPTS[0], cloud, edge, generator) for cloud in (endless, usual))
    assert (found.gates == expected.gates).all() and (found.indices == expected.indices).all()
