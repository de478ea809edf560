"""The tokenizer of a GGUF file gives the tokens of the one that it was written from."""

import json
import warnings

import pytest
from tokenizers import Regex as Pattern
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from lorax_gen.models.gguf_files import GGUFFile
from lorax_gen.models.gguf_tokenizer import SPLITS, read_gguf_stop_ids, read_gguf_tokenizer
from lorax_gen.tokenizers import adds_bos, encode, load_tokenizer
from tests.models.gguf_models import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED

TEXTS = (
    "The quick brown fox jumps over the lazy dog. The dog sleeps, the fox doesn't.",
    "  leading and   inner   spaces  ",
    "new\nlines\n\n\tand\r\n tabs \n",
    "I'M sure THEY'LL say: it's 1234567 or 3.14159 at 10:45, isn't it?",
    "CamelCase snake_case HTTPServer x**2+y[0]!=z // comment",
    "Café déjà vu – “quotes” … naïve",
    "Быстрая коричневая лиса прыгает через ленивую собаку.",
    "敏捷的棕色狐狸跳过了懒狗。すばやい茶色の狐",
    "الثعلب البني السريع ١٢٣ तेज भूरी लोमड़ी १२३ ½ ² Ⅷ",
    "emoji 👋🏽 🌍 e\u0301 vs é, nbsp\u00a0em\u2003space",
    "<|turn|>user says <|end|>hi<|turn|>",
    "",
    " ",
    "\n",
)
SPECIAL = ["<|none|>", "<|turn|>", "<|end|>"]
# As the models' own tokenizer.json files have them.
WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split_by(pattern):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Pattern(pattern), "isolated"), BYTES])


ORIGINALS = {
    "gpt-2": (WORDS, None, False),
    "smollm": (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), WORDS]), None, False
    ),
    "llama-bpe": (split_by(LLAMA3), None, True),
    "qwen2": (split_by(QWEN2), normalizers.NFC(), False),
}  # fmt: skip


def file_of(metadata, architecture="llama"):
    return GGUFFile("here", {"general.architecture": architecture, **metadata}, {})


def vocabulary_of(tokenizer):
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    return sorted(vocabulary, key=vocabulary.get)


@pytest.fixture(scope="module")
def byte_level():
    """`byte_level(kind) -> (original, metadata)`, trained on the texts."""

    def make(kind):
        split, normalizer, ignore_merges = ORIGINALS[kind]
        tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
        tokenizer.pre_tokenizer = split
        if normalizer is not None:
            tokenizer.normalizer = normalizer
        trainer = trainers.BpeTrainer(
            vocab_size=700, special_tokens=SPECIAL, show_progress=False, min_frequency=1,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )  # fmt: skip
        tokenizer.train_from_iterator([*TEXTS, "the fox " * 50, "1234567 " * 9], trainer)
        tokens = vocabulary_of(tokenizer)
        merges = json.loads(tokenizer.to_str())["model"]["merges"]
        metadata = {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": kind,
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [CONTROL if t in SPECIAL else NORMAL for t in tokens],
            "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.chat_template": "{{ messages[0]['content'] }}<|end|>",
        }
        assert len(merges) > 100
        return tokenizer, metadata

    return make


@pytest.mark.parametrize("kind", ORIGINALS)
def test_bpe_over_bytes_gives_the_tokens_of_its_original(kind, byte_level, tmp_path):
    original, metadata = byte_level(kind)
    tokenizer = read_gguf_tokenizer(file_of(metadata))
    for text in TEXTS:
        assert encode(tokenizer, text, bos=False) == original.encode(text).ids
        if kind != "qwen2":  # to NFC
            assert tokenizer.decode(encode(tokenizer, text, bos=False)) == text
    assert adds_bos(tokenizer) == (kind == "llama-bpe")
    assert len(tokenizer) == len(metadata["tokenizer.ggml.tokens"])
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    for text in TEXTS:
        assert encode(again, text) == encode(tokenizer, text)
    assert again.chat_template == metadata["tokenizer.chat_template"]
    assert (again.bos_token, again.eos_token) == ("<|turn|>", "<|end|>")


def test_kinds_of_bpe_differ_in_how_they_split(byte_level):
    """So each test above can fail."""
    _, metadata = byte_level("gpt-2")
    split = {
        kind: str(read_gguf_tokenizer(file_of(metadata | {"tokenizer.ggml.pre": kind}))
                  .backend_tokenizer.pre_tokenizer.pre_tokenize_str("IT'S x\n\n 1234!Ab aBc"))
        for kind in ("gpt-2", "smollm", "llama-bpe", "qwen2", "tekken")
    }  # fmt: skip
    assert len(set(split.values())) == 5
    assert set(split) < set(SPLITS)


@pytest.mark.parametrize("add", [True, False])
def test_bos_and_eos_are_added_as_the_file_says(add, byte_level):
    _, metadata = byte_level("gpt-2")
    keys = {"tokenizer.ggml.add_bos_token": add, "tokenizer.ggml.add_eos_token": add}
    tokenizer = read_gguf_tokenizer(file_of(metadata | keys))
    ids = tokenizer("fox")["input_ids"]
    assert (ids[0] == 1, ids[-1] == 2) == (add, add)
    pair = tokenizer("fox", "dog")["input_ids"]
    assert pair.count(1) == pair.count(2) == (2 if add else 0)


def sentencepiece(prefix, gemma=False):
    """BPE in SentencePiece's way with bytes as a fall-back, and the metadata that it is stored as:
    pieces in the order of their scores, and no merges."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, show_progress=False, min_frequency=1,
        limit_alphabet=90, max_token_length=9,
    )  # fmt: skip
    tokenizer.train_from_iterator([text for text in TEXTS if "<" not in text], trainer)
    tokens = vocabulary_of(tokenizer)
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256]
    stored = [" " * len(t) if gemma and set(t) == {"▁"} and len(t) > 1 else t for t in tokens]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": stored,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(tokens) - 259)],
        "tokenizer.ggml.token_type": types + [NORMAL] * (len(tokens) - len(types)),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_space_prefix": prefix,
    }
    if gemma:  # its scores are not its ranks
        metadata["tokenizer.ggml.scores"] = [-1000.5] * len(tokens)
    return tokenizer, metadata


@pytest.mark.parametrize(
    ("prefix", "architecture"), [(True, "llama"), (False, "llama"), (False, "gemma2")]
)
def test_sentencepiece_bpe_gives_the_tokens_of_its_original(prefix, architecture):
    original, metadata = sentencepiece(prefix, architecture == "gemma2")
    tokenizer = read_gguf_tokenizer(file_of(metadata, architecture))
    for text in TEXTS:
        assert encode(tokenizer, text, bos=False) == original.encode(text).ids
        assert tokenizer.decode(encode(tokenizer, text, bos=False)) == text
    assert adds_bos(tokenizer)
    assert encode(tokenizer, "<s>the</s>", bos=False)[0] == 1


def test_sentencepiece_unigram_takes_the_likeliest_pieces():
    pieces = {"<unk>": 0.0, "<s>": 0.0, "</s>": 0.0, "▁": -3.5, "a": -4.5, "b": -4.25, "ab": -6.75,
              "▁ab": -9.5, "▁a": -6.5, "ba": -7.5}  # fmt: skip
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": list(pieces),
        "tokenizer.ggml.scores": list(pieces.values()),
        "tokenizer.ggml.token_type": [UNKNOWN, CONTROL, CONTROL] + [NORMAL] * 7,
        "tokenizer.ggml.bos_token_id": 1,
    }
    tokenizer = read_gguf_tokenizer(file_of(metadata))
    # ▁ab -9.5, before ▁a+b -10.75 and ▁+ab -10.25; ▁ab+ab -16.25, before ▁a+ba+b -18.25.
    assert tokenizer.convert_ids_to_tokens(encode(tokenizer, "ab", bos=False)) == ["▁ab"]
    assert tokenizer.convert_ids_to_tokens(encode(tokenizer, "abab", bos=False)) == ["▁ab", "ab"]


def test_user_defined_tokens_are_one_token_and_are_printed():
    _, metadata = sentencepiece(True)
    tokens = list(metadata["tokenizer.ggml.tokens"])
    types = list(metadata["tokenizer.ggml.token_type"])
    number = len(tokens) - 1
    tokens[number], types[number] = "<think>", USER_DEFINED
    changed = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    tokenizer = read_gguf_tokenizer(file_of(metadata | changed))
    ids = encode(tokenizer, "a<think>b", bos=False)
    assert number in ids and len(tokenizer) == len(tokens)
    assert "<think>" in tokenizer.decode(ids, skip_special_tokens=True)


def test_a_turn_ends_a_text_too(byte_level):
    _, metadata = byte_level("gpt-2")
    assert read_gguf_stop_ids(file_of(metadata)) == (2,)
    assert read_gguf_stop_ids(file_of(metadata | {"tokenizer.ggml.eos_token_id": 0})) == (0, 2)
    assert read_gguf_stop_ids(file_of(metadata | {"tokenizer.ggml.eot_token_id": 1})) == (2, 1)


def test_a_file_that_names_no_way_to_split_is_split_by_default_with_a_warning(byte_level):
    """As llama.cpp does it: punctuation apart, then words, then digits by three."""
    _, metadata = byte_level("gpt-2")
    pre = "tokenizer.ggml.pre"
    with pytest.warns(UserWarning, match=r"here has no tokenizer\.ggml\.pre, so texts are split"):
        unnamed = read_gguf_tokenizer(file_of({k: v for k, v in metadata.items() if k != pre}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        named = read_gguf_tokenizer(file_of(metadata | {pre: "default"}))
    text = "IT'S x\n\n 12345!$Ab"
    parts = [part for part, _ in named.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    expected = ["IT", "'", "S", "Ġx", "ĊĊ", "Ġ", "123", "45", "!$", "Ab"]
    assert parts == expected
    assert all(encode(unnamed, each) == encode(named, each) for each in TEXTS)
