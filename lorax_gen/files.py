"""Reading and writing files so that nothing is overwritten and nothing is left half-written."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorax_gen.errors import UserError


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; UserError where it is missing, broken or no object."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object, which it should")
    return value


def write_text(path: Path, text: str) -> None:
    """Writes a whole text file or none: under a temporary name, then renamed."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Writes a whole JSON file or none."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def must_be_new(path: Path) -> None:
    """UserError where something is at `path`."""
    if path.exists():
        raise UserError(f"{path} already exists; choose another name or remove it first")


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary path that becomes `path` when the block ends well. `path` must not exist."""
    must_be_new(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A temporary directory that becomes `path` when the block ends well.

    `path` must not exist, or be an empty directory.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} already exists; choose another name or remove it first")
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if path.exists():
            path.rmdir()
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_prompt(text: str) -> str:
    """The prompt itself, or the text of standard input (`-`) or of a file (`@FILE`)."""
    if text == "-":
        return sys.stdin.read()
    if text.startswith("@"):
        path = Path(text[1:])
        try:
            return path.read_text()
        except (OSError, UnicodeDecodeError):
            raise UserError(
                f"cannot read the prompt file {path}; after @ stands the name of a text file"
            ) from None
    return text
