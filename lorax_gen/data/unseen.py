"""Keeps the unseen benchmarks out of training, by name and by text."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from pathlib import Path

from lorax_gen.data.benchmarks import BENCHMARKS, Benchmark, has_split, load_questions
from lorax_gen.data.questions import Question
from lorax_gen.errors import UserError
from lorax_gen.files import AnyPath

UNSEEN = tuple(record.name for record in BENCHMARKS.values() if record.unseen)
# Tasks of Natural Instructions that were made from WinoGrande, and other spellings of the names.
_MADE_FROM = re.compile(r"(sub)?task0*(29|3[0-5])(?!\d)")
_ALIASES = {"physicaliqa": "piqa", "physicalinteractionqa": "piqa"}
_WORD = re.compile(r"[a-z0-9]+")
FEWEST_WORDS = 8  # shorter texts occur in legitimate training data too


def refuse_name(name: str, *descriptions: str) -> None:
    """Raises UserError where a name or description of training data names an unseen benchmark."""
    spelled = {benchmark: benchmark for benchmark in UNSEEN} | _ALIASES
    for text in (name, *descriptions):
        plain = "".join(_WORD.findall(text.lower()))
        for spelling, benchmark in spelled.items():
            if spelling.replace("_", "") in plain:
                raise _refusal(name, benchmark)
    if _MADE_FROM.match(Path(name).name.lower()):
        raise _refusal(name, "winogrande")


def _refusal(name: str, benchmark: str) -> UserError:
    return UserError(
        f"{name} must not be trained on: {benchmark} is one of the unseen benchmarks "
        f"({', '.join(UNSEEN)}); leave it out of the mixture"
    )


def unseen_texts(directory: AnyPath | None) -> list[str]:
    """Texts that identify the unseen benchmarks, of all their splits, from files or the hub.

    Questions, and all choices but WinoGrande's. HellaSwag's questions with and without the leading
    activity, WinoGrande's with the blank and with either option in it. A split without a file in
    `directory` is skipped.
    """
    texts = []
    for record in (BENCHMARKS[name] for name in UNSEEN):
        for split in record.hub.splits:
            if directory is None or has_split(record, split, directory):
                texts += [
                    text
                    for q in load_questions(record, split, directory)
                    for text in _texts(record, q)
                ]
    return texts


def without_texts(directory: AnyPath | None) -> list[str]:
    """The unseen benchmarks without a file in a directory: training data can be checked against
    their names, not against their texts."""
    if directory is None:
        return []
    records = [BENCHMARKS[name] for name in UNSEEN]
    return [r.name for r in records if not any(has_split(r, s, directory) for s in r.hub.splits)]


def _texts(record: Benchmark, question: Question) -> list[str]:
    if record.blank:
        pairs = zip(record.contexts(question), record.continuations(question), strict=True)
        return [question.question, *("".join(pair) for pair in pairs)]
    _, _, body = question.question.partition(": ")
    return [question.question, *([body] if body else []), *question.choices]


def refuse_unseen(texts: Iterable[str], unseen: Iterable[str], name: str = "this data") -> None:
    """Raises UserError where one of the training `texts` contains one of the `unseen` texts.

    Words are compared in lower case, without punctuation. Unseen texts of fewer than `FEWEST_WORDS`
    words are ignored.
    """
    index: dict[tuple[str, ...], list[tuple[int, str]]] = {}
    for text in unseen:
        words = _WORD.findall(text.lower())
        if len(words) >= FEWEST_WORDS:
            index.setdefault(tuple(words[:FEWEST_WORDS]), []).append((len(words), " ".join(words)))
    begun = {start[:2] for start in index}  # two words rule out nearly every position cheaply
    for text in texts:
        words = _WORD.findall(text.lower())
        for i, pair in enumerate(itertools.pairwise(words)):
            if pair not in begun:
                continue
            for count, found in index.get(tuple(words[i : i + FEWEST_WORDS]), ()):
                if " ".join(words[i : i + count]) == found:
                    raise UserError(
                        f"{name} holds a question of an unseen benchmark: {found!r}, in "
                        f"{text[:60]!r}; leave it out of the mixture"
                    )
