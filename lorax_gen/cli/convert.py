"""`lorax-gen convert`."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

import tyro

from lorax_gen.cli.parse import UserPath


@dataclasses.dataclass(frozen=True)
class Convert:
    """Write a model as a directory in Hugging Face's format: config, tensors, tokenizer.

    A GGUF file is dequantised: as float32 exactly, otherwise rounded.

    Example: lorax-gen convert model.gguf my-model
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A GGUF file (model.gguf, org/name::model.gguf on the hub), a directory or a hub name."""
    output: Annotated[UserPath, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """A new directory."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Dtype of the tensors."""
    max_shard_size: str = "5GB"
    """Largest file of tensors."""

    def run(self) -> int:
        import lorax_gen
        from lorax_gen import files
        from lorax_gen.artifacts.export import converted
        from lorax_gen.models.huggingface import save_model

        files.must_be_new(self.output)
        model = lorax_gen.load_model(self.model, self.dtype)
        save_model(self.output, model, converted(model), max_shard_size=self.max_shard_size)
        print(f"model: {self.output}")
        return 0
