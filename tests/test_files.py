"""Files appear whole or not at all, and nothing that exists is replaced."""

import os

import pytest

from lorax_gen import files
from lorax_gen.errors import UserError


def snapshot(directory):
    """Everything under a directory, hidden files too."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in directory.rglob("*")
    }


def write(temporary, text):
    if temporary.is_dir():
        temporary = temporary / "inside"
    temporary.write_text(text)


@pytest.fixture(params=[files.new_file, files.new_directory])
def new(request):
    return request.param


def test_a_new_path_appears_when_the_block_ends_well(new, tmp_path):
    path = tmp_path / "folder" / "made.bin"
    with new(path) as temporary:
        write(temporary, "whole")
        assert not path.exists()
    inside = path / "inside" if path.is_dir() else path
    assert inside.read_text() == "whole"
    assert [p.name for p in path.parent.iterdir()] == ["made.bin"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_the_block_leaves_nothing(new, error, tmp_path):
    with pytest.raises(error), new(tmp_path / "made") as temporary:
        write(temporary, "half of")
        raise error
    assert snapshot(tmp_path) == {}


def test_nothing_is_overwritten(new, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("mine too")
    before = snapshot(tmp_path)
    for name in ("file", "folder"):
        with pytest.raises(UserError, match=f"{name} already exists"), new(tmp_path / name):
            raise AssertionError("the block must not run")
    assert snapshot(tmp_path) == before


def test_an_empty_directory_may_be_filled(tmp_path):
    path = tmp_path / "made"
    path.mkdir()
    with files.new_directory(path) as temporary:
        write(temporary, "whole")
    assert snapshot(path) == {"inside": b"whole"}


def test_what_a_killed_process_left_is_no_hindrance(new, tmp_path):
    path = tmp_path / "made"
    manager = new(path)
    write(manager.__enter__(), "half of")  # and never comes back
    with new(path) as temporary:
        if temporary.is_dir():
            assert not list(temporary.iterdir())
        write(temporary, "whole")
    assert list(snapshot(tmp_path).values())[-1] == b"whole"
    assert not (tmp_path / ".made.tmp").exists()


def test_a_text_that_cannot_be_finished_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "log"
    files.write_text(path, "old")
    files.write_text(path, "new")
    assert snapshot(tmp_path) == {"log": b"new"}

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        files.write_text(path, "newer")
    assert path.read_text() == "new"


def test_json_comes_back(tmp_path):
    value = {"a": [1, 2.5, None], "b": {"c": "text"}}
    files.write_json(tmp_path / "value.json", value)
    assert files.read_json(tmp_path / "value.json") == value


@pytest.mark.parametrize("content", [None, b"", b'{"a": ', b"\xff\xfe\x00"])
def test_a_missing_or_broken_json_file_is_named_in_one_line(content, tmp_path):
    path = tmp_path / "value.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"value\.json") as error:
        files.read_json(path)
    assert "\n" not in str(error.value)
