"""The five success rates of GPT4Tools, from the gold answer and the one that was written.

A text consists of steps, each of a thought and, where a tool is used, an action and its input:

    Thought: Do I need to use a tool? Yes
    Action: the tool
    Action Input: its arguments, with commas between them
    Observation: what the tool answers

and ends with the thought `No` and a line `AI: ...`. Thoughts, actions and inputs are compared one
by one with those of the gold text, as in `eval/evaluate_result.py` of AILab-CVC/GPT4Tools: an index
that only one of the two texts has counts as wrong.
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
SIMILAR = 0.5  # least similarity of the arguments in a successful call


@dataclasses.dataclass(frozen=True)
class Steps:
    """The steps of a text, in order; `reply` is whether it has a line for the user."""

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
      arguments: SR_args, similarity of their arguments.
      success: SR, items with correct thoughts and actions, and arguments of at least `SIMILAR`.
      iou: what is correct over all that either text has.
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
    """The scores of a written text against the gold one."""
    expected, found = parse(gold), parse(written.strip())
    if "Action:" in gold and "Action Input:" in gold:
        return _with_tools(expected, found)
    return _without_tools(expected, found)


def mean_scores(scores: Iterable[ToolScores]) -> ToolScores:
    """Each score's mean over items, at least one."""
    return ToolScores(*np.mean([dataclasses.astuple(item) for item in scores], axis=0).tolist())


def _with_tools(expected: Steps, found: Steps) -> ToolScores:
    # The last thought, a `No` after the tools are done, is optional and not scored.
    thoughts = expected.thoughts[: len(expected.actions)]
    thought_last = len(found.thoughts) == len(found.actions) + 1 and found.thoughts[-1] == "No"
    marks = (
        _marks(thoughts, found.thoughts[:-1] if thought_last else found.thoughts),
        _marks(expected.actions, found.actions),
        _marks(expected.inputs, found.inputs, arguments_alike),
    )
    thought, action, arguments = (sum(each) / len(each) for each in marks)
    success = float(thought == 1 and action == 1 and arguments >= SIMILAR)
    counts = (len(thoughts), len(expected.actions), len(expected.inputs))
    return ToolScores(thought, action, arguments, success, _iou(marks, counts))


def _without_tools(expected: Steps, found: Steps) -> ToolScores:
    marks = _marks(expected.thoughts, found.thoughts)
    share = sum(marks) / max(len(marks), 1)
    thought = share if found.reply and found.thoughts[:1] == ("No",) else 0.0
    success = float(thought == 1)
    return ToolScores(thought, success, success, success, _iou([marks], [len(expected.thoughts)]))


def _marks(
    expected: Sequence[str],
    found: Sequence[str],
    alike: Callable[[str, str], float] = lambda a, b: float(a == b),
) -> list[float]:
    """Similarity of the two at each index; 0 where only one of them has it."""
    pairs = [alike(a, b) for a, b in zip(expected, found, strict=False)]
    return pairs + [0.0] * abs(len(expected) - len(found))


def _iou(marks: Sequence[Sequence[float]], counts: Sequence[int]) -> float:
    """Marks at the first `count` indices of each, over all counts plus all other marks."""
    inside = sum(sum(each[:count]) for each, count in zip(marks, counts, strict=True))
    outside = sum(sum(each[count:]) for each, count in zip(marks, counts, strict=True))
    return inside / max(sum(counts) + outside, 1)


def arguments_alike(gold: str, written: str) -> float:
    """The mean similarity of two comma-separated lists of arguments.

    It is 0 unless the lists have the same length, and a file name, whichever it is, wherever the
    gold list has one. Other arguments are compared by `bleu_1`.
    """
    expected, found = gold.split(","), written.split(",")
    pairs = list(zip(expected, found, strict=False))
    if len(expected) != len(found) or any(FILE in a and FILE not in b for a, b in pairs):
        return 0.0
    return sum(1.0 if FILE in a else bleu_1(a, b) for a, b in pairs) / len(pairs)


def bleu_1(reference: str, text: str) -> float:
    """BLEU of single words (Papineni et al. 2002): clipped precision times the brevity penalty.

    Words are separated by white space. A text without words scores 0.
    """
    expected, found = reference.split(), text.split()
    common = (Counter(expected) & Counter(found)).total()
    if not common:
        return 0.0
    return common / len(found) * math.exp(min(0.0, 1 - len(expected) / len(found)))
