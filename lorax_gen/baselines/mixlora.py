"""MixLoRA (Li et al. 2024, arXiv 2404.15159): feed-forward networks with LoRAs, two for each token.

A layer's router, without a bias, chooses K of N experts for a token: p = softmax(R x) in fp32, of
which the K largest are kept and renormalised to gates g. An expert is the entire frozen network
with its own LoRA at each kernel; attention has one plain LoRA at q, k, v and o.

    y = sum_e g_e FFN_e(x)

Parameters, fp32: `{'router': [L, D, N], 'experts': {name: {'a': [L, N, D, R], 'b': [L, N, R, F]}},
'attention': {name: {'a': [L, D, R], 'b': [L, R, F]}}}`.

The frozen kernels act once on each token, not once for each expert: gate and up have the same input
for all experts, and down is linear, so that sum_e g_e (W h_e) = W (sum_e g_e h_e). A token's K
experts are K slots of the hidden activations, [K, B, T, F].
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lorax_gen.baselines.loramoe import in_layers, token_gates
from lorax_gen.config import Positive, Size, check
from lorax_gen.errors import UserError
from lorax_gen.method.lora import init_factors, init_lora, scaled
from lorax_gen.models.adapter import Adapter, Apply, LowRank, Mlp, Tree, drop
from lorax_gen.models.config import MLP_KERNELS, DecoderConfig, kernel_shapes

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class MixLoraConfig:
    """Experts of MixLoRA."""

    n_experts: Size = 8
    """Experts of each layer."""
    top_k: Size = 2
    """Experts of a token."""
    rank: Size = 16
    alpha: Positive = 32.0

    def __post_init__(self):
        check(self, "adapter.")
        if self.top_k > self.n_experts:
            raise UserError(
                f"adapter.top_k is {self.top_k}, but there are {self.n_experts} experts; choose "
                "that many or fewer"
            )


def init_mixlora(key: Array, config: MixLoraConfig, edge: DecoderConfig) -> dict[str, Any]:
    """Fresh parameters: R ~ N(0, 0.02^2), A ~ U(+-1/sqrt(D)), B = 0, so that the edge is as it
    was."""
    shapes, layers = kernel_shapes(edge), edge.num_hidden_layers
    mlp = {name: shape for name, shape in shapes.items() if name in MLP_KERNELS}
    attention = {name: shape for name, shape in shapes.items() if name not in MLP_KERNELS}
    router_key, experts_key, attention_key = jax.random.split(key, 3)
    router = jax.random.normal(router_key, (layers, edge.hidden_size, config.n_experts))
    return {
        "router": 0.02 * router,
        "experts": init_factors(experts_key, mlp, config.rank, (layers, config.n_experts)),
        "attention": init_lora(attention_key, attention, config.rank, layers),
    }


def mixlora_adapter(
    params: dict[str, Any],
    config: MixLoraConfig,
    real: Array | None = None,
    dropout: float = 0.0,
) -> Adapter:
    """The adapter of trained parameters.

    Args:
      real: `[B, T]` bool, the tokens that are no padding. With it the adapter's auxiliary values
        are what `balance_loss` takes.
      dropout: rate on the input of each LoRA; one mask for all experts of a kernel.
    """
    s = config.alpha / config.rank
    shared = {
        "router": params["router"],
        "experts": scaled(params["experts"], s),
        "attention": scaled(params["attention"], s),
    }
    return Adapter(shared, in_layers(real, params), MixLora(config.top_k, dropout))


@dataclasses.dataclass(frozen=True)
class MixLora(Apply):
    """See the module's docstring; `mixlora_adapter` makes the adapter."""

    top_k: int = 2
    dropout: float = 0.0

    def kernel(self, name, x, shared, rows, key):
        return LowRank(self.dropout).kernel(name, x, shared["attention"], {}, key)

    def feed_forward(
        self, x: Array, mlp: Mlp, shared: Tree, rows: Tree, key: Array | None
    ) -> tuple[Array, dict[str, Array]]:
        probabilities = token_gates(x, shared["router"])  # [B, T, N]
        chosen = largest(probabilities, self.top_k)  # [B, T, K, N]
        kept = jnp.where(chosen, probabilities[..., None, :], 0.0).sum(-1)
        gates = (kept / kept.sum(-1, keepdims=True)).astype(x.dtype)  # [B, T, K]
        slots = chosen.astype(x.dtype)
        experts = jax.tree.map(lambda leaf: leaf.astype(x.dtype), shared["experts"])

        def dropped(h: Array, index: int) -> Array:  # attention has the indices below 4
            return drop(h, self.dropout, None if key is None else jax.random.fold_in(key, index))

        def enter(name: str, h: Array) -> Array:  # [B, T, D] -> [K, B, T, F]
            h = dropped(h, 4 + MLP_KERNELS.index(name))
            inner = jnp.einsum("btd,ndr->btnr", h, experts[name]["a"])
            inner = jnp.einsum("btnr,btkn->kbtnr", inner, slots)
            return jnp.einsum("kbtnr,nrf->kbtf", inner, experts[name]["b"])

        hidden = mlp.inner(x, enter)

        def leave(name: str, _: Array) -> Array:  # [K, B, T, F] -> [B, T, D]
            h = dropped(hidden, 4 + MLP_KERNELS.index(name))
            inner = jnp.einsum("kbtf,nfr->kbtnr", h, experts[name]["a"])
            inner = jnp.einsum("kbtnr,btkn,btk->btnr", inner, slots, gates)
            return jnp.einsum("btnr,nrd->btd", inner, experts[name]["b"])

        y = mlp.down(jnp.einsum("kbtf,btk->btf", hidden, gates), leave)
        if "real" not in rows:
            return y, {}
        real = rows["real"].astype(jnp.float32)
        counts = chosen.any(-2).astype(jnp.float32)
        return y, {
            "chosen": jnp.einsum("btn,bt->bn", counts, real),
            "probability": jnp.einsum("btn,bt->bn", probabilities, real),
        }


def largest(values: Array, k: int) -> Array:
    """`[..., K, N]` bool, one-hot: the K largest of `[..., N]` in order, of equal ones the first.

    Not by `lax.top_k`, for which XLA would gather the rows of all devices.
    """
    picked = []
    for _ in range(k):
        one = jax.nn.one_hot(values.argmax(-1), values.shape[-1], dtype=bool)
        picked.append(one)
        values = jnp.where(one, -jnp.inf, values)
    return jnp.stack(picked, -2)


def balance_loss(aux: dict[str, Array], real: Array, axis_name: str | None = None) -> Array:
    """Mixtral's balance loss, N sum_e f_e p_e over real tokens, the mean over layers.

    f_e is the share of tokens that chose expert e, so that the f_e sum to K, and p_e the mean of
    its probability: balanced the loss is K.

    Args:
      aux: of the adapter, sums `[L, B, N]` over a row's real tokens: `chosen`, `probability`.
      real: `[B, T]` bool, as the adapter was given.
      axis_name: the mapped axis that the batch is sharded over (under pmap), else None.

    Returns:
      fp32 scalar, without a coefficient.
    """
    sums = {name: value.sum(-2) for name, value in aux.items()}  # [L, N]
    sums["count"] = real.sum().astype(jnp.float32)
    if axis_name is not None:
        sums = jax.lax.psum(sums, axis_name)
    f, p = (sums[name] / sums["count"] for name in ("chosen", "probability"))
    return f.shape[-1] * (f * p).sum(-1).mean()
