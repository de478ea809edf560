"""A released generator: a directory of plain safetensors and JSON.

generator.safetensors   meta tokens, cloud LoRA, router, pool, BatchNorm statistics
config.json             GeneratorConfig, shapes, training config and results
metrics.jsonl           the training metrics, if a run of this package trained it
"""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_gen import config as configs
from lorax_gen import documents, files
from lorax_gen.errors import UserError
from lorax_gen.files import AnyPath
from lorax_gen.hub import find_directory
from lorax_gen.method.generator import GeneratorConfig
from lorax_gen.models.decoder import DecoderConfig
from lorax_gen.system import GeneratorSpec, model_shape
from lorax_gen.tensors import flatten, read_tensors, tree_hash, unflatten, write_tensors

FORMAT = "lorax-gen generator 1"


@dataclasses.dataclass(frozen=True, eq=False)
class Generator:
    """A trained generator.

    Attributes:
      metadata: `shapes` of the two models (see `make_generator`), and what training adds.
    """

    config: GeneratorConfig
    params: dict[str, Any]
    stats: dict[str, Any]
    metadata: dict[str, Any]

    def spec(self, cloud: DecoderConfig, edge: DecoderConfig) -> GeneratorSpec:
        """The static system with its two models.

        Raises UserError if a model does not have the shape that the generator was trained with.
        """
        for role, model in (("cloud", cloud), ("edge", edge)):
            wanted, found = self.metadata["shapes"][role], model_shape(model)
            if wanted != found:
                raise UserError(
                    f"the generator was trained with the {role} model of {wanted}, but the given "
                    f"one has {found}; pass the {role} model that it was trained with"
                )
        return GeneratorSpec(self.config, cloud, edge)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the parameters, BatchNorm statistics and config."""
        config = json.dumps(configs.to_dict(self.config), sort_keys=True)
        tree = {"params": self.params, "stats": self.stats}
        return tree_hash(tree | {"config": np.frombuffer(config.encode(), np.uint8)})

    @functools.cached_property
    def pool_hash(self) -> str:
        """Hash of the pool of experts and its scale alpha."""
        return tree_hash({**self.params["pool"], "alpha": np.float32(self.config.alpha)})


def make_generator(
    config: GeneratorConfig,
    params: dict[str, Any],
    stats: dict[str, Any],
    *,
    cloud: DecoderConfig,
    edge: DecoderConfig,
) -> Generator:
    """A generator of trained parameters, for the two models that it was trained with."""
    shapes = {"cloud": model_shape(cloud), "edge": model_shape(edge)}
    return Generator(config, params, stats, {"shapes": shapes})


def save_generator(
    directory: str | AnyPath, generator: Generator, provenance: dict[str, Any] | None = None
) -> None:
    """Writes a generator to a new directory.

    Args:
      provenance: added to the generator's metadata in its `config.json`.
    """
    with files.new_directory(directory) as partial:
        tensors = flatten({"params": generator.params, "stats": generator.stats})
        write_tensors(partial / "generator.safetensors", tensors)
        files.write_json(
            partial / "config.json",
            {
                "format": FORMAT,
                "generator": configs.to_dict(generator.config),
                **generator.metadata,
                **(provenance or {}),
            },
        )


def load_generator(directory: str | AnyPath) -> Generator:
    """Reads a generator directory.

    Raises UserError if a file is missing, truncated or of another kind.
    """
    directory = find_directory(directory, "generator")
    metadata = documents.read_json(directory / "config.json")
    if metadata.get("format") != FORMAT:
        raise UserError(
            f"{directory} is not a generator (format {metadata.get('format')!r}, expected "
            f"{FORMAT!r}); give the directory that training released"
        )
    config = configs.from_dict(
        GeneratorConfig, metadata.pop("generator"), str(directory / "config.json")
    )
    tree = unflatten(read_tensors(directory / "generator.safetensors"))
    for part in ("meta_tokens", "cloud_lora", "router", "pool"):
        if part not in tree.get("params", {}):
            raise UserError(f"{directory}/generator.safetensors lacks {part}; get it again")
    tree = jax.tree.map(jnp.asarray, tree)
    return Generator(config, tree["params"], tree.get("stats", {}), metadata)
