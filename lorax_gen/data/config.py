"""Configs of training data: the embedded world, or a mixture of real tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from lorax_gen.assets import ASSETS, resolve
from lorax_gen.config import Count, Seed, Size, check
from lorax_gen.data.agent import AgentSource, load_agent
from lorax_gen.data.benchmarks import BENCHMARKS, find_benchmark, load_questions
from lorax_gen.data.held_out import HeldOut, refuse_held_out, split
from lorax_gen.data.instructions import NaturalSource, load_tasks
from lorax_gen.data.mixture import Mixture
from lorax_gen.data.own_tasks import RowSource, RowTask, column_names, load_row_tasks
from lorax_gen.data.readers import FORMATS
from lorax_gen.data.sources import QuestionSource, Source
from lorax_gen.data.tokens import Encoder
from lorax_gen.data.unseen import UNSEEN, refuse_name, unseen_texts, without_texts
from lorax_gen.data.world import FAMILIES, World, make_world
from lorax_gen.errors import UserError
from lorax_gen.files import AnyPath, find, to_path
from lorax_gen.frames import IO, Frame, make_frame

ARCHIVES = (".tar", ".tar.gz", ".tar.xz")
EVALUATE_ON = ("arc_challenge", "boolq", "hellaswag", "winogrande")
SETS = ("alpaca", "natural_instructions", "gpt4tools")


@dataclasses.dataclass(frozen=True)
class WorldConfig:
    """The embedded world and the shape of the batches drawn from it."""

    kind: Literal["world"] = "world"
    """Which kind of data this is."""
    seed: Seed = 0
    """Seed of the world; the shipped models are trained on world 0."""
    families: tuple[str, ...] = FAMILIES
    """Families of tasks to train and evaluate on."""
    max_shots: Count = 0
    """Most solved examples in a prompt; each prompt draws from 0 to this many."""
    prompt_length: Size = 32
    """Longest system prompt, in tokens of the cloud model."""
    question_length: Size = 5
    """Longest question with its answer, in tokens of the edge model."""

    def __post_init__(self):
        check(self, "data.")
        if not self.families:
            raise UserError(f"data.families is empty; choose from {', '.join(FAMILIES)}")
        for family in self.families:
            if family not in FAMILIES:
                raise UserError(f"unknown family {family!r}; the world has {', '.join(FAMILIES)}")

    def world(self) -> World:
        return make_world(self.seed)


@dataclasses.dataclass(frozen=True)
class MixtureConfig:
    """Real tasks: what is mixed, where the files are, and the shape of the batches."""

    kind: Literal["mixture"] = "mixture"
    """Which kind of data this is."""
    sources: tuple[str, ...] = ("arc_challenge", "arc_easy", "openbookqa", "boolq", "social_iqa")
    """What to train on: benchmarks by name, alpaca, natural_instructions, gpt4tools, or paths: a
    .jsonl, .json or .parquet file of rows, an archive or directory of Natural Instructions tasks.
    A name may have a weight, how often an epoch takes a sample: alpaca=0.5.
    A path that holds = is given with its weight (a=b.jsonl=1), one that is the name of a benchmark
    or a set with its directory (./boolq)."""
    columns: tuple[str, ...] = ()
    """Fields of files of rows that are called otherwise there: input=question output=label."""
    frame: str = "io"
    """How the edge reads an input of rows and of Natural Instructions: io (Input: ... Output:),
    plain, chat (the edge's chat template), or a text with {input} in it."""
    held_out: HeldOut = dataclasses.field(default_factory=HeldOut)
    leave_out: tuple[str, ...] = ()
    """Tasks of Natural Instructions to leave out, as glob patterns: *winogrande*; [*] is a star.
    Those made from an unseen benchmark must be left out, since they are refused."""
    per_task: Size | None = 1000
    """Most instances of a task of Natural Instructions, evenly spaced; None: all, so that the
    largest tasks dominate."""
    directory: str = ""
    """Directory of the data files, at any depth; empty: they are loaded from the hub."""
    shots: Count = 5
    """Most solved examples in a prompt."""
    min_shots: Count | None = None
    """Fewest; each sample draws between the two. None: always `shots`."""
    prompt_length: Size = 2048
    """Longest system prompt, in tokens of the cloud model; shots are left out of longer ones."""
    question_length: Size = 512
    """Longest question with its answer, in tokens of the edge model; longer ones are dropped."""
    prompt_buckets: tuple[Size, ...] = ()
    """Lengths that prompts are padded to, in increasing order up to prompt_length; one program is
    compiled for each. Empty: a quarter, a half and all of prompt_length."""
    question_buckets: tuple[Size, ...] = ()
    """The same for questions."""
    evaluate_on: tuple[str, ...] | None = None
    """What to evaluate on during training, beside what is held out: benchmarks, and files of rows.
    Each question has a prompt of its own. None: arc_challenge, boolq, hellaswag and winogrande
    where a benchmark is trained on, else nothing."""
    evaluate_questions: Size = 200
    """How many questions of each; the first ones are taken."""
    evaluate_shots: Count = 1
    """Solved examples in those prompts."""
    evaluate_new_tokens: Count = 64
    """Most tokens of an answer to a row, which exact match and ROUGE-L compare; 0: none is
    generated."""

    def __post_init__(self):
        check(self, "data.")
        if not self.sources:
            raise UserError("data.sources is empty; name one or more")
        names = [split_weight(entry)[0] for entry in self.sources]
        column_names(self.columns)
        make_frame(self.frame, None)
        if self.evaluate_on is None:
            on = EVALUATE_ON if any(name in BENCHMARKS for name in names) else ()
            object.__setattr__(self, "evaluate_on", on)
        for name in self.evaluate_on or ():
            if not is_row_file(name):
                find_benchmark(name)
        if self.held_out and not any(map(is_row_file, names)):
            raise UserError("data.held_out is of files of rows, and data.sources names none")

    @property
    def root(self) -> AnyPath | None:
        """The directory, or None for the hub."""
        return to_path(self.directory) if self.directory else None

    def open(self, tokenizer: Any) -> Opened:
        """Opens all sources, and the rows to evaluate on.

        Args:
          tokenizer: of the edge model, for the frame `chat`.

        Raises UserError where a source is unknown, unseen, or cannot be read, or holds what is to
        be evaluated on.
        """
        frame = make_frame(self.frame, tokenizer)
        sources: list[Source] = []
        held: dict[str, list[RowTask]] = {}
        for name, _ in map(split_weight, self.sources):
            options = self.leave_out, self.per_task, self.columns, frame
            source = open_source(name, self.root, *options)
            if self.held_out and isinstance(source, RowSource) and is_row_file(name):
                tasks, kept = split(source.row_tasks, self.held_out)
                source = RowSource(tasks, source.name, frame, source.left_out)
                for kind, own in kept.items():
                    held.setdefault(f"held_out_{kind}", []).extend(own)
            sources.append(source)
        for name in (name for name in self.evaluate_on or () if is_row_file(name)):
            path = resolve(name)
            stem = path.name.partition(".")[0]
            if stem in held:
                raise UserError(f"data.evaluate_on has two sets called {stem}; rename a file")
            held[stem] = load_row_tasks(path, self.columns)[0]
        for source in sources:
            if held and isinstance(source, RowSource | NaturalSource):
                refuse_held_out(source.pairs(), held, source.name)
        bare = not all(isinstance(source, RowSource | NaturalSource) for source in sources)
        frame = dataclasses.replace(frame, benchmarks=not bare)
        return Opened(sources, frame, held, self.guard())

    def mixture(
        self,
        cloud: Encoder | None,
        edge: Encoder,
        *,
        opened: Opened | None = None,
        **options: Any,
    ) -> Mixture:
        """The batches of the sources, opened if they are not; see `Mixture` for the others."""
        opened = opened or self.open(edge.tokenizer)
        return Mixture(
            opened.sources,
            [weight for _, weight in map(split_weight, self.sources)],
            cloud,
            edge,
            shots=self.shots,
            min_shots=self.min_shots,
            prompt_length=self.prompt_length,
            question_length=self.question_length,
            buckets=self.prompt_buckets,
            question_buckets=self.question_buckets,
            unseen=opened.guard.texts,
            **options,
        )

    def guard(self) -> Guard:
        """The texts of the unseen benchmarks, from the directory or the hub; and the names of those
        whose texts are not there.

        Shipped tasks hold none of them. Raises UserError where the hub cannot be reached, and
        sources are from there too.
        """
        names = [split_weight(entry)[0] for entry in self.sources]
        if all(ASSETS in resolve(name).parents for name in names):
            return Guard([], [])
        try:
            return Guard(unseen_texts(self.root), without_texts(self.root))
        except UserError:
            if self.root is None and not any(name in (*BENCHMARKS, *SETS) for name in names):
                return Guard([], list(UNSEEN))
            raise


class Guard(NamedTuple):
    """What training data are checked against.

    Attributes:
      texts: of unseen benchmarks.
      without: unseen benchmarks of which there are no texts, only the name.
    """

    texts: list[str]
    without: list[str]


class Opened(NamedTuple):
    """The opened data of a mixture.

    Attributes:
      frame: how the edge reads inputs of rows.
      held: rows to evaluate on, by the name of the set.
    """

    sources: list[Source]
    frame: Frame
    held: dict[str, list[RowTask]]
    guard: Guard


def is_row_file(name: str) -> bool:
    """Whether a source or something to evaluate on is a file of rows."""
    return name not in (*BENCHMARKS, *SETS) and name.endswith(FORMATS)


def split_weight(entry: str) -> tuple[str, float]:
    """`name=weight`, or a name of weight 1. A name with `=` in it is written with its weight.

    Raises UserError where the weight is not a number.
    """
    name, given, weight = entry.rpartition("=")
    try:
        return (name, float(weight)) if given else (entry, 1.0)
    except ValueError:
        raise UserError(
            f"the source {entry!r} has a weight that is not a number; write it as in alpaca=0.5, "
            f"or {entry}=1 if this is the name of a file"
        ) from None


def open_source(
    name: str,
    directory: AnyPath | None,
    leave_out: Sequence[str] = (),
    per_task: int | None = None,
    columns: Sequence[str] = (),
    frame: Frame = IO,
) -> Source:
    """The source of a name or path; see `MixtureConfig` for the arguments.

    Raises UserError where it is unknown, unseen, or cannot be read.
    """
    if name in BENCHMARKS:
        record = BENCHMARKS[name]
        if record.unseen:
            raise UserError(f"{name} is an unseen benchmark: it is never trained on")
        return QuestionSource(record, load_questions(record, "train", directory))
    if name == "gpt4tools":
        if directory is None:
            raise UserError("gpt4tools has no copy on the hub; set data.directory to its files")
        return AgentSource(load_agent("train", directory))
    if name == "alpaca":
        path = None if directory is None else _find(directory, name, FORMATS)
        own, left_out = load_row_tasks(path)
        return RowSource(own, name, frame, left_out)
    if name == "natural_instructions":
        if directory is None:
            raise UserError("natural_instructions: set data.directory to its archive or folder")
        tasks = load_tasks(_find(directory, name, ARCHIVES, folders=True), leave_out=leave_out)
        return NaturalSource(tasks, per_task, frame=frame)
    path = resolve(name)
    refuse_name(path.name)
    if path.is_dir() or (path.is_file() and name.endswith(ARCHIVES)):
        tasks = load_tasks(path, leave_out=leave_out)
        return NaturalSource(tasks, per_task, name=path.name.partition(".")[0], frame=frame)
    if path.is_file():
        own, left_out = load_row_tasks(path, columns)
        return RowSource(own, path.name.partition(".")[0], frame, left_out)
    known = [record.name for record in BENCHMARKS.values() if not record.unseen]
    raise UserError(
        f"unknown source {name!r}: neither a file nor one of {', '.join([*known, *SETS])}"
    )


def _find(
    directory: AnyPath, name: str, endings: tuple[str, ...], *, folders: bool = False
) -> AnyPath:
    """The one file in or below a directory whose name begins with `name`, or such a folder."""
    if not directory.is_dir():
        raise UserError(f"no such data directory: {directory}")
    found = [
        path
        for path in find(directory, f"{name}*")
        if (folders if path.is_dir() else path.name.endswith(endings))
    ]
    if len(found) != 1:
        there = ", ".join(path.name for path in found) or "nothing"
        raise UserError(
            f"expected one file {name}*{endings[0]} in or below {directory}, found {there}; "
            "name the one you mean as the source"
        )
    return found[0]
