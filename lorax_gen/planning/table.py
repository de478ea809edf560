"""A plan as tables on the terminal."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from lorax_gen.planning.plan import GIB


def print_plan(report: dict[str, Any]) -> None:
    """The report as tables on the terminal, and the verdict."""
    console = Console(highlight=False)

    def gib(count: float) -> str:
        return f"{count / GIB:.2f}"

    def parameters(count: int) -> str:
        if count < 1e6:
            return f"{count / 1e3:.1f} K"
        return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"

    def listed(values: dict[str, Any]) -> str:
        return ", ".join(f"{name} {value}" for name, value in values.items())

    def table(title: str, *columns: str) -> Table:
        made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        for i, column in enumerate(columns):
            made.add_column(column, justify="right" if i else "left")
        return made

    needs, held = report["memory"], report["arguments"]
    models = [
        f"{role} {model['name']} ({parameters(model['parameters'])})"
        for role, model in report["models"].items()
    ]
    kernels = ", ".join(
        f"{role} {each['kernel']}" + (f" ({each['reason']})" if each["reason"] else "")
        for role, each in report["attention"].items()
    )
    sizes = {name: " x ".join(map(str, shape)) for name, shape in report["batch"].items()}
    lines = [
        ", ".join([*models, f"{parameters(report['trained'])} trained"]),
        f"{report['devices']} x {report['chip']['kind']}: {listed(report['mesh'])}",
        f"batch: {listed(sizes)}",
        listed({name: value for name, value in report["settings"].items() if value}),
        kernels and f"kernels: {kernels}",
    ]
    console.print("\n".join(filter(None, lines)) + "\n")
    how = {
        "compiled": "compiled for it",
        "refused": "XLA refused to compile it",
        "estimated": "estimated, not compiled",
    }
    rows = table(f"memory per device ({how[needs['method']]})", "", "GiB")
    rows.add_row("arguments", gib(needs["arguments"]))
    for name, count in held.items():
        if name != "total":
            rows.add_row(f"  {name}", gib(count))
    if "outputs" in needs:
        rows.add_row("outputs", gib(needs["outputs"]))
        rows.add_row("  aliased to arguments", f"-{gib(needs['aliased'])}")
    if "temporaries" in needs:
        rows.add_row("temporaries", gib(needs["temporaries"]))
    for name, count in needs.get("parts", {}).items():
        rows.add_row(f"  {name}", gib(count))
    if "program" in needs:
        rows.add_row("program", gib(needs["program"]))
    rows.add_row("needed", gib(needs["needed"]), style="bold")
    if "peak" in needs:
        rows.add_row("  peak in use", gib(needs["peak"]))
    rows.add_row(f"usable of {report['chip']['capacity']:g} GB", gib(needs["usable"]))
    console.print(rows)

    if report["collectives"] is not None:
        estimated = " (estimated)" if needs["method"] == "estimated" else ""
        sends = table(f"collectives of a step{estimated}", "", "count", "GiB sent per device")
        for kind, each in report["collectives"].items():
            sends.add_row(kind, f"{each['count']:,}", gib(each["bytes"]))
        console.print(sends)
    elif needs["method"] == "compiled":
        console.print(
            "collectives are not known: this jaxlib cannot read the programs of this libtpu; "
            "pip install 'lorax-gen\\[plan]' installs the one that fits\n"
        )

    time = report["time"]
    work = table("work of a step", "", "")
    work.add_row("FLOPs", f"{report['flops']['useful']:.3e}")
    work.add_row("  with recomputation", f"{report['flops']['executed']:.3e}")
    work.add_row(
        f"seconds at {100 * time['utilisation']:g} % of {time['peak_flops'] / 1e12:,g} TFLOP/s",
        f"{time['computing']:.3g}",
    )
    if time["sending"] is not None:
        work.add_row("seconds on the links, at their peak", f"{time['sending']:.3g}")
    work.add_row("seconds, overlapped", f"{time['step']:.3g}", style="bold")
    work.add_row("MFU then", f"{100 * time['mfu']:.1f} %")
    console.print(work)

    share = f"{gib(needs['needed'])} of {gib(needs['usable'])} GiB, {100 * needs['share']:.0f} %"
    if report["fits"]:
        estimated = ", by an estimate" if needs["method"] == "estimated" else ""
        console.print(f"[green]fits[/green]: {share}{estimated}")
        if (
            "gpu" in report["topology"]
            and needs["needed"] > 0.75 * report["chip"]["capacity"] * GIB
        ):
            console.print("jax takes 75 % of a GPU; set XLA_PYTHON_CLIENT_MEM_FRACTION=0.92")
    else:
        console.print(f"[red]does not fit[/red]: {share}")
        for line in report["advice"]:
            console.print(f"  try {line}")
