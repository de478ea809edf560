"""Task cards: a specialised task as the K experts it uses in each layer and their gates.

    indices  [L, K] uint8   experts, largest gate first
    gates    [L, K] fp32    summing to 1 in each layer

A card is a safetensors file of a few hundred bytes. With its pool of experts it defines a LoRA; its
metadata name the pool and the edge model, and it is refused with any other.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json

import jax.numpy as jnp
import numpy as np

from lorax_gen.artifacts.generator import Generator
from lorax_gen.errors import UserError
from lorax_gen.files import AnyPath, to_path
from lorax_gen.method.generator import lora_from_gates
from lorax_gen.method.lora import Tree
from lorax_gen.models.model import Model
from lorax_gen.tensors import read_metadata, read_tensors, write_tensors

FORMAT = "lorax-gen card 2"
METADATA = ("pool", "edge", "prompt", "composition", "generator", "cloud", "tokenizer")
# Cards of version 1 do not name the models that made them: those fields are left empty.
FIRST_FORMAT, FIRST_METADATA = "lorax-gen card 1", METADATA[:4]


@dataclasses.dataclass(frozen=True, eq=False)
class TaskCard:
    """The result of specialising an edge model to a prompt.

    Attributes:
      pool: hash of the pool of experts; edge: hash of the edge model's parameters.
      prompt: SHA-256 of the prompt's text.
      generator, cloud, tokenizer: fingerprints of what made it; the tokenizer is the cloud's.
    """

    indices: np.ndarray
    gates: np.ndarray
    pool: str
    edge: str
    prompt: str
    composition: str
    generator: str = ""
    cloud: str = ""
    tokenizer: str = ""

    @property
    def top_k(self) -> int:
        """Experts kept in each layer (K)."""
        return self.indices.shape[1]

    def dense_gates(self, n_experts: int) -> np.ndarray:
        """Gates over all experts, `[L, N]` fp32, zero except for the K kept."""
        dense = np.zeros((len(self.indices), n_experts), np.float32)
        np.put_along_axis(dense, self.indices.astype(np.int64), self.gates, axis=1)
        return dense

    def lora(self, generator: Generator) -> Tree:
        """The card's LoRA tree `[L, ...]`, scale folded in.

        Raises UserError if the card was made with another pool or for another composition.
        """
        if self.pool != generator.pool_hash:
            raise UserError(
                f"this card was made with the pool {self.pool}, the given generator has "
                f"{generator.pool_hash}; use the card's own generator or specialise again"
            )
        if self.composition != generator.config.composition:
            raise UserError(
                f"this card is for the composition {self.composition}, the given generator's is "
                f"{generator.config.composition}; use the card's own generator"
            )
        gates = jnp.asarray(self.dense_gates(generator.config.n_experts))
        return lora_from_gates(generator.params["pool"], gates, generator.config)

    def check_edge(self, edge: Model) -> None:
        """Raises UserError if the card was made for another edge model."""
        if self.edge != edge.fingerprint:
            raise UserError(
                f"this card was made for the edge model {self.edge}, the given one is "
                f"{edge.fingerprint}; use that model or specialise again"
            )

    def merge(self, edge: Model, generator: Generator) -> Model:
        """The edge model with the card's LoRA merged into its kernels (eq. 1).

        Raises UserError if the card was made for another edge model or pool.
        """
        self.check_edge(edge)
        return edge.merged(self.lora(generator))


def make_card(
    gates: np.ndarray, prompt: str, cloud: Model, edge: Model, generator: Generator
) -> TaskCard:
    """A card of gates `[L, N]`: the experts with non-zero gates, largest gate first."""
    config = generator.config
    kept = config.top_k if config.strategy == "keep_top_k" else config.n_experts
    order = np.argsort(-gates, axis=1, kind="stable")[:, :kept]
    return TaskCard(
        indices=order.astype(np.uint8 if config.n_experts <= 256 else np.uint16),
        gates=np.take_along_axis(gates, order, axis=1).astype(np.float32),
        pool=generator.pool_hash,
        edge=edge.fingerprint,
        prompt=hashlib.sha256(prompt.encode()).hexdigest(),
        composition=config.composition,
        generator=generator.fingerprint,
        cloud=cloud.fingerprint,
        tokenizer=cloud.tokenizer_fingerprint,
    )


def save_card(path: str | AnyPath, card: TaskCard) -> None:
    """Writes a card to a new file, atomically."""
    metadata = {"format": FORMAT, **{name: getattr(card, name) for name in METADATA}}
    tensors = {"indices": card.indices, "gates": card.gates}
    # One entry, as safetensors writes several in random order: equal cards give equal files.
    write_tensors(to_path(path), tensors, {"card": json.dumps(metadata)})


def load_card(path: str | AnyPath) -> TaskCard:
    """Reads a card. Raises UserError if the file is missing, truncated or not a card."""
    path = to_path(path)
    metadata, tensors = json.loads(read_metadata(path).get("card", "{}")), read_tensors(path)
    names = {FORMAT: METADATA, FIRST_FORMAT: FIRST_METADATA}.get(metadata.pop("format", None))
    known = names is not None and set(metadata) == set(names)
    if not known or set(tensors) != {"indices", "gates"}:
        raise UserError(f"{path} is not a task card; make one with `lorax-gen specialize`")
    return TaskCard(**tensors, **metadata)
