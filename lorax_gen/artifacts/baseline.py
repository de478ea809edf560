"""A released baseline that is not a PEFT adapter: a directory of plain safetensors and JSON.

baseline.safetensors   the trained parameters, fp32
baseline.json          format, method, its config, identities of the models, frame, whether prompts
                       are read in context, shapes of the tensors, fingerprint, a digest of these;
                       provenance

The method is the name of a recipe, which makes the answerer (`recipes.registry`); nothing here
depends on what the method is.
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

from lorax_gen import documents, files
from lorax_gen.artifacts.checks import read_arrays
from lorax_gen.artifacts.identity import Hash, Identity, check_same, identify
from lorax_gen.errors import UserError
from lorax_gen.files import AnyPath, to_path
from lorax_gen.frames import PLAIN, Frame, read_frame
from lorax_gen.hub import find_directory, public_name
from lorax_gen.models.model import Model
from lorax_gen.tensors import flatten, named_leaves, tree_hash, unflatten, write_tensors

FORMAT = "lorax-gen baseline 1"
DOCUMENT, TENSORS = "baseline.json", "baseline.safetensors"
WAY_OUT = "train a baseline on the one given"


class _Models(Struct, frozen=True, forbid_unknown_fields=True):
    edge: Identity
    cloud: Identity | None = None


class _Document(Struct):
    """What is used of baseline.json; the rest is provenance."""

    format: str
    method: Annotated[str, Meta(pattern=r"^[a-z][a-z0-9_]{0,63}\Z")]
    config: dict[str, Any]
    models: _Models
    tensors: dict[str, tuple[Annotated[int, Meta(ge=0)], ...]]
    fingerprint: Hash
    digest: Hash
    frame: dict[str, Any] = {}
    in_context: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Baseline:
    """A trained baseline.

    Attributes:
      method: the name of its recipe.
      config: what the method needs beside the parameters, as plain values.
      params: a tree of fp32 arrays, nested dicts with names without dots.
      edge, cloud: the models that it was trained with, from `identity.identify`; an edge is
        identified by its parameters (reads=False), a cloud also by its tokenizer (reads=True).
      frame: how the edge reads an input.
      in_context: whether the edge reads a question after its prompt.
      name: that it was loaded by, see `hub.public_name`.
    """

    method: str
    config: dict[str, Any]
    params: dict[str, Any]
    edge: Identity
    cloud: Identity | None = None
    frame: Frame = PLAIN
    in_context: bool = False
    name: str = ""

    def check_models(self, edge: Model, cloud: Model | None = None) -> None:
        """Raises UserError where a model is not the one that it was trained with, or is missing."""
        what = f"the {self.method} baseline"
        check_same("edge", self.edge, identify(edge, reads=False), WAY_OUT, what)
        if self.cloud is None:
            return
        if cloud is None:
            raise UserError(
                f"{what} reads prompts with the cloud model {self.cloud.name!r}; give it (--cloud)"
            )
        check_same("cloud", self.cloud, identify(cloud, reads=True), WAY_OUT, what)

    def check_params(self, expected: Any) -> None:
        """Raises UserError where the parameters are not those that the config makes.

        Args:
          expected: a tree of arrays or shapes, as from `jax.eval_shape` of the method's init.
        """
        wanted = {name: tuple(leaf.shape) for name, leaf in named_leaves(expected)}
        found = {name: tuple(leaf.shape) for name, leaf in named_leaves(self.params)}
        if wanted != found:
            name = min(n for n in wanted | found if wanted.get(n) != found.get(n))
            raise UserError(
                f"the {self.method} baseline {self.name!r} has {name} {found.get(name)}, but its "
                f"config makes it {wanted.get(name)}; train or get it again"
            )

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the parameters, method and config."""
        described = {"method": self.method, "config": self.config, "in_context": self.in_context}
        text = json.dumps(described, sort_keys=True).encode()
        return tree_hash({"params": self.params, "described": np.frombuffer(text, np.uint8)})


def save_baseline(
    directory: str | AnyPath, baseline: Baseline, provenance: dict[str, Any] | None = None
) -> None:
    """Writes a baseline to a new directory, atomically.

    Args:
      provenance: of the run, kept under its own key.

    Raises UserError if `directory` exists, or an array is not finite or not fp32.
    """
    tensors = flatten(baseline.params)
    models = _Models(baseline.edge, baseline.cloud)
    document: dict[str, Any] = {
        "format": FORMAT,
        "method": baseline.method,
        "config": baseline.config,
        "models": msgspec.to_builtins(models),
        "frame": baseline.frame.stored(),
        "in_context": baseline.in_context,
        "tensors": {name: list(value.shape) for name, value in sorted(tensors.items())},
        "fingerprint": baseline.fingerprint,
    }
    document["digest"] = digest(document)
    with files.new_directory(directory) as partial:
        write_tensors(partial / TENSORS, tensors)
        files.write_json(partial / DOCUMENT, {**document, "provenance": provenance or {}})
        load_baseline(partial)


def load_baseline(directory: str | AnyPath) -> Baseline:
    """Reads a baseline directory.

    Raises UserError if a file is missing, damaged or of another kind or version.
    """
    name, directory = public_name(directory), find_directory(directory, "baseline")
    path, tensors = directory / DOCUMENT, directory / TENSORS
    values = documents.read_json(path)
    if values.get("format") != FORMAT:
        raise UserError(
            f"{directory} is not a baseline that this version reads (format "
            f"{values.get('format')!r}, expected {FORMAT!r}); give the directory that training "
            "released, or another version of lorax-gen"
        )
    document = documents.convert(values, _Document, str(path))
    if document.digest != digest(values):
        raise UserError(f"{path} was changed after it was written; get it again")
    arrays = read_arrays(tensors, ("F32",))
    shapes = {name: value.shape for name, value in arrays.items()}
    if shapes != document.tensors:
        which = min(
            n for n in shapes | document.tensors if shapes.get(n) != document.tensors.get(n)
        )
        raise UserError(
            f"{tensors} has {which} {shapes.get(which)}, but {DOCUMENT} says "
            f"{document.tensors.get(which)}; get both files again"
        )
    baseline = Baseline(
        document.method,
        document.config,
        jax.tree.map(jnp.asarray, unflatten(arrays)),
        document.models.edge,
        document.models.cloud,
        read_frame(document.frame, f"{path}: frame"),
        document.in_context,
        name,
    )
    if document.fingerprint != baseline.fingerprint:
        raise UserError(
            f"{directory} is damaged: its content has the fingerprint {baseline.fingerprint}, but "
            f"{DOCUMENT} says {document.fingerprint}; get it again"
        )
    return baseline


def digest(document: Mapping[str, Any]) -> str:
    """Hash of what is used of baseline.json."""
    used = [name for name in _Document.__struct_fields__ if name != "digest"]
    text = json.dumps({name: document.get(name) for name in used}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_baseline(directory: str | AnyPath) -> bool:
    """Whether a path is a baseline directory."""
    return (to_path(directory) / DOCUMENT).is_file()
