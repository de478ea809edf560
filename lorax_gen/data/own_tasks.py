"""Tasks as rows: one's own JSON lines, JSON lists and parquet files, and Alpaca.

A row is an input with its correct output, under an instruction, the system prompt of its task. Its
columns tell which of these forms it has:

    instruction, input, output             the output a text, or a list of correct ones
    instruction, input, choices, answer    the answer an index of the choices, or one of them
    messages                               at most one system turn, a user turn, an assistant turn
    prompt, completion                     texts, or lists of turns; without an instruction

Rows with the same `task` are one task, whose system prompt has as many wordings as its rows have
different instructions; an instruction may also be a list of wordings. Without a `task`, rows of the
same instruction are one task, and rows without an instruction or an input are requests to an
assistant, all of them one task. White space around inputs and outputs is dropped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lorax_gen.data.hub_rows import HubData, load_hub_rows
from lorax_gen.data.readers import Row, is_text, name_of, parse_row, read_rows
from lorax_gen.data.sources import Episode
from lorax_gen.data.unseen import refuse_name
from lorax_gen.errors import UserError
from lorax_gen.files import AnyPath, to_path
from lorax_gen.frames import Frame

ALPACA = HubData(
    "tatsu-lab/alpaca", None, "dce01c9b08f87459cf36a430d809084718273017", {"train": "train"}
)
COLUMNS = (
    "task", "instruction", "input", "output", "choices", "answer", "messages", "prompt",
    "completion",
)  # fmt: skip
# Values of `input` that mean there is none, letters only.
NO_INPUT = {"noinput", "noinputs", "noinputneeded", "noinputrequired", "none", "na"}
ASSISTANT = (
    "You are an assistant. Each input asks you for something. Carry it out, and answer with the "
    "result."
)


@dataclasses.dataclass(frozen=True)
class Item:
    """An input, its correct outputs, and for multiple choice all choices."""

    input: str
    outputs: tuple[str, ...]
    choices: tuple[str, ...] = ()

    @property
    def answer(self) -> int:
        """Index of the correct choice."""
        return self.choices.index(self.outputs[0])


@dataclasses.dataclass(frozen=True)
class RowTask:
    """The rows of one task.

    Attributes:
      instructions: wordings of its system prompt, one or more.
    """

    name: str
    instructions: tuple[str, ...]
    items: tuple[Item, ...]


# --- reading -------------------------------------------------------------------------------------


def load_row_tasks(
    path: AnyPath | None = None, columns: Sequence[str] = ()
) -> tuple[list[RowTask], int]:
    """The tasks of a file, sorted by name, or of Alpaca from the hub; and how many rows were left
    out for want of an instruction or an output, as Alpaca has some.

    Args:
      columns: `field=column` where a file names a field of `COLUMNS` otherwise.

    Raises UserError for a malformed row, with file, line and column.
    """
    named = column_names(columns)
    if path is None:
        rows, file = load_hub_rows("alpaca", ALPACA, "train"), "alpaca"
    else:
        rows, file = read_rows(to_path(path)), to_path(path).name.partition(".")[0]
    wordings: dict[str, dict[str, None]] = {}
    items: dict[str, dict[Item, None]] = {}
    kinds: dict[str, tuple[bool, str]] = {}  # of named tasks: with choices or without, where first
    empty = 0
    for location, row in rows:
        parsed = parse_row(location, row, lambda row: parse_item(row, named, file))
        if parsed is None:
            empty += 1
            continue
        task, instructions, item = parsed
        if row.get(named["task"]) is not None:
            chosen, first = kinds.setdefault(task, (bool(item.choices), location))
            if chosen != bool(item.choices):
                raise UserError(
                    f"{location}: task {task!r} has rows with {named['choices']} and rows without "
                    f"(as {first.rpartition('/')[2]}); name them as two tasks"
                )
        wordings.setdefault(task, {}).update(dict.fromkeys(instructions))
        items.setdefault(task, {})[item] = None  # a row given twice is one
    if not items:
        raise UserError(f"{path or file} holds no row with an input and an output")
    tasks = [RowTask(name, tuple(wordings[name]), tuple(own)) for name, own in items.items()]
    return sorted(tasks, key=lambda task: task.name), empty


def column_names(columns: Sequence[str]) -> dict[str, str]:
    """`field=column` entries as a map from the field to its column; others keep their name."""
    names = {field: field for field in COLUMNS}
    for entry in columns:
        field, mark, column = entry.partition("=")
        if not mark or not column or field not in names:
            raise UserError(
                f"data.columns has {entry!r}; expected FIELD=COLUMN with a field of "
                f"{', '.join(COLUMNS)}"
            )
        names[field] = column
    return names


def parse_item(
    row: Row, named: Mapping[str, str], file: str
) -> tuple[str, tuple[str, ...], Item] | None:
    """The task's name, its instructions and the item of a row; None for a row without an
    instruction or an output."""
    given = {field: row[column] for field, column in named.items() if row.get(column) is not None}
    forms = [form for form in ("messages", "prompt", "input") if form in given]
    if len(forms) > 1:
        raise UserError(f"{' and '.join(forms)} are both there; keep one")
    if "messages" in given or isinstance(given.get("prompt"), list):
        given |= from_turns(given, named)
    elif "prompt" in given:
        given |= {"input": given["prompt"], "output": field_of(given, "completion", named)}
        named = {**named, "input": named["prompt"], "output": named["completion"]}
    elif "input" not in given and "instruction" not in given:
        wanted = [named[name] for name in ("instruction", "messages", "prompt")]
        raise UserError(
            f"no column {', '.join(wanted[:-1])} or {wanted[-1]}; it has {', '.join(row) or 'none'}"
        )
    wordings = texts_of(given, "instruction", named) if "instruction" in given else ()
    if isinstance(given.get("instruction"), list) and not all(map(str.strip, given["instruction"])):
        raise UserError(f"{named['instruction']} has an empty text; remove it from the list")
    text = text_of_field(given, "input", named) if "input" in given else ""
    choices, outputs = answers_of(given, named)
    task = name_of(given, "task", "") if "task" in given else ""
    if task and "instruction" in given and not wordings:
        raise UserError(f"{named['instruction']} is empty: the task would have no prompt")
    if ("instruction" in given and not wordings) or not outputs:
        return None
    if task and not text:
        raise UserError(f"{named['input']} is empty: the edge model would have nothing to read")
    if not text or (not task and not is_input(text)):  # the instruction is itself what is asked
        if len(wordings) != 1:
            raise UserError(f"{named['input']} is empty; give an input, or one instruction")
        return file, (ASSISTANT,), Item(wordings[0], outputs, choices)
    if not wordings:
        return task or file, (ASSISTANT,), Item(text, outputs, choices)
    return task or f"{file}: {wordings[0]}", wordings, Item(text, outputs, choices)


def is_input(text: str) -> bool:
    """Whether it is not empty, nor one of `NO_INPUT`."""
    letters = "".join(letter for letter in text.lower() if letter.isalpha())
    return bool(text.strip()) and letters not in NO_INPUT


def field_of(given: Row, field: str, named: Mapping[str, str]) -> Any:
    if field not in given:
        raise UserError(f"no column {named[field]!r}")
    return given[field]


def text_of_field(given: Row, field: str, named: Mapping[str, str]) -> str:
    value = field_of(given, field, named)
    if not is_text(value):
        raise UserError(f"{named[field]} should be a string, not {value!r}")
    return value.strip()


def texts_of(given: Row, field: str, named: Mapping[str, str]) -> tuple[str, ...]:
    """One text or a list of texts, without empty ones and repetitions."""
    value = field_of(given, field, named)
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(map(is_text, texts)):
        raise UserError(f"{named[field]} should be a string or a list of strings, not {value!r}")
    return tuple(dict.fromkeys(text.strip() for text in texts if text.strip()))


def answers_of(given: Row, named: Mapping[str, str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The choices, which may be none, and the correct outputs."""
    if "choices" not in given:
        return (), texts_of(given, "output", named)
    value = given["choices"]
    if not isinstance(value, list) or len(value) < 2 or not all(map(is_text, value)):
        raise UserError(f"{named['choices']} should be a list of two or more strings")
    choices = tuple(choice.strip() for choice in value)
    if not all(choices) or len(set(choices)) < len(choices):
        raise UserError(f"{named['choices']} has an empty choice, or one twice")
    answer = field_of(given, "answer", named)
    answer = answer.strip() if isinstance(answer, str) else answer
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        correct = choices[answer]
    elif isinstance(answer, str) and answer in choices:
        correct = answer
    else:
        raise UserError(
            f"{named['answer']} is {answer!r}; expected an index of {named['choices']}, 0 to "
            f"{len(choices) - 1}, or one of them"
        )
    if "output" in given and texts_of(given, "output", named) != (correct,):
        raise UserError(f"{named['output']} is not the choice that {named['answer']} names")
    return choices, (correct,)


def from_turns(given: Row, named: Mapping[str, str]) -> Row:
    """Instruction, input and output of chat turns."""
    fields, turns = ("messages",) if "messages" in given else ("prompt", "completion"), []
    for field in fields:
        own = field_of(given, field, named)
        if not isinstance(own, list) or not all(isinstance(turn, dict) for turn in own):
            raise UserError(f"{named[field]} should be a list of turns, not {own!r}")
        turns += own
    column = " and ".join(named[field] for field in fields)
    roles = [turn.get("role") for turn in turns]
    if roles not in (["user", "assistant"], ["system", "user", "assistant"]):
        raise UserError(
            f"{column} has the roles {', '.join(map(str, roles))}; expected user and assistant, "
            "with or without a system turn before them"
        )
    texts = [turn.get("content") for turn in turns]
    for role, text in zip(roles, texts, strict=True):
        if not is_text(text):
            raise UserError(f"the content of the {role} turn should be a string, not {text!r}")
    found = {"input": texts[-2], "output": texts[-1]}
    if len(texts) == 3:
        if "instruction" in given:
            raise UserError("instruction and a system turn are both there; keep one")
        found["instruction"] = texts[0]
    return found


# --- a source of training samples ----------------------------------------------------------------


class RowSource:
    """Samples of row tasks: sample i asks row i, under one of the wordings of its task.

    Shots and further questions are other rows of the task, all with different inputs. A task with
    few rows gives fewer: shots come first, and no row is asked twice.

    Raises UserError where the name is that of an unseen benchmark.
    """

    def __init__(self, tasks: Sequence[RowTask], name: str, frame: Frame, left_out: int = 0):
        refuse_name(name)
        self.name, self.frame, self.left_out = name, frame, left_out
        self.row_tasks = list(tasks)
        self.samples = [(t, i) for t, task in enumerate(tasks) for i in range(len(task.items))]
        self.tasks = len(self.row_tasks)

    def __len__(self) -> int:
        return len(self.samples)

    def episode(self, index: int, rng: np.random.Generator, shots: int, queries: int) -> Episode:
        which, first = self.samples[index]
        task = self.row_tasks[which]
        wording = task.instructions[int(rng.integers(len(task.instructions)))]
        # A few more than are needed, as inputs may repeat.
        drawn = rng.choice(len(task.items), min(len(task.items), 4 * (shots + queries)), False)
        rows = {task.items[i].input: task.items[i] for i in [*drawn[::-1].tolist(), first]}
        own = rows.pop(task.items[first].input)
        others = list(rows.values())[::-1]
        asked = min(queries, max(1, 1 + len(others) - shots))
        questions = [own, *others[: asked - 1]]
        return Episode(
            task=task.name,
            instruction=wording,
            shots=tuple(
                self.frame.shot(item.input, self._output(item, rng))
                for item in others[asked - 1 :][:shots]
            ),
            questions=tuple(
                self.frame.pair(item.input, self._output(item, rng)) for item in questions
            ),
            join=lambda episode, question: self.frame.after(episode.prompt, question),
        )

    def pairs(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """The instructions and the input of every sample."""
        for which, i in self.samples:
            task = self.row_tasks[which]
            yield task.instructions, task.items[i].input

    def texts(self) -> Iterator[str]:
        for task in self.row_tasks:
            for item in task.items:
                yield " ".join([*task.instructions, item.input, *item.outputs, *item.choices])

    def _output(self, item: Item, rng: np.random.Generator) -> str:
        return item.outputs[int(rng.integers(len(item.outputs)))]
