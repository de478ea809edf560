"""Checks that all forms of an artifact agree: gates, LoRA, merged, written and read again.

The forms are compared by their logits on the same random tokens. They compute one function in
different orders, so they differ by rounding errors only, of the coarsest dtype among them.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_gen.artifacts.card import TaskCard
from lorax_gen.artifacts.export import CARD, export, lora_of
from lorax_gen.artifacts.generator import Generator
from lorax_gen.artifacts.peft import load_adapter
from lorax_gen.errors import UserError
from lorax_gen.files import AnyPath, to_path
from lorax_gen.method.generator import lora_from_gates
from lorax_gen.method.lora import Tree
from lorax_gen.models import decoder
from lorax_gen.models.adapter import Adapter
from lorax_gen.models.huggingface import load_model
from lorax_gen.models.model import Model

# Largest difference of logits, relative to the largest logit: some tens of rounding errors.
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 8e-2}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One form compared with the unmerged LoRA."""

    form: str
    difference: float  # of logits, the largest
    agreement: float  # share of positions with the same argmax
    tolerance: float | None  # of the difference; None: not checked

    @property
    def holds(self) -> bool:
        return self.tolerance is None or self.difference <= self.tolerance


def verify(
    artifact: TaskCard | Tree | str | AnyPath,
    edge: Model,
    generator: Generator | None = None,
    *,
    rows: int = 4,
    length: int = 64,
    seed: int = 0,
) -> list[Comparison]:
    """Compares the forms of a card or an adapter, or of a merged directory that contains its card.

    The first comparison is the edge model without the artifact, for scale.

    Args:
      artifact: the object or the path of a card or an adapter, or such a directory.
      generator: the one that a card was made with; adapters need none.
      rows, length, seed: of the random tokens `[rows, length]`.

    Raises UserError for any other artifact, or one made for other models.
    """
    merged_dir = None
    if isinstance(artifact, str | os.PathLike) and (found := card_in(artifact)) != artifact:
        merged_dir, artifact = artifact, found
    lora, _, card = lora_of(artifact, edge, generator)

    length = min(length, edge.config.max_position_embeddings)
    rng = np.random.default_rng(seed)
    tokens = jnp.asarray(rng.integers(0, edge.config.vocab_size, (rows, length)), jnp.int32)
    compute = jax.jit(run, static_argnums=1)

    def logits(model: Model, adapter: Adapter | None = None) -> np.ndarray:
        return np.asarray(compute(model.params, model.config, tokens, adapter))

    own = edge.params["embed"].dtype
    reference = logits(edge, Adapter(shared=lora))
    forms = {"edge without it": (logits(edge), None)}
    if card is not None and generator is not None:
        by_row = Adapter(rows=per_row(card, generator, rows))
        forms["gates, one row each"] = logits(edge, by_row), own
    forms["merged"] = logits(edge.merged(lora)), own
    if merged_dir is None:
        with tempfile.TemporaryDirectory() as folder:
            for format in ("merged", "peft"):
                export(card or lora, Path(folder) / format, format, edge, generator)
            forms["merged, written and read"] = logits(load_model(f"{folder}/merged", None)), own
            tree = load_adapter(Path(folder) / "peft", edge.config)
            forms["adapter, written and read"] = logits(edge, Adapter(shared=tree)), own
    else:
        loaded = load_model(merged_dir, None)
        if loaded.config != edge.config:
            raise UserError(
                f"{merged_dir} has another shape than the edge model {edge.name}; pass the edge "
                "model that it was merged from"
            )
        stored = loaded.params["embed"].dtype
        params = jax.tree.map(lambda leaf: leaf.astype(own), loaded.params)
        forms["the directory"] = logits(dataclasses.replace(loaded, params=params)), stored

    scale = float(np.abs(reference).max())
    return [
        Comparison(
            form,
            float(np.abs(value - reference).max()),
            float((value.argmax(-1) == reference.argmax(-1)).mean()),
            None if dtype is None else scale * max(TOLERANCE[d.name] for d in (own, dtype)),
        )
        for form, (value, dtype) in forms.items()
    ]


def card_in(artifact: str | AnyPath) -> str | AnyPath:
    """The card in a merged directory; anything else as it is.

    Raises UserError for a model directory without a card.
    """
    directory = to_path(artifact)
    if not (directory / "config.json").is_file():
        return artifact
    if not (directory / CARD).is_file():
        raise UserError(
            f"{artifact} holds no {CARD} to compare it with; verify takes a card, an adapter or a "
            "directory that `lorax-gen export` merged from a card"
        )
    return directory / CARD


def run(params: dict, config: Any, tokens: jax.Array, adapter: Any) -> jax.Array:
    hidden = decoder.hidden_states(params, config, tokens, adapter=adapter)
    return decoder.logits(params, config, hidden)


def per_row(card: TaskCard, generator: Generator, rows: int) -> Any:
    """The card as one LoRA per row, from gates `[B, L, N]`, as in a batch of mixed tasks."""
    gates = jnp.asarray(card.dense_gates(generator.config.n_experts))
    gates = jnp.broadcast_to(gates, (rows, *gates.shape))
    return lora_from_gates(generator.params["pool"], gates, generator.config)
