"""Triples and tasks become samples: what is to be done for the cloud, the input for the edge."""

import io
import json
import tarfile

import numpy as np
import pytest

from lorax_gen.data.instructions import (
    ASSISTANT,
    NaturalSource,
    Triple,
    TripleSource,
    load_tasks,
    load_triples,
)
from lorax_gen.errors import UserError
from tests.data.rows import write_lines

TRIPLES = [
    Triple("Name the color.", "grass", "green"),
    Triple("Write a word.", "", "word"),
    Triple("Write a number.", "Noinput.", "seven"),
    Triple("Write a sum.", "N/A", "1 + 1"),
    Triple("Say it in French.", "none of these", "rien"),
    Triple("Say nothing.", "", " "),
]
V1 = {
    "Title": "Writing questions",
    "Definition": "Ask about the sentence. ",
    "Examples": {
        "Positive Examples": [
            {"input": "It rains.", "output": "Does it rain?", "reason": "right"},
            {"input": "It snows.", "output": "Does it snow?", "reason": "right"},
        ],
        "Negative Examples": [{"input": "It hails.", "output": "It hails.", "reason": "wrong"}],
    },
    "Instances": [
        {"input": f"It is {i} o'clock.", "output": [f"Is it {i}?", f"Is it {i} now?"]}
        for i in range(6)
    ],
}
V2 = {
    "Source": ["weather"],
    "Definition": ["Name the season.", "One word."],
    "Positive Examples": [{"input": "Snow falls.", "output": "winter", "explanation": "cold"}],
    "Negative Examples": [],
    "Instances": [
        {"id": "a", "input": "Leaves fall.", "output": ["autumn"]},
        {"id": "b", "input": "Snow falls.", "output": ["winter", " "]},
        {"id": "c", "input": "Nothing.", "output": [""]},
    ],
}
FILES = {"subtask003_clock.json": V1, "weather/task500_seasons.json": V2}


def rng(seed=0):
    return np.random.default_rng(seed)


def write_tasks(directory, files=FILES):
    for name, task in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(json.dumps(task))
    return directory


def archive(path, files=FILES):
    with tarfile.open(path, f"w:{path.suffix[1:]}") as out:
        for name, task in files.items():
            data = json.dumps(task).encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return path


# --- triples -------------------------------------------------------------------------------------


def test_an_instruction_with_an_input_is_a_prompt_without_shots():
    episode = TripleSource(TRIPLES).episode(0, rng(), shots=3, queries=2)
    assert episode.prompt == "Name the color."
    assert episode.questions == (("Input: grass\nOutput:", " green"),) * 2
    assert episode.task != TripleSource(TRIPLES).episode(4, rng(), 0, 1).task


@pytest.mark.parametrize("index", [1, 2, 3])
def test_an_instruction_without_an_input_is_asked_beneath_what_an_assistant_does(index):
    source = TripleSource(TRIPLES)
    seen = set()
    for seed in range(20):
        episode = source.episode(index, rng(seed), shots=1, queries=2)
        first, second = episode.questions
        triple = TRIPLES[index]
        assert first == (f"Input: {triple.instruction}\nOutput:", f" {triple.output}")
        assert second != first
        (shot,) = episode.shots
        assert shot not in {"".join(first), "".join(second)}
        assert episode.prompt == f"{ASSISTANT}\n\n{shot}"
        seen.add(shot)
    assert len(seen) == 2  # of the three requests, those that are not asked
    assert not source.episode(index, rng(), shots=0, queries=1).shots


def test_triples_without_an_output_are_left_out_and_counted():
    source = TripleSource(TRIPLES)
    assert (len(source), source.left_out, source.tasks) == (5, 1, 3)
    assert sum("Write" in text for text in source.texts()) == 3


def test_more_is_asked_of_few_triples_by_asking_again():
    source = TripleSource(TRIPLES[1:3])
    episode = source.episode(0, rng(), shots=2, queries=5)
    assert len(episode.questions) == 5
    assert len(set(episode.questions)) == 2
    assert not episode.shots


def test_triples_are_read_from_lines_and_from_a_list(tmp_path):
    rows = [vars(triple) | {"text": "unread"} for triple in TRIPLES]
    lines = write_lines(tmp_path / "a.jsonl", rows)
    listed = tmp_path / "a.json"
    listed.write_text(json.dumps(rows))
    assert load_triples(lines) == load_triples(listed) == TRIPLES
    write_lines(lines, [rows[0], {"instruction": "x", "input": "y"}])
    with pytest.raises(UserError, match=r"a.jsonl, line 2: no column 'output'"):
        load_triples(lines)
    listed.write_text(json.dumps([rows[0], rows[1] | {"input": 3}]))
    with pytest.raises(UserError, match=r"a.json, item 2: input should be a string, not 3"):
        load_triples(listed)
    listed.write_text('[\n{"a": 1},\n{"b" 1}]')
    with pytest.raises(UserError, match=r"a.json is not valid JSON .*line 3"):
        load_triples(listed)
    listed.write_text("{}")
    with pytest.raises(UserError, match=r"a.json should hold a list of objects, not a dict"):
        load_triples(listed)
    with pytest.raises(UserError, match=r"a.csv has no known data format"):
        load_triples(tmp_path / "a.csv")


def test_without_a_network_alpacas_file_is_named(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def unreachable(*_, **__):
        raise ConnectionError

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match=r"tatsu-lab/alpaca .*ConnectionError.*alpaca.train.jsonl"):
        load_triples()


# --- tasks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["directory", "tar.xz", "tar.gz"])
def test_both_versions_are_read_from_archives_and_directories(tmp_path, kind):
    path = write_tasks(tmp_path) if kind == "directory" else archive(tmp_path / f"t.{kind}")
    clock, seasons = load_tasks(path)
    assert (clock.name, seasons.name) == ("subtask003_clock", "task500_seasons")
    assert clock.definition == "Ask about the sentence."
    assert clock.examples == (("It rains.", "Does it rain?"), ("It snows.", "Does it snow?"))
    assert clock.instances[1] == ("It is 1 o'clock.", ("Is it 1?", "Is it 1 now?"))
    assert seasons.definition == "Name the season. One word."
    assert [len(clock.instances), len(seasons.instances)] == [6, 3]
    assert load_tasks(path, only=["*clock"]) == [clock]
    assert load_tasks(path, leave_out=["sub*"]) == [seasons]
    with pytest.raises(UserError, match="holds no task whose name matches"):
        load_tasks(path, only=["*moon*"])


def test_a_tasks_sample_is_its_definition_its_examples_and_an_instance(tmp_path):
    source = NaturalSource(load_tasks(write_tasks(tmp_path)))
    assert (len(source), source.left_out, source.tasks) == (8, 1, 2)
    answers = set()
    for seed in range(10):
        episode = source.episode(3, rng(seed), shots=5, queries=2)
        assert episode.task == "subtask003_clock"
        assert episode.instruction == "Ask about the sentence."
        assert sorted(episode.shots) == [
            "Input: It rains.\nOutput: Does it rain?",
            "Input: It snows.\nOutput: Does it snow?",
        ]
        assert episode.questions[0][0] == "Input: It is 3 o'clock.\nOutput:"
        assert episode.questions[1][0] != episode.questions[0][0]
        answers.add(episode.questions[0][1])
    assert answers == {" Is it 3?", " Is it 3 now?"}
    assert len(source.episode(3, rng(), shots=1, queries=1).shots) == 1


def test_an_example_that_is_asked_is_not_shown_and_no_answer_is_empty(tmp_path):
    source = NaturalSource(load_tasks(write_tasks(tmp_path), only=["task500_seasons"]))
    for seed in range(10):
        episode = source.episode(1, rng(seed), shots=2, queries=1)
        assert episode.questions == (("Input: Snow falls.\nOutput:", " winter"),)
        assert episode.shots == ()


def test_large_tasks_are_thinned_evenly(tmp_path):
    tasks = load_tasks(write_tasks(tmp_path))
    source = NaturalSource(tasks, per_task=3)
    assert [(task.name, i) for task, i in source.samples] == [
        ("subtask003_clock", 0),
        ("subtask003_clock", 2),
        ("subtask003_clock", 4),
        ("task500_seasons", 0),
        ("task500_seasons", 1),
    ]
    with pytest.raises(UserError, match="per_task is 0"):
        NaturalSource(tasks, per_task=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"Definition": None}, "Definition should be a text or a list of texts, not None"),
        ({"Definition": [" "]}, "Definition should be a text"),
        ({"Instances": "xy"}, "Instances should be a list, not 'xy'"),
        ({"Instances": [{"input": "x", "output": {"y": 1}}]}, "output should be a text or a list"),
        ({"Instances": [{"input": "x", "output": []}]}, "output should be a text or a list"),
        ({"Instances": [{"input": 1, "output": "y"}]}, "input should be a string, not 1"),
        ({"Instances": [{"output": "y"}]}, "no column 'input'"),
        ({"Examples": {}}, "no column 'Positive Examples'"),
    ],
)
def test_a_malformed_task_is_named(tmp_path, change, message):
    path = archive(tmp_path / "t.tar.xz", FILES | {"subtask004_bad.json": V1 | change})
    with pytest.raises(UserError, match=r"t.tar.xz, subtask004_bad.json: ") as error:
        load_tasks(path)
    assert message in str(error.value)


def test_what_is_no_archive_is_named(tmp_path):
    (tmp_path / "t.tar.xz").write_text("nothing")
    for path in (tmp_path / "t.tar.xz", tmp_path / "none.tar"):
        with pytest.raises(UserError, match=rf"cannot read {path}.*expected a tar archive"):
            load_tasks(path)
    (tmp_path / "task.json").write_text("{")
    with pytest.raises(UserError, match=r"task.json is not valid JSON"):
        load_tasks(tmp_path)
    (tmp_path / "task.json").write_text("[]")
    with pytest.raises(UserError, match=r"task.json: expected an object, not a list"):
        load_tasks(tmp_path)


# --- the data folder -----------------------------------------------------------------------------


def test_counts_of_alpaca(shared_data):
    (path,) = (shared_data / "alpaca").glob("*.jsonl.gz")
    triples = load_triples(path)
    source = TripleSource(triples)
    assert len(triples) == 20_678
    assert (len(source), source.left_out, len(source.requests)) == (20_668, 10, 13_568)


def test_counts_of_natural_instructions(shared_data):
    first, second = sorted((shared_data / "multitask").glob("natural_instructions_*.tar.xz"))
    tasks = load_tasks(first, leave_out=["*winogrande*"]) + load_tasks(second)
    assert len(load_tasks(first)) == 48
    assert len(tasks) == 42 + 24
    source = NaturalSource(tasks, per_task=50)
    assert (len(source), source.tasks) == (66 * 50, 66)
