"""LoraHub (Huang et al., 2023): trained LoRAs of one shape, summed with weights that are searched
for on a few solved examples of a new task. Nothing is trained, no gradient is taken.

    A = sum_i w_i A_i    B = sum_i w_i B_i    w in [-1.5, 1.5]^N minimises CE + 0.05 mean |w|

As in sail-sg/lorahub the factors are summed each by themselves, so that w_i counts twice in a
product. The search is nevergrad's NGOpt from w = 0 with 40 evaluations. CE is the mean over the
answers' tokens; that code divides it by the number of examples once more, which makes the penalty
heavier the more there are.

Dims beyond the legend (`lorax_gen.method`): N LoRAs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lorax_gen.errors import UserError
from lorax_gen.method.lora import Tree, deepened
from lorax_gen.models.decoder import Array

BOUND, PENALTY, BUDGET = 1.5, 0.05, 40

Score = Callable[[np.ndarray], float]
Minimise = Callable[[Score, int, int, int], np.ndarray]
"""`minimise(score, count, budget, seed)`: `[count]` weights within the bounds."""


def stack_loras(trees: Sequence[Tree], names: Sequence[str]) -> Tree:
    """LoRAs as one tree with a leading axis, `[N, L, D, R]` and `[N, L, R, F]`, L being that of the
    one with the most layers.

    Raises UserError, naming the LoRA, where their kernels or shapes differ.
    """
    layers = max(len(leaf) for leaf in jax.tree.leaves(trees))
    trees = [deepened(tree, layers) for tree in trees]
    shapes = [
        {(kernel, k): pair[k].shape for kernel, pair in tree.items() for k in ("a", "b")}
        for tree in trees
    ]
    for own, name in zip(shapes, names, strict=True):
        if own != shapes[0]:
            key = min(k for k in own | shapes[0] if own.get(k) != shapes[0].get(k))
            raise UserError(
                f"{name} has a factor {key[1]} of {key[0]!r} of shape {own.get(key)}, {names[0]} "
                f"of {shapes[0].get(key)}; give LoRAs of the same kernels and rank"
            )
    return {
        kernel: {k: jnp.stack([tree[kernel][k] for tree in trees]) for k in ("a", "b")}
        for kernel in trees[0]
    }


def combine(loras: Tree, weights: Array | np.ndarray) -> Tree:
    """The shared tree of weights `[N]`: A and B are each summed."""
    return {
        kernel: {k: jnp.einsum("n,n...->...", weights, factor) for k, factor in pair.items()}
        for kernel, pair in loras.items()
    }


def penalised(loss: Score) -> Score:
    """The loss of weights, plus 0.05 mean |w|."""
    return lambda weights: float(loss(weights)) + PENALTY * float(np.abs(weights).mean())


def search(
    loss: Score,
    count: int,
    *,
    budget: int = BUDGET,
    seed: int = 0,
    minimise: Minimise | None = None,
) -> np.ndarray:
    """The weights `[count]` fp32 in [-1.5, 1.5] of the lowest penalised loss that was found.

    Args:
      loss: of weights; called `budget` times.
      minimise: None: nevergrad's NGOpt.

    Raises UserError where nevergrad is not installed.
    """
    minimise = minimise or ng_opt
    return np.asarray(minimise(penalised(loss), count, budget, seed), np.float32)


def ng_opt(score: Score, count: int, budget: int, seed: int) -> np.ndarray:
    """See `Minimise`."""
    try:
        import nevergrad
    except ImportError:
        raise UserError(
            "LoraHub searches with nevergrad, which is not installed; pip install "
            "'lorax-gen[lorahub]'"
        ) from None
    bounds = np.full(count, BOUND)
    space = nevergrad.p.Array(init=np.zeros(count), lower=-bounds, upper=bounds)
    space.random_state.seed(seed)
    optimizer = nevergrad.optimizers.NGOpt(parametrization=space, budget=budget)
    try:
        return np.asarray(optimizer.minimize(score).value)
    except TypeError as error:  # of the quadratic models of nevergrad 1.0.12, with numpy 2.4
        raise UserError(
            f"nevergrad's choice for {count} LoRAs and {budget} evaluations, {optimizer.name}, "
            f"does not run with the numpy that is installed ({error}); choose {BUDGET} evaluations"
        ) from error
