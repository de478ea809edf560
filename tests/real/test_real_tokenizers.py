"""Tokenizers of real vocabularies, held against their algorithms written out plainly."""

import json
import lzma
import math
import shutil
import unicodedata

import numpy as np
import pytest
import regex

from lorax_gen.errors import UserError
from lorax_gen.models import presets
from lorax_gen.models.model import Model
from lorax_gen.tokenizers import encode, load_tokenizer
from tests.real.real_tokenizers import (
    BYTES,
    GEMMA_SPECIAL,
    LLAMA2_FILE,
    LLAMA3_FILE,
    LLAMA3_SPECIAL,
    LLAMA3_WORDS,
    QWEN_FILE,
    QWEN_WORDS,
    read_pieces,
    read_ranks,
)

FAMILIES = ["llama2", "llama3", "qwen", "gemma"]
BYTE_LEVEL = {"llama3": (LLAMA3_FILE, LLAMA3_WORDS), "qwen": (QWEN_FILE, QWEN_WORDS)}
CORPORA = [
    "tinyshakespeare",
    "tinystories_cased_0.9MB",
    "tinystories_lowercase_4.2MB",
    "wikitext2_test",
    "wikitext2_valid",
]
TEXTS = [
    "Hello, world! It's what we'll say; they'd AGREE, WOULDN'T they?",
    "def f(x):\n    if x:\n\t\treturn {'a': [x ** 2, 3.14e-5]}  # done\n\n\n",
    "0 12 345 6789 1234567890 3,141.59 ½ ² Ⅷ ٣٤",
    " leading,  two,   three,        eight,                 seventeen spaces ",
    " \n \n\n  \r\n\t\t line ends  ",
    "Grüße, señor! Ça va? Þórr, żółć, naïve café",
    "nhiều điều việc ở Việt Nam",  # words that LLaMA 3 has, but no row of merges makes
    "Съешь же ещё этих мягких французских булок",
    "Ελληνικά: το γρήγορο",
    "敏捷的棕色狐狸。世界，你好！素早い茶色の狐が、怠け者の犬を。빠른 갈색 여우가",
    "مرحبا بالعالم! שלום עולם नमस्ते दुनिया สวัสดีชาวโลก",
    "🙂 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 ✊🏽 𝔘𝔫𝔦 𓀀",
    "aaaaaaaaaaaaaaaaaaaaaaa ==================== ---------------!!!!!!!!!!!!",
    "   \u00a0\u2003\u3000 odd spaces \u200b and \u0000 and \ufeff and \U0010ffff",
    "<0x41> <unknown> <|nothing|> ▁",
]


@pytest.fixture
def tokenizer(request, family):
    return request.getfixturevalue(f"{family}_tokenizer")


@pytest.fixture(scope="module")
def samples(shared_data) -> list[str]:
    """Stretches of 400 characters from everywhere in the corpora, and `TEXTS`."""
    rng, found = np.random.default_rng(0), list(TEXTS)
    for name in CORPORA:
        with lzma.open(shared_data / f"corpora/{name}.txt.xz", "rt", encoding="utf-8") as file:
            text = file.read().replace("<unk>", "rare")  # WikiText's, and a token of LLaMA 2's
        found += [text[start : start + 400] for start in rng.integers(0, len(text) - 400, 6)]
    return found


# --- the algorithms, written out -----------------------------------------------------------------


def merge(parts: list, ranks: dict) -> list:
    """Joins neighbours while any pair of them has a rank: the lowest first, then the leftmost."""
    while len(parts) > 1:
        pairs = [ranks.get(parts[i] + parts[i + 1], math.inf) for i in range(len(parts) - 1)]
        at = pairs.index(min(pairs))
        if pairs[at] == math.inf:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def tiktoken_encode(text: str, ranks: dict[bytes, int], words: str) -> list[int]:
    ids = []
    for word in regex.findall(words, text):
        content = word.encode()
        whole = [content] if content in ranks else None
        ids += [ranks[part] for part in whole or merge([bytes([b]) for b in content], ranks)]
    return ids


def sentencepiece_encode(text: str, pieces: list[tuple[str, float]]) -> list[int]:
    """Of a text that is not empty."""
    ids = {piece: i for i, (piece, _) in enumerate(pieces)}
    ranks = {piece: -score for piece, score in pieces[3 + len(BYTES) :]}
    parts = merge(list("▁" + text.replace(" ", "▁")), ranks)
    return [i for part in parts for i in ([ids[part]] if part in ids else by_bytes(part))]


def by_bytes(text: str) -> list[int]:
    return [3 + byte for byte in text.encode()]


@pytest.mark.parametrize("family", BYTE_LEVEL)
def test_byte_level_tokenizers_merge_as_tiktoken_does(family, tokenizer, samples, shared_data):
    file, words = BYTE_LEVEL[family]
    ranks = read_ranks(shared_data / file)
    for text in samples:
        text = unicodedata.normalize("NFC", text) if family == "qwen" else text
        assert encode(tokenizer, text, bos=False) == tiktoken_encode(text, ranks, words)


def test_llama2_merges_as_sentencepiece_does(llama2_tokenizer, samples, shared_data):
    pieces = read_pieces(shared_data / LLAMA2_FILE)
    for text in samples:
        assert encode(llama2_tokenizer, text, bos=False) == sentencepiece_encode(text, pieces)


def test_llama2_has_the_pieces_of_the_sentencepiece_model(shared_data):
    """The file that is read is an export of another, which holds the pieces themselves."""
    pytest.importorskip("google.protobuf", reason="needs protobuf")
    from transformers.convert_slow_tokenizer import import_protobuf

    model = import_protobuf().ModelProto()
    model.ParseFromString((shared_data / LLAMA2_FILE).with_name("tokenizer.model").read_bytes())
    expected = [(piece.piece, piece.score) for piece in model.pieces]
    assert read_pieces(shared_data / LLAMA2_FILE) == expected
    assert model.trainer_spec.byte_fallback and model.normalizer_spec.add_dummy_prefix


# --- known ids -----------------------------------------------------------------------------------

# From the tests of transformers (LLaMA 2, Qwen) and of llama-models (LLaMA 3), and from Qwen's note
# on its tokenizer.
KNOWN = [
    ("llama2", "This is a test", [1, 910, 338, 263, 1243]),
    ("llama2", "Hello this is a test", [1, 15043, 445, 338, 263, 1243]),
    ("llama2", "Hey how are you doing", [1, 18637, 920, 526, 366, 2599]),
    ("llama3", "This is a test sentence.", [128000, 2028, 374, 264, 1296, 11914, 13]),
    (
        "llama3",
        "<|start_header_id|>user<|end_header_id|>\n\nThis is a response.<|eot_id|>",
        [128000, 128006, 882, 128007, 271, 2028, 374, 264, 2077, 13, 128009],
    ),
    ("qwen", 'print("<|endoftext|>")', [1350, 445, 151643, 899]),
    ("qwen", " 根", [51461, 117]),
    (
        "qwen",
        '```python\ntokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen-tokenizer")\n'
        'tokenizer("世界，你好！")```',
        [73594, 12669, 198, 85593, 284, 8979, 37434, 6387, 10442, 35722, 445, 48, 16948, 45274]
        + [16948, 34841, 3135, 1138, 85593, 445, 99489, 3837, 108386, 6313, 899, 73594],
    ),
]


@pytest.mark.parametrize("family, text, ids", KNOWN)
def test_texts_get_their_published_ids(family, tokenizer, text, ids):
    assert encode(tokenizer, text) == ids


@pytest.mark.parametrize(
    "family, size, special",
    [
        ("llama2", 32_000, {"<unk>": 0, "<s>": 1, "</s>": 2}),
        (
            "llama3",
            128_256,
            {
                "<|begin_of_text|>": 128_000,
                "<|end_of_text|>": 128_001,
                "<|finetune_right_pad_id|>": 128_004,
                "<|start_header_id|>": 128_006,
                "<|end_header_id|>": 128_007,
                "<|eom_id|>": 128_008,
                "<|eot_id|>": 128_009,
                "<|python_tag|>": 128_010,
                "<|reserved_special_token_247|>": 128_255,
            },
        ),
        (
            "qwen",
            151_646,
            {"<|endoftext|>": 151_643, "<|im_start|>": 151_644, "<|im_end|>": 151_645},
        ),
        ("gemma", None, {name: i for i, name in enumerate(GEMMA_SPECIAL)}),
    ],
)
def test_vocabularies_have_their_sizes_and_special_tokens(family, tokenizer, size, special):
    assert size is None or len(tokenizer) == size
    assert tokenizer.convert_tokens_to_ids(list(special)) == list(special.values())
    assert encode(tokenizer, "".join(special), bos=False) == list(special.values())
    assert tokenizer.decode(list(special.values()), skip_special_tokens=True) == ""


def test_llama3_has_256_special_tokens():
    assert len(set(LLAMA3_SPECIAL)) == 256


# --- there and back ------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", " ", "\n", *TEXTS], ids=range(3 + len(TEXTS)))
@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_gives_the_text_back(family, tokenizer, text):
    if family in ("llama2", "gemma"):
        text = text.replace("▁", "_")  # SentencePiece's own sign for a space
    ids = encode(tokenizer, text)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert max(ids, default=0) < len(tokenizer)


def test_stretches_of_the_corpora_come_back(samples, llama2_tokenizer, llama3_tokenizer):
    for tokenizer in (llama2_tokenizer, llama3_tokenizer):
        for text in samples[len(TEXTS) :]:
            ids = encode(tokenizer, text)
            assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_only_qwen_composes_accents(qwen_tokenizer, llama2_tokenizer, llama3_tokenizer):
    apart, composed = "cafe\u0301", "café"
    assert encode(qwen_tokenizer, apart) == encode(qwen_tokenizer, composed)
    for tokenizer in (llama2_tokenizer, llama3_tokenizer):
        ids = encode(tokenizer, apart)
        assert tokenizer.decode(ids, skip_special_tokens=True) == apart


def test_digits_are_taken_one_by_one_but_for_llama3(
    qwen_tokenizer, llama2_tokenizer, llama3_tokenizer
):
    assert llama3_tokenizer.tokenize("1234567") == ["123", "456", "7"]
    assert qwen_tokenizer.tokenize("1234567") == list("1234567")
    assert llama2_tokenizer.tokenize("1234567") == ["▁", *"1234567"]


# --- BOS and EOS ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, bos", [("llama2", "<s>"), ("llama3", "<|begin_of_text|>"), ("gemma", "<bos>")]
)
def test_bos_goes_in_front_by_itself_and_once(family, tokenizer, bos):
    bare, start = encode(tokenizer, "hello", bos=False), tokenizer.convert_tokens_to_ids(bos)
    assert start == tokenizer.bos_token_id
    assert start not in bare
    assert encode(tokenizer, "hello") == encode(tokenizer, "hello", bos=True) == [start, *bare]
    assert encode(tokenizer, "") == encode(tokenizer, "", bos=True) == [start]
    assert encode(tokenizer, "", bos=False) == []
    # A chat template writes BOS itself.
    assert encode(tokenizer, f"{bos}hello", bos=True).count(start) == 1


def test_qwen_has_no_bos(qwen_tokenizer):
    bare = encode(qwen_tokenizer, "hello", bos=False)
    assert encode(qwen_tokenizer, "hello") == bare
    assert encode(qwen_tokenizer, "") == []
    with pytest.raises(UserError, match="no BOS"):
        encode(qwen_tokenizer, "hello", bos=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_eos_never_comes_by_itself(family, tokenizer):
    assert tokenizer.eos_token_id is not None
    assert tokenizer.eos_token_id not in encode(tokenizer, "hello the that")


@pytest.mark.parametrize(
    "preset, family, expected",
    [
        (presets.tinyllama_1b, "llama2", True),
        (presets.llama3_8b, "llama3", True),
        (presets.llama3_2_1b, "llama3", True),
        (presets.qwen2_1_5b, "qwen", False),
        (presets.gemma_2b, "gemma", True),
        (presets.gemma2_2b, "gemma", True),
    ],
)
def test_texts_begin_with_bos_where_the_tokenizer_puts_one(preset, family, expected, tokenizer):
    model = Model(preset(), {}, tokenizer)
    assert model.bos is expected
    ids = model.encode("hello")
    assert (ids[0] == tokenizer.bos_token_id) is expected


# --- other people's directories ------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, model_type, tokenizer_class",
    [
        ("llama2", "llama", "LlamaTokenizer"),
        ("llama2", "llama", "LlamaTokenizerFast"),
        ("llama3", "llama", "PreTrainedTokenizerFast"),
        ("qwen", "qwen2", "Qwen2Tokenizer"),
        ("gemma", "gemma", "GemmaTokenizer"),
        ("gemma", "gemma2", "GemmaTokenizerFast"),
    ],
)
def test_the_class_that_published_directories_name_reads_the_same(
    family, model_type, tokenizer_class, tokenizer, request, tmp_path
):
    """Some of these classes take only the vocabulary from the file, and build the rest anew."""
    source = request.getfixturevalue(f"{family}_directory")
    copy = shutil.copytree(source, tmp_path / "copy")
    config = json.loads((copy / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": tokenizer_class}
    del config["backend"]
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    (copy / "config.json").write_text(json.dumps({"model_type": model_type}))
    loaded = load_tokenizer(copy)
    assert len(loaded) == len(tokenizer)
    for text in ["", *TEXTS]:
        if tokenizer_class.startswith("Llama"):
            text = text.lstrip(" ")  # transformers 5 takes one space there for its own
        ids = encode(loaded, text)
        assert ids == encode(tokenizer, text)
        assert loaded.decode(ids) == tokenizer.decode(ids)
