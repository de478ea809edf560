"""Helpers of the commands on artifacts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorax_gen.artifacts.generator import Generator
    from lorax_gen.files import AnyPath
    from lorax_gen.models.model import Model


def load_for(
    artifact: str | AnyPath,
    edge: str | None,
    generator: str | None,
    dtype: Any = "float32",
) -> tuple[Model, Generator | None]:
    """The edge and the generator of a card, or the edge of a PEFT adapter, which needs no other.

    Args:
      edge, generator: what the user gave; None: what the artifact names.
    """
    import lorax_gen
    from lorax_gen.artifacts.export import check_adapted, is_adapter
    from lorax_gen.artifacts.lookup import find_system

    names = find_system(artifact, generator, edge=edge, need=("generator", "edge"))
    model = lorax_gen.load_model(names.needed("edge"), dtype)
    if is_adapter(artifact):
        if edge is None:
            check_adapted(artifact, model)
        return model, None
    return model, lorax_gen.load_generator(names.needed("generator"))
