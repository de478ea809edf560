"""Where training data comes from, as a config: today the embedded world."""

from __future__ import annotations

import dataclasses

from lorax_gen.data.world import FAMILIES, World, make_world
from lorax_gen.errors import UserError


@dataclasses.dataclass(frozen=True)
class WorldConfig:
    """The embedded world and the shape of the batches drawn from it."""

    seed: int = 0
    """Which world; the shipped models know world 0."""
    families: tuple[str, ...] = FAMILIES
    """Families of tasks to train and evaluate on."""
    prompt_length: int = 32
    """Longest system prompt, in tokens of the cloud model."""
    question_length: int = 5
    """Longest question with its answer, in tokens of the edge model."""

    def __post_init__(self):
        for family in self.families:
            if family not in FAMILIES:
                raise UserError(f"unknown family {family!r}; the world has {', '.join(FAMILIES)}")

    def world(self) -> World:
        return make_world(self.seed)
