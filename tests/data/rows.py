"""Invented rows of the eight benchmarks, with the columns of the data sets on the hub.

Row 0 of each is a neat one; later ones hold what real rows do to formatting: spaces at the ends,
pairs of spaces, braces, brackets, digits, line breaks.
"""

import json

from lorax_gen.data.benchmarks import BENCHMARKS, load_questions

TEXTS = (
    "Which of these melts in the sun",
    "Which of these is hard",
    " spaces  around and {inside} ",
    "A [title] and a [step] of markup",
    "42",
    "Two\nlines",
    'Quotes "here" and it\'s there',
)


def _text(i, what):
    text = TEXTS[i % len(TEXTS)]
    return text if text.isdigit() else f"{text}, {what} {i}"


def _lettered(column, i):
    letters = ("1", "2", "3") if i % 3 == 2 else ("A", "B", "C", "D", "E")[: 3 + i % 3]
    texts = [
        ("ice cream", "a stone", "a brick", "a spoon", "a cup")[j] for j in range(len(letters))
    ]
    texts[-1] = texts[-1] if i == 0 else _text(i, "choice")
    return {
        "id": f"{column}-{i}",
        column: _text(i, "question") if i else f"{TEXTS[0]}?",
        "choices": {"text": texts, "label": list(letters)},
        "answerKey": letters[i % len(letters)],
    }


def _boolq(i):
    passage = "Ice cream -- Ice cream is a frozen food." if i == 0 else _text(i, "passage")
    question = "is ice cream frozen" if i == 0 else _text(i, "question")
    return {"question": question, "passage": passage, "idx": i, "label": (i + 1) % 2}


def _social_iqa(i):
    return {
        "context": "Ann gave Bo her umbrella." if i == 0 else _text(i, "context"),
        "question": "Why did Ann do this?" if i == 0 else _text(i, "why"),
        "answerA": "to keep Bo dry",
        "answerB": "to go home" if i == 0 else _text(i, "answer"),
        "answerC": "to sleep",
        "label": str(1 + i % 3),
    }


def _hellaswag(i):
    return {
        "ind": i,
        "activity_label": "Baking bread",
        "ctx_a": "A woman kneads dough on a table." if i == 0 else _text(i, "ctx"),
        "ctx_b": ("she", "the Dough Of Ann", "")[i % 3],
        "endings": [f"{_text(i, 'end')} [step] {j}  " for j in range(4)]
        if i
        else ["puts it into the oven.", "swims away.", "paints a wall.", "plays the flute."],
        "label": str(i % 4),
    }


def _winogrande(i):
    neat = "The cup did not fit into the box because _ was too big."
    return {
        "sentence": neat if i == 0 else f"{_text(i, 'before')}  _  was {_text(i, 'behind')} ",
        "option1": "the cup" if i == 0 else _text(i, "one"),
        "option2": "the box",
        "answer": str(1 + i % 2),
    }


def _piqa(i):
    return {
        "goal": "open a jar" if i == 0 else _text(i, "goal"),
        "sol1": "turn the lid" if i == 0 else _text(i, "one"),
        "sol2": "turn the table " if i == 0 else _text(i, "two"),
        "label": i % 2,
    }


MAKERS = {
    "arc_challenge": lambda i: _lettered("question", i),
    "arc_easy": lambda i: _lettered("question", i),
    "openbookqa": lambda i: _lettered("question_stem", i),
    "boolq": _boolq,
    "social_iqa": _social_iqa,
    "hellaswag": _hellaswag,
    "winogrande": _winogrande,
    "piqa": _piqa,
}


def make_rows(name, count, first=0):
    """`count` rows of a benchmark, from row `first` on."""
    return [MAKERS[name](i) for i in range(first, first + count)]


def write_lines(path, rows):
    """A `.jsonl` file of rows."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_questions(directory, name, count, first=0):
    """The same as questions, by way of a file."""
    write_lines(directory / f"{name}.made.jsonl", make_rows(name, count, first))
    return load_questions(BENCHMARKS[name], "made", directory)
