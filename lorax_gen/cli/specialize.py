"""`lorax-gen specialize`."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lorax_gen.cli.parse import UserPath
from lorax_gen.config import Size
from lorax_gen.prompts import read_prompt


@dataclasses.dataclass(frozen=True)
class Specialize:
    """Read a task's prompt once and write a task card: a few hundred bytes that, merged into the
    edge model, replace the prompt.

    Example: lorax-gen specialize "Look at the color of each thing : red=alpha , else=beta ."
    """

    prompt: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT")]
    """The system prompt, used as it is; `-` is the text of standard input, `@FILE` that of a file
    without its last line end, `@@` stands for an @ that begins a prompt, and `--` goes before a
    prompt that begins with -."""
    output: UserPath = Path("task.card.safetensors")
    """The card, a new file."""
    merged: UserPath | None = None
    """Also write the merged edge model into this new directory."""
    cloud: str | None = None
    """Cloud model: a directory or a hub name; default the one that the generator names."""
    edge: str | None = None
    """Edge model: a directory or a hub name; default the one that the generator names."""
    generator: str | None = None
    """Generator directory; default that of the shipped world."""
    allow_other_models: bool = False
    """Accept a cloud or an edge model of the same shape that the generator was not trained with."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the cloud model's parameters; bfloat16 on GPUs and TPUs."""
    cloud_int8: bool = False
    """Keep the cloud model's kernels in int8, half the bytes of bfloat16 (pip install
    'lorax-gen[int8]')."""
    fsdp: Size = 1
    """Devices that the cloud model's weights are sharded over, so that it need not fit on one."""
    tensor: Size = 1
    """Devices that heads and feed-forward width are sharded over."""

    def run(self) -> int:
        import lorax_gen
        from lorax_gen import files
        from lorax_gen.artifacts.lookup import find_system
        from lorax_gen.mesh.sharding import serving_mesh, tree_shardings

        files.must_be_new(self.output)
        if self.merged is not None:
            files.must_be_new(self.merged)
        prompt = read_prompt(self.prompt)
        mesh = serving_mesh(self.fsdp, self.tensor)
        shardings = functools.partial(tree_shardings, mesh=mesh) if mesh else None
        names = find_system(generator=self.generator, cloud=self.cloud, edge=self.edge)
        cloud = lorax_gen.load_model(
            names.needed("cloud"), self.dtype, in_int8=self.cloud_int8, shardings=shardings
        )
        edge = lorax_gen.load_model(names.needed("edge"))
        generator = lorax_gen.load_generator(
            names.needed("generator"), allow_other_models=self.allow_other_models
        )
        card = lorax_gen.specialize(prompt, cloud, edge, generator, mesh=mesh)
        lorax_gen.save_card(self.output, card)
        print(f"card: {self.output}")
        if self.merged is not None:
            lorax_gen.export(card, self.merged, "merged", edge, generator)
            print(f"merged edge model: {self.merged}")
        return 0
