"""Exports cards and adapters for other programs: merged model directories, PEFT, GGUF."""

from __future__ import annotations

import functools
import os
import textwrap
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from lorax_gen.artifacts.card import TaskCard, load_card, save_card
from lorax_gen.artifacts.checks import check_tree
from lorax_gen.artifacts.generator import Generator
from lorax_gen.artifacts.gguf import save_gguf_lora
from lorax_gen.artifacts.identity import fingerprint, public_name
from lorax_gen.artifacts.peft import CONFIG, load_adapter, save_adapter
from lorax_gen.errors import UserError
from lorax_gen.files import AnyPath, to_path
from lorax_gen.method.lora import Tree
from lorax_gen.models.decoder import Params
from lorax_gen.models.huggingface import save_model
from lorax_gen.models.model import Model
from lorax_gen.tensors import named_leaves

Format = Literal["merged", "peft", "gguf-lora"]
CARD = "task.card.safetensors"  # a merged directory keeps the card that it was made from


def is_adapter(artifact: str | AnyPath) -> bool:
    """Whether a path is a PEFT adapter directory."""
    return (to_path(artifact) / CONFIG).is_file()


def lora_of(
    artifact: TaskCard | Tree | str | AnyPath, edge: Model, generator: Generator | None = None
) -> tuple[Tree, dict[str, Any], TaskCard | None]:
    """The LoRA tree of a card, a tree, or the card or PEFT adapter at a path; its provenance; and
    the card, if any.

    Args:
      generator: the one that a card was made with; adapters need none.

    Raises UserError for any other artifact, or one made for another edge model or generator.
    """
    if isinstance(artifact, str | os.PathLike):
        if is_adapter(artifact):
            provenance = {"edge": describe(edge), "adapter": to_path(artifact).name}
            return load_adapter(artifact, edge.config), provenance, None
        artifact = load_card(artifact)
    if not isinstance(artifact, TaskCard):
        return artifact, {"edge": describe(edge)}, None
    if generator is None:
        raise UserError("a card needs the generator that it was made with; pass it as generator")
    artifact.check_edge(edge)
    return artifact.lora(generator), card_provenance(artifact, edge), artifact


def describe(model: Model) -> dict[str, str]:
    """The name and fingerprint of a model; of a path only the last component."""
    return {"name": public_name(model), "fingerprint": fingerprint(model)}


def card_provenance(card: TaskCard, edge: Model) -> dict[str, Any]:
    """The provenance written with what is exported from a card."""
    return {
        "made_with": f"lorax-gen {version('lorax-gen')}",
        "edge": describe(edge),
        "pool": card.pool,
        "prompt_sha256": card.prompt,
        "composition": card.composition,
        "experts_per_layer": card.top_k,
    }


def export(
    artifact: TaskCard | Tree | str | AnyPath,
    output: str | AnyPath,
    format: Format,
    edge: Model,
    generator: Generator | None = None,
    *,
    dtype: Any = None,
    max_shard_size: str = "5GB",
) -> None:
    """Writes a card or adapter as a merged model directory, a PEFT adapter or a GGUF adapter.

    Args:
      artifact, generator: see `lora_of`.
      dtype: of a merged model's tensors; None: that of the edge. Merging is in fp32, cast once if
        the edge is fp32.

    Raises UserError if `output` exists, the artifact does not fit the models, or what would be
    written is not finite, as in a dtype of a smaller range.
    """
    if format not in get_args(Format):
        raise UserError(f"format is {format!r}: choose one of {', '.join(get_args(Format))}")
    tree, provenance, card = lora_of(artifact, edge, generator)
    check_tree(tree)
    if format == "peft":
        save_adapter(output, tree, edge.config, base_model=public_name(edge), provenance=provenance)
    elif format == "gguf-lora":
        flat = {key: str(value) for key, value in provenance.items() if key != "edge"}
        flat |= {f"edge_{key}": value for key, value in describe(edge).items()}
        save_gguf_lora(output, tree, edge.config, name=to_path(output).stem, provenance=flat)
    else:

        def extra(directory: Path) -> None:
            (directory / "README.md").write_text(model_card(edge, provenance))
            if card is not None:
                save_card(directory / CARD, card)

        merged = edge.merged(tree)
        check_params(merged.params, dtype)
        save_model(
            output,
            merged,
            provenance,
            dtype=dtype,
            max_shard_size=max_shard_size,
            extra=extra,
        )


def check_params(params: Params, dtype: Any) -> None:
    """Raises UserError where a leaf of a merged model is not finite in the dtype to write."""
    for name, leaf in named_leaves(params):
        if not is_finite(leaf, leaf.dtype):
            raise UserError(
                f"the merged model would hold NaN or an infinity in {name}: the LoRA or the edge "
                "is too large; check both"
            )
        if dtype is not None and not is_finite(leaf, dtype):
            raise UserError(
                f"{name} of the merged model holds numbers that {jnp.dtype(dtype).name} cannot "
                "hold; choose dtype bfloat16 or float32"
            )


@functools.partial(jax.jit, static_argnames="dtype")
def is_finite(leaf: jax.Array, dtype: Any) -> jax.Array:
    """Whether all numbers of an array are finite in a dtype."""
    return jnp.isfinite(leaf.astype(dtype)).all()


def model_card(edge: Model, provenance: dict[str, Any]) -> str:
    """README.md of a merged directory, with the hub's metadata."""
    header = ["library_name: transformers", "pipeline_tag: text-generation", "tags: [lora-gen]"]
    if "/" in (name := public_name(edge)):
        header.append(f"base_model: {name}")
    rows = [f"| {key} | {value} |" for key, value in flatten_rows(provenance).items()]
    intro = textwrap.dedent(
        """\
        # A specialised model

        An edge model with a generated LoRA merged into its kernels (LoRA-Gen,
        [arXiv 2506.11638](https://arxiv.org/abs/2506.11638)). It serves the task of one system
        prompt and needs no prompt: give it the bare input. Same architecture, size and tokenizer
        as the edge model, whose licence applies.
        """
    )
    return "\n".join(["---", *header, "---", "", intro, "| made from | |", "|---|---|", *rows, ""])


def flatten_rows(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, dict)
        rows |= flatten_rows(value, f"{key} ") if nested else {f"{prefix}{key}": value}
    return rows
