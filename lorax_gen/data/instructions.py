"""Natural Instructions' tasks as training samples."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from lzma import LZMAError
from pathlib import Path
from typing import Any

import numpy as np

from lorax_gen.data.readers import MAX_BYTES, Row, is_text, list_of, parse_row, text_of
from lorax_gen.data.sources import Episode, Pair, draw
from lorax_gen.data.unseen import refuse_name
from lorax_gen.documents import parse_json
from lorax_gen.errors import UserError
from lorax_gen.files import AnyPath, local_copy, to_path
from lorax_gen.frames import IO, Frame


@dataclasses.dataclass(frozen=True)
class NaturalTask:
    """A task of Natural Instructions: definition, solved examples, and instances."""

    name: str
    definition: str
    examples: tuple[Pair, ...]
    """`(input, output)`, the positive ones."""
    instances: tuple[tuple[str, tuple[str, ...]], ...]
    """An input and its correct outputs, one or more."""
    source: str = ""
    """The other fields of the task as JSON: titles, data sets it was made from."""


def load_tasks(
    path: AnyPath, only: Sequence[str] = ("*",), leave_out: Sequence[str] = ()
) -> list[NaturalTask]:
    """Tasks of an archive (`.tar`, `.tar.gz`, `.tar.xz`) or of a directory of `.json` files.

    Versions 1 and 2 of the format, sorted by name. `only` and `leave_out` are glob patterns such as
    `*winogrande*` for file names without their extension.

    Raises UserError where something cannot be read or is malformed, with the file.
    """
    path, tasks = to_path(path), []
    local = local_copy(path)
    for file, data in _members(local, only, leave_out):
        location = f"{path}, {file}" if local.is_file() else str(path / file)
        row = parse_json(data, location)
        if not isinstance(row, dict):
            raise UserError(f"{location}: expected an object, not a {type(row).__name__}")
        name = Path(file).stem
        tasks.append(parse_row(location, row, partial(_natural_task, name)))
    if not tasks:
        raise UserError(f"{path} holds no task whose name matches {', '.join(only)}")
    return sorted(tasks, key=lambda task: task.name)


def _members(
    path: Path, only: Sequence[str], leave_out: Sequence[str]
) -> Iterator[tuple[str, bytes]]:
    def wanted(file: str) -> bool:
        def named(patterns: Sequence[str]) -> bool:
            return any(fnmatch.fnmatch(Path(file).stem, pattern) for pattern in patterns)

        return file.endswith(".json") and named(only) and not named(leave_out)

    if path.is_dir():
        for file in sorted(path.rglob("*.json")):
            if wanted(file.name):
                yield str(file.relative_to(path)), file.read_bytes()
        return
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.isfile() and wanted(member.name):
                    if member.size > MAX_BYTES:
                        raise tarfile.ReadError(f"{member.name} has {member.size:,} bytes")
                    content = archive.extractfile(member)
                    assert content is not None  # of a file
                    yield member.name, content.read()
    except UserError:
        raise
    except (OSError, EOFError, ValueError, tarfile.TarError, LZMAError, zlib.error) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(":")
        raise UserError(
            f"cannot read {path} ({reason}); expected a tar archive or a directory of tasks"
        ) from None


def _natural_task(name: str, row: Row) -> NaturalTask:
    examples = list_of(row.get("Examples", row), "Positive Examples")
    definition = row["Definition"]
    definition = " ".join(definition) if isinstance(definition, list) else definition
    if not is_text(definition) or not definition.strip():
        raise UserError(f"Definition should be a text or a list of texts, not {definition!r}")
    about = {k: v for k, v in row.items() if k not in ("Instances", "Examples")}
    about = {k: v for k, v in about.items() if not k.endswith("Examples")}
    return NaturalTask(
        name=name,
        definition=definition.strip(),
        examples=tuple((text_of(e, "input"), _outputs(e)[0]) for e in examples),
        instances=tuple((text_of(i, "input"), _outputs(i)) for i in list_of(row, "Instances")),
        source=json.dumps(about),
    )


def _outputs(row: dict[str, Any]) -> tuple[str, ...]:
    found = row["output"]
    found = [found] if isinstance(found, str) else found
    if not isinstance(found, list) or not found or not all(map(is_text, found)):
        raise UserError(f"output should be a text or a list of texts, not {found!r}")
    return tuple(found)


class NaturalSource:
    """Samples of tasks: definition and positive examples for the cloud, an instance for the edge.

    Of each task at most `per_task` instances are taken, evenly spaced; None takes all, so that the
    largest tasks dominate. Where an instance has several correct outputs, one is drawn. Instances
    without an input or an output are left out; `left_out` counts them.

    Raises UserError where a task was made from an unseen benchmark.
    """

    def __init__(
        self,
        tasks: Sequence[NaturalTask],
        per_task: int | None = None,
        name: str = "natural_instructions",
        frame: Frame = IO,
    ):
        self.name, self.frame = name, frame
        if per_task is not None and per_task < 1:
            raise UserError(f"per_task is {per_task}; it must be at least 1")
        self.samples: list[tuple[NaturalTask, int]] = []
        self.left_out = 0
        for task in tasks:
            refuse_name(task.name, task.source, task.definition)
            full = [i for i, instance in enumerate(task.instances) if _complete(*instance)]
            self.left_out += len(task.instances) - len(full)
            count = len(full) if per_task is None else min(per_task, len(full))
            self.samples += [(task, full[i * len(full) // count]) for i in range(count)]
        self.tasks = len({task.name for task, _ in self.samples})

    def __len__(self) -> int:
        return len(self.samples)

    def episode(self, index: int, rng: np.random.Generator, shots: int, queries: int) -> Episode:
        task, first = self.samples[index]
        others = [i for i in draw(rng, len(task.instances), 2 * queries) if i != first]
        others = [i for i in others if _complete(*task.instances[i])]
        asked = [first, *others][:queries]
        inputs = {task.instances[i][0] for i in asked}
        shown = [task.examples[i] for i in draw(rng, len(task.examples), len(task.examples))]
        solved = [
            self.frame.shot(text.strip(), output.strip())
            for text, output in shown
            if text not in inputs
        ]
        return Episode(
            task=task.name,
            instruction=task.definition,
            shots=tuple(solved[:shots]),
            questions=tuple(self._question(task, i, rng) for i in asked),
            join=lambda episode, question: self.frame.after(episode.prompt, question),
        )

    def pairs(self) -> Iterator[tuple[tuple[str, ...], str]]:
        return (((task.definition,), task.instances[i][0]) for task, i in self.samples)

    def texts(self) -> Iterator[str]:
        for task in {task.name: task for task, _ in self.samples}.values():
            shown = (text for pair in task.examples for text in pair)
            yield " ".join([f"{task.name}:", task.definition, *shown])
        for task, i in self.samples:
            text, outputs = task.instances[i]
            yield " ".join([f"{task.name}:", text, *outputs])

    def _question(self, task: NaturalTask, i: int, rng: np.random.Generator) -> Pair:
        text, outputs = task.instances[i]
        filled = [output for output in outputs if output.strip()]
        return self.frame.pair(text.strip(), filled[int(rng.integers(len(filled)))].strip())


def _complete(text: str, outputs: Sequence[str]) -> bool:
    return bool(text.strip()) and any(output.strip() for output in outputs)
