"""Which models an artifact was made with: their names and hashes of their content.

A fingerprint hashes all parameters on the host, leaf by leaf: about a minute for 8 billion. It is
computed once per `Model`, when an artifact is written or used, not in training steps.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from msgspec import Meta, Struct

from lorax_gen.errors import UserError
from lorax_gen.hub import public_name, without_folders
from lorax_gen.mesh import hosts
from lorax_gen.models import int8
from lorax_gen.models.model import Model
from lorax_gen.tensors import named_leaves, tree_hash

Hash = Annotated[str, Meta(pattern=r"^[0-9a-f]{16}\Z")]
Name = Annotated[str, Meta(max_length=1000)]


class Identity(Struct, frozen=True, forbid_unknown_fields=True):
    """What identifies a model.

    Attributes:
      fingerprint: of the parameters; None: the kernels are in int8.
      besides_kernels: of the parameters that int8 leaves as they are.
      tokenizer: of what the model reads for a text, see `reading`; None: not recorded.
      bos: whether a text begins with BOS.
    """

    name: str
    fingerprint: Hash | None
    besides_kernels: Hash
    tokenizer: Hash | None = None
    bos: bool | None = None


class Identities(Struct, frozen=True, forbid_unknown_fields=True):
    """Of the models of a generator."""

    cloud: Identity
    edge: Identity


class Names(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The names of a generator and its models, as `hub.public_name` has them; empty: unknown.

    Raises UserError for an absolute path or a URL.
    """

    generator: Name = ""
    cloud: Name = ""
    edge: Name = ""

    def __post_init__(self):
        for role in self.__struct_fields__:
            name = getattr(self, role)
            if without_folders(name) != name:
                raise UserError(
                    f"{role} is named {name!r}; expected a relative path or a name on the hub"
                )


UNNAMED = Names()


def named(name: str, fingerprint: str | None) -> str:
    """How messages call a model or a generator."""
    return f"{name!r} ({fingerprint})" if name else f"{fingerprint}"


def fingerprint(model: Model) -> str:
    """`model.fingerprint`, also where its arrays span several processes, which all call this."""
    if "fingerprint" not in model.__dict__ and _spans_hosts(model.params):
        model.__dict__["fingerprint"] = tree_hash(_lazy(model.params), jnp.bfloat16)
    return model.fingerprint


def identify(model: Model, *, reads: bool) -> Identity:
    """The identity of a model; of an edge without `reads`, its tokenizer is left out.

    Where its arrays span several processes, all of them call this.
    """
    key = f"identity {reads}"
    if key not in model.__dict__:
        kernels = {name: leaf for name, leaf in model.params["layers"].items() if _is_kernel(leaf)}
        layers = {k: leaf for k, leaf in model.params["layers"].items() if k not in kernels}
        quantized = any(map(int8.is_quantized, kernels.values()))
        model.__dict__[key] = Identity(
            name=public_name(model.name),
            fingerprint=None if quantized else fingerprint(model),
            besides_kernels=tree_hash(_lazy({**model.params, "layers": layers}), jnp.bfloat16),
            tokenizer=reading(model) if reads else None,
            bos=bool(model.bos) if reads else None,
        )
    return model.__dict__[key]


def check_same(
    role: str, trained: Identity, given: Identity, way_out: str, what: str = "the generator"
) -> None:
    """Raises UserError where the model given for a role is not the one `what` was trained with.

    Kernels in int8 have other numbers, so with these on either side only the other parameters are
    compared.
    """
    in_int8 = trained.fingerprint is None or given.fingerprint is None
    kind = "besides_kernels" if in_int8 else "fingerprint"
    ours, theirs = getattr(trained, kind), getattr(given, kind)
    if ours != theirs:
        raise UserError(
            f"{what} was trained with the {role} model {trained.name!r} ({ours}), the given one is "
            f"{given.name!r} ({theirs}): pass that {role} model, or {way_out}"
        )
    if trained.tokenizer is not None and (trained.bos, trained.tokenizer) != (
        given.bos,
        given.tokenizer,
    ):
        other = "another tokenizer" if trained.bos == given.bos else f"bos={given.bos}"
        raise UserError(
            f"the given {role} model {given.name!r} has {other}, but {what} was trained with that "
            f"of {trained.name!r}: pass that {role} model, or {way_out}"
        )


PROBE = "Grade each thing: 3.14, 'naïve' = über!\n\tif x != 1e-5:  # 東京\n"


def reading(model: Model) -> str:
    """Hash of the vocabulary and of the ids that a model reads for a text. Unlike the tokenizer's
    own file, it does not depend on the version of the library."""
    found = [sorted(model.tokenizer.get_vocab().items()), list(model.encode(PROBE))]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]


def _is_kernel(leaf: Any) -> bool:
    return int8.is_quantized(leaf) or leaf.ndim == 3


def _spans_hosts(tree: Any) -> bool:
    return any(not getattr(leaf, "is_fully_addressable", True) for leaf in jax.tree.leaves(tree))


class _Gathered:
    """An array that spans several processes; numpy gets it from all of them, layer by layer, so
    that no device holds all of it."""

    def __init__(self, leaf: jax.Array):
        self.leaf = leaf

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if self.leaf.ndim < 3:
            return np.asarray(hosts.gather(self.leaf), dtype)
        layers = (self.leaf[i] for i in range(self.leaf.shape[0]))
        return np.stack([np.asarray(hosts.gather(layer), dtype) for layer in layers])


def _lazy(tree: dict[str, Any]) -> dict[str, Any]:
    return {name: leaf if leaf.is_fully_addressable else _Gathered(leaf)
            for name, leaf in named_leaves(tree)}  # fmt: skip
