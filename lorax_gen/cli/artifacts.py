"""Helpers of the commands on artifacts."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorax_gen.artifacts.generator import Generator
    from lorax_gen.files import AnyPath


def generator_of(artifact: AnyPath, directory: str) -> Generator | None:
    """The generator that a card was made with; None for a PEFT adapter, which needs none."""
    from lorax_gen.artifacts.export import is_adapter
    from lorax_gen.artifacts.generator import load_generator

    return None if is_adapter(artifact) else load_generator(directory)
