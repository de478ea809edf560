"""`lorax-gen export`."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

import tyro

from lorax_gen.cli.artifacts import load_for
from lorax_gen.cli.parse import UserPath


@dataclasses.dataclass(frozen=True)
class Export:
    """Convert a task card or a PEFT adapter to a format that other programs load.

    merged: a model directory for transformers, vLLM and others, without a LoRA. peft: an adapter
    directory for peft, vLLM and others. gguf-lora: an adapter file for llama.cpp's --lora.

    Example: lorax-gen export task.card.safetensors --format peft --output adapter
    """

    artifact: Annotated[UserPath, tyro.conf.Positional, tyro.conf.arg(metavar="ARTIFACT")]
    """A task card, or a PEFT adapter directory."""
    format: Literal["merged", "peft", "gguf-lora"]
    """Format to write."""
    output: UserPath
    """A new directory, or for gguf-lora a new file."""
    edge: str | None = None
    """Edge model that the artifact was made for; default the one that it names."""
    generator: str | None = None
    """Generator that the card was made with; default the one that it names."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Dtype of a merged model's tensors; merged in float32, then rounded once."""
    max_shard_size: str = "5GB"
    """Largest file of a merged model's tensors."""

    def run(self) -> int:
        import lorax_gen

        edge, generator = load_for(self.artifact, self.edge, self.generator)
        lorax_gen.export(
            self.artifact,
            self.output,
            self.format,
            edge,
            generator,
            dtype=self.dtype,
            max_shard_size=self.max_shard_size,
        )
        print(f"{self.format}: {self.output}")
        return 0
