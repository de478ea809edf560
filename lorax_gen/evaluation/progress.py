"""A tqdm bar that an evaluation resets for each of its parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def show(bar: Any, text: str, total: int, done: int = 0) -> None:
    """Begins a part of `total` items, of which `done` are there; without a bar nothing."""
    if bar is not None:
        bar.reset(total=total)
        bar.set_description(text)
        bar.update(done)


def ticker(bar: Any) -> Callable[[int], object]:
    """A function that counts finished items."""
    return (lambda count: None) if bar is None else bar.update
