"""One writer at a time: a lock on a directory of results."""

from __future__ import annotations

import errno
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from lorax_gen import files
from lorax_gen.errors import UserError
from lorax_gen.files import AnyPath

NAME = ".lock"


@contextmanager
def only_writer(directory: AnyPath) -> Iterator[None]:
    """Makes the directory, and refuses every other process that asks for it until the block ends.

    The lock is one of the operating system (flock), on a file `.lock` that stays: it ends with its
    process, however that ends, so it never blocks a run that resumes. On NFS it holds between
    hosts. A store has no such lock, and an object that stands for one would outlive a killed
    process: there, two writers are not noticed.

    Raises UserError at once where another process holds it, naming that one, or where the directory
    is not writable.
    """
    if files.is_url(directory):
        yield
        return
    path = Path(directory) / NAME
    lock = FileLock(path, blocking=False, fallback_to_soft=False, on_acquired=_sign)
    try:
        files.make_directory(directory)
        lock.acquire()
    except Timeout:
        raise UserError(
            f"{directory} is in use by {path.read_text() or 'another process'}; wait until it "
            "ends, or choose another directory"
        ) from None
    except OSError as error:
        reason = error.strerror or error
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise UserError(f"cannot write to {directory} ({reason}); choose another") from None
        text = f"{directory} cannot be locked ({reason}): start only one process that writes to it"
        warnings.warn(text, stacklevel=3)
    try:
        yield
    finally:
        lock.release()


def _sign(file: int) -> None:
    os.ftruncate(file, 0)
    os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
