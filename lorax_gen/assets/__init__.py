"""Shipped with the package: the world's cloud and edge LM, their generator and LoRA, and tasks."""

from __future__ import annotations

from pathlib import Path

from lorax_gen import files

ASSETS = Path(__file__).parent


def resolve(name: str | files.AnyPath) -> files.AnyPath:
    """The path as given, or if it does not exist that of what is shipped: a model such as
    `world/cloud`, or the tasks `world/tasks.jsonl`."""
    path, shipped = files.to_path(name), ASSETS / str(name)
    return shipped if shipped.exists() and not path.exists() else path
