"""Models shipped with the package: the world's cloud and edge LM, and what was trained on them."""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).parent


def resolve(name: str | Path) -> Path:
    """A directory as given, or that of a shipped model such as `world/cloud`."""
    shipped = ASSETS / name
    return shipped if not Path(name).exists() and shipped.is_dir() else Path(name)
