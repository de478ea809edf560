"""Results of single items in a file that grows while they come, so that a run can be resumed.

One JSON object a line: first the settings of the run, then an item each, in the order in which
they are finished. A line counts when it is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lorax_gen.errors import UserError

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

    def __init__(self, path: Path, settings: Row):
        self.path = path
        self.rows: list[Row] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = self._whole_lines()
        if not lines:
            self._write([{"settings": settings}])
            return
        found, *self.rows = lines
        self._check(found.get("settings"), json.loads(json.dumps(settings)))

    def append(self, rows: Iterable[Row]) -> None:
        """Writes items; when this returns they are on the disk."""
        rows = list(rows)
        self._write(rows)
        self.rows += rows

    def _write(self, rows: Iterable[Row]) -> None:
        with self.path.open("a") as file:
            file.write("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())

    def _whole_lines(self) -> list[Row]:
        """The lines of the file, which is cut behind the last whole one."""
        if not self.path.exists():
            return []
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
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
        if len(whole) < len(data):
            os.truncate(self.path, len(whole))
        return rows

    def _check(self, found: Row, settings: Row) -> None:
        for key in {**settings, **found}:
            if found.get(key) != settings.get(key):
                raise UserError(
                    f"{self.path} is of a run with {key} {found.get(key)!r}, this one has "
                    f"{settings.get(key)!r}; choose another place, or remove the file"
                )
