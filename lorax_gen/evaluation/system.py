"""What is evaluated."""

from __future__ import annotations

import dataclasses

from lorax_gen.artifacts.generator import Generator
from lorax_gen.mesh import hosts
from lorax_gen.method.lora import Tree
from lorax_gen.models.model import Model


@dataclasses.dataclass(frozen=True, eq=False)
class System:
    """An edge model, and what specialises it where a method asks for that.

    Attributes:
      lora: of the baseline that fine-tunes one LoRA on all tasks.
      max_length: most tokens that the edge, or the cloud, reads; None: as many as it has positions.
    """

    edge: Model
    cloud: Model | None = None
    generator: Generator | None = None
    lora: Tree | None = None
    max_length: int | None = None

    @property
    def prompt_room(self) -> int:
        """Tokens of a prompt that the cloud has room for, before the meta tokens."""
        positions = self.cloud.config.max_position_embeddings
        limit = min(self.max_length or positions, positions)
        return limit - self.edge.config.num_hidden_layers


def identity(model: Model) -> str:
    """What tells a model from others: a hash of its weights, or, spread over hosts, its name."""
    return model.name if hosts.several() else model.fingerprint
