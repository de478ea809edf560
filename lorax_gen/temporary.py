"""Temporary names on a disk: `.NAME.16 hex digits.tmp`, beside the file or directory NAME.

No other process uses such a name, so two that write the same path do not meet before the end, and
a file of the user's is never taken for one. A killed process leaves it there; `remove_leftovers`
is for those who know that its writer is dead.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorax_gen.errors import UserError

NAME = re.compile(r"\.(.+)\.[0-9a-f]{16}\.tmp", re.DOTALL)
# No space, in the quota or by the limit of a file's size; a broken or a read-only disk.
FAILED_WRITES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


def name_for(path: Path) -> Path:
    """A new temporary name for a path; of one that is temporary itself, for the same NAME."""
    inner = NAME.fullmatch(path.name)
    return path.with_name(f".{inner[1] if inner else path.name}.{secrets.token_hex(8)}.tmp")


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """An empty temporary file, with the mode that `open` gives; removed when the block ends."""
    temporary = name_for(path)
    try:
        temporary.touch(exist_ok=False)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def link(temporary: Path, path: Path) -> None:
    """Gives a file the name `path`; unlike a rename it replaces nothing.

    Raises FileExistsError.
    """
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        path.touch(exist_ok=False)
        os.replace(temporary, path)


def remove_leftovers(path: Path) -> None:
    """Removes what killed processes left of `path`. No other process may be writing it."""
    for left in path.parent.iterdir():
        found = NAME.fullmatch(left.name)
        if found and found[1] == path.name:
            shutil.rmtree(left) if left.is_dir() else left.unlink()


@contextmanager
def no_space(path: os.PathLike) -> Iterator[None]:
    """Raises UserError where a write to `path` fails for want of space.

    safetensors raises an error of its own, with the number of the system's as text.
    """
    try:
        yield
    except Exception as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        number = error.errno if isinstance(error, OSError) else found and int(found[1])
        if number not in FAILED_WRITES:
            raise
        if any(NAME.fullmatch(part) for part in Path(path).parts):  # the directory's name follows
            raise OSError(number, os.strerror(number)) from error
        raise UserError(
            f"cannot write {path} ({os.strerror(number)}); free space or choose another path"
        ) from error
