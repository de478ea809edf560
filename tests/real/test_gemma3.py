"""Gemma 3 270M from its GGUF file (Q4_K_M): as a directory beside transformers on torch, and the
tokens that llama.cpp gave.

`gguf_sources` says where it comes from. `tests/golden/gguf_tokens.json` has a digest of each text's
tokens, which were llama.cpp's too when it was written: `test_llama_cpp.py` has that comparison.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from lorax_gen import generate_text, load_model
from lorax_gen.models.gguf_files import GGUFCheckpoint, open_gguf
from lorax_gen.models.gguf_tokenizer import read_gguf_tokenizer
from lorax_gen.models.huggingface import save_model
from lorax_gen.tokenizers import encode
from tests.models.gguf_models import gguf
from tests.real.gguf_sources import GEMMA3, SMOLLM2
from tests.real.texts import WITH_DIGITS, WITH_ODD

GOLDEN = Path(__file__).parents[1] / "golden" / "gguf_tokens.json"
ABSENT = "Gemma 3 270M is not there: see tests/real/gguf_sources.py"
needs_gemma = pytest.mark.skipif(GEMMA3 is None, reason=ABSENT)


@pytest.fixture(scope="module")
def model():
    return load_model(GEMMA3)


@pytest.fixture(scope="module")
def directory(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("gemma3") / "model"
    save_model(path, model)
    return path


@pytest.fixture(scope="module")
def theirs(directory):
    torch = pytest.importorskip("torch", reason="needs torch: make parity")
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_tokens_are_those_that_llama_cpp_gave(name):
    path = {"smollm2": SMOLLM2, "gemma3": GEMMA3}[name]
    if path is None:
        pytest.skip(f"{name} is not there: see tests/real/gguf_sources.py")
    tokenizer, expected = read_gguf_tokenizer(open_gguf(path)), json.loads(GOLDEN.read_text())[name]
    assert len(WITH_ODD) == len(expected) == 200
    for text, digest in zip(WITH_ODD, expected, strict=True):
        assert digest_of(encode(tokenizer, text)) == digest, text


def digest_of(ids):
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:8]


@needs_gemma
def test_its_layers_have_the_windows_and_ropes_of_gemma3(model):
    config = model.config
    assert (config.num_hidden_layers, config.hidden_size, config.head_dim) == (18, 640, 256)
    assert [i for i, window in enumerate(config.windows) if window is None] == [5, 11, 17]
    assert {window for window in config.windows if window} == {512}
    assert [rope.theta for rope in config.ropes[4:6]] == [1e4, 1e6]
    assert config.query_pre_attn_scalar == 256 and config.tie_word_embeddings


@needs_gemma
def test_tensors_are_what_the_gguf_package_dequantises(model):
    checkpoint = GGUFCheckpoint(open_gguf(GEMMA3), model.config)
    kinds = set()
    for tensor in gguf.GGUFReader(GEMMA3).tensors:
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        expected = expected - np.float32(1) if tensor.name.endswith("norm.weight") else expected
        shape = checkpoint.shape(tensor.name)
        assert checkpoint.read(tensor.name, (slice(None),) * len(shape)).tobytes() == (
            expected.tobytes()
        )
        kinds.add(tensor.tensor_type.name)
    assert kinds == {"F32", "Q4_K", "Q5_0", "Q6_K", "Q8_0"}


@needs_gemma
def test_a_directory_that_is_read_and_written_again_is_the_same_bit_for_bit(directory, tmp_path):
    save_model(tmp_path / "again", load_model(directory))
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (directory / name).read_bytes(), name


@needs_gemma
def test_logits_are_those_of_transformers(model, theirs):
    import torch

    every = [model.encode(text) for text in WITH_DIGITS[::20]]
    length, worst = max(map(len, every)), 0.0  # of one shape, so that JAX compiles once
    for ids in every:
        with torch.no_grad():
            expected = theirs(torch.tensor([ids])).logits[0].numpy()
        padded = np.array([ids + [0] * (length - len(ids))])
        found = np.asarray(model(padded))[0, : len(ids)]
        worst = max(worst, np.abs(found - expected).max() / np.abs(expected).max())
        assert (found.argmax(-1) == expected.argmax(-1)).all()
    print(f"largest difference: {worst:.1e}")  # shown by -s
    assert worst <= 1e-3


@needs_gemma
def test_a_hundred_greedy_tokens_are_those_of_transformers(model, theirs):
    import torch

    ids = model.encode("The history of the bicycle begins")
    found = theirs.generate(torch.tensor([ids]), max_new_tokens=100, do_sample=False)[0, len(ids) :]
    assert len(found) == 100
    expected = model.tokenizer.decode(found, skip_special_tokens=True)
    assert generate_text(model, [ids], max_new_tokens=100) == [expected]
