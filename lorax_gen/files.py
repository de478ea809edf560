"""Reading and writing files so that nothing is overwritten and nothing is left half-written.

A path is a local one (`pathlib.Path`) or, where a user wrote a URL such as `gs://bucket/run`, one
in an object store (`epath.Path`, the type that orbax uses). `to_path` returns either. In a store:

* The upload of an object is atomic; a disk needs a temporary name and a rename for that.
* A directory is only a common prefix of object names and cannot be renamed atomically. While one is
  being written it holds an object `.incomplete`, created first and deleted last. Readers refuse
  such a directory, and the next writer removes it. Other programs recognise a directory by its
  `config.json`, so that is uploaded last.
* Libraries need local files: they read from `local_copy` and write into the local paths that
  `new_file`, `new_directory` and `replaced_file` yield, which are uploaded when the block ends
  without an error.
* Objects cannot be appended to: see `Log`.
"""

from __future__ import annotations

import errno
import fnmatch
import functools
import importlib.util
import json
import os
import pathlib
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import fsspec
from etils import epath

from lorax_gen import temporary
from lorax_gen.errors import UserError

# Where tensorflow is installed, epath would import it to reach a store, which is slow.
os.environ.setdefault("EPATH_USE_TF", "false")

if TYPE_CHECKING:  # epath has pathlib's methods, but no types: the union would accept anything
    AnyPath: TypeAlias = pathlib.Path
else:
    AnyPath = pathlib.Path | epath.Path

# Schemes of stores: the package that each needs, and the extra that installs it.
STORES = {"gs": ("gcsfs", "'lorax-gen[gcs]'"), "s3": ("s3fs", "'lorax-gen[s3]'")}
# Packages whose errors are a store's: of the store, of authentication and of the connection.
LIBRARIES = {"aiobotocore", "aiohttp", "botocore", "gcsfs", "google", "s3fs"}
INCOMPLETE = ".incomplete"

# --- paths ---------------------------------------------------------------------------------------


def to_path(name: str | os.PathLike) -> AnyPath:
    """The path for a user's string: a URL is in a store, anything else is local.

    Raises UserError where the store is not supported, or its package is not installed.
    """
    if isinstance(name, epath.Path) and not is_url(name):
        return Path(name)
    text = os.fspath(name)
    scheme, mark, rest = text.partition("://")
    if not mark or not re.fullmatch(r"[a-z][a-z0-9+.-]*", scheme, re.IGNORECASE):
        cut = re.match("|".join(f"{known}:/" for known in STORES), text)
        if cut and isinstance(name, pathlib.Path):
            raise UserError(f"{name} was a URL before pathlib took a slash from it; pass a string")
        return Path(name)
    if scheme not in STORES:
        known = " or ".join(f"{known}://" for known in STORES)
        raise UserError(f"{text}: unsupported store; expected {known}, or a local path")
    package, install = STORES[scheme]
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{text} needs {package}: pip install {install}")
    if not rest or rest.startswith("/"):
        raise UserError(f"{text} names no bucket; expected such as {scheme}://bucket/name")
    _open_store(scheme)
    return epath.Path(text)


def is_url(path: str | os.PathLike) -> bool:
    """Whether a path is in a store."""
    return os.fspath(path).startswith(tuple(f"{scheme}://" for scheme in STORES))


def scheme(path: AnyPath) -> str:
    """`gs`, `s3`, or `''` for a local path."""
    return os.fspath(path).partition("://")[0] if is_url(path) else ""


def file_system(path: AnyPath) -> fsspec.AbstractFileSystem:
    """The fsspec file system of a path in a store, which epath uses too."""
    return _open_store(scheme(path))


def absolute(path: AnyPath) -> AnyPath:
    return path if is_url(path) else path.absolute()


@functools.cache
def _open_store(scheme: str) -> fsspec.AbstractFileSystem:
    # Listings are not cached: other processes, and orbax's own client, write too.
    for name in {"gs": ("gs", "gcs")}.get(scheme, (scheme,)):
        fsspec.config.conf.setdefault(name, {}).setdefault("use_listings_cache", False)
    return fsspec.filesystem(scheme)


def store_error(error: BaseException) -> str | None:
    """The message of a store's error, in one line; None for any other error."""
    kinds = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    if not kinds & LIBRARIES:
        return None
    return " ".join(str(error).split())[:300] or type(error).__name__


# --- reading -------------------------------------------------------------------------------------


def find(directory: AnyPath, pattern: str) -> list[AnyPath]:
    """The files and directories in or below a directory whose name matches a pattern, sorted."""
    if not is_url(directory):
        return sorted(directory.rglob(pattern))
    found = file_system(directory).find(os.fspath(directory), withdirs=True)
    names = (_inside(name, directory) for name in found)
    return sorted(directory / name for name in names if name and _fits(name, pattern))


def local_copy(path: AnyPath, patterns: Sequence[str] = ("*",)) -> Path:
    """The path itself, or for one in a store a local copy with the same name.

    A process downloads an unchanged path once, into a temporary directory (in `$TMPDIR`) that is
    removed when the process ends.

    Args:
      patterns: of a directory, the files to copy.

    Raises UserError where a directory is incomplete; FileNotFoundError where the path is missing.
    """
    if not is_url(path):
        return path
    store = file_system(path)
    infos = store.find(os.fspath(path), detail=True)
    if not infos:
        raise FileNotFoundError(f"no such file or directory: {path}")
    names = {name: _inside(name, path) for name in sorted(infos)}  # '' for a file
    if INCOMPLETE in names.values():
        raise UserError(f"{path} is incomplete: its writer was interrupted; write it again")
    wanted = {
        name: inner
        for name, inner in names.items()
        if not inner or any(_fits(inner, pattern) for pattern in patterns)
    }
    state = fsspec.utils.tokenize(os.fspath(path), [(name, infos[name]) for name in wanted])
    if state not in _copies:
        folder = Path(_scratch().name) / state / path.name
        folder.parent.mkdir(exist_ok=True)
        local = [folder / inner for inner in wanted.values()]
        for each in local:
            each.parent.mkdir(parents=True, exist_ok=True)
        store.get(list(wanted), [os.fspath(each) for each in local])
        _copies[state] = folder
    return _copies[state]


def _inside(name: str, directory: AnyPath) -> str:
    """An object's name in the store, relative to the directory."""
    return name.removeprefix(os.fspath(directory).partition("://")[2]).strip("/")


def _fits(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name.rpartition("/")[2], pattern)


_copies: dict[str, Path] = {}


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="lorax-gen-")


def remove_copies() -> None:
    """Removes all local copies and staging directories; for a process that ends without exiting."""
    if _scratch.cache_info().currsize:
        _scratch().cleanup()


# --- writing -------------------------------------------------------------------------------------


def must_be_new(path: str | os.PathLike) -> None:
    """Raises UserError where `path` exists; an incomplete directory in a store does not count."""
    path = to_path(path)
    if path.exists() and not is_incomplete(path):
        raise _exists(path)


def is_incomplete(path: AnyPath) -> bool:
    """Whether it is a directory in a store whose writing was interrupted."""
    return is_url(path) and (path / INCOMPLETE).exists()


def is_complete_directory(path: AnyPath) -> bool:
    return path.is_dir() and not is_incomplete(path)


def make_directory(path: AnyPath) -> None:
    """Makes a directory and its parents; a store needs none."""
    if not is_url(path):
        path.mkdir(parents=True, exist_ok=True)


@contextmanager
def replaced_file(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary local file, empty, that replaces `path` when the block ends without an error.

    Raises UserError where there is no space for it, as the functions below do.
    """
    path = to_path(path)
    with temporary.no_space(path), _temporary_file(path) as local:
        yield local
        if is_url(path):
            upload(local, path)
        else:
            os.replace(local, path)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a text file completely or not at all, replacing what was there."""
    with replaced_file(path) as temporary:
        temporary.write_text(text)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes a JSON file completely or not at all, replacing what was there."""
    write_text(path, json.dumps(value, indent=2) + "\n")


@contextmanager
def new_file(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary local file, empty, that becomes `path` when the block ends without an error.

    Raises UserError where `path` exists, also where another process made it since; in a store the
    other's may be replaced if both end in the same instant.
    """
    path = to_path(path)
    must_be_new(path)
    make_directory(path.parent)
    with temporary.no_space(path), _temporary_file(path) as local:
        yield local
        if is_url(path):
            must_be_new(path)
            upload(local, path)
            return
        try:
            temporary.link(local, path)
        except FileExistsError:
            raise _exists(path) from None


@contextmanager
def new_directory(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary local directory that becomes `path` when the block ends without an error.

    `path` must not exist, or be an empty directory, or one left incomplete in a store. Raises
    UserError where it does, also where another process made it since.
    """
    path = to_path(path)
    _must_be_empty(path)
    if is_url(path):
        with temporary.no_space(path), tempfile.TemporaryDirectory(prefix="lorax-gen-") as folder:
            local = Path(folder) / path.name
            local.mkdir()
            yield local
            _must_be_empty(path)
            _upload_new(local, path)
        return
    make_directory(path.parent)
    local = temporary.name_for(path)
    try:
        with temporary.no_space(path):
            local.mkdir()
            yield local
            try:
                os.rename(local, path)  # it replaces an empty directory, and nothing else
            except OSError as error:
                taken = error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)
                raise _exists(path) if taken else error from None
    finally:
        shutil.rmtree(local, ignore_errors=True)


def _must_be_empty(path: AnyPath) -> None:
    if not is_incomplete(path) and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise _exists(path)


@contextmanager
def _temporary_file(path: AnyPath) -> Iterator[Path]:
    """An empty file beside `path`, or for one in a store in `$TMPDIR`."""
    if not is_url(path):
        with temporary.new_file(path) as local:
            yield local
        return
    with tempfile.TemporaryDirectory(prefix="lorax-gen-") as folder:
        local = Path(folder) / path.name
        local.touch()
        yield local


def _exists(path: AnyPath) -> UserError:
    return UserError(f"{path} already exists; choose another name or remove it first")


def staging(path: AnyPath) -> Path:
    """The local directory to write into: `path` itself if local, else a temporary one, to be
    copied by `upload` as often as needed."""
    return Path(tempfile.mkdtemp(dir=_scratch().name)) if is_url(path) else path


def upload(local: Path, path: AnyPath) -> None:
    """Copies a local file, or the files in and below a local directory, to a store, replacing
    objects of the same name. Does nothing if both paths are the same."""
    if local == path:
        return
    store = file_system(path)
    inside = [each for each in sorted(local.rglob("*")) if each.is_file()]
    inside.sort(key=lambda each: each.name.endswith("config.json"))  # False comes first
    for each in inside if local.is_dir() else [local]:
        store.put_file(os.fspath(each), os.fspath(path / each.relative_to(local)))


def _upload_new(local: Path, path: epath.Path) -> None:
    """Uploads a directory completely, or leaves it marked incomplete."""
    if is_incomplete(path):
        path.rmtree()
    (path / INCOMPLETE).write_text("")
    try:
        upload(local, path)
        (path / INCOMPLETE).unlink()
    except BaseException:
        with suppress(Exception):  # the store itself may have failed; then it stays incomplete
            path.rmtree()
        raise


class Log:
    """A text file that is appended to.

    On a disk, `write` returns after the text is synced. A store can only replace an object, so text
    is buffered in memory, and the object is replaced by `flush`, and by `write` if the last flush
    was a minute ago or more. A killed process loses the buffered text, so a writer flushes before
    anything that depends on it.

    Args:
      text: the initial content; it replaces an existing file.
    """

    EVERY = 60.0  # seconds

    def __init__(self, path: AnyPath, text: str = ""):
        write_text(path, text)
        self.path, self.written = path, text
        self.pending: list[str] = []
        self.flushed = time.monotonic()

    def write(self, text: str) -> None:
        if not is_url(self.path):
            # Not made anew where it was removed: then what depends on it is gone too.
            with open(os.open(self.path, os.O_WRONLY | os.O_APPEND), "a") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            return
        self.pending.append(text)
        if time.monotonic() - self.flushed >= self.EVERY:
            self.flush()

    def flush(self) -> None:
        """Returns after all text is written."""
        if self.pending:
            text = "".join([self.written, *self.pending])
            write_text(self.path, text)
            self.written, self.pending, self.flushed = text, [], time.monotonic()
