"""Text to fixed-shape integer arrays: encoding, bucketing, padding. Rows are right-padded."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from lorax_gen.errors import UserError
from lorax_gen.prompts import check_size
from lorax_gen.tokenizers import adds_bos, check_ids, encode

Batch = dict[str, np.ndarray]


class Encoder:
    """A tokenizer with a cache: question and answer pairs recur, prompts mostly do not.

    Args:
      bos: whether a text begins with BOS; None: the tokenizer's default.
      vocab_size: of the model that reads the ids; None: not checked. `Encoder.of(model)` has both
        of a model, in training and in inference.
    """

    def __init__(self, tokenizer: Any, bos: bool | None = None, vocab_size: int | None = None):
        self.tokenizer, self.bos = tokenizer, adds_bos(tokenizer) if bos is None else bos
        self.vocab_size = vocab_size
        # Padding is never attended to, but must be a row of the embedding.
        pad = tokenizer.pad_token_id
        self.pad_id = 0 if pad is None or (vocab_size and pad >= vocab_size) else pad
        self.row = lru_cache(maxsize=1 << 16)(self._row)
        self.ids = lru_cache(maxsize=1 << 16)(self.encode)

    @classmethod
    def of(cls, model: Any) -> Encoder:
        """The encoder of a `models.model.Model`."""
        return cls(model.tokenizer, model.bos, model.config.vocab_size)

    @property
    def end_of_text(self) -> int:
        """The id of the end of text. Raises UserError where the tokenizer has none."""
        if self.tokenizer.eos_token_id is None:
            raise UserError(
                "the tokenizer has no end of text, which is put after each answer; set eos_token "
                "in its tokenizer_config.json"
            )
        if self.vocab_size is not None:
            check_ids([self.tokenizer.eos_token_id], self.vocab_size, self.tokenizer)
        return self.tokenizer.eos_token_id

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; `ids` is the cached version.

        Raises UserError for a token beyond the model's vocabulary, or a text that is not UTF-8.
        """
        ids = encode(self.tokenizer, text, bos=self.bos)
        if self.vocab_size is not None:
            check_ids(ids, self.vocab_size, self.tokenizer)
        return ids

    def joined(self, context: str, continuation: str) -> tuple[list[int], int]:
        """Ids of context + continuation + end of text, and the index of the continuation.

        The continuation includes its leading separator. Both are encoded together. It begins at the
        first token that it changes: where its first letters are merged with the last ones of the
        context, at the merged token.

        Raises UserError where the tokenizer has no end of text, and as `encode`.
        """
        end = self.end_of_text
        alone, together = self.encode(context), self.encode(context + continuation)
        while together and together[-1] == end:  # of the text, or added by a normaliser
            together.pop()
        start = common_prefix(alone, together)
        return [*together, end], start

    def _row(self, question: str, answer: str) -> tuple[list[int], int]:
        """Ids of a question, a space and its answer; see `joined`."""
        return self.joined(question, f" {answer}")


def common_prefix(a: Sequence, b: Sequence) -> int:
    """The number of leading items that two sequences share."""
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))
    return sum(1 for _ in same)


def bucket(size: int, smallest: int = 32) -> int:
    """`size` rounded up to a power of two, above 128 to a multiple of 128: few compilations."""
    return (
        max(smallest, 1 << (int(size) - 1).bit_length()) if size <= 128 else -(-size // 128) * 128
    )


def pad_rows(rows: Sequence[Sequence[int]], length: int, pad_id: int, what: str) -> np.ndarray:
    """`[len(rows), length]` int32. Raises UserError where a row is longer: nothing is truncated."""
    out = np.full((len(rows), length), pad_id, np.int32)
    for i, row in enumerate(rows):
        if len(row) > length:
            raise UserError(
                f"{what} of {len(row)} tokens is longer than the limit of {length}; "
                "shorten it or raise the limit"
            )
        out[i, : len(row)] = row
    return out


def prompt_batch(encoder: Encoder, prompts: Sequence[str], length: int) -> Batch:
    """`{'prompt': [P, T], 'prompt_lengths': [P]}` of system prompts."""
    rows = []
    for prompt in prompts:
        if not prompt.strip():
            raise UserError("the prompt is empty; describe the task in a sentence or more")
        check_size(prompt, length, encoder.tokenizer, "a prompt")
        rows.append(encoder.ids(prompt))
    return {
        "prompt": pad_rows(rows, length, encoder.pad_id, "a prompt"),
        "prompt_lengths": np.array([len(row) for row in rows], np.int32),
    }


def question_batch(
    encoder: Encoder,
    questions: Sequence[tuple[str, str]],
    length: int,
    full_sequence: bool = False,
    answer_length: int | None = None,
) -> Batch:
    """`{'tokens': [B, T], 'answer': [B, T]}`: `answer` marks the answer and the end of text.

    With `full_sequence` it marks every token of a row: the loss is on the full edge sequence.

    Raises UserError for a row longer than `length`, one with more than `answer_length` marks, or
    one whose answer has no token before it.
    """
    rows, starts = zip(*(encoder.row(*pair) for pair in questions), strict=True)
    return answer_batch(rows, starts, length, encoder.pad_id, full_sequence, answer_length)


def answer_batch(
    rows: Sequence[Sequence[int]],
    starts: Sequence[int],
    length: int,
    pad_id: int,
    full_sequence: bool = False,
    answer_length: int | None = None,
) -> Batch:
    """As `question_batch`, from rows of ids and the index where each answer begins."""
    if not full_sequence and min(starts) == 0:
        raise UserError(
            "an answer has no token before it, so its first one cannot be learned; write a "
            "question before it, or use a tokenizer that adds BOS"
        )
    answer = np.zeros((len(rows), length), bool)
    for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
        answer[i, 0 if full_sequence else start : len(row)] = True
    longest = int(answer[:, 1:].sum(1).max())
    if answer_length is not None and longest > answer_length:
        raise UserError(
            f"an answer of {longest} tokens is longer than answer_length={answer_length}; raise it"
        )
    return {"tokens": pad_rows(rows, length, pad_id, "a question"), "answer": answer}
