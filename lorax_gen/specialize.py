"""From a prompt to a task card: the cloud model reads the prompt once, the router chooses experts.

This is all that happens at run time; what leaves is a card (`artifacts.card`), and what the edge
model serves is the card merged.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from lorax_gen.artifacts.card import TaskCard, make_card
from lorax_gen.artifacts.generator import Generator
from lorax_gen.data.batches import Encoder, bucket, prompt_batch
from lorax_gen.errors import UserError
from lorax_gen.evaluation.gates import prompt_gates
from lorax_gen.models.huggingface import Model


def specialize(
    prompt: str | Sequence[str], cloud: Model, edge: Model, generator: Generator
) -> TaskCard | list[TaskCard]:
    """A task card for each prompt (one for a string, a list for several).

    The card does not depend on the other prompts: BatchNorm uses its running statistics and
    padding is never seen.

    Raises UserError for an empty prompt, for one longer than the cloud model's positions, and for
    models that the generator was not trained with.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    spec = generator.spec(cloud.config, edge.config)
    encoder = Encoder(cloud.tokenizer)
    limit = cloud.config.max_position_embeddings - edge.config.num_hidden_layers
    length = min(bucket(max((len(encoder.ids(text)) for text in prompts), default=1)), limit)
    batch = prompt_batch(encoder, prompts, length)
    gates = prompt_gates(
        generator.params,
        generator.stats,
        cloud.params,
        spec,
        jnp.asarray(batch["prompt"]),
        jnp.asarray(batch["prompt_lengths"]),
    )
    cards = [
        make_card(row, text, edge, generator)
        for row, text in zip(np.asarray(gates), prompts, strict=True)
    ]
    return cards[0] if isinstance(prompt, str) else cards


def read_prompt(text: str) -> str:
    """The prompt itself, or the text of standard input (`-`) or of a file (`@FILE`)."""
    if text == "-":
        return sys.stdin.read()
    if text.startswith("@"):
        path = Path(text[1:])
        try:
            return path.read_text()
        except (OSError, UnicodeDecodeError):
            raise UserError(
                f"cannot read the prompt file {path}; after @ stands the name of a text file"
            ) from None
    return text
