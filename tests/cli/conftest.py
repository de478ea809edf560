"""Commands called in an empty directory, and tiny models as files."""

import copy
import dataclasses
import json

import pytest

from lorax_gen import cli
from lorax_gen.models.huggingface import save_model
from tests.tiny import PROMPTS, make_generator, one_word_edge, write_generator, write_system

PROMPT = PROMPTS[0]
CHAT = "{{ bos_token }} thing {% for turn in messages %}{{ turn['content'] }} {% endfor %}bell :"


@pytest.fixture(scope="session")
def models(tiny_world_system, tmp_path_factory):
    """A folder of `cloud`, `edge` and `generator`, of models that do not go with them, of one that
    goes on for ever (`talker`) and of one that chats (`chatter`)."""
    system = tiny_world_system._replace(edge=one_word_edge(tiny_world_system))
    config = dataclasses.replace(system.cloud.config, max_position_embeddings=40)
    system = system._replace(cloud=dataclasses.replace(system.cloud, config=config))
    ours, other = (make_generator(system, seed, edge_targets=("gate", "up")) for seed in (0, 2))
    folder = write_system(tmp_path_factory.mktemp("models"), system, ours)
    write_generator(folder / "generator2", other, system)
    params = {**system.edge.params, "final_norm": 2 * system.edge.params["final_norm"]}
    save_model(folder / "edge2", dataclasses.replace(system.edge, params=params))
    save_model(folder / "foreign", system.edge)
    config = json.loads((folder / "foreign" / "config.json").read_text())
    config["architectures"] = ["MambaForCausalLM"]
    (folder / "foreign" / "config.json").write_text(json.dumps(config))
    save_model(folder / "talker", dataclasses.replace(tiny_world_system.edge, stop_ids=(1,)))
    tokenizer = copy.deepcopy(system.edge.tokenizer)
    tokenizer.chat_template = CHAT
    save_model(folder / "chatter", dataclasses.replace(system.edge, tokenizer=tokenizer))
    return folder


@pytest.fixture
def call(capsys, monkeypatch, tmp_path):
    """`call(*words) -> (exit code, stdout, stderr)`, in an empty working directory."""
    monkeypatch.chdir(tmp_path)

    def call(*words):
        with pytest.raises(SystemExit) as stop:
            cli.main([str(word) for word in words])
        return stop.value.code, *capsys.readouterr()

    return call


@pytest.fixture
def refused(call):
    """`refused(*words) -> message` of a command that ends with exit code 2 and one line."""

    def refused(*words):
        code, out, err = call(*words)
        assert (code, out) == (2, "")
        assert err.startswith("lorax-gen: error: ") and err.count("\n") == 1 and err[-1] == "\n"
        return err.removeprefix("lorax-gen: error: ")

    return refused


@pytest.fixture
def specialize(models):
    """The words of a command that specialises the tiny edge."""

    def words(prompt=PROMPT, *more, **other):
        names = {"cloud": "cloud", "edge": "edge", "generator": "generator"} | other
        options = [word for role, name in names.items() for word in (f"--{role}", models / name)]
        return ["specialize", prompt, *options, *more]

    return words


@pytest.fixture
def card(call, specialize, tmp_path):
    assert call(*specialize())[0] == 0
    return tmp_path / "task.card.safetensors"


@pytest.fixture
def to(models):
    """The words of a command about an artifact of the tiny edge."""

    def words(command, artifact, *more, **other):
        names = {"edge": "edge", "generator": "generator"} | other
        options = [word for role, name in names.items() for word in (f"--{role}", models / name)]
        return [command, artifact, *options, *more]

    return words


@pytest.fixture
def generate(call, models):
    """`generate(*words)`: what is printed for them."""

    def generate(*words, model="edge"):
        code, out, err = call("generate", *words, "--edge", models / model)
        assert (code, err) == (0, "")
        return out

    return generate
