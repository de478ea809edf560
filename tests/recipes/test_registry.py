"""Every shipped config is a valid one, and what is wrong in a config file is said."""

import re

import pytest
import yaml

from lorax_gen import config as configs
from lorax_gen import documents
from lorax_gen.errors import UserError
from lorax_gen.recipes.registry import RECIPES, SHIPPED, load_config, shipped_configs


def test_there_are_configs_for_every_method():
    assert {load_config(name)[0] for name in shipped_configs()} == set(RECIPES)


@pytest.mark.parametrize("name", shipped_configs())
def test_a_shipped_config_loads_by_name_and_by_path(name):
    method, config = load_config(name)
    assert type(config) is RECIPES[method].config
    assert load_config(str(SHIPPED / f"{name}.yaml")) == (method, config)


@pytest.mark.parametrize("name", shipped_configs())
def test_a_resolved_config_is_the_same_config(name, tmp_path):
    method, config = load_config(name)
    path = tmp_path / "config.yaml"
    path.write_text(documents.to_yaml({"method": method, **configs.to_dict(config)}))
    assert load_config(str(path)) == (method, config)


def test_the_shipped_configs_say_what_they_set():
    values = yaml.safe_load((SHIPPED / "world.yaml").read_text())
    _, config = load_config("world")
    assert config.prompts == values["prompts"]
    assert config.generator.n_experts == values["generator"]["n_experts"]
    assert config.optimizer.learning_rate == 3e-3


@pytest.mark.parametrize("name", shipped_configs())
def test_the_comment_on_top_is_the_command(name):
    text = (SHIPPED / f"{name}.yaml").read_text()
    assert re.search(rf"^#   lorax-gen train {name}( --data.directory DIR)?$", text, re.MULTILINE)


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "prompts: 4",
            "method is None; expected one of lora_gen, lora, ",
        ),
        ("method: lorax", "method is 'lorax'; expected one of"),
        ("method: [lora]", "expected one of"),
        ("method: lora_gen\nprompt: 4", "unknown key prompt; did you mean prompts?"),
        (
            "method: lora_gen\ngenerator: {n_expert: 4}",
            "unknown key generator.n_expert; did you mean generator.n_experts?",
        ),
        ("method: pretrain\nprompts: 4", "unknown key prompts"),
        ("method: lora_gen\nprompts: four", "prompts is 'four'; expected int, got str"),
        ("method: lora_gen\ngenerator: {pool: global}", "pool"),
        ("method: lora_gen\ngenerator: {top_k: 9}", "top_k is 9: choose a number at most"),
        ("method: lora_gen\ndata: {kind: world, families: [sorts]}", "unknown family 'sorts'"),
        (
            "method: lora_gen\ndata: {prompt_length: 9}",
            "data.kind is missing; choose one of world,",
        ),
        (
            "method: lora_gen\ndata: {kind: mixture, families: [sort]}",
            "unknown key data.families; did you mean data.frame?",
        ),
        (
            "method: lora\noptimizer: {learning_rate: -1.0}",
            "optimizer.learning_rate is -1.0; expected float > 0.0",
        ),
        (
            "method: lora\noptimizer: {warmup_steps: -1}",
            "optimizer.warmup_steps is -1; expected int >= 0",
        ),
        ("method: lora_gen\nprompts: 0", "prompts is 0; expected int >= 1"),
        ("method: lora_gen\nqueries_per_prompt: 0", "queries_per_prompt is 0"),
        ("method: lora_gen\nmicrobatches: -2", "microbatches is -2"),
        ("method: lora_gen\nanswer_length: 0", "answer_length is 0"),
        ("method: lora_gen\ndata: {kind: world, max_shots: -1}", "data.max_shots is -1"),
        ("method: lora\nbatch_size: 0", "batch_size is 0; expected int >= 1"),
        ("method: lora\ndropout: 1.0", "dropout is 1.0; expected float < 1.0"),
        ("method: pretrain\nlessons: 0", "lessons is 0; expected int >= 1"),
    ],
)
def test_what_is_wrong_in_a_file_is_named_in_one_line(text, message, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_config(str(path))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_rate_without_a_point_is_a_float(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("method: lora_gen\noptimizer: {learning_rate: 2e-5}\n")
    assert load_config(str(path))[1].optimizer.learning_rate == 2e-5


def test_an_unknown_config_is_answered_with_the_nearest_name():
    with pytest.raises(UserError, match=r"no config file wrold; did you mean world\?"):
        load_config("wrold")
    with pytest.raises(UserError, match=r"no config file zzz; shipped configs: .*world-cloud"):
        load_config("zzz")


def test_a_file_goes_before_a_shipped_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "world").write_text("method: lora\nrank: 3\n")
    assert load_config("world")[1].rank == 3
