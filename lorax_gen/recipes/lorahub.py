"""LoraHub on an edge: LoRAs from files, a search on solved examples of a task, an answerer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from lorax_gen.artifacts.peft import load_adapter
from lorax_gen.baselines.lorahub import BUDGET, Minimise, combine, search, stack_loras
from lorax_gen.data.tokens import Batch, Encoder, answer_batch, bucket
from lorax_gen.errors import UserError
from lorax_gen.evaluation.answerers import Answerer
from lorax_gen.files import AnyPath, to_path
from lorax_gen.frames import PLAIN, Frame
from lorax_gen.method.lora import Tree
from lorax_gen.models.adapter import Adapter
from lorax_gen.models.decoder import Array, DecoderConfig, Params
from lorax_gen.models.huggingface import stored_frame, stored_in_context
from lorax_gen.models.model import Model
from lorax_gen.training.step import answer_loss

Pair = tuple[str, str]


@dataclasses.dataclass(frozen=True, eq=False)
class LoraHub(Answerer):
    """The edge with a weighted sum of LoRAs, fitted to solved examples of a task. Before that all
    weights are zero, and it is the edge.

    Attributes:
      loras: see `baselines.lorahub.stack_loras`; weights: `[N]`.
      budget, seed, minimise: of the search.
    """

    loras: Tree = dataclasses.field(kw_only=True)
    weights: np.ndarray = dataclasses.field(kw_only=True)
    budget: int = BUDGET
    seed: int = 0
    minimise: Minimise | None = None

    @property
    def is_fitted(self) -> bool:
        return True

    @property
    def lora(self) -> Tree:
        """The LoRA of the weights."""
        return combine(self.loras, self.weights)

    def fit(self, task: str, shots: Sequence[Pair]) -> LoraHub:
        """The answerer with the weights that were found on the examples: inputs as the edge reads
        them, and answers with their separator (`Frame.pair`).

        Raises UserError where there are none, or one is longer than the edge reads.
        """
        if not shots:
            raise UserError(f"{task}: no solved examples to fit LoraHub to; give one or more")
        batch, config = shot_batch(self.model, shots), self.model.config

        def loss(weights: np.ndarray) -> float:
            found = shot_loss(self.model.params, config, batch, self.loras, np.float32(weights))
            return float(found)

        weights = search(
            loss, len(self.weights), budget=self.budget, seed=self.seed, minimise=self.minimise
        )
        fitted = dataclasses.replace(self, weights=weights)
        return dataclasses.replace(fitted, adapter=Adapter(fitted.lora))


@partial(jax.jit, static_argnames="config")
def shot_loss(
    params: Params, config: DecoderConfig, batch: Batch, loras: Tree, weights: Array
) -> Array:
    """Cross entropy on the answers of solved examples with a weighted sum of LoRAs."""
    return answer_loss(params, config, batch, adapter=Adapter(combine(loras, weights)))[0]


def shot_batch(model: Model, shots: Sequence[Pair]) -> Batch:
    """`{'tokens', 'answer': [B, T]}` of solved examples; see `LoraHub.fit`."""
    encoder = Encoder.of(model)
    rows, starts = zip(*(encoder.joined(*pair) for pair in shots), strict=True)
    positions = model.config.max_position_embeddings
    longest = max(map(len, rows))
    if longest > positions:
        raise UserError(
            f"an example of {longest} tokens is longer than the {positions} positions of the edge "
            "model; leave it out"
        )
    return answer_batch(rows, starts, min(bucket(longest), positions), encoder.pad_id)


def make_lorahub(
    edge: Model, loras: Sequence[Tree], names: Sequence[str], **options: Any
) -> LoraHub:
    """The answerer of LoRAs, not fitted yet; `options` are its fields."""
    if not loras:
        raise UserError("LoraHub needs one LoRA or more; give adapters")
    stacked, weights = stack_loras(loras, names), np.zeros(len(loras), np.float32)
    adapter = Adapter(combine(stacked, weights))
    return LoraHub(
        "lorahub",
        "edge + LoraHub",
        edge,
        adapter=adapter,
        loras=stacked,
        weights=weights,
        **options,
    )


def load_loras(paths: Sequence[AnyPath], edge: Model) -> tuple[list[Tree], Frame]:
    """The LoRAs of PEFT adapters, and the frame that all of them read inputs in.

    Raises UserError where one is not of this edge, reads prompts in context, or has another frame.
    """
    trees, frames = [], []
    for path in map(to_path, paths):
        trees.append(load_adapter(path, edge.config))
        frames.append(stored_frame(path))
        if stored_in_context(path):
            raise UserError(
                f"{path} was trained on questions after their prompts; LoraHub serves questions "
                "alone: give adapters that were trained without in_context"
            )
        if frames[-1] != frames[0]:
            raise UserError(
                f"{path} reads inputs as {frames[-1].template!r}, {paths[0]} as "
                f"{frames[0].template!r}; give adapters of one frame"
            )
    return trees, frames[0] if frames else PLAIN
