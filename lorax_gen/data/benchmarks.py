"""The benchmarks that a model is evaluated on: one declarative record each.

Texts are those of lm-evaluation-harness 0.4.13, so that log-likelihoods can be compared with it
item by item: a question is `context`, one per choice or one for all, and `continuation`, scored
after it. To add a benchmark, add a record to `BENCHMARKS` and, where its rows have columns of
their own, a function to `questions.py` that maps them.
"""

from __future__ import annotations

import dataclasses
import difflib
import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from lorax_gen.data import questions
from lorax_gen.data.hub_rows import HubData, load_hub_rows
from lorax_gen.data.questions import Question
from lorax_gen.data.readers import Row, parse_row, read_rows
from lorax_gen.errors import UserError
from lorax_gen.files import AnyPath, find, to_path
from lorax_gen.frames import BETWEEN, PLAIN, Frame

HARNESS_SEED = 1234  # of lm-evaluation-harness's few-shot draws
ENDINGS = (".jsonl", ".jsonl.gz", ".parquet")  # of local files
QA = "Question: {question}\nAnswer:"


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """How the questions of a benchmark are found, worded and scored."""

    name: str
    """As in lm-evaluation-harness; local file names begin with it."""
    title: str
    """Header of its column in the paper's tables."""
    description: str
    """Description of the task in a system prompt."""
    template: str
    """The context, with the fields of a question; a line whose field is empty is left out."""
    hub: HubData
    columns: Callable[[Row], Row]
    """Maps the hub's columns to the fields of `Question`."""
    prepare: Callable[[Question], Question] = lambda question: question
    """Cleans a question that was read from the hub or from a file."""
    blank: str = ""
    """The marker that choices replace: then the text after it is scored, once per choice."""
    parts: tuple[str, ...] = ()
    """Splits of local files that are read for `train` where the full split is missing."""
    numbered: bool = False
    """Whether the hub's rows have ids, which distinguish rows with the same texts."""
    unseen: bool = False
    """Never trained on: it measures generalisation to unseen tasks."""
    per_character: bool = False
    """Whether people quote acc_norm, by log-likelihood per character of a choice."""
    files: Mapping[str, AnyPath] = dataclasses.field(default_factory=dict)
    """Files of its splits, where they have names of their own."""
    read: Callable[[Row, str], Question] | None = None
    """Reads a row, with a default id, in another way than `questions.read_question`."""

    def contexts(self, question: Question) -> tuple[str, ...]:
        """The text before the continuation: one for all choices, or one per choice."""
        if self.blank:
            before, _ = self._around_blank(question)
            return tuple(before + choice for choice in question.choices)
        fields = dataclasses.asdict(question)
        lines = [(line, line.format(**fields)) for line in self.template.split("\n")]
        return ("\n".join(text for line, text in lines if text or not line),)

    def continuations(self, question: Question) -> tuple[str, ...]:
        """The text that is scored, one per choice, with its leading space."""
        if self.blank:
            _, after = self._around_blank(question)
            return (f" {after}",) * len(question.choices)
        return tuple(f" {choice}" for choice in question.choices)

    def pair(self, question: Question) -> tuple[str, str]:
        """The context and the continuation of the correct choice."""
        contexts = self.contexts(question)
        correct = question.answer
        context = contexts[correct if len(contexts) > 1 else 0]
        return context, self.continuations(question)[correct]

    def solved(self, question: Question) -> str:
        """The question with its correct answer, as in a shot."""
        return "".join(self.pair(question))

    def check(self, question: Question) -> Question:
        """Returns the question; raises UserError where there is no blank, or no text after it."""
        if self.blank and not self._around_blank(question)[1]:
            raise UserError(f"no text follows the blank {self.blank!r}, so nothing is scored")
        return question

    def complete(self, question: Question) -> bool:
        """Whether no field of the template is empty: some BoolQ rows have no passage."""
        fields = dataclasses.asdict(question)
        return all(line.format(**fields) for line in self.template.split("\n"))

    def _around_blank(self, question: Question) -> tuple[str, str]:
        before, blank, after = question.question.partition(self.blank)
        if not blank:
            raise UserError(f"the question has no blank {self.blank!r}")
        return before, after.strip()


# Revisions are commits of the hub's repositories, all of them parquet files.
_ARC = "210d026faf9955653af8916fad021475a3f00453"
_TEST = {"train": "train", "test": "test"}
_VALIDATION = {"train": "train", "test": "validation"}

BENCHMARKS: dict[str, Benchmark] = {
    record.name: record
    for record in (
        Benchmark(
            name="arc_challenge",
            title="ARC-c",
            description="Answer a question of a school science exam. These are the hard ones: "
            "think the facts through and choose the statement that answers the question best.",
            template=QA,
            hub=HubData("allenai/ai2_arc", "ARC-Challenge", _ARC, _TEST),
            columns=questions.lettered("question"),
            per_character=True,
        ),
        Benchmark(
            name="arc_easy",
            title="ARC-e",
            description="Answer a question of a school science exam with the one statement that "
            "is right.",
            template=QA,
            hub=HubData("allenai/ai2_arc", "ARC-Easy", _ARC, _TEST),
            columns=questions.lettered("question"),
            per_character=True,
        ),
        Benchmark(
            name="openbookqa",
            title="OBQA",
            description="Complete a statement or answer a question with elementary science facts "
            "and common knowledge.",
            template="{question}",
            hub=HubData(
                "allenai/openbookqa", "main", "388097ea7776314e93a529163e0fea805b8a6454", _TEST
            ),
            columns=questions.lettered("question_stem"),
            per_character=True,
        ),
        Benchmark(
            name="boolq",
            title="BoolQ",
            description="Read the passage, then answer the question about it with yes or no.",
            template="{passage}\nQuestion: {question}?\nAnswer:",
            # Not google/boolq, whose passages lack the title of the page.
            hub=HubData(
                "aps/super_glue", "boolq", "3de24cf8022e94f4ee4b9d55a6f539891524d646", _VALIDATION
            ),
            columns=questions.boolq,
            numbered=True,
        ),
        Benchmark(
            name="social_iqa",
            title="SIQA",
            description="Read about a situation among people and answer what they want, feel, "
            "need or do, and why.",
            template="Q: {context} {question}\nA:",
            hub=HubData(
                "lighteval/siqa", None, "54c6a1f8cb6daf4f5abf24a601852612fb35eb25", _VALIDATION
            ),
            columns=questions.social_iqa,
        ),
        Benchmark(
            name="hellaswag",
            title="HellaS",
            description="Go on with the description of what somebody does: choose the ending that "
            "would follow in real life.",
            template="{question}",
            hub=HubData(
                "Rowan/hellaswag", None, "218ec52e09a7e7462a5400043bb9a69a41d06b76", _VALIDATION
            ),
            columns=questions.hellaswag,
            numbered=True,
            prepare=questions.without_markup,
            parts=("train_part",),
            unseen=True,
            per_character=True,
        ),
        Benchmark(
            name="winogrande",
            title="WinoG",
            description="Find out which of two names or things a sentence speaks of, so that the "
            "sentence makes sense.",
            template="{question}",
            hub=HubData(
                "allenai/winogrande",
                "winogrande_xl",
                "01e74176c63542e6b0bcb004dcdea22d94fb67b5",
                _VALIDATION,
            ),
            columns=questions.winogrande,
            blank="_",
            parts=("train_xl", "train_l", "train_debiased"),
            unseen=True,
        ),
        Benchmark(
            name="piqa",
            title="PIQA",
            description="Somebody wants to reach a goal in the physical world: choose the solution "
            "that works.",
            template=QA,
            hub=HubData(
                "baber/piqa", None, "142f6d7367fd9877f0fb3b5734ea6a545f54cdd1", _VALIDATION
            ),
            columns=questions.piqa,
            unseen=True,
            per_character=True,
        ),
    )
}
REASONING = tuple(BENCHMARKS)  # in the order of the paper's tables


def find_benchmark(name: str) -> Benchmark:
    """The record of a name. Raises UserError where there is none, with the nearest names."""
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    titles = {record.title.lower(): record.name for record in BENCHMARKS.values()}
    near = difflib.get_close_matches(name.lower(), [*BENCHMARKS, *titles], n=3, cutoff=0.4)
    near = list(dict.fromkeys(titles.get(found, found) for found in near))
    advice = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(BENCHMARKS)}"
    raise UserError(f"unknown benchmark {name!r}; {advice}")


# --- loading -------------------------------------------------------------------------------------


def load_questions(
    benchmark: Benchmark, split: str, directory: AnyPath | None = None
) -> list[Question]:
    """All questions of a split, in the order of the data set.

    `test` is the split that the benchmark is evaluated on (the validation split of most), `train`
    the source of shots and training samples. With a `directory` they are read from the file
    `<name>.<split>` in or below it, `.jsonl`, `.jsonl.gz` or `.parquet`, in the form of
    `questions.py`; any other split is read where such a file exists. Without one they come from
    the hub, at the revision of the record.

    A local file of HellaSwag in the project's own form is cleaned like the hub's rows, but the
    unfinished sentence at the end of its question is not capitalised: its start is not marked.

    Raises UserError where there is no such split, a row is malformed (with file and line), or the
    hub cannot be reached.
    """
    if split in benchmark.files:
        rows = read_rows(benchmark.files[split])
    elif benchmark.files:
        raise UserError(
            f"{benchmark.name} names no file of its split {split!r}"
            + ("; shots are drawn from it, so name one or ask for 0 shots" * (split == "train"))
        )
    elif directory is None:
        if split not in benchmark.hub.splits:
            raise UserError(
                f"{benchmark.name} on the hub has no split {split!r}; "
                f"there are {', '.join(benchmark.hub.splits)}"
            )
        rows = load_hub_rows(benchmark.name, benchmark.hub, split)
    else:
        rows = read_rows(_find_file(benchmark, split, to_path(directory)))
    found: list[Question] = []
    for location, row in rows:
        name = f"{benchmark.name}-{split}-{len(found)}"
        found.append(parse_row(location, row, partial(_question, benchmark, name=name)))
    if not found:
        raise UserError(f"{benchmark.name} has no questions in its split {split!r}")
    return found


def _question(benchmark: Benchmark, row: Row, name: str) -> Question:
    if benchmark.read is not None:
        question = benchmark.read(row, name)
    else:
        question = questions.read_question(row, benchmark.columns, name)
    return benchmark.check(benchmark.prepare(question))


def load_shots(benchmark: Benchmark, directory: AnyPath | None = None) -> list[Question]:
    """The training questions that shots are drawn from: the complete ones, or all if none is."""
    train = load_questions(benchmark, "train", directory)
    return [question for question in train if benchmark.complete(question)] or train


def has_split(benchmark: Benchmark, split: str, directory: AnyPath) -> bool:
    """Whether a directory holds a file of a split."""
    return bool(_find_files(benchmark, split, to_path(directory)))


def _find_files(benchmark: Benchmark, split: str, directory: AnyPath) -> list[AnyPath]:
    """The files of a split, or of the first of its `parts` that exists."""
    for name in (split, *(benchmark.parts if split == "train" else ())):
        wanted = {f"{benchmark.name}.{name}{ending}" for ending in ENDINGS}
        found = [p for p in find(directory, f"{benchmark.name}.*") if p.name in wanted]
        if found:
            return found
    return []


def _find_file(benchmark: Benchmark, split: str, directory: AnyPath) -> AnyPath:
    if not directory.is_dir():
        raise UserError(f"no such data directory: {directory}")
    found = _find_files(benchmark, split, directory)
    if len(found) > 1:
        raise UserError(
            f"several files hold the split {split!r} of {benchmark.name}: "
            f"{', '.join(map(str, found))}; keep one"
        )
    if found:
        return found[0]
    others = ", ".join(sorted(p.name for p in find(directory, f"{benchmark.name}.*")))
    raise UserError(
        f"no file {benchmark.name}.{split}.jsonl, .jsonl.gz or .parquet in or below {directory}; "
        + (f"of {benchmark.name} there is {others}" if others else "put one there")
        + ("; shots are drawn from it" if split == "train" else "")
    )


# --- prompts -------------------------------------------------------------------------------------


def harness_shots(
    benchmark: Benchmark,
    train: Sequence[Question],
    count: int,
    items: Sequence[Question],
    seed: int = HARNESS_SEED,
) -> list[list[Question]]:
    """The `count` shots that lm-evaluation-harness draws for each of `items`, in their order.

    All items share one random generator, so an item's shots depend on its index. Where the harness
    scores the validation split it draws one shot more than it needs and drops the item itself if
    it was drawn.

    Raises UserError where `train` is too small.
    """
    if not count:
        return [[] for _ in items]
    spare = int(benchmark.hub.splits["test"] != "test")
    if len(train) < count + spare:
        raise UserError(f"{count} shots of {benchmark.name} need more than {len(train)} questions")

    def same(a: Question, b: Question) -> bool:
        return a == (b if benchmark.numbered else dataclasses.replace(b, id=a.id))

    rng, pool, shots = random.Random(seed), list(train), []
    for item in items:
        drawn = rng.sample(pool, count + spare)
        if spare:
            drawn = [shot for shot in drawn if not same(shot, item)][:count]
        if len(drawn) < count:
            drawn = rng.sample([shot for shot in pool if not same(shot, item)], count)
        shots.append(drawn)
    return shots


def few_shot(
    benchmark: Benchmark, shots: Sequence[Question], question: Question, frame: Frame = PLAIN
) -> tuple[str, ...]:
    """The contexts of a question after solved shots, separated by blank lines."""
    contexts = benchmark.contexts(question)
    if not shots:
        return tuple(map(frame.wrap, contexts))
    prompt = BETWEEN.join(_solved(benchmark, shots, frame))
    return tuple(frame.prompted(prompt, context) for context in contexts)


def system_prompt(benchmark: Benchmark, shots: Sequence[Question], frame: Frame = PLAIN) -> str:
    """What the cloud reads: the description, then solved shots, separated by blank lines."""
    return BETWEEN.join([benchmark.description, *_solved(benchmark, shots, frame)])


def _solved(benchmark: Benchmark, shots: Sequence[Question], frame: Frame) -> list[str]:
    pairs = map(benchmark.pair, shots)
    return [frame.shot(context, answer.removeprefix(" ")) for context, answer in pairs]
