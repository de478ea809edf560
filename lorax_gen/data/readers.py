"""Rows of data files: JSON lines, JSON lists and parquet. Errors name the file and the line."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from lorax_gen.errors import UserError
from lorax_gen.files import AnyPath, local_copy

Row = dict[str, Any]
T = TypeVar("T")
FORMATS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
_SURROGATE = re.compile("[\ud800-\udfff]")


def read_text(path: AnyPath) -> str:
    """The text of a file, decompressed where its name ends in `.gz`.

    Raises UserError where it is missing, is not UTF-8 text or cannot be decompressed.
    """
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
        return data.decode("utf-8-sig")  # some editors write a byte order mark
    except OSError as error:  # includes a broken gzip header
        reason = error.strerror or str(error)
        raise UserError(f"cannot read {path} ({reason})") from None
    except (EOFError, zlib.error) as error:
        raise UserError(f"{path} is truncated or broken ({error})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error})") from None


def read_rows(path: AnyPath) -> Iterator[tuple[str, Row]]:
    """Yields `(location, row)` of every row; `location` names the file and the line, for errors.

    Formats are those of `FORMATS`; blank lines of `.jsonl` are skipped.

    Raises UserError at the first malformed row, with its location.
    """
    if path.name.endswith(".parquet"):
        yield from _parquet_rows(path)
    elif path.name.endswith((".jsonl", ".jsonl.gz")):
        # Not splitlines: a JSON string may hold a bare U+2028, which that treats as a line break.
        for number, line in enumerate(read_text(path).split("\n"), 1):
            location = f"{path}, line {number}"
            if line.strip():
                yield location, _object(location, line)
    elif path.name.endswith((".json", ".json.gz")):
        try:
            rows = json.loads(read_text(path))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from None
        if not isinstance(rows, list):
            raise UserError(f"{path} should hold a list of objects, not a {type(rows).__name__}")
        for number, row in enumerate(rows, 1):
            yield f"{path}, item {number}", _checked(f"{path}, item {number}", row)
    else:
        raise UserError(f"{path} has no known data format; use one of {', '.join(FORMATS)}")


def parse_rows(path: AnyPath, parse: Callable[[Row], T]) -> list[T]:
    """`parse(row)` of every row; its errors become UserErrors with the row's location."""
    return [parse_row(location, row, parse) for location, row in read_rows(path)]


def parse_row(location: str, row: Row, parse: Callable[[Row], T]) -> T:
    """`parse(row)`; its errors become UserErrors prefixed with the location."""
    try:
        return parse(row)
    except UserError as error:
        raise UserError(f"{location}: {error}") from None
    except KeyError as error:
        raise UserError(
            f"{location}: no column {error}; it has {', '.join(row) or 'none'}"
        ) from None
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(f"{location}: a value is malformed ({error})") from None


def text_of(row: Row, column: str, default: str | None = None) -> str:
    """A column's string. Raises UserError for another type, or if missing with no default."""
    value = row.get(column, default) if default is not None else row[column]
    if not is_text(value):
        raise UserError(f"{column} should be a string, not {value!r}")
    return value


def is_text(value: Any) -> bool:
    """Whether it is a string without lone surrogates: JSON can escape them, UTF-8 has none."""
    return isinstance(value, str) and not _SURROGATE.search(value)


def _object(location: str, line: str) -> Row:
    try:
        return _checked(location, json.loads(line))
    except json.JSONDecodeError as error:
        raise UserError(f"{location}: not valid JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:  # a number too long, brackets too deep
        raise UserError(f"{location}: cannot be read ({error})") from None


def _checked(location: str, row: Any) -> Row:
    if not isinstance(row, dict):
        raise UserError(f"{location}: expected an object, not a {type(row).__name__}")
    return row


def _parquet_rows(path: AnyPath) -> Iterator[tuple[str, Row]]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(local_copy(path)) as file:
            rows = [row for batch in file.iter_batches() for row in batch.to_pylist()]
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"cannot read {path} ({str(error).splitlines()[0]})") from None
    yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, 1))
