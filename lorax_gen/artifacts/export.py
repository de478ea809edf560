"""Exports cards and adapters for other programs: merged model directories, PEFT, GGUF."""

from __future__ import annotations

import os
import textwrap
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

from lorax_gen.artifacts.card import TaskCard, load_card, save_card
from lorax_gen.artifacts.generator import Generator
from lorax_gen.artifacts.gguf import save_gguf_lora
from lorax_gen.artifacts.peft import CONFIG, load_adapter, save_adapter
from lorax_gen.errors import UserError
from lorax_gen.files import AnyPath, to_path
from lorax_gen.method.lora import Tree
from lorax_gen.models.huggingface import save_model
from lorax_gen.models.model import Model

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
    return {"name": model.name, "fingerprint": model.fingerprint}


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

    Raises UserError if `output` exists, or the artifact does not fit the models.
    """
    if format not in get_args(Format):
        raise UserError(f"format is {format!r}: choose one of {', '.join(get_args(Format))}")
    tree, provenance, card = lora_of(artifact, edge, generator)
    if format == "peft":
        save_adapter(output, tree, edge.config, base_model=edge.name, provenance=provenance)
    elif format == "gguf-lora":
        flat = {key: str(value) for key, value in provenance.items() if key != "edge"}
        flat |= {f"edge_{key}": value for key, value in describe(edge).items()}
        save_gguf_lora(output, tree, edge.config, name=to_path(output).stem, provenance=flat)
    else:

        def extra(directory: Path) -> None:
            (directory / "README.md").write_text(model_card(edge, provenance))
            if card is not None:
                save_card(directory / CARD, card)

        save_model(
            output,
            edge.merged(tree),
            provenance,
            dtype=dtype,
            max_shard_size=max_shard_size,
            extra=extra,
        )


def model_card(edge: Model, provenance: dict[str, Any]) -> str:
    """README.md of a merged directory, with the hub's metadata."""
    header = ["library_name: transformers", "pipeline_tag: text-generation", "tags: [lora-gen]"]
    if "/" in edge.name:
        header.append(f"base_model: {edge.name}")
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
    rows = {}
    for key, value in values.items():
        nested = isinstance(value, dict)
        rows |= flatten_rows(value, f"{key} ") if nested else {f"{prefix}{key}": value}
    return rows
