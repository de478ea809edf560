"""Files appear whole or not at all, and nothing that exists is replaced."""

import errno
import importlib.util
import os
import resource
import time
from pathlib import Path

import numpy as np
import pytest

from lorax_gen import documents, files, temporary
from lorax_gen.errors import UserError
from lorax_gen.tensors import write_tensors
from tests.stores import bucket, servers  # noqa: F401


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
    left = manager.__enter__()  # and never comes back
    write(left, "half of")
    with new(path) as other:
        assert other != left and (not other.is_dir() or not list(other.iterdir()))
        write(other, "all of it")
    assert {left, path} == set(tmp_path.iterdir())
    inside = path / "inside" if path.is_dir() else path
    assert inside.read_text() == "all of it"
    temporary.remove_leftovers(path)
    assert {path} == set(tmp_path.iterdir())


def test_what_a_user_named_like_a_temporary_file_stays(new, tmp_path):
    for name in (".made.tmp", ".made.0123.tmp", ".other.0123456789abcdef.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
    before = snapshot(tmp_path)
    with new(tmp_path / "made") as other:
        write(other, "made")
    temporary.remove_leftovers(tmp_path / "made")
    assert before.items() <= snapshot(tmp_path).items()


def test_the_first_of_two_writers_wins_and_the_other_is_told(new, tmp_path):
    """The second one has begun before the first one ends."""
    path = tmp_path / "made"
    with pytest.raises(UserError, match="made already exists"), new(path) as slow:
        write(slow, "second")
        with new(path) as fast:
            write(fast, "first")
    inside = path / "inside" if path.is_dir() else path
    assert inside.read_text() == "first" and set(tmp_path.iterdir()) == {path}


def test_where_there_are_no_hard_links_nothing_is_replaced_either(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "made"
    with pytest.raises(UserError, match="made already exists"), files.new_file(path) as slow:
        write(slow, "second")
        with files.new_file(path) as fast:
            write(fast, "first")
    assert snapshot(tmp_path) == {"made": b"first"}


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes_are_those_of_open_and_mkdir(umask, tmp_path):
    old = os.umask(umask)
    try:
        with files.new_directory(tmp_path / "made") as partial:
            write_tensors(partial / "a.safetensors", {"a": np.zeros(2)})
            files.write_text(partial / "b.txt", "b")
    finally:
        os.umask(old)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    file = 0o666 & ~umask
    assert modes == {"made": 0o777 & ~umask, "a.safetensors": file, "b.txt": file}


def limited_to(size, task):
    """The message of the UserError of a task that may write files of `size` bytes at most."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
        with pytest.raises(UserError) as error:
            task()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    return str(error.value)


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    """safetensors raises no OSError."""
    tensors = {"a": np.zeros(4096, np.uint8)}

    def file():
        write_tensors(tmp_path / "made", tensors)

    def directory():
        with files.new_directory(tmp_path / "made") as partial:
            write_tensors(partial / "a.safetensors", tensors)

    def text():
        files.write_text(tmp_path / "made", "a" * 4096)

    for task in (file, directory, text):
        assert limited_to(1024, task) == (
            f"cannot write {tmp_path}/made (File too large); free space or choose another path"
        )
        assert not list(tmp_path.iterdir())


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
    assert documents.read_json(tmp_path / "value.json") == value


@pytest.mark.parametrize("content", [None, b"", b'{"a": ', b"\xff\xfe\x00"])
def test_a_missing_or_broken_json_file_is_named_in_one_line(content, tmp_path):
    path = tmp_path / "value.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"value\.json") as error:
        documents.read_json(path)
    assert "\n" not in str(error.value)


# --- paths ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["runs/x", "/runs/x", "s3/x", "a:b", "a:/b", "C:/x", "."])
def test_what_is_no_url_is_a_local_path(name):
    path = files.to_path(name)
    assert path == Path(name) and isinstance(path, Path)
    assert not files.is_url(path) and files.scheme(path) == ""
    assert files.local_copy(path) is path and files.staging(path) is path


@pytest.mark.parametrize(
    "name, message",
    [
        ("ftp://host/run", "ftp://host/run: unsupported store; expected gs:// or s3://"),
        ("gs:///run", "gs:///run names no bucket"),
        ("gs://", "gs:// names no bucket"),
        (Path("gs://bucket/run"), "gs:/bucket/run was a URL before pathlib took a slash"),
    ],
)
def test_a_url_that_names_nothing_is_refused_and_not_made_a_folder(name, message, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    with pytest.raises(UserError) as error:
        files.to_path(name)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("scheme, package, extra", [("gs", "gcsfs", "gcs"), ("s3", "s3fs", "s3")])
def test_a_store_whose_package_is_missing_says_what_to_install(scheme, package, extra, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"{package}: pip install 'lorax-gen\[{extra}\]'"):
        files.to_path(f"{scheme}://bucket/run")


# --- in a store ----------------------------------------------------------------------------------


@pytest.fixture
def folder(bucket, request):  # noqa: F811
    """A place of its own in a store, where nothing is yet."""
    return bucket / request.node.name.strip("]").replace("[", "-")


def objects(directory):
    """Everything under a directory of a store."""
    store = files.file_system(directory)
    return {
        name.removeprefix(str(directory).partition("://")[2]).strip("/"): store.cat(name)
        for name in store.find(str(directory))
    }


def test_a_url_stays_one(folder):
    path = files.to_path(f"{folder}/a//b/")
    assert str(path) == f"{folder}/a/b" and files.is_url(path)
    assert files.to_path(path) == path and files.absolute(path) == path
    assert not files.is_url(Path("x")) and files.scheme(path) in ("gs", "s3")


def test_a_new_path_appears_in_a_store_when_the_block_ends_well(new, folder):
    path = folder / "made.bin"
    with new(path) as temporary:
        write(temporary, "whole")
        assert isinstance(temporary, Path) and temporary.name == "made.bin"
        assert not path.exists()
    assert list(objects(folder).values()) == [b"whole"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_the_block_leaves_nothing_in_a_store(new, error, folder):
    with pytest.raises(error), new(folder / "made") as temporary:
        write(temporary, "half of")
        raise error
    assert objects(folder) == {}


def test_nothing_is_overwritten_in_a_store(new, folder):
    (folder / "file").write_text("mine")
    (folder / "folder" / "file").write_text("mine too")
    before = objects(folder)
    for name in ("file", "folder"):
        with pytest.raises(UserError, match=f"{name} already exists"), new(folder / name):
            raise AssertionError("the block must not run")
        with pytest.raises(UserError, match=f"{name} already exists"):
            files.must_be_new(folder / name)
    assert objects(folder) == before


def test_an_upload_that_fails_leaves_nothing(folder, monkeypatch):
    store, sent = files.file_system(folder), []
    put = store.put_file

    def fail_at_the_second(local, remote):
        sent.append(remote)
        if len(sent) == 2:
            raise OSError("connection lost")
        put(local, remote)

    monkeypatch.setattr(store, "put_file", fail_at_the_second)
    with pytest.raises(OSError, match="connection lost"), files.new_directory(folder) as temporary:
        for name in "abc":
            (temporary / name).write_text(name)
    assert len(sent) == 2 and objects(folder) == {}


def test_a_killed_upload_is_no_directory_and_is_made_anew(folder, monkeypatch):
    """The process dies while files go up: no code of ours runs after that."""
    monkeypatch.setattr(files, "upload", lambda local, path: (path / "half").write_text("x"))
    monkeypatch.setattr(type(folder), "unlink", lambda path: None)
    with files.new_directory(folder):
        pass
    monkeypatch.undo()
    assert set(objects(folder)) == {"half", files.INCOMPLETE}
    assert not files.is_complete_directory(folder)
    with pytest.raises(UserError, match="is incomplete: its writer was interrupted"):
        files.local_copy(folder)
    files.must_be_new(folder)
    with files.new_directory(folder) as temporary:
        write(temporary, "whole")
    assert objects(folder) == {"inside": b"whole"} and files.is_complete_directory(folder)


def test_what_makes_a_directory_valid_is_written_last(folder, monkeypatch):
    sent, store = [], files.file_system(folder)
    monkeypatch.setattr(store, "put_file", lambda local, remote: sent.append(remote))
    with files.new_directory(folder) as temporary:
        for name in ("adapter_config.json", "a.bin", "z.bin"):
            (temporary / name).write_text(name)
    assert [name.rpartition("/")[2] for name in sent] == ["a.bin", "z.bin", "adapter_config.json"]


def test_a_copy_is_made_once_and_again_when_the_store_has_changed(folder, monkeypatch):
    for name in ("d/a.json", "d/sub/b.json", "d/sub/c.bin"):
        (folder / name).write_text(name)
    copy = files.local_copy(folder / "d")
    assert copy.name == "d" and snapshot(copy) == {
        "a.json": b"d/a.json", "sub": None, "sub/b.json": b"d/sub/b.json",
        "sub/c.bin": b"d/sub/c.bin",
    }  # fmt: skip
    assert files.local_copy(folder / "d") == copy
    some = files.local_copy(folder / "d", ("*.json",))
    assert set(snapshot(some)) == {"a.json", "sub", "sub/b.json"}
    (folder / "d" / "a.json").write_text("new")
    assert (files.local_copy(folder / "d") / "a.json").read_text() == "new"
    assert files.local_copy(folder / "d" / "a.json").read_text() == "new"
    with pytest.raises(FileNotFoundError, match="nowhere"):
        files.local_copy(folder / "nowhere")


def test_files_are_found_at_any_depth(folder, tmp_path):
    for root in (folder, tmp_path):
        for name in ("b.txt", "deep/er/b.json", "deep/b.d/x", "a.txt"):
            files.make_directory((root / name).parent)
            (root / name).write_text(name)
        found = files.find(root, "b.*")
        assert [path.relative_to(root).as_posix() for path in found] == [
            "b.txt", "deep/b.d", "deep/er/b.json"
        ]  # fmt: skip
    assert files.find(folder / "nowhere", "*") == []


def test_a_log_in_a_store_is_there_after_a_flush_and_after_a_minute(folder, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    path = folder / "log"
    log = files.Log(path, "a\n")
    log.write("b\n")
    assert path.read_text() == "a\n"
    log.flush()
    assert path.read_text() == "a\nb\n"
    log.write("c\n")
    now[0] = files.Log.EVERY
    log.write("d\n")
    assert path.read_text() == "a\nb\nc\nd\n"


def test_a_log_that_was_removed_is_not_begun_anew(tmp_path):
    log = files.Log(tmp_path / "log", "a\n")
    (tmp_path / "log").unlink()
    with pytest.raises(FileNotFoundError):
        log.write("b\n")
    assert not list(tmp_path.iterdir())


def test_a_log_on_a_disk_is_there_at_once(tmp_path):
    log = files.Log(tmp_path / "log", "a\n")
    log.write("b\n")
    assert (tmp_path / "log").read_text() == "a\nb\n"


def test_a_store_that_cannot_be_reached_is_told_in_one_line():
    class Refused(Exception):
        __module__ = "botocore.exceptions"

    assert files.store_error(Refused("no\ncredentials")) == "no credentials"
    assert files.store_error(Refused()) == "Refused"
    assert files.store_error(KeyError("no")) is None
