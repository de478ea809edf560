"""Natural Instructions: the definition goes to the cloud, an instance to the edge."""

import io
import json
import tarfile

import numpy as np
import pytest

from lorax_gen.data.instructions import NaturalSource, load_tasks
from lorax_gen.errors import UserError

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


def test_counts_of_natural_instructions(shared_data):
    first, second = sorted((shared_data / "multitask").glob("natural_instructions_*.tar.xz"))
    tasks = load_tasks(first, leave_out=["*winogrande*"]) + load_tasks(second)
    assert len(load_tasks(first)) == 48
    assert len(tasks) == 42 + 24
    source = NaturalSource(tasks, per_task=50)
    assert (len(source), source.tasks) == (66 * 50, 66)
