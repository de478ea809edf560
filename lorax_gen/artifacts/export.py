"""Exports cards and adapters for other programs: merged model directories, PEFT, GGUF.

What is exported says which frame its inputs go into (see `frames`), if not the plain one: a merged
model and an adapter in `provenance.json`, a GGUF adapter in its metadata.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import textwrap
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from lorax_gen import documents
from lorax_gen.artifacts.card import TaskCard, load_card, save_card
from lorax_gen.artifacts.checks import check_tree
from lorax_gen.artifacts.generator import Generator
from lorax_gen.artifacts.gguf import save_gguf_lora
from lorax_gen.artifacts.identity import fingerprint, named
from lorax_gen.artifacts.peft import CONFIG, load_adapter, save_adapter
from lorax_gen.errors import UserError
from lorax_gen.files import AnyPath, to_path
from lorax_gen.frames import PLAIN, SLOT, Frame, read_frame
from lorax_gen.hub import is_hub_name, public_name
from lorax_gen.method.lora import Tree
from lorax_gen.models.decoder import Params
from lorax_gen.models.huggingface import (
    PROVENANCE,
    save_model,
    stored_frame,
    stored_in_context,
)
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
    the card, if any. Provenance holds its frame, if it has one, and `in_context` where it was
    trained on questions after their prompts.

    Args:
      generator: the one that a card was made with; adapters need none.

    Raises UserError for any other artifact, or one made for another edge model or generator.
    """
    if isinstance(artifact, str | os.PathLike):
        if is_adapter(artifact):
            provenance: dict[str, Any] = {"edge": describe(edge), "adapter": to_path(artifact).name}
            if stored_in_context(to_path(artifact)):
                provenance["in_context"] = True
            tree, frame = load_adapter(artifact, edge.config), stored_frame(to_path(artifact))
            return tree, provenance | framed(edge.frame if frame == PLAIN else frame), None
        artifact = load_card(artifact)
    if not isinstance(artifact, TaskCard):
        return artifact, {"edge": describe(edge), **framed(edge.frame)}, None
    if generator is None:
        raise UserError("a card needs the generator that it was made with; pass it as generator")
    artifact.check_edge(edge)
    return artifact.lora(generator), card_provenance(artifact, edge), artifact


def check_adapted(adapter: str | AnyPath, edge: Model) -> None:
    """Raises UserError where the provenance of a PEFT adapter has another edge model."""
    path = to_path(adapter) / PROVENANCE
    made_for = documents.read_json(path).get("edge") if path.is_file() else None
    if not isinstance(made_for, dict) or not isinstance(made_for.get("fingerprint"), str):
        return
    if made_for["fingerprint"] != fingerprint(edge):
        wanted = named(str(made_for.get("name", "")), made_for["fingerprint"])
        raise UserError(
            f"this adapter was made for the edge model {wanted}, but what its name leads to is "
            f"{named(public_name(edge.name), edge.fingerprint)}; give the edge that is meant"
        )


def specialised(
    artifact: TaskCard | Tree | str | AnyPath, edge: Model, generator: Generator | None = None
) -> Model:
    """The edge with what `lora_of` takes merged into it, and its frame; see there."""
    tree, provenance, _ = lora_of(artifact, edge, generator)
    return dataclasses.replace(edge.merged(tree), frame=read_frame(provenance.get("frame", {})))


def framed(frame: Frame) -> dict[str, Any]:
    """The entry of provenance for a frame; none for the plain one."""
    return {} if frame == PLAIN else {"frame": frame.stored()}


def describe(model: Model) -> dict[str, str]:
    """The name and fingerprint of a model."""
    return {"name": public_name(model.name), "fingerprint": fingerprint(model)}


def converted(model: Model) -> dict[str, Any]:
    """The provenance of a model that is written in another format or dtype."""
    return {"made_with": made_with(), "converted_from": describe(model)}


def made_with() -> str:
    return f"lorax-gen {version('lorax-gen')}"


def card_provenance(card: TaskCard, edge: Model) -> dict[str, Any]:
    """The provenance written with what is exported from a card."""
    return {
        "made_with": made_with(),
        "edge": describe(edge),
        "pool": card.pool,
        "prompt_sha256": card.prompt,
        "composition": card.composition,
        "experts_per_layer": card.top_k,
        **framed(card.frame),
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
    name, frame = public_name(edge.name), read_frame(provenance.get("frame", {}))
    if format == "peft":
        save_adapter(output, tree, edge.config, base_model=name, provenance=provenance)
    elif format == "gguf-lora":
        flat = {key: str(value) for key, value in provenance.items() if key != "edge"}
        flat |= {f"edge_{key}": value for key, value in describe(edge).items()}
        if frame != PLAIN:
            flat["frame"] = json.dumps(frame.stored())
        save_gguf_lora(output, tree, edge.config, name=to_path(output).stem, provenance=flat)
    else:
        merged = dataclasses.replace(edge.merged(tree), frame=frame)

        def extra(directory: Path) -> None:
            (directory / "README.md").write_text(model_card(merged, provenance))
            if card is not None:
                save_card(directory / CARD, card)

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


def model_card(merged: Model, provenance: dict[str, Any]) -> str:
    """README.md of a merged directory, with the hub's metadata."""
    header = ["library_name: transformers", "pipeline_tag: text-generation", "tags: [lora-gen]"]
    if is_hub_name(name := public_name(merged.name)):
        header.append(f"base_model: {name}")
    made_from = {key: value for key, value in provenance.items() if key != "frame"}
    rows = [f"| {key} | {value} |" for key, value in flatten_rows(made_from).items()]
    parts = [
        "\n".join(["---", *header, "---"]),
        (IN_CONTEXT if provenance.get("in_context") else INTRO).strip(),
        how_to_ask(merged),
        "\n".join(["| made from | |", "|---|---|", *rows]),
    ]
    return "\n\n".join(parts) + "\n"


INTRO = """
# A specialised model

An edge model with a generated LoRA merged into its kernels (LoRA-Gen,
[arXiv 2506.11638](https://arxiv.org/abs/2506.11638)). It serves the task of one system prompt and
needs no prompt. Same architecture, size and tokenizer as the edge model, whose licence applies.
"""
IN_CONTEXT = """
# A fine-tuned model

An edge model with a LoRA merged into its kernels. It was trained on questions after their task's
prompt and needs that prompt before each input. Same architecture, size and tokenizer as
the edge model, whose licence applies.
"""


def how_to_ask(model: Model) -> str:
    """What a README says of the input: its frame, and how transformers continues it."""
    template = model.frame.template
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`*", template)))
    asked = "Give it the bare input."
    if not model.frame.is_bare:
        asked = (
            f"It was trained on inputs in this frame; put yours where `{SLOT}` is:\n\n"
            f"{fence}text\n{template}\n{fence}"
        )
    # Whichever gives the ids of training: a frame may begin with BOS itself.
    text, own = model.frame.wrap("apple"), model.tokenizer
    adds = own(text).input_ids == model.encode(text)
    options = "" if adds else ", add_special_tokens=False"
    code = f"""\
        from transformers import AutoModelForCausalLM, AutoTokenizer

        directory = "."  # where this file is
        model = AutoModelForCausalLM.from_pretrained(directory)
        tokenizer = AutoTokenizer.from_pretrained(directory)
        text = {template!r}.replace({SLOT!r}, "your input")
        ids = tokenizer(text, return_tensors="pt"{options}).input_ids
        answer = model.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :]
        print(tokenizer.decode(answer, skip_special_tokens=True))
        """
    return f"{asked}\n\n```python\n{textwrap.dedent(code)}```"


def flatten_rows(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, dict)
        rows |= flatten_rows(value, f"{key} ") if nested else {f"{prefix}{key}": value}
    return rows
