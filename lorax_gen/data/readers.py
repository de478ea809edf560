"""Rows of data files: JSON lines, JSON lists and parquet. Errors name the file and the line."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, TypeVar

from lorax_gen.documents import parse_json
from lorax_gen.errors import UserError
from lorax_gen.files import AnyPath, local_copy

Row = dict[str, Any]
T = TypeVar("T")
FORMATS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
MAX_BYTES = 4 << 30  # of a file, decompressed: all of it is read at once
_SURROGATE = re.compile("[\ud800-\udfff]")


def read_text(path: AnyPath) -> str:
    """The text of a file, decompressed where its name ends in `.gz`.

    Raises UserError where it is missing, is not UTF-8 text, is too large or cannot be decompressed.
    """
    try:
        with path.open("rb") as file, maybe_gzip(file, path) as content:
            data = bytearray()
            while part := content.read(1 << 20):  # all at once would reserve the most there may be
                data += part
                if len(data) > MAX_BYTES:
                    raise UserError(f"{path} is too large; expected at most {MAX_BYTES:,} bytes")
        return data.decode("utf-8-sig")  # some editors write a byte order mark
    except OSError as error:  # includes a broken gzip header
        reason = error.strerror or str(error)
        raise UserError(f"cannot read {path} ({reason})") from None
    except (EOFError, zlib.error) as error:
        raise UserError(f"{path} is truncated or broken ({error})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error})") from None


def maybe_gzip(file: BinaryIO, path: AnyPath) -> BinaryIO | gzip.GzipFile:
    """The content of an open file, decompressed where its name ends in `.gz`."""
    return gzip.open(file) if path.suffix == ".gz" else file


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
                yield location, _checked(location, parse_json(line, location))
    elif path.name.endswith((".json", ".json.gz")):
        rows = parse_json(read_text(path), str(path), MAX_BYTES)
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


def list_of(row: Row, column: str) -> list:
    """A column's list. Raises UserError for another type: a string is none."""
    value = row[column]
    if not isinstance(value, list | tuple):
        raise UserError(f"{column} should be a list, not {value!r}")
    return list(value)


def index_of(row: Row, column: str) -> int:
    """A column's index, which some data sets write as a string. Raises UserError for others."""
    value = row[column]
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,9}", value):
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"{column} should be an index, not {value!r}")
    return value


def name_of(row: Row, column: str, default: str) -> str:
    """A column's name or number, as a string. Raises UserError for another type."""
    value = row.get(column, default)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise UserError(f"{column} should be a string or a number, not {value!r}")
    return str(value)


def is_text(value: Any) -> bool:
    """Whether it is a string without lone surrogates: UTF-8 has none."""
    return isinstance(value, str) and not _SURROGATE.search(value)


def _checked(location: str, row: Any) -> Row:
    if not isinstance(row, dict):
        raise UserError(f"{location}: expected an object, not a {type(row).__name__}")
    return row


def _parquet_rows(path: AnyPath) -> Iterator[tuple[str, Row]]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(local_copy(path)) as file:
            names = file.schema_arrow.names
            rows = [row for batch in file.iter_batches() for row in batch.to_pylist()]
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot read {path} ({reason})") from None
    if len(set(names)) < len(names):
        raise UserError(f"{path} has two columns of the same name; keep one")
    yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, 1))
