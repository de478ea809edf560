"""The router: meta states to logits (eq. 3) and logits to gates over the experts (eq. 4-7).

Everything is fp32. Parameters have a leading L axis, or none where the layers share one router.

Dims beyond the legend (`lorax_gen.method`): H router width.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lorax_gen.errors import UserError
from lorax_gen.method.explicit import shards

Array = jax.Array
Params = dict[str, Array]


def init_router(
    key: Array, d_model: int, width: int, n_experts: int, layers: int | None
) -> tuple[Params, Params]:
    """Parameters and BatchNorm statistics; `layers=None`: one router for all layers.

    Weights and biases of f1, f2 ~ U(+-1/sqrt(fan_in)), PyTorch's default for linear layers.

    Returns:
      params `w1 [L, D, H], b1 [L, H], w2 [L, H, N], b2 [L, N], bn_scale, bn_bias [L, N]` and
      stats `mean, var [L, N]`, without the L axis when shared.
    """
    lead = () if layers is None else (layers,)

    def uniform(k: Array, shape: tuple[int, ...], fan_in: int) -> Array:
        return jax.random.uniform(k, (*lead, *shape), jnp.float32, -(fan_in**-0.5), fan_in**-0.5)

    keys = jax.random.split(key, 4)
    params = {
        "w1": uniform(keys[0], (d_model, width), d_model),
        "b1": uniform(keys[1], (width,), d_model),
        "w2": uniform(keys[2], (width, n_experts), width),
        "b2": uniform(keys[3], (n_experts,), width),
        "bn_scale": jnp.ones((*lead, n_experts)),
        "bn_bias": jnp.zeros((*lead, n_experts)),
    }
    stats = {"mean": jnp.zeros((*lead, n_experts)), "var": jnp.ones((*lead, n_experts))}
    return params, stats


@shards(lambda params, stats, states, **_: (P(*states[:2], params["w2"][-1]), stats))
def router_logits(
    params: Params,
    stats: Params,
    states: Array,
    *,
    train: bool,
    use_batch_norm: bool = True,
    momentum: float = 0.9,
    eps: float = 1e-5,
    axis_name: str | None = None,
) -> tuple[Array, Params]:
    """Eq. 3: R^i = BN(f2(SiLU(f1(T^i)))), with BatchNorm last, over the N logits.

    Training normalises with the mean and (biased) variance of the global batch and updates the
    running ones with weight `1 - momentum`, both biased as in flax (torch keeps the variance times
    n / (n - 1)); inference uses the running ones, so a row does not depend on the others.
    A shared router computes its statistics over batch and layers.

    Args:
      states: `[B, L, D]`, any float dtype.
      axis_name: the mapped axis that the batch is sharded over (under pmap), else None.

    Returns:
      logits `[B, L, N]` fp32, and the updated statistics.
    """
    layer = "l" if params["w1"].ndim == 3 else ""
    exact = jax.lax.Precision.HIGHEST  # BatchNorm would amplify the rounding of a fast matmul
    states = states.astype(jnp.float32)
    hidden = jnp.einsum(f"bld,{layer}dh->blh", states, params["w1"], precision=exact)
    hidden = jax.nn.silu(hidden + params["b1"])
    logits = jnp.einsum(f"blh,{layer}hn->bln", hidden, params["w2"], precision=exact)
    logits = logits + params["b2"]
    if not use_batch_norm:
        return logits, stats
    if train:
        batch = _batch_statistics(logits, (0,) if layer else (0, 1), axis_name)
        new_stats = {k: momentum * stats[k] + (1 - momentum) * batch[k] for k in stats}
    else:
        batch = new_stats = stats
    normal = (logits - batch["mean"]) * jax.lax.rsqrt(batch["var"] + eps)
    return normal * params["bn_scale"] + params["bn_bias"], new_stats


def _batch_statistics(logits: Array, axes: tuple[int, ...], axis_name: str | None) -> Params:
    """Mean and variance over `axes` and, if named, over equal shards of the batch.

    In two passes, first the global mean and then the squared distances to it: E[x^2] - E[x]^2
    in one pass cancels when the logits hardly vary, as early in training.
    """

    def global_mean(x: Array) -> Array:
        local = x.mean(axes)
        return local if axis_name is None else jax.lax.pmean(local, axis_name)

    mean = global_mean(logits)
    return {"mean": mean, "var": global_mean(jnp.square(logits - mean))}


@shards(lambda logits, k: logits)
def keep_top_k(logits: Array, k: int) -> Array:
    """Eq. 6, 7: softmax over all N, keep the K largest, renormalise them to sum 1.

    The softmax's denominator cancels in the renormalisation, so this is a softmax over the kept
    logits alone, which cannot divide zero by zero. A kept gate that underflows is set to the
    smallest normal number, so exactly K gates are non-zero. Of ties the lower index is kept.

    Args:
      logits: `[..., N]` fp32.

    Returns:
      gates `[..., N]` fp32.

    Raises:
      UserError: K is not between 1 and N.
    """
    if not 1 <= k <= logits.shape[-1]:
        raise UserError(f"k is {k} for {logits.shape[-1]} experts: choose 1 up to all of them")
    kept, indices = jax.lax.top_k(logits, k)
    gates = jnp.maximum(jax.nn.softmax(kept), jnp.finfo(kept.dtype).tiny)
    one_hot = jax.nn.one_hot(indices, logits.shape[-1], dtype=gates.dtype)
    return (gates[..., None] * one_hot).sum(-2)


def gumbel(key: Array | None, logits: Array) -> Array:
    """Eq. 4, 5: softmax(R + g), g ~ Gumbel(0, 1) drawn for every logit; dense, temperature 1.

    Args:
      key: None at inference: no noise. Each shard of a batch needs its own key.
      logits: `[..., N]` fp32.
    """
    noise = 0.0 if key is None else jax.random.gumbel(key, logits.shape, logits.dtype)
    return jax.nn.softmax(logits + noise)
