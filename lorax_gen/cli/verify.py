"""`lorax-gen verify`."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

import tyro

from lorax_gen.cli.artifacts import load_for
from lorax_gen.cli.parse import UserPath


@dataclasses.dataclass(frozen=True)
class Verify:
    """Check that an artifact gives the same logits in all its forms: gates, LoRA, merged, reloaded.

    Prints the largest difference of logits from the unmerged LoRA and the fraction of positions
    with the same argmax. Exit code 1 when a difference is larger than the dtype explains.

    Example: lorax-gen verify task.card.safetensors
    """

    artifact: Annotated[UserPath, tyro.conf.Positional, tyro.conf.arg(metavar="ARTIFACT")]
    """A task card, a PEFT adapter directory, or a merged directory that export wrote."""
    edge: str | None = None
    """Edge model that the artifact was made for; default the one that it names."""
    generator: str | None = None
    """Generator that the card was made with; default the one that it names."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the edge model's parameters."""

    def run(self) -> int:
        from rich import box
        from rich.console import Console
        from rich.table import Table

        import lorax_gen
        from lorax_gen.artifacts.verify import card_in

        made_from = card_in(self.artifact)
        edge, generator = load_for(made_from, self.edge, self.generator, self.dtype)
        comparisons = lorax_gen.verify(self.artifact, edge, generator)
        title = "compared with the unmerged LoRA"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        for name in ("form", "logits differ by", "allowed", "same argmax", ""):
            table.add_column(name, justify="left" if name == "form" else "right")
        for row in comparisons:
            allowed = "" if row.tolerance is None else f"{row.tolerance:.1e}"
            verdict = "" if row.tolerance is None else ("ok" if row.holds else "[red]differs[/red]")
            table.add_row(
                row.form, f"{row.difference:.1e}", allowed, f"{100 * row.agreement:.2f} %", verdict
            )
        Console(highlight=False).print(table)
        return 0 if all(row.holds for row in comparisons) else 1
