"""A benchmark of one's own, from a small YAML file.

    name: capitals
    description: Choose the capital of the country.     # of the task, in a system prompt
    template: "Question: {question}\\nAnswer:"           # with columns of the rows
    choices: options                                    # a column with a list of texts, or
                                                        # texts with columns: ["{a}", "{b}"]
    answer: label                                       # a column: an index, or one of the choices
    test: capitals.jsonl                                # files beside this one, or a data set of
    train: shots.jsonl                                  # the hub: {path, config, revision, splits}

A line of the template is left out where it is empty in a row.
"""

from __future__ import annotations

import dataclasses
from string import Formatter

from lorax_gen import config, documents
from lorax_gen.data.benchmarks import BENCHMARKS, Benchmark
from lorax_gen.data.hub_rows import HubData
from lorax_gen.data.questions import Question
from lorax_gen.data.readers import Row, is_text, list_of, name_of
from lorax_gen.errors import UserError
from lorax_gen.files import AnyPath, to_path

ENDINGS = (".yaml", ".yml")


@dataclasses.dataclass(frozen=True)
class BenchmarkFile:
    """The content of the file. Raises UserError where it is contradictory."""

    name: str
    description: str
    template: str
    choices: str | list[str] = "choices"
    answer: str = "answer"
    title: str = ""
    """Header of its column; empty: its name."""
    test: str = ""
    train: str = ""
    """What shots are drawn from; the file of `test` itself does too, without the question asked."""
    hub: HubData | None = None
    blank: str = ""
    """See `Benchmark`."""
    per_character: bool = False
    """See `Benchmark`."""

    def __post_init__(self):
        if not self.name or not all(letter.isalnum() or letter in "_-" for letter in self.name):
            raise UserError(f"name is {self.name!r}; expected letters, digits, _ and -")
        if self.name in BENCHMARKS:
            raise UserError(f"there is a benchmark {self.name}; choose another name")
        if not self.description.strip():
            raise UserError("description is empty; say what the task is")
        if bool(self.test) == (self.hub is not None):
            raise UserError("expected either test, a file, or hub, a data set")
        if self.hub is not None and self.train:
            raise UserError("train is a file beside test; of the hub, name its split in hub.splits")
        if self.hub is not None and not {"test"} <= set(self.hub.splits) <= {"train", "test"}:
            raise UserError("hub.splits should name the split of test, and that of train if any")
        if isinstance(self.choices, list) and len(self.choices) < 2:
            raise UserError(f"choices has {len(self.choices)} texts; expected two or more")
        for text in (self.template, *(self.choices if isinstance(self.choices, list) else ())):
            columns_of(text)
        if not columns_of(self.template):
            raise UserError("template names no column, so all questions would be the same")

    def read(self, row: Row, default_id: str) -> Question:
        """The question of a row: what the template makes of it is all of its text."""
        lines = [(line, fill(line, row)) for line in self.template.split("\n")]
        if isinstance(self.choices, list):
            choices = [fill(text, row) for text in self.choices]
        else:
            choices = list_of(row, self.choices)
        if not all(map(is_text, choices)) or len(set(choices)) < len(choices):
            raise UserError(f"the choices should be strings, all different, not {choices!r}")
        answer = row[self.answer]
        if isinstance(answer, str) and answer in choices:
            answer = choices.index(answer)
        if isinstance(answer, bool) or not isinstance(answer, int):
            raise UserError(
                f"{self.answer} is {answer!r}; expected the index of a choice, or one of "
                f"{', '.join(choices)}"
            )
        text = "\n".join(text for line, text in lines if text or not line)
        return Question(name_of(row, "id", default_id), text, tuple(choices), answer)


def load_benchmark(path: AnyPath) -> Benchmark:
    """The benchmark that a YAML file describes.

    Raises UserError for an unknown key, with the nearest known one, and for values that are
    missing or contradictory.
    """
    own = config.from_dict(BenchmarkFile, documents.read_yaml(path), str(path))
    names = {"test": own.test, "train": own.train}
    files = {
        split: to_path(name) if "://" in name else path.parent / name
        for split, name in names.items()
        if name
    }
    # Named as another split, so that a question is not among its own shots (`harness_shots`).
    same = "train" if files.get("train") == files.get("test") else "test"
    return Benchmark(
        name=own.name,
        title=own.title or own.name,
        description=own.description.strip(),
        template="{question}",
        hub=own.hub or HubData("", None, "", {"train": "train", "test": same}),
        columns=dict,
        blank=own.blank,
        per_character=own.per_character,
        files=files,
        read=own.read,
    )


def columns_of(text: str) -> list[str]:
    """The columns in a text. Raises UserError where braces hold more than the name of one."""
    try:
        parts = list(Formatter().parse(text))
    except ValueError as error:
        raise UserError(f"{text!r} is no template ({error}); write {{{{ for a brace") from None
    for _, column, form, conversion in parts:
        if column is not None and (not column or form or conversion):
            raise UserError(f"{text!r} should have only names of columns in braces")
    return [column for _, column, _, _ in parts if column is not None]


def fill(text: str, row: Row) -> str:
    """The text with the row's columns in it, strings and numbers; a missing value is empty."""

    def shown(column: str | None) -> str:
        if column is None or row[column] is None:
            return ""
        value = row[column]
        return str(value) if isinstance(value, float) else name_of({column: value}, column, "")

    return "".join(literal + shown(column) for literal, column, _, _ in Formatter().parse(text))
