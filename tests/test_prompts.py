"""A text is used as it is written, wherever it comes from; what is no text is refused at once."""

import io
import time

import pytest

from lorax_gen.errors import UserError
from lorax_gen.prompts import MAX_BYTES, check_size, read_prompt
from lorax_gen.tokenizers import word_level


@pytest.fixture
def given(tmp_path, monkeypatch):
    """`given(data) -> texts`: the bytes as a file, and on standard input."""

    def texts(data):
        path = tmp_path / "prompt.txt"
        path.write_bytes(data)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), "latin-1"))
        return [read_prompt(f"@{path}"), read_prompt("-")]

    return texts


@pytest.mark.parametrize(
    "data, text",
    [
        (b"### Response:", "### Response:"),
        (b"### Response:\n", "### Response:"),  # the file's line end
        (b"### Response:\n\n", "### Response:\n"),  # the text's own
        (b"a\r\nb\r\n", "a\nb"),
        (b"a\rb \t", "a\rb \t"),
        (b"\xef\xbb\xbfcaf\xc3\xa9\n", "café"),
        (b"a\xef\xbb\xbfb", "a\ufeffb"),  # a mark only at the beginning
        (b"\0", "\0"),
        (b"", ""),
        (b"\n", ""),
        (b"@@x", "@@x"),  # a file needs no escape
        (b"-", "-"),
    ],
)
def test_a_file_and_standard_input_give_the_same_text(given, data, text):
    assert given(data) == [text, text]


@pytest.mark.parametrize("text", ["### Response:\n", "a\r\nb", " x ", "", "--", "\ufeffx", "a@b"])
def test_an_argument_is_the_text_itself(text):
    assert read_prompt(text) == text


def test_two_ats_stand_for_one():
    assert [read_prompt(text) for text in ("@@", "@@here", "@@@x")] == ["@", "@here", "@@x"]


@pytest.mark.parametrize(
    "data, message",
    [
        (b"caf\xe9 :", r"is not UTF-8 text \(byte 3 is 0xe9\)"),
        (b"\xff\xfea\0", r"byte 0 is 0xff"),  # UTF-16
        (b"\xed\xa0\x80", r"byte 0 is 0xed"),  # half a pair
    ],
)
def test_bytes_that_are_not_utf8_are_refused(given, data, message):
    with pytest.raises(UserError, match=message):
        given(data)


@pytest.mark.parametrize("text", ["caf\udce9", "\ud83d", "@caf\udce9"])
def test_a_text_with_half_a_character_is_refused(text):
    with pytest.raises(UserError, match=r"the text is not UTF-8: .* which stands for no character"):
        read_prompt(text)


@pytest.mark.parametrize("name", ["missing.txt", ".", "a\0b", ""])
def test_a_file_that_cannot_be_read_says_how_to_write_an_at(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"cannot read the prompt file .* @@ stands for an @"):
        read_prompt(f"@{name}")


def test_a_closed_standard_input_is_refused(monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(UserError, match="standard input is closed"):
        read_prompt("-")


def test_an_endless_file_is_refused_soon():
    start = time.monotonic()
    with pytest.raises(UserError, match=f"too large; expected at most {MAX_BYTES:,} bytes"):
        read_prompt("@/dev/zero")
    assert time.monotonic() - start < 5


def test_a_huge_text_is_refused_in_no_time():
    tokenizer, start = word_level(["bell", "apple"]), time.monotonic()
    with pytest.raises(UserError, match="a prompt of 20,000,000 characters is longer than 508 tok"):
        check_size("x" * 20_000_000, 508, tokenizer, "a prompt")
    assert time.monotonic() - start < 0.5
    check_size("x" * 1_000_000, 508, tokenizer)  # its tokens can be counted
    check_size("apple " * 1_000_000, 1_200_000, tokenizer)  # as many might fit
