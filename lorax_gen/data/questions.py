"""One multiple-choice question, and the conversion of rows of published data sets to it.

A row is in the project's own form (`question`, `choices` as a list, `answer` as an index, and
`id`, `passage` or `context` where there are any) or has the columns of the data set on the hub.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

from lorax_gen.data.readers import Row, index_of, is_text, list_of, name_of, text_of
from lorax_gen.errors import UserError


@dataclasses.dataclass(frozen=True)
class Question:
    """One item. Raises UserError for an empty question or choice, or an answer out of range."""

    id: str
    question: str
    choices: tuple[str, ...]
    answer: int
    """Index of the correct choice."""
    passage: str = ""
    """The passage that a question of BoolQ is about; empty where it is missing."""
    context: str = ""
    """The situation that a question of SocialIQA is about."""

    def __post_init__(self):
        if not self.question.strip():
            raise UserError("the question is empty")
        if len(self.choices) < 2:
            raise UserError(f"{len(self.choices)} choices; a question needs two or more")
        for i, choice in enumerate(self.choices):
            if not choice.strip():
                raise UserError(f"choice {i} is empty")
        if not 0 <= self.answer < len(self.choices):
            raise UserError(
                f"answer {self.answer} is out of range: {len(self.choices)} choices have the "
                f"indices 0 to {len(self.choices) - 1}"
            )

    @property
    def correct(self) -> str:
        """The text of the correct choice."""
        return self.choices[self.answer]


def read_question(row: Row, columns: Callable[[Row], Row], default_id: str) -> Question:
    """The question of a row; `columns` maps the hub's columns to the fields of `Question`."""
    own = isinstance(row.get("choices"), list)
    fields = row if own else columns(row)
    answer = fields["answer"]
    if isinstance(answer, bool) or not isinstance(answer, int):
        raise UserError(f"answer should be the index of a choice, not {answer!r}")
    choices = fields["choices"]
    if not isinstance(choices, list | tuple) or not all(map(is_text, choices)):
        raise UserError(f"choices should be strings, not {choices!r}")
    return Question(
        id=name_of({"id": row.get("id", default_id)} | fields, "id", default_id),
        question=text_of(fields, "question"),
        choices=tuple(choices),
        answer=answer,
        passage=text_of(fields, "passage", ""),
        context=text_of(fields, "context", ""),
    )


# --- columns of the data sets on the hub ---------------------------------------------------------


def lettered(column: str) -> Callable[[Row], Row]:
    """ARC and OpenBookQA: choices `{text, label}`, and `answerKey` is one of the labels."""

    def columns(row: Row) -> Row:
        labels, texts = (list_of(row["choices"], name) for name in ("label", "text"))
        key = text_of(row, "answerKey").strip()
        if key not in labels:
            known = ", ".join(map(str, labels))
            raise UserError(f"answerKey {key!r} is not one of the labels {known}")
        if len(labels) != len(texts) or labels.count(key) > 1:
            raise UserError(f"{len(texts)} texts need a label each, all different: not {labels}")
        return {
            "question": row[column],
            "choices": texts,
            "answer": labels.index(key),
        }

    return columns


def boolq(row: Row) -> Row:
    """BoolQ of SuperGLUE: `label` 1 means yes."""
    fields = {"question": row["question"], "choices": ("no", "yes"), "answer": row["label"]}
    numbered = {"id": f"boolq-{name_of(row, 'idx', '')}"} if "idx" in row else {}
    passage = row.get("passage")
    return fields | numbered | {"passage": "" if passage is None else passage}


def social_iqa(row: Row) -> Row:
    """SocialIQA: `label` counts the three answers from 1."""
    return {
        "context": row["context"],
        "question": row["question"],
        "choices": (row["answerA"], row["answerB"], row["answerC"]),
        "answer": index_of(row, "label") - 1,
    }


def hellaswag(row: Row) -> Row:
    """HellaSwag: the activity, the context, and the unfinished sentence that the endings complete.

    The unfinished sentence is capitalised, as in the harness.
    """
    context = f"{text_of(row, 'ctx_a')} {text_of(row, 'ctx_b').capitalize()}"
    numbered = {"id": f"hellaswag-{name_of(row, 'ind', '')}"} if "ind" in row else {}
    return numbered | {
        "question": f"{text_of(row, 'activity_label')}: {context}",
        "choices": tuple(list_of(row, "endings")),
        "answer": index_of(row, "label"),
    }


def winogrande(row: Row) -> Row:
    """WinoGrande: `answer` counts the two options from 1."""
    return {
        "question": row["sentence"],
        "choices": (row["option1"], row["option2"]),
        "answer": index_of(row, "answer") - 1,
    }


def piqa(row: Row) -> Row:
    """PIQA: a goal and two solutions."""
    return {
        "question": row["goal"],
        "choices": (row["sol1"], row["sol2"]),
        "answer": row["label"],
    }


# --- cleaning ------------------------------------------------------------------------------------

_MARKUP = re.compile(r"\[.*?\]")


def without_markup(question: Question) -> Question:
    """HellaSwag's texts without the remains of WikiHow's markup, cleaned as in the harness.

    The marker ` [title]` becomes a full stop, other brackets are removed with their contents, and
    pairs of spaces become one space.
    """

    def clean(text: str) -> str:
        text = text.strip().replace(" [title]", ". ")
        return _MARKUP.sub("", text).replace("  ", " ")

    return dataclasses.replace(
        question,
        question=clean(question.question),
        choices=tuple(clean(choice) for choice in question.choices),
    )
