"""Results of single items in a file that grows as they finish, so that a run can be resumed.

One JSON object per line: first the settings of the run, then one item per line, in the order in
which they finish. A line counts if it is complete. In a store the file lags by up to a minute
(`files.Log`), and missing items are computed again. One process at a time writes it: see `suite`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from lorax_gen.errors import UserError
from lorax_gen.files import AnyPath, Log, make_directory

ItemRow = dict[str, Any]


def digest(value: Any) -> str:
    """First 16 hex digits of the SHA-256 of a plain value, for settings that are large."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


class ItemLog:
    """Opens the file of a run, or creates it.

    Attributes:
      rows: items that were in the file, and those written since.

    Raises UserError where the file has other settings, or is not a file of results.
    """

    def __init__(self, path: AnyPath, settings: ItemRow):
        self.path = path
        self.rows: list[ItemRow] = []
        make_directory(path.parent)
        data = path.read_bytes() if path.exists() else b""
        complete = data[: data.rfind(b"\n") + 1]  # without a truncated last line
        lines = self._parsed(complete)
        if lines:
            found, *self.rows = lines
            self._check(found["settings"], json.loads(json.dumps(settings)))
        self.log = Log(path, complete.decode() or _text([{"settings": settings}]))

    def append(self, rows: Iterable[ItemRow]) -> None:
        """Writes items; on a disk they are written when this returns."""
        rows = list(rows)
        self.log.write(_text(rows))
        self.rows += rows

    def flush(self) -> None:
        """Returns when all items are stored."""
        self.log.flush()

    def _parsed(self, complete: bytes) -> list[ItemRow]:
        rows = []
        for number, line in enumerate(complete.split(b"\n")[:-1], 1):
            try:
                rows.append(json.loads(line))
            except ValueError:
                rows.append(None)
            row = rows[-1]
            settings = row.get("settings") if isinstance(row, dict) else row
            if not isinstance(row, dict) or isinstance(settings, dict) != (number == 1):
                raise UserError(
                    f"{self.path}, line {number}: not a line of results; remove the file or "
                    "choose another path"
                )
        return rows

    def _check(self, found: ItemRow, settings: ItemRow) -> None:
        for key in {**settings, **found}:
            if found.get(key) != settings.get(key):
                raise UserError(
                    f"{self.path} is of a run with {key} {found.get(key)!r}, this one has "
                    f"{settings.get(key)!r}; choose another path, or remove the file"
                )


def _text(rows: Iterable[ItemRow]) -> str:
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
