"""Benchmarks of one's own: a damaged YAML file or row is a benchmark still, or refused."""

import json

from hypothesis import given
from hypothesis import strategies as st

from lorax_gen.data.benchmarks import load_questions
from lorax_gen.data.own_benchmarks import load_benchmark
from lorax_gen.documents import to_yaml
from tests.fuzz.damage import damaged_bytes, damaged_json, fuzz, refused

SPEC = {
    "name": "capitals", "title": "Capitals", "description": "Choose the capital.",
    "template": "{hint}\nCountry: {country}\nCapital:", "choices": ["{a}", "{b}"],
    "answer": "label", "test": "rows.jsonl", "train": "rows.jsonl", "blank": "",
    "per_character": True,
}  # fmt: skip
ROWS = [{"country": "Chad", "hint": "", "a": "Oslo", "b": "Lima", "label": i % 2} for i in range(3)]


def check(folder) -> None:
    """What is accepted has questions with two different choices, one of them correct."""

    def load() -> None:
        record = load_benchmark(folder / "mine.yaml")
        for question in load_questions(record, "test"):
            assert question.question.strip() and len(set(question.choices)) >= 2
            assert question.correct in question.choices
            assert len(record.contexts(question)) in (1, len(question.choices))
            assert len(record.continuations(question)) == len(question.choices)

    refused(load)


@fuzz
@given(data=st.data())
def test_a_damaged_file_or_row(data, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    spec, rows = SPEC, ROWS
    kind = data.draw(st.sampled_from(["values", "rows", "bytes"]))
    if kind == "values":
        spec = data.draw(damaged_json(SPEC))
    if kind == "rows":
        rows = data.draw(damaged_json(ROWS))
    text = json.dumps(spec).encode() if kind == "values" else to_yaml(SPEC).encode()
    if kind == "bytes":
        text = data.draw(damaged_bytes(text))
    (folder / "mine.yaml").write_bytes(text)
    lines = rows if isinstance(rows, list) else [rows]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    check(folder)
