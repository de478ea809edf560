"""A report as one HTML page that needs nothing else: tables, and pictures within it.

The tables are those of the terminal (`evaluation.tables`), the layout is `assets/report.html`.
"""

from __future__ import annotations

import base64
import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from rich.table import Table
from rich.text import Text

from lorax_gen import assets
from lorax_gen.evaluation.paper import PaperTable
from lorax_gen.files import AnyPath, replaced_file, write_text

PAGE = "report.html"


class Row(NamedTuple):
    cells: tuple[str, ...]
    style: str = ""  # bold, dim or none


class Grid(NamedTuple):
    """A table of texts."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[Row, ...]
    kind: str = "table"


class Picture(NamedTuple):
    name: str  # of its file beside the page
    png: bytes
    caption: str
    kind: str = "figure"

    @property
    def base64(self) -> str:
        return base64.b64encode(self.png).decode()


class Note(NamedTuple):
    text: str
    kind: str = "note"


@dataclasses.dataclass(frozen=True)
class Section:
    """One run or evaluation: a title, a sentence about it, and its parts in order."""

    title: str
    about: str
    parts: Sequence[Grid | Picture | Note]
    anchor: str = ""


def grid_of(table: Table) -> Grid:
    """A table for the terminal as texts; its markup is dropped, bold and dim rows are kept."""
    columns = [[_plain(cell) for cell in column.cells] for column in table.columns]
    styles = [str(row.style or "") for row in table.rows]
    rows = (
        Row(cells, style if style in ("bold", "dim") else "")
        for cells, style in zip(zip(*columns, strict=True), styles, strict=True)
    )
    heads = tuple(_plain(column.header) for column in table.columns)
    return Grid(_plain(table.title or ""), heads, tuple(rows))


def grid_of_paper(table: PaperTable) -> list[Grid | Note]:
    """A table of the paper, and what it can be compared in."""
    title = f"In the paper: {table.title}"
    rows = tuple(Row(row, "bold" if "LoRA-Gen" in row[0] else "") for row in table.rows)
    return [Grid(title, table.heads, rows), Note(table.note)]


def draw(name: str, caption: str, function: Callable[..., None], *values: Any) -> Picture:
    """A picture that `function(*values, path)` draws."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / name
        function(*values, path)
        return Picture(name, path.read_bytes(), caption)


def write_page(directory: AnyPath, title: str, sections: Sequence[Section]) -> None:
    """Writes `report.html`, after its pictures beside it; each file that is there is replaced."""
    for part in (part for section in sections for part in section.parts):
        if isinstance(part, Picture):
            with replaced_file(directory / part.name) as path:
                path.write_bytes(part.png)
    found = [
        dataclasses.replace(section, anchor=f"section-{i}") for i, section in enumerate(sections, 1)
    ]
    template = (assets.ASSETS / "report.html").read_text(encoding="utf-8")
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        template
    )
    write_text(
        directory / PAGE, page.render(title=title, sections=found, version=version("lorax-gen"))
    )


def _plain(cell: Any) -> str:
    return cell.plain if isinstance(cell, Text) else Text.from_markup(str(cell)).plain
