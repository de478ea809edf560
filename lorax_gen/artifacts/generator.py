"""A released generator: a directory of plain safetensors and JSON.

generator.safetensors   meta tokens, cloud LoRA, router, pool, BatchNorm statistics
config.json             GeneratorConfig, shapes and identities of the two models, fingerprint,
                        frame, a digest of these; training config and results
metrics.jsonl           the training metrics, if a run of this package trained it
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from msgspec import Meta, Struct

from lorax_gen import config as configs
from lorax_gen import documents, files
from lorax_gen.artifacts.checks import read_arrays
from lorax_gen.artifacts.identity import Hash, Identities, check_same, identify
from lorax_gen.errors import UserError
from lorax_gen.files import AnyPath
from lorax_gen.frames import PLAIN, Frame, read_frame
from lorax_gen.hub import find_directory, public_name
from lorax_gen.method.generator import GeneratorConfig, init_generator
from lorax_gen.models.decoder import DecoderConfig
from lorax_gen.models.model import Model
from lorax_gen.system import GeneratorSpec, model_shape
from lorax_gen.tensors import flatten, named_leaves, tree_hash, unflatten, write_tensors

FORMAT = "lorax-gen generator 2"
FIRST_FORMAT = "lorax-gen generator 1"  # has no fingerprint, models and digest

Size = Annotated[int, Meta(ge=1, le=2**24)]


class _Shape(Struct, forbid_unknown_fields=True):
    """See `system.model_shape`."""

    layers: Size
    kernels: dict[str, tuple[Size, Size]]


class _Shapes(Struct, forbid_unknown_fields=True):
    cloud: _Shape
    edge: _Shape


class _Document(Struct):
    """What is used of config.json; the rest is provenance."""

    format: str
    generator: dict[str, Any]
    shapes: _Shapes
    models: Identities | None = None
    frame: dict[str, Any] = {}
    fingerprint: Hash | None = None
    digest: Hash | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Generator:
    """A trained generator.

    Attributes:
      metadata: `shapes` of the two models, their identities in `models` where they are known (see
        `make_generator`), and what training adds.
      name: that it was loaded by, see `hub.public_name`; cards keep it.
    """

    config: GeneratorConfig
    params: dict[str, Any]
    stats: dict[str, Any]
    metadata: dict[str, Any]
    name: str = ""

    def spec(self, cloud: Model, edge: Model) -> GeneratorSpec:
        """The static system with its two models.

        Raises UserError if a model is not the one that the generator was trained with: by its
        shape, and where the generator knows them by its parameters, the cloud also by its tokenizer
        and BOS.
        """
        models = self.metadata.get("models")
        for article, role, model in (("a", "cloud", cloud), ("an", "edge", edge)):
            wanted, found = self.metadata["shapes"][role], model_shape(model.config)
            if wanted != found:
                raise UserError(
                    f"the generator was trained with {article} {role} model of "
                    f"{_difference(wanted, found)}; pass the {role} model that it was trained with"
                )
            if models is not None:
                trained = documents.convert(models, Identities)
                given = identify(model, reads=role == "cloud")
                check_same(role, getattr(trained, role), given, WAY_OUT)
        return GeneratorSpec(self.config, cloud.config, edge.config)

    @property
    def frame(self) -> Frame:
        """How the edge reads an input."""
        return read_frame(self.metadata.get("frame", {}))

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the parameters, BatchNorm statistics and config."""
        config = json.dumps(self.config.stored(), sort_keys=True)
        tree = {"params": self.params, "stats": self.stats}
        return tree_hash(tree | {"config": np.frombuffer(config.encode(), np.uint8)})

    @functools.cached_property
    def pool_hash(self) -> str:
        """Hash of the pool of experts and its scale alpha."""
        return tree_hash({**self.params["pool"], "alpha": np.float32(self.config.alpha)})


def _difference(wanted: dict[str, Any], found: dict[str, Any]) -> str:
    """What of two shapes of a model differs."""
    if wanted["layers"] != found["layers"]:
        return f"{wanted['layers']} layers, the given one has {found['layers']}"
    ours, theirs = wanted["kernels"], found["kernels"]
    name = next(name for name in [*ours, *theirs] if ours.get(name) != theirs.get(name))
    return f"{name} {ours.get(name)}, the given one has {theirs.get(name)}"


WAY_OUT = "load the generator with allow_other_models=True (--allow-other-models) if it is meant"


def make_generator(
    config: GeneratorConfig,
    params: dict[str, Any],
    stats: dict[str, Any],
    *,
    cloud: DecoderConfig,
    edge: DecoderConfig,
    models: Identities | None = None,
    frame: Frame = PLAIN,
) -> Generator:
    """A generator of trained parameters, for the two models that it was trained with.

    Args:
      models: which models they are, from `identity.identify`; None: any of these shapes.
      frame: how the edge reads an input.
    """
    metadata = {"shapes": {"cloud": model_shape(cloud), "edge": model_shape(edge)}}
    if models is not None:
        metadata["models"] = msgspec.to_builtins(models)
    if frame != PLAIN:  # what is not stored is plain, as in generators that know no frames
        metadata["frame"] = frame.stored()
    return Generator(config, params, stats, metadata)


def save_generator(
    directory: str | AnyPath, generator: Generator, provenance: dict[str, Any] | None = None
) -> None:
    """Writes a generator to a new directory.

    Args:
      provenance: added to the generator's metadata in its `config.json`.

    Raises UserError if `directory` exists, or the arrays are not those of the config or not finite.
    """
    with files.new_directory(directory) as partial:
        tensors = flatten({"params": generator.params, "stats": generator.stats})
        write_tensors(partial / "generator.safetensors", tensors)
        document = {
            "format": FORMAT,
            "generator": generator.config.stored(),
            **generator.metadata,
            "fingerprint": generator.fingerprint,
        }
        document = {**document, "digest": digest(document)}
        files.write_json(partial / "config.json", {**document, **(provenance or {}), **document})
        load_generator(partial)


def load_generator(directory: str | AnyPath, *, allow_other_models: bool = False) -> Generator:
    """Reads a generator directory.

    Args:
      allow_other_models: accept any cloud and edge model of the shapes that it was trained with,
        such as a fine-tuned edge. It was not trained to work with these.

    Raises UserError if a file is missing, damaged or of another kind.
    """
    name = public_name(directory)
    directory = find_directory(directory, "generator")
    path = directory / "config.json"
    metadata = documents.read_json(path)
    if metadata.get("format") not in (FORMAT, FIRST_FORMAT):
        raise UserError(
            f"{directory} is not a generator (format {metadata.get('format')!r}, expected "
            f"{FORMAT!r}); give the directory that training released"
        )
    document = documents.convert(metadata, _Document, str(path))
    config = configs.from_dict(GeneratorConfig, document.generator, str(path))
    read_frame(document.frame, f"{path}: frame")
    recorded = {"fingerprint": document.fingerprint, "digest": document.digest}
    if document.format == FORMAT and None in recorded.values():
        raise UserError(f"{path} lacks the fingerprint or the digest; get it again")
    if document.digest not in (None, digest(metadata)):
        raise UserError(f"{path} was changed after it was written; get it again")
    tensors = read_arrays(directory / "generator.safetensors", ("F32",))
    check_tensors(tensors, expected_tensors(config, document.shapes, path), directory)
    tree = jax.tree.map(jnp.asarray, unflatten(tensors))
    used = {"format", "generator", *recorded} | ({"models"} if allow_other_models else set())
    metadata = {name: value for name, value in metadata.items() if name not in used}
    generator = Generator(config, tree["params"], tree["stats"], metadata, name)
    if document.fingerprint not in (None, generator.fingerprint):
        raise UserError(
            f"{directory} is damaged: its content has the fingerprint {generator.fingerprint}, but "
            f"config.json says {document.fingerprint}; get it again"
        )
    return generator


def digest(document: Mapping[str, Any]) -> str:
    """Hash of what is used of config.json."""
    names = ("format", "generator", "shapes", "models", "fingerprint")
    used = {name: document.get(name) for name in names}
    if "frame" in document:  # it came later
        used["frame"] = document["frame"]
    text = json.dumps(used, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def expected_tensors(config: GeneratorConfig, shapes: _Shapes, path: AnyPath) -> dict[str, Any]:
    """Name -> shape and dtype of every tensor, without allocating any.

    Raises UserError where the shapes lack a kernel that the config targets.
    """
    if "q" not in shapes.cloud.kernels:
        raise UserError(f"{path}: shapes.cloud.kernels lacks 'q'; get it again")
    embedding = jax.ShapeDtypeStruct((shapes.cloud.kernels["q"][0],), jnp.float32)

    def init(embedding: jax.Array) -> Any:
        return init_generator(
            jax.random.key(0),
            config,
            edge_layers=shapes.edge.layers,
            edge_shapes=shapes.edge.kernels,
            cloud_layers=shapes.cloud.layers,
            cloud_shapes=shapes.cloud.kernels,
            cloud_embedding=embedding,
        )

    try:
        params, stats = jax.eval_shape(init, embedding)
    except (OverflowError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise UserError(f"{path}: {error}") from None
        raise UserError(f"{path} has sizes that no generator has; get it again") from None
    return dict(named_leaves({"params": params, "stats": stats}))


def check_tensors(tensors: dict[str, Any], expected: dict[str, Any], directory: AnyPath) -> None:
    """Raises UserError where tensors are not those of the config."""
    path = directory / "generator.safetensors"
    for name, wanted in expected.items():
        if name not in tensors:
            raise UserError(f"{path} lacks {name}; get it again")
        if tensors[name].shape != wanted.shape:
            raise UserError(
                f"{path}: {name} is {tensors[name].shape}, but its config.json makes it "
                f"{wanted.shape}; get both files again"
            )
    for name in tensors:
        if name not in expected:
            raise UserError(f"{path} has {name}, which no generator of its config.json has")
    if (tensors["stats.var"] < 0).any():
        raise UserError(f"{path}: stats.var has a negative variance; get it again")
