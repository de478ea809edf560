"""What a user's type checker says of the public names: checked by `make lint`, never run.

Each ignored error is one that a checker must find: mypy refuses an ignore that it does not need.
"""

from typing import assert_type

import jax

import lorax_gen
from lorax_gen import Model, TaskCard, method


def gates(logits: jax.Array) -> jax.Array:
    method.keep_top_k(logits, "two")  # type: ignore[arg-type]
    method.keep_top_k(logits)  # type: ignore[call-arg]
    return method.keep_top_k(logits, k=2)


def specialised(prompt: str, others: list[str]) -> Model:
    lorax_gen.load_model(3)  # type: ignore[arg-type]
    cloud, edge = lorax_gen.load_model("world/cloud"), lorax_gen.load_model("world/edge")
    generator = lorax_gen.load_generator("world/generator")

    card = lorax_gen.specialize(prompt, cloud, edge, generator)
    assert_type(card, TaskCard)
    assert_type(lorax_gen.specialize(others, cloud, edge, generator), list[TaskCard])
    lorax_gen.specialize(prompt, cloud, edge)  # type: ignore[call-overload]
    lorax_gen.save_card("cards", [card])  # type: ignore[arg-type]

    card.merge(edge, cloud)  # type: ignore[arg-type]
    return card.merge(edge, generator)


def misspelt() -> None:
    lorax_gen.load_modl  # type: ignore[attr-defined]  # noqa: B018
    lorax_gen.LoraGen("name", "label", lorax_gen.load_model("e"))  # type: ignore[call-arg]
