"""LoRAMoE (Dou et al. 2024, arXiv 2312.09979): experts at each feed-forward kernel, mixed by token.

    y = W x + sum_i w_i(x) (alpha / r) B_i A_i drop(x),    w = softmax(R x) in fp32

Every kernel has a router R of its own, without a bias, and all N experts are used for every token.
Parameters are `{name: {'a': [L, N, D, R], 'b': [L, N, R, F], 'router': [L, D, N]}}`, fp32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lorax_gen.config import Positive, Size, check
from lorax_gen.method.lora import init_factors
from lorax_gen.models.adapter import Adapter, Apply, Mlp, Tree, drop
from lorax_gen.models.config import MLP_KERNELS, DecoderConfig, kernel_shapes

Array = jax.Array
Params = dict[str, dict[str, Array]]


@dataclasses.dataclass(frozen=True)
class LoraMoeConfig:
    """Experts of LoRAMoE."""

    n_experts: Size = 8
    """Experts of each kernel."""
    rank: Size = 4
    alpha: Positive = 32.0

    def __post_init__(self):
        check(self, "adapter.")


def init_loramoe(key: Array, config: LoraMoeConfig, edge: DecoderConfig) -> Params:
    """Fresh parameters: A and R ~ U(+-1/sqrt(D)), B = 0, so that the edge is as it was."""
    shapes = {
        name: kernel_shapes(edge)[name] for name in MLP_KERNELS if name in kernel_shapes(edge)
    }
    layers, n = edge.num_hidden_layers, config.n_experts
    factors_key, key = jax.random.split(key)
    params = init_factors(factors_key, shapes, config.rank, (layers, n))
    for name, own in zip(sorted(shapes), jax.random.split(key, len(shapes)), strict=True):
        d_in, _ = shapes[name]
        bound = d_in**-0.5
        shape = (layers, d_in, n)
        params[name]["router"] = jax.random.uniform(own, shape, jnp.float32, -bound, bound)
    return params


def loramoe_adapter(
    params: Params, config: LoraMoeConfig, real: Array | None = None, dropout: float = 0.0
) -> Adapter:
    """The adapter of trained parameters.

    Args:
      real: `[B, T]` bool, the tokens that are no padding. With it the adapter's auxiliary values
        are each kernel's sums of gates over a row's real tokens, `{name: [L, B, N]}`; see
        `localized_balance`.
      dropout: rate on the experts' input; one mask for all experts of a kernel.
    """
    s = config.alpha / config.rank
    shared = {name: own | {"b": own["b"] * s} for name, own in params.items()}
    return Adapter(shared, in_layers(real, params), LoraMoe(dropout))


def in_layers(real: Array | None, params: Mapping[str, Any]) -> dict[str, Array]:
    """The rows of an adapter that say which tokens are real, the same in each layer."""
    layers = jax.tree.leaves(params)[0].shape[0]
    return {} if real is None else {"real": jnp.broadcast_to(real, (layers, *real.shape))}


@dataclasses.dataclass(frozen=True)
class LoraMoe(Apply):
    """See the module's docstring; `loramoe_adapter` makes the adapter."""

    dropout: float = 0.0

    def feed_forward(
        self, x: Array, mlp: Mlp, shared: Tree, rows: Tree, key: Array | None
    ) -> tuple[Array, dict[str, Array]]:
        sums = {}

        def delta(name: str, h: Array) -> Array:
            own = shared[name]
            gates = token_gates(h, own["router"])  # [B, T, N]
            if "real" in rows:
                sums[name] = jnp.einsum("btn,bt->bn", gates, rows["real"].astype(jnp.float32))
            index = sorted(shared).index(name)
            h = drop(h, self.dropout, None if key is None else jax.random.fold_in(key, index))
            inner = jnp.einsum("btd,ndr->btnr", h, own["a"].astype(h.dtype))
            inner = inner * gates[..., None].astype(h.dtype)
            return jnp.einsum("btnr,nrf->btf", inner, own["b"].astype(h.dtype))

        return mlp(x, delta), sums


def token_gates(x: Array, router: Array) -> Array:
    """softmax(R x) `[B, T, N]` in fp32, for tokens `[B, T, D]` of any dtype."""
    x, router = x.astype(jnp.float32), router.astype(jnp.float32)
    # The default precision of an accelerator would round both to fewer bits.
    return jax.nn.softmax(jnp.matmul(x, router, precision=jax.lax.Precision.HIGHEST))


def localized_balance(
    sums: Mapping[str, Array],
    group: Array | None = None,
    delta: float = 0.1,
    axis_name: str | None = None,
) -> Array:
    """The localized balance loss, var(Z) / (mean(Z)^2 + 1e-10), the mean over kernels and layers.

    Z[b, i] = I[b, i] Q[b, i], where Q is row b's sum of gates of expert i over its tokens. I is
    1 + delta where row and expert are of the same group of tasks, else 1 - delta: the first half of
    the experts belongs to the rows marked in `group`, the others to the rest. The variance is
    unbiased and over all B N entries of the global batch.

    Args:
      sums: `{name: [L, B, N]}`, the auxiliary values of the adapter.
      group: `[B]` bool; None: I = 1.
      axis_name: the mapped axis that the batch is sharded over (under pmap), else None.

    Returns:
      fp32 scalar, without a coefficient.
    """
    z = jnp.stack(list(sums.values()))  # [kernels, L, B, N]
    if group is not None:
        experts = jnp.arange(z.shape[-1]) < z.shape[-1] // 2
        z = z * jnp.where(group[:, None] == experts, 1 + delta, 1 - delta)
    if axis_name is not None:
        z = jax.lax.all_gather(z, axis_name, axis=2, tiled=True)
    spread = z.var((-2, -1), ddof=1) / (jnp.square(z.mean((-2, -1))) + 1e-10)
    return spread.mean()
