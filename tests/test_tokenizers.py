"""What is put around a text, how a chat becomes tokens, and what is said of a foreign tokenizer."""

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lorax_gen.errors import UserError
from lorax_gen.tokenizers import chat_ids, encode, load_tokenizer, word_level

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
