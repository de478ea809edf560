"""Results of single items in a file that grows while they come, so that a run can be resumed.

One JSON object a line: first the settings of the run, then an item each, in the order in which
they are finished. A line counts when it is whole. In a store the file is up to a minute behind
(`files.Log`), and what it lacks is computed again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from lorax_gen.errors import UserError
from lorax_gen.files import AnyPath, Log, make_directory

Row = dict[str, Any]


def digest(value: Any) -> str:
    """First 16 hex digits of the SHA-256 of a plain value, for settings that are large."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


class ItemLog:
    """Opens the file of a run, or begins it.

    Attributes:
      rows: items that were there, and those written since.

    Raises UserError where the file is of a run with other settings, or is no such file.
    """

    def __init__(self, path: AnyPath, settings: Row):
        self.path = path
        self.rows: list[Row] = []
        make_directory(path.parent)
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]  # without a last line that was cut off
        lines = self._parsed(whole)
        if lines:
            found, *self.rows = lines
            self._check(found.get("settings"), json.loads(json.dumps(settings)))
        self.log = Log(path, whole.decode() or _text([{"settings": settings}]))

    def append(self, rows: Iterable[Row]) -> None:
        """Writes items; on a disk they are there when this returns."""
        rows = list(rows)
        self.log.write(_text(rows))
        self.rows += rows

    def flush(self) -> None:
        """Returns when all items are where they are kept."""
        self.log.flush()

    def _parsed(self, whole: bytes) -> list[Row]:
        rows = []
        for number, line in enumerate(whole.split(b"\n")[:-1], 1):
            try:
                rows.append(json.loads(line))
            except ValueError:
                rows.append(None)
            row = rows[-1]
            settings = row.get("settings") if isinstance(row, dict) else row
            if not isinstance(row, dict) or isinstance(settings, dict) != (number == 1):
                raise UserError(
                    f"{self.path}, line {number}: not a line of results; remove the file or "
                    "choose another place"
                )
        return rows

    def _check(self, found: Row, settings: Row) -> None:
        for key in {**settings, **found}:
            if found.get(key) != settings.get(key):
                raise UserError(
                    f"{self.path} is of a run with {key} {found.get(key)!r}, this one has "
                    f"{settings.get(key)!r}; choose another place, or remove the file"
                )


def _text(rows: Iterable[Row]) -> str:
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
