"""The five success rates of GPT4Tools, of what should have been written and of what was.

A text holds steps, each of a thought and, where a tool is used, an action and its input:

    Thought: Do I need to use a tool? Yes
    Action: the tool
    Action Input: its arguments, with commas between them
    Observation: what the tool answers

and ends with the thought `No` and a line `AI: ...`. Thoughts, actions and inputs are compared one
by one with those of the right text, as `eval/evaluate_result.py` of AILab-CVC/GPT4Tools does it: a
place that only one of the two texts has counts as wrong.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np

THOUGHT = re.compile(r"Thought: Do I need to use a tool\? (.*)")
ACTION = re.compile(r"Action: (.*)")
INPUT = re.compile(r"Action Input: (.*)")
REPLY = re.compile(r"AI: (.*)")
FILE = ".png"
SIMILAR = 0.5  # arguments at least so alike make a successful call


@dataclasses.dataclass(frozen=True)
class Steps:
    """What a text says, in its order; `reply` is whether it has a line for the user."""

    thoughts: tuple[str, ...]
    actions: tuple[str, ...]
    inputs: tuple[str, ...]
    reply: bool


@dataclasses.dataclass(frozen=True)
class ToolScores:
    """Shares between 0 and 1, of one item or as means over items.

    Attributes:
      thought: SR_t, decisions for or against a tool.
      action: SR_act, names of tools.
      arguments: SR_args, likeness of their arguments.
      success: SR, items in which all of it is right, the arguments at least half.
      iou: what is right among all that one of the two texts has.
    """

    thought: float
    action: float
    arguments: float
    success: float
    iou: float

    @property
    def average(self) -> float:
        """The mean of the five."""
        return sum(dataclasses.astuple(self)) / 5


def parse(text: str) -> Steps:
    """The steps of a text; what follows a name up to the end of its line, stripped."""
    thoughts, actions, inputs = (
        tuple(found.strip() for found in pattern.findall(text))
        for pattern in (THOUGHT, ACTION, INPUT)
    )
    return Steps(thoughts, actions, inputs, bool(REPLY.search(text)))


def score_answer(gold: str, written: str) -> ToolScores:
    """The scores of one text that was written, beside the right one."""
    right, found = parse(gold), parse(written.strip())
    if "Action:" in gold and "Action Input:" in gold:
        return _with_tools(right, found)
    return _without_tools(right, found)


def mean_scores(scores: Iterable[ToolScores]) -> ToolScores:
    """Each score's mean over items, of which there must be one."""
    return ToolScores(*np.mean([dataclasses.astuple(item) for item in scores], axis=0).tolist())


def _with_tools(right: Steps, found: Steps) -> ToolScores:
    # The last thought is about what to say when the tools are done. It is not asked for, and is no
    # mistake either.
    thoughts = right.thoughts[: len(right.actions)]
    thought_last = len(found.thoughts) == len(found.actions) + 1 and found.thoughts[-1] == "No"
    marks = (
        _marks(thoughts, found.thoughts[:-1] if thought_last else found.thoughts),
        _marks(right.actions, found.actions),
        _marks(right.inputs, found.inputs, arguments_alike),
    )
    thought, action, arguments = (sum(each) / len(each) for each in marks)
    success = float(thought == 1 and action == 1 and arguments >= SIMILAR)
    counts = (len(thoughts), len(right.actions), len(right.inputs))
    return ToolScores(thought, action, arguments, success, _iou(marks, counts))


def _without_tools(right: Steps, found: Steps) -> ToolScores:
    marks = _marks(right.thoughts, found.thoughts)
    share = sum(marks) / max(len(marks), 1)
    thought = share if found.reply and found.thoughts[:1] == ("No",) else 0.0
    success = float(thought == 1)
    return ToolScores(thought, success, success, success, _iou([marks], [len(right.thoughts)]))


def _marks(
    right: Sequence[str],
    found: Sequence[str],
    alike: Callable[[str, str], float] = lambda a, b: float(a == b),
) -> list[float]:
    """How alike the two are at each place; 0 where only one of them has it."""
    pairs = [alike(a, b) for a, b in zip(right, found, strict=False)]
    return pairs + [0.0] * abs(len(right) - len(found))


def _iou(marks: Sequence[Sequence[float]], counts: Sequence[int]) -> float:
    """Marks within the first `count` places of each, over those places and all other marks."""
    inside = sum(sum(each[:count]) for each, count in zip(marks, counts, strict=True))
    outside = sum(sum(each[count:]) for each, count in zip(marks, counts, strict=True))
    return inside / max(sum(counts) + outside, 1)


def arguments_alike(gold: str, written: str) -> float:
    """The mean likeness of two lists of arguments, with commas between them.

    As many arguments are expected as there should be, and a file name where there should be one,
    whichever it is; otherwise nothing is alike. Other arguments are compared by `bleu_1`.
    """
    right, found = gold.split(","), written.split(",")
    pairs = list(zip(right, found, strict=False))
    if len(right) != len(found) or any(FILE in a and FILE not in b for a, b in pairs):
        return 0.0
    return sum(1.0 if FILE in a else bleu_1(a, b) for a, b in pairs) / len(pairs)


def bleu_1(reference: str, text: str) -> float:
    """BLEU of single words (Papineni et al. 2002): clipped precision times the brevity penalty.

    Words stand between white space. A text without words has 0, beside any reference.
    """
    right, found = reference.split(), text.split()
    common = (Counter(right) & Counter(found)).total()
    if not common:
        return 0.0
    return common / len(found) * math.exp(min(0.0, 1 - len(right) / len(found)))
