"""What is put around a text, how a chat becomes tokens, and what is said of a foreign tokenizer."""

import importlib.util
import json
import struct

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lorax_gen import tokenizers
from lorax_gen.errors import UserError
from lorax_gen.tokenizers import chat_ids, check_ids, encode, load_tokenizer, word_level

WORDS = {"<bos>": 0, "<eos>": 1, "<unk>": 2, "red": 3, "green": 4, "user": 5, "system": 6, ":": 7}
BOS, EOS, RED, GREEN, USER, SYSTEM, COLON = 0, 1, 3, 4, 5, 6, 7
TEMPLATE = "{{ bos_token }} {% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}"


def make(around="$A", **options):
    """A tokenizer of words that puts around a text what the template `around` says."""
    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=around, special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **(names | options))


# --- around a text -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "around, own",
    [
        ("$A", [RED, GREEN]),
        ("<bos> $A", [BOS, RED, GREEN]),
        ("<bos> $A <eos>", [BOS, RED, GREEN]),  # nothing follows a text
        ("$A <eos>", [RED, GREEN]),
    ],
)
def test_a_tokenizers_own_habit_or_exactly_one_bos_or_nothing(around, own):
    tokenizer = make(around)
    assert encode(tokenizer, "red green") == own
    assert encode(tokenizer, "red green", bos=True) == [BOS, RED, GREEN]
    assert encode(tokenizer, "red green", bos=False) == [RED, GREEN]


def test_a_text_that_writes_its_bos_out_gets_no_second():
    tokenizer = make("<bos> $A")
    assert encode(tokenizer, "<bos> red", bos=True) == [BOS, RED]
    assert encode(tokenizer, "<bos> red", bos=False) == [BOS, RED]


def test_an_empty_text_is_its_bos_or_nothing():
    tokenizer = make("<bos> $A")
    assert encode(tokenizer, "") == encode(tokenizer, "", bos=True) == [BOS]
    assert encode(tokenizer, "", bos=False) == encode(make(), "") == []


def test_a_bos_that_a_tokenizer_lacks_is_an_error_where_it_is_asked_for():
    tokenizer = make(bos_token=None)
    assert encode(tokenizer, "red") == encode(tokenizer, "red", bos=False) == [RED]
    with pytest.raises(UserError, match="no BOS token to put before"):
        encode(tokenizer, "red", bos=True)


# --- chats ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("around", ["$A", "<bos> $A <eos>"])
def test_a_chat_has_what_its_template_puts_there_and_nothing_else(around):
    tokenizer = make(around, chat_template=TEMPLATE)
    assert chat_ids(tokenizer, "red") == [BOS, USER, COLON, RED]
    found = chat_ids(tokenizer, "red", system="green")
    assert found == [BOS, SYSTEM, COLON, GREEN, USER, COLON, RED]


def test_the_answer_begins_where_a_chat_ends():
    end = "{% if add_generation_prompt %}green :{% endif %}"
    found = chat_ids(make(chat_template=TEMPLATE + end), "red")
    assert found == [BOS, USER, COLON, RED, GREEN, COLON]


def test_a_chat_needs_a_template():
    with pytest.raises(UserError, match="no chat template; leave out --chat"):
        chat_ids(make(), "red")


@pytest.mark.parametrize(
    "template, message",
    [
        ("{{ raise_exception('System role not supported') }}", "System role not supported"),
        ("red\n{% if %}\ngreen", "Expected an expression"),  # says so in several lines
        ("{{ messages[7].content }}", "has no element 7"),
    ],
)
def test_a_template_that_refuses_says_why_in_one_line(template, message):
    with pytest.raises(UserError, match="the chat template refuses these turns: ") as error:
        chat_ids(make(chat_template=template), "red")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# --- directories ---------------------------------------------------------------------------------


def test_a_saved_tokenizer_encodes_as_before(tmp_path):
    tokenizer = make("<bos> $A", chat_template=TEMPLATE)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert encode(loaded, "red green") == [BOS, RED, GREEN]
    assert chat_ids(loaded, "red") == [BOS, USER, COLON, RED]
    assert (loaded.bos_token_id, loaded.eos_token_id) == (BOS, EOS)


def test_words_are_read_in_any_case_and_begin_with_bos(tmp_path):
    tokenizer = word_level(["red", "green"])
    assert tokenizer.convert_ids_to_tokens(encode(tokenizer, " Green  RED blue")) == [
        "<bos>", "green", "red", "<unk>",
    ]  # fmt: skip


def test_a_directory_without_a_tokenizer_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=rf"no tokenizer\.json in {tmp_path}; a model"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model": {"type": "Fancy"}}'])
def test_a_broken_tokenizer_is_named_in_one_line(text, tmp_path):
    make().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match=f"cannot read the tokenizer in {tmp_path}: .") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_no_code_of_a_tokenizers_own_is_run(tmp_path, monkeypatch):
    """Some repositories bring Python; it is not run, nor is anyone asked whether it may be."""
    asked = []
    monkeypatch.setattr("builtins.input", lambda *args: asked.append(args) or "y")
    make().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {
        "tokenizer_class": "Own",
        "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]},
    }
    path.write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\n"
        "from transformers import PreTrainedTokenizerFast\n"
        "class Own(PreTrainedTokenizerFast):\n    pass\n"
    )
    with pytest.raises(UserError, match="cannot read the tokenizer") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)
    assert not asked
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["tokenizer_config.json", "config.json"])
def test_code_of_a_tokenizers_own_is_refused_where_transformers_has_the_class_too(name, tmp_path):
    make().save_pretrained(tmp_path)
    path = tmp_path / name
    config = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(config | {"auto_map": {"AutoTokenizer": ["own.Own", None]}}))
    with pytest.raises(UserError, match=rf"{name} names code of its own .*own\.Own.*never run"):
        load_tokenizer(tmp_path)


def test_the_format_of_a_newer_version_is_refused(tmp_path):
    make().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": "2.0"}))
    with pytest.raises(UserError, match=r"cannot read the tokenizer.*version '2\.0'"):
        load_tokenizer(tmp_path)


def test_settings_that_are_only_used_later_are_tried(tmp_path):
    make().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": "many"}))
    with pytest.raises(UserError, match="cannot read the tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("where", ["tokenizer.json", "tokenizer_config.json"])
def test_an_added_token_has_the_id_that_its_file_says(where, tmp_path):
    """The tokenizers library numbers new tokens itself, whatever id is written beside them."""
    make().save_pretrained(tmp_path)
    path = tmp_path / where
    raw = json.loads(path.read_text())

    def write(number):
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        token = {"content": "<tool>", "special": True, **flags}
        if where == "tokenizer.json":
            changed = {"added_tokens": [*raw["added_tokens"], {"id": number, **token}]}
        else:
            changed = {"added_tokens_decoder": {str(number): token}}
        path.write_text(json.dumps(raw | changed))

    write(len(WORDS))
    assert load_tokenizer(tmp_path).convert_tokens_to_ids("<tool>") == len(WORDS)
    write(100)
    with pytest.raises(UserError, match=f"says that '<tool>' has id 100, but it gets {len(WORDS)}"):
        load_tokenizer(tmp_path)


def test_a_vocabulary_needs_its_merges(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 2}))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    with pytest.raises(UserError, match=r"has vocab\.json without merges\.txt"):
        load_tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    assert encode(load_tokenizer(tmp_path), "ab") == [2]


# --- readers that may not be installed -----------------------------------------------------------


def sentencepiece_model() -> bytes:
    """A model of the pieces a, b, ab and the space, written as protobuf by hand."""

    def field(number: int, data: bytes) -> bytes:
        return bytes([number << 3 | 2, len(data)]) + data

    def piece(text: str, score: float, kind: int) -> bytes:
        score_and_kind = b"\x15" + struct.pack("<f", score) + bytes([0x18, kind])
        return field(1, field(1, text.encode()) + score_and_kind)

    pieces = [("<unk>", 0, 2), ("<s>", 0, 3), ("</s>", 0, 3)]
    pieces += [(text, -i, 1) for i, text in enumerate(["▁", "a", "b", "ab", "▁ab"])]
    trainer = field(2, bytes([0x18, 2]))  # BPE
    normalizer = field(3, field(1, b"identity") + bytes([0x18, 1, 0x20, 0, 0x28, 1]))
    return b"".join(piece(*each) for each in pieces) + trainer + normalizer


@pytest.fixture
def sentencepiece_only(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    return tmp_path


def test_a_sentencepiece_model_is_read_or_what_reads_it_is_named(sentencepiece_only):
    if importlib.util.find_spec("sentencepiece") and importlib.util.find_spec("google.protobuf"):
        assert encode(load_tokenizer(sentencepiece_only), "ab", bos=False) == [7]
    else:
        with pytest.raises(UserError, match="pip install sentencepiece protobuf"):
            load_tokenizer(sentencepiece_only)


@pytest.mark.parametrize(
    "content, needed",
    [(sentencepiece_model(), "sentencepiece and protobuf"), (b"YQ== 0\nYg== 1\n", "tiktoken")],
)
def test_a_reader_that_is_not_installed_is_named(content, needed, sentencepiece_only, monkeypatch):
    (sentencepiece_only / "tokenizer.model").write_bytes(content)
    monkeypatch.setattr(tokenizers, "_is_installed", lambda module: False)
    install = needed.replace(" and", "")
    with pytest.raises(UserError, match=f"tokenizer.model needs {needed}: pip install {install}$"):
        load_tokenizer(sentencepiece_only)


def test_a_damaged_sentencepiece_model_is_not_blamed_on_another_reader(
    sentencepiece_only, monkeypatch
):
    path = sentencepiece_only / "tokenizer.model"
    path.write_bytes(path.read_bytes()[:50])
    monkeypatch.setattr(tokenizers, "_is_installed", lambda module: True)
    with pytest.raises(UserError, match="not a complete SentencePiece model") as error:
        load_tokenizer(sentencepiece_only)
    assert "tiktoken" not in str(error.value)


# --- ids -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [[], [0], [7, 0], [[1, 2], [3, 4]], np.array([[7]], np.uint8)])
def test_ids_of_the_vocabulary_pass(ids):
    check_ids(ids, 8)


@pytest.mark.parametrize(
    "ids, message",
    [
        ([0, 7], "the token ':' has the id 7, but the model's vocabulary has 7 ids from 0"),
        ([[1, 8]], "^8 is a token id, but"),
        ([-1], "^-1 is a token id, but"),
        ([2**40], f"^{2**40} is a token id, but"),
        ([1.0], "expected integers"),
        (["1"], "expected integers"),
        ([True, False], "expected integers"),
        ([2**70], "expected integers"),
    ],
)
def test_ids_beyond_the_vocabulary_are_named_with_their_token(ids, message):
    with pytest.raises(UserError, match=message):
        check_ids(ids, 7, make())
