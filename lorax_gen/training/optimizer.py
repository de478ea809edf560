"""AdamW with warm-up and cosine decay, gradients clipped by their global norm."""

from __future__ import annotations

import dataclasses

import jax
import optax

from lorax_gen.config import BelowOne, Count, Fraction, NotNegative, Positive, check

# Norm weights, biases and BatchNorm parameters are not decayed.
NOT_DECAYED = ("norm", "bias", "b1", "b2", "bn_scale")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule. The defaults are the paper's; the world's runs use larger rates."""

    learning_rate: Positive = 2e-5
    """Peak learning rate, reached after the warm-up."""
    warmup_steps: Count = 50
    final_fraction: Fraction = 0.0
    """Where the cosine ends, as a fraction of the peak."""
    weight_decay: NotNegative = 0.1
    b1: BelowOne = 0.9
    b2: BelowOne = 0.999
    clip_norm: Positive = 1.0
    """Largest global norm of the gradients."""

    def __post_init__(self):
        check(self, "optimizer.")


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up from 0, then a cosine to `final_fraction` of the peak at `steps`."""
    warmup = min(config.warmup_steps, max(steps - 1, 0))
    return optax.warmup_cosine_decay_schedule(
        0.0 if warmup else config.learning_rate,
        config.learning_rate,
        warmup,
        max(steps, 1),
        config.learning_rate * config.final_fraction,
    )


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The optax transformation: clipping, AdamW, schedule."""

    def decay_mask(params):
        name = lambda path: str(getattr(path[-1], "key", path[-1]))  # noqa: E731
        return jax.tree_util.tree_map_with_path(
            lambda path, _: not name(path).endswith(NOT_DECAYED), params
        )

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            make_schedule(config, steps),
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mask=decay_mask,
        ),
    )
