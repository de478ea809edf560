"""One writer per directory: the second is told at once, and a killed one is no hindrance."""

import os
import signal
import socket
import subprocess
import sys
import warnings

import pytest

from lorax_gen import locks
from lorax_gen.errors import UserError
from tests.stores import bucket, servers  # noqa: F401

HOLDER = """
import sys, time
from pathlib import Path
from lorax_gen import locks
with locks.only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds `tmp_path / 'run'`."""
    words = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_the_second_process_is_told_who_holds_it(holder, tmp_path):
    with pytest.raises(UserError) as error, locks.only_writer(tmp_path / "run"):
        raise AssertionError("the block must not run")
    who = f"process {holder.pid} on {socket.gethostname()}"
    assert f"{tmp_path}/run is in use by {who}; wait until it ends" in str(error.value)


def test_a_killed_holder_holds_nothing(holder, tmp_path):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with locks.only_writer(tmp_path / "run"):
        assert str(os.getpid()) in (tmp_path / "run" / locks.NAME).read_text()


def test_within_a_process_too_and_again_when_the_block_has_ended(tmp_path):
    for _ in range(2):
        with (
            locks.only_writer(tmp_path / "run"),
            pytest.raises(UserError, match=f"in use by process {os.getpid()} on"),
            locks.only_writer(tmp_path / "run"),
        ):
            raise AssertionError("the block must not run")
    with pytest.raises(KeyError), locks.only_writer(tmp_path / "run"):
        raise KeyError
    with locks.only_writer(tmp_path / "run"):
        pass


def test_a_directory_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        told = pytest.raises(UserError, match=r"cannot write to .* \(.*\); choose another")
        with told, locks.only_writer(path):
            raise AssertionError("the block must not run")


def test_where_nothing_can_be_locked_the_user_is_warned(tmp_path, monkeypatch):
    monkeypatch.setattr("fcntl.flock", no_locks)
    told = pytest.warns(UserWarning, match="cannot be locked .*: start only one process")
    with told, locks.only_writer(tmp_path / "run"):
        pass


def no_locks(*_):
    raise OSError(38, "Function not implemented")


def test_a_store_is_not_locked(bucket):  # noqa: F811
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with locks.only_writer(bucket / "locked"), locks.only_writer(bucket / "locked"):
            pass
    assert not (bucket / "locked" / locks.NAME).exists()
