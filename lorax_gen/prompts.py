"""Texts that users give: read exactly as written, checked before they are tokenised.

A text in an argument, in Python or in a row of data is used as it is. A file of text and standard
input are bytes, from which three things are dropped that belong to the file and not to the text:
a byte order mark, the carriage returns of line ends (`\\r\\n`), and one line end at the very end,
which editors and `echo` add.
"""

from __future__ import annotations

import re
import sys
from typing import Any

from lorax_gen.errors import UserError
from lorax_gen.files import to_path

MAX_BYTES = 64 << 20  # of a file of text
UNCHECKED = 1 << 20  # characters that any tokenizer encodes within about a second
_SURROGATE = re.compile("[\ud800-\udfff]")


def read_prompt(text: str) -> str:
    """The text that an argument stands for.

    `-` is the text of standard input, `@FILE` that of a file; two leading `@` stand for one, so
    that `@@here` is the text `@here`. Anything else is the text itself.

    Raises UserError where the text cannot be read, or is no UTF-8.
    """
    if text == "-":
        return text_of_bytes(_standard_input(), "standard input")
    if not text.startswith("@"):
        return check_text(text)
    if text.startswith("@@"):
        return check_text(text[1:])
    advice = "@ is followed by the name of a text file, and @@ stands for an @ of the text"
    name = check_text(text[1:])
    try:
        with to_path(name).open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        if isinstance(error, UserError):
            raise
        raise UserError(f"cannot read the prompt file {name}; {advice}") from None
    return text_of_bytes(data, f"the prompt file {name}")


def text_of_bytes(data: bytes, name: str) -> str:
    """The text in the bytes of a file of text; see this module. Raises UserError if not UTF-8."""
    if len(data) > MAX_BYTES:
        raise UserError(f"{name} is too large; expected at most {MAX_BYTES:,} bytes")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} is not UTF-8 text (byte {error.start:,} is {data[error.start]:#04x})"
        ) from None
    return text.replace("\r\n", "\n").removesuffix("\n")


def check_text(text: str) -> str:
    """The text itself. Raises UserError where it has a surrogate, which is no character: half of a
    pair, or what Python makes of a byte of an argument that is not UTF-8."""
    found = _SURROGATE.search(text)
    if found:
        start = max(found.start() - 20, 0)
        raise UserError(
            f"the text is not UTF-8: {text[start : found.end() + 20]!r} has {found[0]!r} at "
            f"character {found.start():,}, which stands for no character"
        )
    return text


def check_size(text: str, most: int, tokenizer: Any, what: str = "a text") -> None:
    """Refuses a huge text before it takes the memory and the time to tokenise it.

    Raises UserError where it is `surely_longer` than `most` tokens.
    """
    if surely_longer(text, most, tokenizer):
        raise UserError(
            f"{what} of {len(text):,} characters is longer than {most:,} tokens can be; shorten it"
        )


def surely_longer(text: str, most: int, tokenizer: Any) -> bool:
    """Whether a text cannot be encoded in `most` tokens, even if each were the longest one of the
    vocabulary. Texts up to `UNCHECKED` characters pass: their tokens can be counted."""
    if len(text) <= UNCHECKED:
        return False
    return len(text) > most * max(map(len, tokenizer.get_vocab()), default=1)


def _standard_input() -> bytes:
    if sys.stdin is None:
        raise UserError("standard input is closed; give the text itself, or @FILE")
    stream = getattr(sys.stdin, "buffer", sys.stdin)  # a program may put a text stream there
    data = stream.read(MAX_BYTES + 1)
    return data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
