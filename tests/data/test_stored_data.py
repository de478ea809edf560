"""Training data in an object store is found and read as on a disk."""

import gzip
import io
import json
import tarfile

import pyarrow
import pytest
from pyarrow import parquet

from lorax_gen import files
from lorax_gen.data.agent import load_agent
from lorax_gen.data.config import MixtureConfig, open_source
from lorax_gen.errors import UserError
from tests.data import rows
from tests.stores import bucket, servers  # noqa: F401

TRIPLES = [{"instruction": f"Say {i}.", "input": "", "output": str(i)} for i in range(4)]
TASK = {
    "Definition": "Say it.",
    "Positive Examples": [{"input": "a", "output": "b", "explanation": ""}],
    "Negative Examples": [],
    "Instances": [{"input": "q", "output": ["r"]}],
}


@pytest.fixture(scope="module")
def folder(bucket):  # noqa: F811
    """One data set of each format, at different depths."""
    folder = bucket / "data"
    with files.new_file(folder / "deep" / "er" / "boolq.train.jsonl") as path:
        rows.write_lines(path, rows.make_rows("boolq", 6, 0))
    with files.new_file(folder / "alpaca.parquet") as path:
        parquet.write_table(pyarrow.Table.from_pylist(TRIPLES), path)
    with files.new_file(folder / "mine.json.gz") as path:
        path.write_bytes(gzip.compress(json.dumps(TRIPLES).encode()))
    archive = folder / "natural_instructions.tar.gz"
    with files.new_file(archive) as path, tarfile.open(path, "w:gz") as tar:
        data, member = json.dumps(TASK).encode(), tarfile.TarInfo("tasks/task1_said.json")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    files.write_text(folder / "tasks" / "task2_said.json", json.dumps(TASK))
    return folder


@pytest.mark.parametrize(
    "name, count",
    [
        ("boolq", 6),
        ("alpaca", 4),
        ("natural_instructions", 1),
        ("{folder}/tasks", 1),
        ("{folder}/mine.json.gz", 4),
    ],
)
def test_a_source_is_read(folder, name, count):
    root = MixtureConfig(directory=str(folder)).root
    assert len(open_source(name.format(folder=folder), root)) == count


def test_what_is_not_there_is_told_by_its_url(folder):
    with pytest.raises(UserError, match=f"no such data directory: {folder}/nowhere"):
        open_source("boolq", folder / "nowhere")
    with pytest.raises(UserError, match=f"unknown source '{folder}/none.jsonl'"):
        open_source(f"{folder}/none.jsonl", folder)
    with pytest.raises(UserError, match=f"in or below {folder}"):
        load_agent("train", folder)
