"""Where the generator, cloud and edge of an artifact are, from the names that it holds.

A card names its generator and models, a generator or a baseline its models, a PEFT adapter its
edge. A name is
tried as `load_model` does, as a directory and then as a shipped model, and beside the artifact. The
config of the run that released a generator is asked last. Nothing is guessed:
whoever loads what is found compares fingerprints.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from lorax_gen import assets, documents
from lorax_gen.artifacts.baseline import load_baseline
from lorax_gen.artifacts.card import load_card
from lorax_gen.artifacts.export import is_adapter
from lorax_gen.artifacts.identity import Identities
from lorax_gen.artifacts.peft import CONFIG
from lorax_gen.errors import UserError
from lorax_gen.files import AnyPath, to_path
from lorax_gen.hub import find_directory, is_gguf, is_hub_name, without_folders

SHIPPED = {"generator": "world/generator", "cloud": "world/cloud", "edge": "world/edge"}
AnyName = str | AnyPath


class Found(NamedTuple):
    """What `load_generator` and `load_model` take; None: not needed and not found."""

    generator: AnyName | None
    cloud: AnyName | None
    edge: AnyName | None

    def needed(self, role: str) -> AnyName:
        """One of those that were needed, so it was found."""
        found = getattr(self, role)
        assert found is not None
        return found


def find_system(
    card: AnyName | None = None,
    generator: AnyName | None = None,
    cloud: AnyName | None = None,
    edge: AnyName | None = None,
    *,
    need: Sequence[str] = ("generator", "cloud", "edge"),
) -> Found:
    """The generator and the models of a card or of a generator.

    What is given is returned as it is. With neither card nor generator, the rest are those of the
    shipped world.

    Args:
      card: a task card; or a PEFT adapter, which has an edge only.
      need: what must be found; the rest may be None.

    Raises UserError where one is not found.
    """
    found = {"generator": generator, "cloud": cloud, "edge": edge}
    if card is None and generator is None:
        shipped = {role: SHIPPED[role] for role in found if found[role] is None}
        return Found(**found | shipped)
    adapter = card is not None and is_adapter(card)
    named: dict[str, str] = {}

    def fill(names: dict[str, str], artifact: AnyName) -> None:
        for role, name in names.items():
            named.setdefault(role, name)
            found[role] = _find(name, artifact) if found[role] is None else found[role]

    if card is not None:
        fill(_names_of_adapter(card) if adapter else _names_of_card(card), card)
    if adapter:
        need = [role for role in need if role != "generator"]
    elif found["generator"] is not None and any(found[role] is None for role in need):
        fill(_names_of_generator(found["generator"]), found["generator"])
        for role, name in _models_of_run(found["generator"]).items():
            found[role] = _here(name) if found[role] is None else found[role]
    for role in need:
        if found[role] is None:
            artifact = generator if card is None else card
            what = (
                f"names the {role} {named[role]!r}, which is neither here nor beside it"
                if role in named
                else f"does not name the {role} that it was made with"
            )
            raise UserError(f"{artifact} {what}; give it as {role} (--{role})")
    return Found(**found)


def find_models(baseline: AnyName, *, need: Sequence[str] = ("edge",)) -> dict[str, AnyName]:
    """The models of a baseline, by their roles, where they are found.

    Raises UserError where one of `need` is not.
    """
    loaded, found = load_baseline(baseline), dict[str, AnyName]()
    for role, identity in (("edge", loaded.edge), ("cloud", loaded.cloud)):
        where = identity and _find(identity.name, baseline)
        if where:
            found[role] = where
        elif role in need:
            name = identity and identity.name
            raise UserError(
                f"{baseline} names the {role} {name!r}, which is neither here nor beside it; give "
                f"it as {role} (--{role})"
            )
    return found


def _names_of_card(card: AnyName) -> dict[str, str]:
    return msgspec.to_builtins(load_card(card).names)


def _names_of_adapter(adapter: AnyName) -> dict[str, str]:
    """The name of an adapter's edge, if it has one."""
    name = documents.read_json(to_path(adapter) / CONFIG).get("base_model_name_or_path")
    name = without_folders(name) if isinstance(name, str) else ""
    return {"edge": name} if name else {}


def _names_of_generator(generator: AnyName) -> dict[str, str]:
    """The names of a generator's cloud and edge, if it has them."""
    path = find_directory(generator, "generator") / "config.json"
    stored = documents.read_json(path).get("models")
    if stored is None:
        return {}
    models = documents.convert(stored, Identities, f"{path}: models")
    names = {"cloud": models.cloud.name, "edge": models.edge.name}
    return {role: last for role, name in names.items() if (last := without_folders(name))}


def _models_of_run(generator: AnyName) -> dict[str, str]:
    """The models in the config of the run that released a generator, if it lies in its directory,
    as they are written there."""
    path = to_path(generator).parent / "config.yaml"
    config = documents.read_yaml(path) if path.is_file() else {}
    models = {role: config.get(role) for role in ("cloud", "edge")}
    return {role: name for role, name in models.items() if isinstance(name, str)}


def _find(name: str, artifact: AnyName) -> str | None:
    """Where a name in an artifact leads: here, beside it, or to the hub."""
    path = to_path(artifact)
    ways = [name, str(path.parent / name)]
    if assets.resolve(path) != path:  # a shipped one
        ways.reverse()
    here = next(filter(None, map(_here, ways)), None)
    return name if here is None and is_hub_name(name) else here


def _here(name: str) -> str | None:
    """A name that is one of a directory, a shipped model or a GGUF file."""
    found = assets.resolve(name)
    here = found.is_dir() or (is_gguf(name) and found.is_file())
    return name if name and here else None
