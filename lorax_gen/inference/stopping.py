"""Where a generated text ends: at a stop token, or at a stop string.

A stop string may be, or contain, a special token such as `<|im_end|>`, which is no part of the
text that is returned. So it is searched for in the text with its special tokens, as transformers'
`stop_strings` and the `hf` backend of lm-evaluation-harness do, and then in the text without them.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from lorax_gen.data.tokens import common_prefix
from lorax_gen.models.model import Model

Ids = Sequence[int]


@dataclasses.dataclass(frozen=True, eq=False)
class Decoder:
    """New tokens to text, alone or as they continue a prompt.

    Alone, tokenizers such as LLaMA's leave out the space before the first word; after the tokens
    of a prompt it is there.
    """

    tokenizer: Any
    stop_ids: tuple[int, ...]
    prompt: tuple[int, ...] = ()

    @classmethod
    def of(cls, model: Model, prompt: Ids = ()) -> Decoder:
        return cls(model.tokenizer, tuple(model.stop_ids), tuple(prompt))

    @functools.cached_property
    def special_ids(self) -> set[int]:
        """The ids that are no part of a text."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        special = {number for number, token in added.items() if token.special}
        return special | {*self.tokenizer.all_special_ids, *self.stop_ids}

    @property
    def cleans(self) -> bool:
        """Whether it rewrites text when more follows: `do n ' t` becomes `don't`."""
        if getattr(self.tokenizer, "clean_up_tokenization_spaces", False):
            return True
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        return type(getattr(backend, "decoder", None)).__name__ == "WordPiece"

    def text(self, ids: Ids, special: bool = False) -> str:
        """The text of new tokens, with or without special tokens and a stop token."""
        ids = ids if special else [token for token in ids if token not in self.stop_ids]
        alone = self._decode(ids, special)
        if not self.prompt:
            return alone
        before = self._decode(self.prompt, special)
        after = self._decode([*self.prompt, *ids], special)
        return after[len(before) :] if after.startswith(before) else alone

    def _decode(self, ids: Ids, special: bool) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=not special)


def finished_text(decoder: Decoder, ids: Ids, stop: Sequence[str]) -> tuple[str, bool]:
    """The text of new tokens up to a stop token or string, and whether there was one.

    Of several strings the first to be complete counts, however many tokens there are after it.
    """
    end = next((i for i, token in enumerate(ids) if token in decoder.stop_ids), None)
    ids = list(ids if end is None else ids[: end + 1])
    if not _stops(decoder, ids, stop):
        return decoder.text(ids), end is not None
    # As few tokens as it takes: what comes after them must not complete another string.
    complete = lambda count: _stops(decoder, ids[:count], stop)  # noqa: E731
    ids = ids[: 1 + bisect.bisect_left(range(1, len(ids)), True, key=complete)]
    cut = _first(decoder.text(ids, special=True), stop)
    text = decoder.text(ids) if cut is None else before(decoder, ids, cut)
    return text[: _first(text, stop)], True


def settled_text(decoder: Decoder, ids: Ids, stop: Sequence[str]) -> str:
    """The text of new tokens without the end that the next tokens may still change: bytes of an
    incomplete character, and what may be the beginning of a stop string."""
    ids = list(ids)
    text, marked = (decoder.text(ids, special).rstrip("\ufffd") for special in (False, True))
    text = text[: len(text) - _begun(text, stop)]
    if stop:
        text = min(text, before(decoder, ids, len(marked) - _begun(marked, stop)), key=len)
    if decoder.cleans:
        text = text[: common_prefix(text, decoder.text(ids[:-3]))]
    return text


def before(decoder: Decoder, ids: Ids, cut: int) -> str:
    """The text without special tokens of the first `cut` characters with special tokens.

    A special token in which the cut lies is left out entirely.
    """
    end = next(
        (
            i
            for i, token in enumerate(ids)
            if token in decoder.special_ids and cut < len(decoder.text(ids[: i + 1], special=True))
        ),
        len(ids),
    )
    # From the special token before it to `end`, both texts have the same characters.
    text, marked = (decoder.text(ids[:end], special) for special in (False, True))
    return text[: max(len(text) - max(len(marked) - cut, 0), 0)]


def _stops(decoder: Decoder, ids: Ids, stop: Sequence[str]) -> bool:
    texts = (decoder.text(ids, special) for special in ((True, False) if stop else ()))
    return any(string in text for text in texts for string in stop)


def _first(text: str, stop: Sequence[str]) -> int | None:
    """Where the stop string begins that is the first to be complete; None: there is none."""
    found = [(text.index(string) + len(string), -len(string)) for string in stop if string in text]
    return sum(min(found)) if found else None


def _begun(text: str, stop: Sequence[str]) -> int:
    """How many characters at the end of a text may be the beginning of a stop string."""
    lengths = (n for string in stop for n in range(1, len(string)) if text.endswith(string[:n]))
    return max(lengths, default=0)
