"""Task cards: a specialised task as the K experts it uses in each layer and their gates.

    indices  [L, K] uint8   experts, largest gate first, of the edge's last L layers
    gates    [L, K] fp32    summing to 1 in each layer

A card is a safetensors file of a few hundred bytes. With its pool of experts it defines a LoRA; its
metadata name the pool and the edge model, and it is refused with any other. They hold the frame of
its inputs (see `frames`), where it is not plain, and the names of generator, cloud and edge. A
digest over all of it finds any damage to the file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Annotated, Any, Literal

import jax.numpy as jnp
import msgspec
import numpy as np
from msgspec import Meta, Struct

from lorax_gen import documents
from lorax_gen.artifacts.checks import read_arrays
from lorax_gen.artifacts.generator import Generator
from lorax_gen.artifacts.identity import UNNAMED, Hash, Names, fingerprint, named
from lorax_gen.errors import UserError
from lorax_gen.files import AnyPath, to_path
from lorax_gen.frames import PLAIN, Frame, read_frame
from lorax_gen.hub import public_name
from lorax_gen.method.generator import GeneratorConfig, lora_from_gates
from lorax_gen.method.lora import Tree
from lorax_gen.models.model import Model
from lorax_gen.tensors import read_metadata, tree_hash, write_tensors

HASHES = ("pool", "edge", "prompt", "composition", "generator", "cloud", "tokenizer")
# Format -> its metadata. Cards of version 1 do not say which models made them: those fields are
# left empty. Version 2 has no digest, version 3 neither frame nor names.
FORMAT = "lorax-gen card 4"
FORMATS = {
    "lorax-gen card 1": HASHES[:4],
    "lorax-gen card 2": HASHES,
    "lorax-gen card 3": (*HASHES, "digest"),
    FORMAT: (*HASHES, "digest"),
}
OPTIONAL = ("frame", "names")  # of the latest format

MaybeHash = Annotated[str, Meta(pattern=r"^([0-9a-f]{16})?\Z")]


class _Hashes(Struct):
    """The types of a card's metadata."""

    pool: Hash
    edge: Hash
    prompt: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
    composition: Literal["factors", "products"]
    generator: MaybeHash
    cloud: MaybeHash
    tokenizer: MaybeHash


@dataclasses.dataclass(frozen=True, eq=False)
class TaskCard:
    """The result of specialising an edge model to a prompt.

    Attributes:
      pool: hash of the pool of experts; edge: hash of the edge model's parameters.
      prompt: SHA-256 of the prompt's text.
      generator, cloud, tokenizer: fingerprints of what made it; the tokenizer is the cloud's.
      frame: of the inputs that it is for.
      names: of generator, cloud and edge, as they were given.

    Raises UserError where a field is not as described above.
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
    frame: Frame = PLAIN
    names: Names = UNNAMED

    def __post_init__(self):
        check_gates(self.indices, self.gates)
        for value, kind in ((self.frame, Frame), (self.names, Names)):
            if not isinstance(value, kind):
                raise UserError(f"expected a {kind.__name__}, not {value!r}")
        documents.convert(self.metadata(), _Hashes)

    def metadata(self) -> dict[str, Any]:
        """What it holds besides its arrays, as plain values; no frame where it is plain."""
        found = {name: getattr(self, name) for name in HASHES}
        more = {"frame": self.frame.stored(), "names": msgspec.to_builtins(self.names)}
        return found | {name: value for name, value in more.items() if value}

    @property
    def digest(self) -> str:
        """Identifies the card's content."""
        names = json.dumps(self.metadata(), sort_keys=True).encode()
        arrays = {"indices": self.indices, "gates": self.gates}
        return tree_hash(arrays | {"names": np.frombuffer(names, np.uint8)})

    @property
    def top_k(self) -> int:
        """Experts kept in each layer (K)."""
        return self.indices.shape[1]

    def dense_gates(self, n_experts: int) -> np.ndarray:
        """Gates over all experts, `[L, N]` fp32, zero except for the K kept.

        Raises UserError if the card has an expert beyond N.
        """
        if self.indices.max() >= n_experts:
            raise UserError(
                f"this card has expert {self.indices.max()}, but the pool has {n_experts} experts; "
                "use the card's own generator"
            )
        dense = np.zeros((len(self.indices), n_experts), np.float32)
        np.put_along_axis(dense, self.indices.astype(np.int64), self.gates, axis=1)
        return dense

    def lora(self, generator: Generator) -> Tree:
        """The card's LoRA tree `[L, ...]`, scale folded in.

        Raises UserError if the card was made with another pool, for another composition, or for
        other numbers of layers or experts.
        """
        if self.pool != generator.pool_hash:
            raise UserError(
                f"this card was made with the pool {named(self.names.generator, self.pool)}, the "
                f"given generator has {named(generator.name, generator.pool_hash)}; use the card's "
                "own generator or specialise again"
            )
        if self.composition != generator.config.composition:
            raise UserError(
                f"this card is for the composition {self.composition}, the given generator's is "
                f"{generator.config.composition}; use the card's own generator"
            )
        layers = generator.config.layers(generator.metadata["shapes"]["edge"]["layers"])
        wanted = layers, kept_experts(generator.config)
        if self.indices.shape != wanted:
            raise UserError(
                f"this card has {self.indices.shape[0]} layers of {self.top_k} experts, the given "
                f"generator {wanted[0]} of {wanted[1]}; use the card's own generator"
            )
        if self.indices.dtype != index_dtype(generator.config):
            raise UserError(
                f"this card has indices in {self.indices.dtype}, but a card of this generator has "
                f"{np.dtype(index_dtype(generator.config))}; specialise again"
            )
        gates = jnp.asarray(self.dense_gates(generator.config.n_experts))
        return lora_from_gates(generator.params["pool"], gates, generator.config)

    def check_edge(self, edge: Model) -> None:
        """Raises UserError if the card was made for another edge model."""
        if self.edge != fingerprint(edge):
            given = named(public_name(edge.name), edge.fingerprint)
            raise UserError(
                f"this card was made for the edge model {named(self.names.edge, self.edge)}, the "
                f"given one is {given}; use that model or specialise again"
            )

    def merge(self, edge: Model, generator: Generator) -> Model:
        """The edge model with the card's LoRA merged into its kernels (eq. 1), and its frame.

        Raises UserError if the card was made for another edge model or pool.
        """
        self.check_edge(edge)
        return dataclasses.replace(edge.merged(self.lora(generator)), frame=self.frame)


def check_gates(indices: Any, gates: Any) -> None:
    """Raises UserError where arrays are not the experts and gates of a card."""
    for name, array, dtypes in (
        ("indices", indices, ("uint8", "uint16")),
        ("gates", gates, ("float32",)),
    ):
        if not isinstance(array, np.ndarray) or array.dtype.name not in dtypes:
            kind = getattr(array, "dtype", type(array).__name__)
            raise UserError(f"{name} are {kind}; expected an array of {' or '.join(dtypes)}")
    if indices.ndim != 2 or not indices.size or gates.shape != indices.shape:
        raise UserError(
            f"indices are {indices.shape} and gates {gates.shape}; expected [layers, experts] twice"
        )
    if (np.diff(np.sort(indices, axis=1).astype(np.int32), axis=1) == 0).any():
        raise UserError("indices have an expert twice in a layer")
    if not (np.isfinite(gates) & (gates > 0)).all():
        raise UserError("gates must be positive and finite")
    if (np.diff(gates, axis=1) > 0).any():
        raise UserError("gates must be in order, the largest of each layer first")
    # The rounding error of a softmax and its sum.
    tolerance = (16 + gates.shape[1]) * np.finfo(np.float32).eps
    if (np.abs(gates.sum(axis=1, dtype=np.float64) - 1) > tolerance).any():
        raise UserError("gates must sum to 1 in each layer")


def kept_experts(config: GeneratorConfig) -> int:
    """Experts that a card keeps in each layer (K)."""
    return config.top_k if config.strategy == "keep_top_k" else config.n_experts


def index_dtype(config: GeneratorConfig) -> type[np.unsignedinteger]:
    """The dtype of a card's indices."""
    return np.uint8 if config.n_experts <= 256 else np.uint16


def make_card(
    gates: np.ndarray, prompt: str, cloud: Model, edge: Model, generator: Generator
) -> TaskCard:
    """A card of gates `[L, N]`: the experts with non-zero gates, largest gate first.

    Raises UserError where the gates are not finite or do not sum to 1.
    """
    config = generator.config
    order = np.argsort(-gates, axis=1, kind="stable")[:, : kept_experts(config)]
    kept = np.take_along_axis(gates, order, axis=1).astype(np.float32)
    if config.strategy == "gumbel":  # dense gates may underflow
        kept = np.maximum(kept, np.finfo(np.float32).tiny)
    return TaskCard(
        indices=order.astype(index_dtype(config)),
        gates=kept,
        pool=generator.pool_hash,
        edge=fingerprint(edge),
        prompt=hashlib.sha256(prompt.encode()).hexdigest(),
        composition=config.composition,
        generator=generator.fingerprint,
        cloud=fingerprint(cloud),
        tokenizer=cloud.tokenizer_fingerprint,
        frame=generator.frame,
        names=Names(generator.name, public_name(cloud.name), public_name(edge.name)),
    )


def save_card(path: str | AnyPath, card: TaskCard) -> None:
    """Writes a card to a new file, atomically."""
    metadata = {"format": FORMAT, **card.metadata(), "digest": card.digest}
    tensors = {"indices": card.indices, "gates": card.gates}
    # One entry, as safetensors writes several in random order: equal cards give equal files.
    write_tensors(to_path(path), tensors, {"card": json.dumps(metadata)})


def load_card(path: str | AnyPath) -> TaskCard:
    """Reads a card. Raises UserError if the file is missing, damaged or not a card."""
    path = to_path(path)
    entries = read_metadata(path)
    metadata = documents.parse_json(entries.get("card", "{}"), f"{path}, its metadata")
    kind = metadata.pop("format", None) if isinstance(metadata, dict) else None
    names = FORMATS.get(kind) if isinstance(kind, str) else None
    optional = set(OPTIONAL) if kind == FORMAT else set()
    if names is None or entries.keys() != {"card"} or metadata.keys() - optional != set(names):
        raise UserError(f"{path} is not a task card; make one with `lorax-gen specialize`")
    tensors = read_arrays(path, ("U8", "U16", "F32"))
    if tensors.keys() != {"indices", "gates"}:
        raise UserError(f"{path} is not a task card; make one with `lorax-gen specialize`")
    digest = metadata.pop("digest", None)
    try:
        if "frame" in metadata:
            metadata["frame"] = read_frame(metadata["frame"], "frame")
        if "names" in metadata:
            metadata["names"] = documents.convert(metadata["names"], Names, "names")
        card = TaskCard(tensors["indices"], tensors["gates"], **metadata)
        if "digest" in names and digest != card.digest:
            raise UserError(f"its content has the digest {card.digest}, not {digest}")
    except UserError as error:
        raise UserError(f"{path} is damaged: {error}; get it or specialise again") from None
    return card
