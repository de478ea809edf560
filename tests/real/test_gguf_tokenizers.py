"""Real vocabularies, stored in GGUF's metadata as llama.cpp's converter does it, give the same
tokens."""

import json

import pytest

from lorax_gen.models.gguf_files import GGUFFile
from lorax_gen.models.gguf_tokenizer import read_gguf_tokenizer
from lorax_gen.tokenizers import encode
from tests.models.gguf_models import BYTE, CONTROL, NORMAL, UNKNOWN
from tests.real.real_tokenizers import LLAMA2_FILE, read_pieces
from tests.real.test_real_tokenizers import TEXTS as ODD
from tests.real.texts import WITH_DIGITS


def stored(tokenizer, model, **keys):
    """The tokens of a tokenizer and their types, and the special ones."""
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    added = set(tokenizer.added_tokens_decoder)
    types = [CONTROL if i in added else NORMAL for i in range(len(tokens))]
    found = {"model": model, "tokens": tokens, "token_type": types, **keys}
    for name in ("bos", "eos"):
        number = getattr(tokenizer, f"{name}_token_id")
        found |= {} if number is None else {f"{name}_token_id": number}
    return {f"tokenizer.ggml.{key}": value for key, value in found.items()}


@pytest.mark.parametrize(("family", "pre"), [("llama3", "llama-bpe"), ("qwen", "qwen2")])
def test_bpe_over_bytes(family, pre, request):
    directory = request.getfixturevalue(f"{family}_directory")
    tokenizer = request.getfixturevalue(f"{family}_tokenizer")
    merges = json.loads((directory / "tokenizer.json").read_text())["model"]["merges"]
    merges = [" ".join(pair) for pair in merges]
    assert len(merges) > 100_000
    check(tokenizer, stored(tokenizer, "gpt2", pre=pre, merges=merges))


def test_sentencepiece_without_merges(llama2_tokenizer, shared_data):
    scores = [score for _, score in read_pieces(shared_data / LLAMA2_FILE)]
    metadata = stored(llama2_tokenizer, "llama", scores=scores, unknown_token_id=0)
    metadata["tokenizer.ggml.token_type"][:259] = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256]
    check(llama2_tokenizer, metadata)


def check(expected, metadata):
    file = GGUFFile("here", {"general.architecture": "llama", **metadata}, {})
    tokenizer = read_gguf_tokenizer(file)
    assert len(tokenizer) == len(expected)
    for text in [*ODD, *WITH_DIGITS]:
        ids = encode(expected, text)
        assert encode(tokenizer, text) == ids
        assert tokenizer.decode(ids) == expected.decode(ids)
