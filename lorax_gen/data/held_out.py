"""Parts of one's own tasks that are kept back from training: tasks, wordings or rows.

What is kept back depends on the texts and the seed alone, so every run of a file keeps the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence

from lorax_gen.config import BelowOne, Seed, check
from lorax_gen.data.own_tasks import RowTask
from lorax_gen.errors import UserError


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Shares of files of rows that are never trained on; evaluations are on them."""

    tasks: BelowOne = 0.0
    """Of the tasks."""
    wordings: BelowOne = 0.0
    """Of the wordings of each task that has several."""
    rows: BelowOne = 0.0
    """Of the rows of each task that has several."""
    seed: Seed = 0
    """Selects which."""

    def __post_init__(self):
        check(self, "data.held_out.")

    def __bool__(self) -> bool:
        return bool(self.tasks or self.wordings or self.rows)


def split(tasks: Sequence[RowTask], held_out: HeldOut) -> tuple[list[RowTask], dict[str, list]]:
    """The tasks to train on, and `{'tasks': ..., 'wordings': ..., 'rows': ...}` to evaluate on.

    Held wordings come with all rows that may be trained on, held rows with the wordings that may.

    Raises UserError where a share keeps back everything or nothing.
    """
    names = keep_back([task.name for task in tasks], held_out.tasks, held_out.seed)
    held: dict[str, list[RowTask]] = {
        "tasks": [task for task in tasks if task.name in names],
        "wordings": [],
        "rows": [],
    }
    train = []
    for task in (task for task in tasks if task.name not in names):
        seed = f"{held_out.seed} {task.name}"
        wordings = keep_back(task.instructions, held_out.wordings, seed)
        inputs = keep_back([item.input for item in task.items], held_out.rows, seed)
        kept = dataclasses.replace(
            task,
            instructions=tuple(text for text in task.instructions if text not in wordings),
            items=tuple(item for item in task.items if item.input not in inputs),
        )
        train.append(kept)
        if wordings:
            ordered = tuple(text for text in task.instructions if text in wordings)
            held["wordings"].append(dataclasses.replace(kept, instructions=ordered))
        if inputs:
            items = tuple(item for item in task.items if item.input in inputs)
            held["rows"].append(dataclasses.replace(kept, items=items))
    if not train:
        raise UserError("data.held_out keeps back every task; lower data.held_out.tasks")
    for kind, found in held.items():
        if getattr(held_out, kind) and not found:
            raise UserError(
                f"data.held_out.{kind} is {getattr(held_out, kind)}, but there are no two {kind} "
                "to keep one of; add some, or set it to 0"
            )
    return train, {kind: found for kind, found in held.items() if found}


def keep_back(texts: Iterable[str], share: float, seed: object) -> set[str]:
    """A share of the texts, at least one of two or more, by their hashes."""
    distinct = sorted(
        set(texts), key=lambda text: hashlib.sha256(f"{seed}\0{text}".encode()).digest()
    )
    if not share or len(distinct) < 2:
        return set()
    return set(distinct[: min(max(round(share * len(distinct)), 1), len(distinct) - 1)])


def refuse_held_out(
    train: Iterable[tuple[Sequence[str], str]], held: Mapping[str, Sequence[RowTask]], name: str
) -> None:
    """Raises UserError where training data has an input under an instruction that is held out.

    Args:
      train: `(instructions, input)` of each sample of the source `name`.
      held: tasks to evaluate on, by the name of the set.
    """
    where = {
        (instruction, item.input): kind
        for kind, tasks in held.items()
        for task in tasks
        for instruction in task.instructions
        for item in task.items
    }
    for instructions, text in train:
        for instruction in instructions:
            if (instruction, text) in where:
                raise UserError(
                    f"{name} holds a row of {where[instruction, text]}, which is to be evaluated "
                    f"on: {text[:60]!r} under {instruction[:60]!r}; leave it out of the sources"
                )
