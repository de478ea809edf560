"""Frames: the text around an input that the edge model reads in place of a prompt.

A generator acts on inputs in the frame that it was trained with, so the frame is stored with it.

    plain     {input}
    io        Input: {input}
              Output:
    chat      the user's turn in the edge model's chat template, up to where the answer begins
    others    a text of one's own with {input} in it
"""

from __future__ import annotations

import dataclasses
from typing import Any

from lorax_gen import documents
from lorax_gen.chat import render_chat
from lorax_gen.errors import UserError
from lorax_gen.prompts import check_text

BETWEEN = "\n\n"  # a prompt, its shots and a question
SLOT = "{input}"
NAMED = {"plain": SLOT, "io": f"Input: {SLOT}\nOutput:"}


@dataclasses.dataclass(frozen=True)
class Frame:
    """A text with `{input}` in it, once, and what separates it from the answer, no text or white
    space.

    Raises UserError where `{input}` is missing or repeated.
    """

    template: str = SLOT
    separator: str = " "
    turn: bool = False
    """Whether the input is a turn of a chat, so that a prompt in context belongs into it."""
    benchmarks: bool = True
    """Whether questions of benchmarks go into it too; False where they were trained on as they
    are."""

    def __post_init__(self):
        check_text(self.template)
        check_text(self.separator)
        if self.template.count(SLOT) != 1:
            raise UserError(
                f"the frame {self.template!r} has {SLOT} {self.template.count(SLOT)} times; "
                "expected it once"
            )

    @property
    def is_bare(self) -> bool:
        """Whether inputs stay as they are."""
        return self.template == SLOT

    def stored(self) -> dict[str, Any]:
        """What differs from the plain frame, as plain values; see `read_frame`."""
        fields = {field.name: field.default for field in dataclasses.fields(self)}
        return {name: getattr(self, name) for name in fields if getattr(self, name) != fields[name]}

    def wrap(self, text: str) -> str:
        """The input in its frame, as the edge model reads it."""
        before, _, after = self.template.partition(SLOT)
        return f"{before}{text}{after}"

    def pair(self, text: str, output: str) -> tuple[str, str]:
        """The input in its frame, and the output with its separator."""
        return self.wrap(text), f"{self.separator}{output}"

    def prompted(self, prompt: str, text: str) -> str:
        """The input in its frame after a prompt that the edge reads itself."""
        if self.turn:
            return self.wrap(f"{prompt}{BETWEEN}{text}")
        return f"{prompt}{BETWEEN}{self.wrap(text)}"

    def after(self, prompt: str, wrapped: str) -> str:
        """`prompted`, from an input that is in its frame already."""
        before = self.template.partition(SLOT)[0] if self.turn else ""
        return f"{before}{prompt}{BETWEEN}{wrapped.removeprefix(before)}"

    def shot(self, text: str, output: str) -> str:
        """A solved example in a prompt; the marks of a chat are not for the model that reads it."""
        return "".join((IO if self.turn else self).pair(text, output))


PLAIN, IO = Frame(), Frame(NAMED["io"])


def read_frame(stored: Any, where: str = "") -> Frame:
    """The frame of plain values, such as those of `Frame.stored`.

    Raises UserError, which begins with `where`, for any others.
    """
    known = {field.name for field in dataclasses.fields(Frame)}
    if isinstance(stored, dict) and (unknown := stored.keys() - known):
        raise UserError(f"{where}: unknown key {min(map(str, unknown))}".removeprefix(": "))
    return documents.convert(stored, Frame, where)


def make_frame(name: str, tokenizer: Any) -> Frame:
    """The frame of a config: `plain`, `io`, `chat`, or a text with `{input}`.

    Args:
      tokenizer: of the edge model, for `chat`; None (an abstract model): any frame will do.

    Raises UserError for an unknown name, or where there is no chat template.
    """
    if name == "chat":
        return Frame() if tokenizer is None else chat_frame(tokenizer)
    template = NAMED.get(name, name)
    if SLOT not in template:
        raise UserError(
            f"unknown frame {name!r}; choose one of {', '.join(NAMED)}, chat, or a text with "
            f"{SLOT} where the input goes"
        )
    return Frame(template, "" if template[-1:].isspace() else " ")


def chat_frame(tokenizer: Any) -> Frame:
    """A tokenizer's chat template around one turn of the user, as a frame.

    Raises UserError where there is no template, or it does more than put text around a turn.
    """
    rendered: list[tuple[str, str] | None] = []
    for word in ("first-input", "another one, longer"):
        text = render_chat(tokenizer, [{"role": "user", "content": word}])
        before, _, after = text.partition(word)
        rendered.append((before, after) if word in text else None)
    around = rendered[0]
    if around is None or around != rendered[1] or around == ("", "") or SLOT in "".join(around):
        raise UserError(
            "the chat template does more than put text around the user's turn; give the frame as "
            f"a text with {SLOT}"
        )
    before, after = around
    return Frame(f"{before}{SLOT}{after}", "", turn=True)
