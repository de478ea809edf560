"""Model files of llama.cpp.

A damaged file is refused, or what is loaded is what an independent look at it says: all numbers
finite, tokens by their ids, as many embeddings.
"""

import warnings

import jax
import numpy as np
import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from lorax_gen.models.huggingface import load_model
from tests.fuzz.damage import damaged_bytes, fuzz, refused
from tests.models.configs import CONFIGS
from tests.models.gguf_models import gguf, write_model

NAMES = ("llama", "qwen3", "gemma2", "gemma3", "smollm3")


@pytest.fixture(scope="module")
def saved(tmp_path_factory, random_params):
    root = tmp_path_factory.mktemp("saved")
    for name in NAMES:
        write_model(root / name, CONFIGS[name], random_params(CONFIGS[name]))
    return {name: (root / name).read_bytes() for name in NAMES}


def load(path):
    models = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if refused(lambda: models.append(load_model(path))) is None:
            check(models[0], path)
    event("accepted" if models else "refused")


def check(model, path):
    reader = gguf.GGUFReader(path)
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == model.config.vocab_size == model.params["embed"].shape[0]
    if not model.config.rms_norm_offset:  # Gemma's runs of spaces are renamed
        assert model.tokenizer.convert_tokens_to_ids(tokens) == list(range(len(tokens)))
    assert all(bool(np.isfinite(leaf).all()) for leaf in jax.tree.leaves(model.params))
    table = next(tensor for tensor in reader.tensors if tensor.name == "token_embd.weight")
    np.testing.assert_array_equal(model.params["embed"], table.data)


@fuzz
@given(data=st.data(), name=st.sampled_from(NAMES))
def test_a_file_with_damaged_bytes(data, name, saved, tmp_path_factory):
    path = tmp_path_factory.mktemp("damaged") / "model.gguf"
    path.write_bytes(data.draw(damaged_bytes(saved[name])))
    load(path)


@fuzz
@given(data=st.data(), name=st.sampled_from(NAMES))
def test_a_file_with_damaged_metadata(data, name, saved, tmp_path_factory):
    """Of the same length, so that the rest is where it was."""
    content, path = saved[name], tmp_path_factory.mktemp("damaged") / "model.gguf"
    size = content.index(b"blk.0.")  # the metadata come before the first tensor's name
    header = data.draw(damaged_bytes(content[:size]))[:size]
    path.write_bytes(header + content[len(header) :])
    load(path)
