"""`lorax-gen report`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from lorax_gen.cli.parse import UserPath


@dataclasses.dataclass(frozen=True)
class Report:
    """Put training runs and evaluations on one HTML page, with tables and pictures.

    RUN is a directory of lorax-gen train (training curves; of a generator the gates by task and
    layer, a map of the tasks and the load of its experts) or of lorax-gen evaluate, the demo or an
    experiment (scores and costs, beside the paper's where they can be compared), or a directory of
    such. The page needs no other file; the pictures lie beside it as PNG files too.

    Examples:
      lorax-gen report runs/demo
      lorax-gen report runs/world runs/tables --output report
    """

    runs: Annotated[tuple[UserPath, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN ...")]
    output: UserPath = Path("report")
    """Directory of the page; one of an earlier report is replaced."""
    gates: bool = True
    """Load the generators of training runs and draw the gates of their tasks."""

    def run(self) -> int:
        from lorax_gen.errors import UserError
        from lorax_gen.recipes.report import write_report

        if not self.runs:
            raise UserError("name one or more run directories; see lorax-gen report --help")
        print(f"report: {write_report(self.runs, self.output, gates=self.gates)}")
        return 0
