"""Real models beside llama.cpp: tokens, logits, and a LoRA as a GGUF adapter.

Both compute in fp32: llama.cpp has the dequantised tensors, since of quantised ones it rounds the
activations too.
"""

import unicodedata
import warnings

import numpy as np
import pytest

from lorax_gen import load_model
from lorax_gen.artifacts.export import export
from lorax_gen.models.decoder import kernel_shapes
from lorax_gen.models.gguf_files import open_gguf
from lorax_gen.models.gguf_tokenizer import NORMALIZED, SPLITS, read_gguf_tokenizer
from lorax_gen.tokenizers import encode
from tests.real import llama_cpp_models as theirs
from tests.real.gguf_sources import GEMMA3, SMOLLM2
from tests.real.texts import WITH_DIGITS, WITH_ODD

smollm2 = pytest.mark.skipif(SMOLLM2 is None, reason="SmolLM2 is not there; fetch it: make smollm")
FILES = [
    pytest.param(SMOLLM2, 1e-5, id="smollm2", marks=smollm2),
    # Its GELU is a table in fp16 (GGML_GELU_FP16).
    pytest.param(GEMMA3, 2e-3, id="gemma3", marks=pytest.mark.skipif(
        GEMMA3 is None, reason="Gemma 3 270M is not there: see gguf_sources"
    )),
]  # fmt: skip


def pieces_of(file):
    return {key: value for key, value in file.metadata.items() if key.startswith("tokenizer.ggml")}


@pytest.mark.parametrize(("path", "_"), FILES)
def test_tokens_are_those_of_llama_cpp(path, _, tmp_path):
    file = open_gguf(path)
    small = theirs.write_vocabulary(
        tmp_path / "v.gguf", pieces_of(file), file.metadata["general.architecture"]
    )
    ours, other = read_gguf_tokenizer(file), theirs.load(small, vocab_only=True)
    assert len(WITH_ODD) == 200
    for text in WITH_ODD:
        assert encode(ours, text) == theirs.encode(other, text), text


@smollm2
@pytest.mark.parametrize("kind", SPLITS)
def test_texts_are_split_as_llama_cpp_splits_them(kind, tmp_path):
    """All kinds on one vocabulary. Qwen2's tokenizer.json composes characters first (NFC), as we
    do; llama.cpp does not, so here texts are composed already."""
    metadata = pieces_of(open_gguf(SMOLLM2)) | {"tokenizer.ggml.pre": kind}
    path = theirs.write_vocabulary(tmp_path / "v.gguf", metadata)
    ours, other = read_gguf_tokenizer(open_gguf(path)), theirs.load(path, vocab_only=True)
    for text in WITH_ODD:
        text = unicodedata.normalize("NFC", text) if kind in NORMALIZED else text
        assert encode(ours, text) == theirs.encode(other, text), text


@smollm2
def test_a_file_that_names_no_split_is_split_as_llama_cpp_does_it(tmp_path):
    metadata = pieces_of(open_gguf(SMOLLM2))
    del metadata["tokenizer.ggml.pre"]
    path = theirs.write_vocabulary(tmp_path / "v.gguf", metadata)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it names none
        ours = read_gguf_tokenizer(open_gguf(path))
    other = theirs.load(path, vocab_only=True)
    for text in WITH_ODD:
        assert encode(ours, text) == theirs.encode(other, text), text


@pytest.mark.parametrize(("path", "allowed"), FILES)
def test_logits_are_those_of_llama_cpp(path, allowed, tmp_path):
    ours = load_model(path)
    other = theirs.load(theirs.write_in_fp32(open_gguf(path), tmp_path / "f32.gguf"))
    compare(ours, other, allowed)


@smollm2
def test_an_adapter_in_llama_cpp_is_the_merged_model(tmp_path):
    """On all seven kernels of each layer, of a rank for each, and far from the bare model."""
    edge, rng = load_model(SMOLLM2), np.random.default_rng(0)
    tree, layers = {}, edge.config.num_hidden_layers
    for rank, (name, (d_in, d_out)) in enumerate(kernel_shapes(edge.config).items(), start=2):
        a, b = rng.normal(size=(layers, d_in, rank)), rng.normal(size=(layers, rank, d_out))
        a, b = a.astype(np.float32), b.astype(np.float32)
        tree[name] = {"a": a, "b": 0.02 * b / np.float32(d_in**0.5 * rank**0.5)}
    export(tree, tmp_path / "lora.gguf", "gguf-lora", edge)
    bare = theirs.write_in_fp32(open_gguf(SMOLLM2), tmp_path / "f32.gguf")
    other = theirs.load(bare, lora_path=str(tmp_path / "lora.gguf"))
    merged = edge.merged(tree)
    compare(merged, other, 1e-4)
    with pytest.raises(AssertionError, match="logits differ by"):
        compare(edge, other, 0.02)


def compare(ours, other, allowed):
    """Of ten texts all logits, relative to the largest one, and all argmaxes."""
    every = [ours.encode(text) for text in WITH_DIGITS[::20]]
    length, worst = max(map(len, every)), 0.0
    for ids in every:
        expected = theirs.logits(other, ids)
        found = np.asarray(ours(np.array([ids + [0] * (length - len(ids))])))[0, : len(ids)]
        worst = max(worst, np.abs(found - expected).max() / np.abs(expected).max())
        assert worst <= allowed, f"logits differ by {worst:.1e}"
        assert (found.argmax(-1) == expected.argmax(-1)).all()
    print(f"largest difference: {worst:.1e}")  # shown by -s
