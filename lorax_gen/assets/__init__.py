"""Models shipped with the package: the world's cloud and edge LM, and what was trained on them."""

from __future__ import annotations

from pathlib import Path

from lorax_gen import files

ASSETS = Path(__file__).parent


def resolve(name: str | files.AnyPath) -> files.AnyPath:
    """A directory as given, or that of a shipped model such as `world/cloud`."""
    path, shipped = files.to_path(name), ASSETS / str(name)
    return shipped if shipped.is_dir() and not path.exists() else path
