"""`lorax-gen convert`."""

import json

import jax.numpy as jnp

from lorax_gen import load_model
from tests.models.configs import LLAMA
from tests.models.gguf_models import write_model


def test_a_gguf_file_becomes_a_directory_of_the_same_model(call, refused, tmp_path, random_params):
    write_model(tmp_path / "model.gguf", LLAMA, random_params(LLAMA), "F16")
    assert call("convert", "model.gguf", "mine") == (0, "model: mine\n", "")
    assert load_model("mine").fingerprint == load_model("model.gguf").fingerprint
    assert load_model("mine").name == "mine" and load_model("model.gguf").name == "model.gguf"
    assert "mine already exists" in refused("convert", "model.gguf", "mine")
    assert call("convert", "model.gguf", "half", "--dtype", "bfloat16")[0] == 0
    assert load_model("half", None).params["embed"].dtype == jnp.bfloat16


def test_what_is_no_gguf_file_is_refused_and_nothing_written(refused, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert "is not a complete GGUF file" in refused("convert", "model.gguf", "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_an_option_that_names_a_model_takes_a_gguf_file(call, tmp_path, random_params):
    write_model(tmp_path / "model.gguf", LLAMA, random_params(LLAMA))
    code, out, err = call("generate", "--edge", "model.gguf", "--max-new-tokens", "3", "a b")
    assert (code, err) == (0, "") and out.startswith("a b")
    code, directory = call("convert", "model.gguf", "mine")[0], "mine"
    assert call("generate", "--edge", directory, "--max-new-tokens", "3", "a b") == (code, out, "")


def test_a_converted_directory_says_where_it_comes_from_without_paths(
    call, tmp_path, random_params
):
    path = write_model(tmp_path / "model.gguf", LLAMA, random_params(LLAMA))
    assert call("convert", str(path), "mine")[0] == 0
    text = (tmp_path / "mine" / "provenance.json").read_text()
    assert str(tmp_path) not in text
    found, expected = json.loads(text), load_model("mine").fingerprint
    assert found["converted_from"] == {"name": "model.gguf", "fingerprint": expected}
    assert found["made_with"].startswith("lorax-gen ")
