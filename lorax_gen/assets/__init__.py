"""Models shipped with the package: the world's cloud and edge LM, their generator and LoRA."""

from __future__ import annotations

from pathlib import Path

from lorax_gen import files

ASSETS = Path(__file__).parent


def resolve(name: str | files.AnyPath) -> files.AnyPath:
    """The path as given, or if it does not exist that of a shipped model such as `world/cloud`."""
    path, shipped = files.to_path(name), ASSETS / str(name)
    return shipped if shipped.is_dir() and not path.exists() else path
