"""What artifacts are made of, as files: an edge, a generator and a card for each composition."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from lorax_gen import load_generator, load_model, save_adapter, save_card
from lorax_gen.artifacts.card import TaskCard, make_card
from lorax_gen.artifacts.generator import Generator
from lorax_gen.models.huggingface import save_model
from lorax_gen.models.model import Model
from tests.tiny import PROMPTS, make_generator, write_generator

COMPOSITIONS = ("factors", "products")


class Made(NamedTuple):
    """`folder` holds `edge`, `{composition}`, `{composition}.card` and `adapter`."""

    folder: Path
    edge: Model
    generators: dict[str, Generator]
    cards: dict[str, TaskCard]


@pytest.fixture(scope="session")
def made(tiny_world_system, tmp_path_factory) -> Made:
    """One card for each composition; the adapter is the LoRA of the first."""
    folder = tmp_path_factory.mktemp("made")
    save_model(folder / "edge", tiny_world_system.edge)
    edge, generators, cards = load_model(folder / "edge"), {}, {}
    gates = np.zeros((edge.config.num_hidden_layers, 4), np.float32)
    gates[0, [3, 1]] = gates[1, [2, 0]] = 0.7, 0.3
    for seed, composition in enumerate(COMPOSITIONS):
        targets = ("q", "v", "gate", "up", "down")
        generator = make_generator(
            tiny_world_system, seed, composition=composition, alpha=3.0, edge_targets=targets
        )
        write_generator(folder / composition, generator, tiny_world_system)
        generators[composition] = load_generator(folder / composition)
        cards[composition] = make_card(
            gates, PROMPTS[0], tiny_world_system.cloud, edge, generators[composition]
        )
        save_card(folder / f"{composition}.card", cards[composition])
    save_adapter(folder / "adapter", cards["factors"].lora(generators["factors"]), edge.config)
    return Made(folder, edge, generators, cards)
