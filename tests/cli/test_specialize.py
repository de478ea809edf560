"""`lorax-gen specialize`, and `generate` with what it wrote."""

import io

import numpy as np
import pytest

from lorax_gen import load_card, load_model
from tests.tiny import PROMPTS

PROMPT = PROMPTS[0]


def test_a_specialised_edge_answers_through_its_card(call, specialize, models, tmp_path):
    code, out, err = call(*specialize(PROMPT, "--merged", tmp_path / "merged"))
    assert (code, err) == (0, "")
    path = tmp_path / "task.card.safetensors"
    assert out == f"card: task.card.safetensors\nmerged edge model: {tmp_path}/merged\n"
    options = ["--card", path, "--generator", models / "generator", "--max-new-tokens", 3]
    code, by_card, err = call("generate", "apple :", "bell :", "--edge", models / "edge", *options)
    assert (code, err) == (0, "")
    lines = by_card.splitlines()
    assert [line[: line.index(":")] for line in lines] == ["apple ", "bell "]
    assert all(len(line.split()) == 3 for line in lines)  # one word, then the text ended
    _, merged, _ = call("generate", "apple :", "bell :", "--edge", tmp_path / "merged")
    assert merged == by_card
    _, plain, _ = call("generate", "apple :", "bell :", "--edge", models / "edge")
    assert plain != by_card
    assert load_card(path).edge == load_model(models / "edge").fingerprint
    for file in (tmp_path / "merged").iterdir():
        assert str(models).encode() not in file.read_bytes()


def test_a_prompt_comes_from_a_file_or_from_standard_input(call, specialize, tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_text(f"{PROMPT}\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(f"{PROMPT}\r\n".encode())))
    for i, prompt in enumerate((PROMPT, "@prompt.txt", "-")):
        assert call(*specialize(prompt, "--output", f"{i}"))[0] == 0
    cards = [(tmp_path / f"{i}").read_bytes() for i in range(3)]
    assert cards[0] == cards[1] == cards[2]


@pytest.mark.parametrize(
    "prompt, message",
    [
        ("", "the prompt is empty"),
        ("thing " * 60, "a prompt of 61 tokens is longer than the 38 positions"),
        ("@nowhere.txt", "cannot read the prompt file nowhere.txt"),
        ("@.", "cannot read the prompt file"),
        ("Sort each caf\udce9 .", "the text is not UTF-8"),
        (" \n ", "the prompt is empty"),
    ],
    ids=["empty", "long", "missing file", "directory", "no text", "blank"],
)
def test_a_prompt_that_cannot_be_read_is_refused(refused, specialize, tmp_path, prompt, message):
    assert message in refused(*specialize(prompt))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "other, message",
    [
        ({"edge": "nowhere"}, "no model directory at"),
        ({"cloud": "generator"}, "generator/config.json is of architecture none"),
        ({"edge": "foreign"}, "architecture MambaForCausalLM; supported are LlamaForCausalLM"),
        ({"cloud": "edge"}, "pass the cloud model that it was trained with"),
        ({"generator": "edge"}, "edge is not a generator"),
        ({"generator": "nowhere"}, "no generator directory at"),
    ],
)
def test_models_that_do_not_go_together_are_refused(refused, specialize, tmp_path, other, message):
    assert message in refused(*specialize(**other))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--output", "--merged"])
def test_an_existing_output_is_refused_before_anything_is_written(
    refused, specialize, tmp_path, option
):
    (tmp_path / "mine").mkdir()
    assert "mine already exists" in refused(*specialize(PROMPT, option, "mine"))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_cloud_over_several_devices_makes_the_same_card(call, models, tmp_path):
    """Its weights are split over four of the eight devices, and prompts over what is left."""
    options = ["--cloud", models / "cloud", "--edge", models / "edge"]
    options += ["--generator", models / "generator"]
    for name, mesh in (("alone", []), ("split", ["--fsdp", "2", "--tensor", "2"])):
        path = tmp_path / f"{name}.safetensors"
        code, *_ = call("specialize", PROMPT, *options, *mesh, "--output", path)
        assert code == 0
    alone, split = (load_card(tmp_path / f"{name}.safetensors") for name in ("alone", "split"))
    np.testing.assert_array_equal(split.indices, alone.indices)
    np.testing.assert_allclose(split.gates, alone.gates, atol=1e-5)
    assert (split.generator, split.cloud) == (alone.generator, alone.cloud)
