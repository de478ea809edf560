"""Rows of data files: JSON lines, JSON lists and parquet, errors with the file and the line."""

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
_HALF = re.compile("[\ud800-\udfff]")


def read_text(path: AnyPath) -> str:
    """The text of a file, unpacked where its name ends in `.gz`.

    Raises UserError where it is missing, is no text in UTF-8 or cannot be unpacked.
    """
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
        return data.decode("utf-8-sig")  # some editors put a mark in front
    except OSError as error:  # a broken gzip header is one too
        reason = error.strerror or str(error)
        raise UserError(f"cannot read {path} ({reason})") from None
    except (EOFError, zlib.error) as error:
        raise UserError(f"{path} is cut off or broken ({error})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8 ({error})") from None


def read_rows(path: AnyPath) -> Iterator[tuple[str, Row]]:
    """Yields `(place, row)` of every row; `place` names the file and the line, for errors.

    Formats are those of `FORMATS`; blank lines of `.jsonl` are skipped.

    Raises UserError at the first row that is malformed, naming its place.
    """
    if path.name.endswith(".parquet"):
        yield from _parquet_rows(path)
    elif path.name.endswith((".jsonl", ".jsonl.gz")):
        # Not splitlines: a JSON string may hold a bare U+2028, which that takes for a line's end.
        for number, line in enumerate(read_text(path).split("\n"), 1):
            place = f"{path}, line {number}"
            if line.strip():
                yield place, _object(place, line)
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
    """`parse(row)` of every row; what a row lacks or gets wrong is a UserError with its place."""
    return [parse_row(place, row, parse) for place, row in read_rows(path)]


def parse_row(place: str, row: Row, parse: Callable[[Row], T]) -> T:
    """`parse(row)`, its errors prefixed with the place."""
    try:
        return parse(row)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
    except KeyError as error:
        raise UserError(f"{place}: no column {error}; it has {', '.join(row) or 'none'}") from None
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(f"{place}: a value has the wrong form ({error})") from None


def text_of(row: Row, column: str, default: str | None = None) -> str:
    """The string in a column. UserError where it is another type, or missing with no default."""
    value = row.get(column, default) if default is not None else row[column]
    if not is_text(value):
        raise UserError(f"{column} should be a string, not {value!r}")
    return value


def is_text(value: Any) -> bool:
    """Whether it is a string of whole characters: JSON can spell halves, which no file can hold."""
    return isinstance(value, str) and not _HALF.search(value)


def _object(place: str, line: str) -> Row:
    try:
        return _checked(place, json.loads(line))
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: not valid JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:  # a number too long, brackets too deep
        raise UserError(f"{place}: cannot be read ({error})") from None


def _checked(place: str, row: Any) -> Row:
    if not isinstance(row, dict):
        raise UserError(f"{place}: expected an object, not a {type(row).__name__}")
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
