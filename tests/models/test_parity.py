"""The decoder against `transformers` on torch, live: larger models than the golden ones.

Needs torch (pip install -e '.[parity]'); without it, `test_golden.py` says much the same.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

pytest.importorskip("torch", reason="needs torch: pip install -e '.[parity]'")

import torch
from transformers import AutoModelForCausalLM

from lorax_gen.models.huggingface import read_config, read_params, save_model
from lorax_gen.models.model import Model
from lorax_gen.tokenizers import word_level
from tests.golden.compare import assert_matches
from tests.golden.make import CASES, COMMON, GOLDEN, compute, random_model, random_tokens, save

LARGER = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
SEED = 100  # the golden ones count from 0


def case_of(name, **changes):
    case = CASES[name]
    return case._replace(settings=case.settings | LARGER, **changes)


def read_all(directory):
    """`{name: tensor}` over all files of a checkpoint."""
    return {k: v for path in directory.glob("*.safetensors") for k, v in load_file(path).items()}


def test_every_case_is_on_file():
    assert {path.parent.name for path in GOLDEN.glob("*/expected.safetensors")} == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_every_layer_gives_what_transformers_gives(name, tmp_path):
    case, tokens = case_of(name), random_tokens(SEED)
    model = random_model(case, SEED)
    expected = compute(model, tokens)
    save(tmp_path, model, case)
    config = read_config(tmp_path / "config.json")
    assert_matches(read_params(tmp_path, config), config, {"tokens": tokens, **expected})


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_passes_through_bit_for_bit(name, dtype, tmp_path):
    """From `save_pretrained` through our reader and writer back to `from_pretrained`."""
    case, tokens = case_of(name, dtype=dtype), random_tokens(SEED)
    model = random_model(case, SEED)
    logits = compute(model, tokens)["logits"]
    save(tmp_path / "theirs", model, case)

    config = read_config(tmp_path / "theirs" / "config.json")
    params = read_params(tmp_path / "theirs", config, dtype=None)
    tokenizer = word_level([f"word{i}" for i in range(COMMON["vocab_size"] - 4)])
    save_model(
        tmp_path / "ours", Model(config, params, tokenizer), max_shard_size=case.max_shard_size
    )

    assert read_config(tmp_path / "ours" / "config.json") == config
    theirs, ours = read_all(tmp_path / "theirs"), read_all(tmp_path / "ours")
    assert params["embed"].dtype == jnp.dtype(dtype)
    assert ours.keys() == theirs.keys()
    for key in theirs:
        assert (ours[key].shape, ours[key].dtype) == (theirs[key].shape, theirs[key].dtype), key
        assert ours[key].tobytes() == theirs[key].tobytes(), key

    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, attn_implementation="eager"
    )
    np.testing.assert_allclose(compute(again, tokens)["logits"], logits, atol=1e-5)
