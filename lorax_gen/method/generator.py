"""The generator: meta states to gates to the task's LoRA, eq. 3-8 composed.

Trainables and BatchNorm statistics are two explicit trees. The trainables are
`{'meta_tokens', 'cloud_lora', 'router', 'pool'}`; the first two are used inside the cloud model,
which computes the states that this module starts from.

Dims beyond the legend (`lorax_gen.method`): C cloud layers, H router width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import jax
from msgspec import Meta

from lorax_gen.config import BelowOne, NotNegative, Positive, Size, check, to_dict
from lorax_gen.errors import UserError
from lorax_gen.method.experts import compose, init_pool
from lorax_gen.method.lora import Tree, init_lora, scaled
from lorax_gen.method.meta_tokens import init_meta_tokens
from lorax_gen.method.router import gumbel, init_router, keep_top_k, router_logits

Array = jax.Array
Shapes = Mapping[str, tuple[int, int]]

Experts = Annotated[int, Meta(ge=1, le=2**16)]  # task cards number them in 16 bits
Width = Annotated[int, Meta(ge=1, le=2**24)]
Epsilon = Annotated[float, Meta(ge=1e-30, le=1)]


@dataclass(frozen=True)
class GeneratorConfig:
    """The paper's constants, and an option wherever the paper leaves a choice open.

    Raises:
      UserError: a value is out of range; the message names the field.
    """

    n_experts: Experts = 8
    """Experts per pool (n)."""
    top_k: Experts = 2
    """Experts kept by KeepTOP-K (K)."""
    rank: Width = 16
    """Rank of an expert (r)."""
    alpha: Positive = 16.0
    """The generated LoRA is scaled by alpha / rank."""
    strategy: Literal["keep_top_k", "gumbel"] = "keep_top_k"
    """How logits become gates: eq. 6-7, or eq. 4-5 (an ablation)."""
    composition: Literal["factors", "products"] = "factors"
    """Eq. 8 sums A and B each (rank r), or the products A B (rank K r)."""
    pool: Literal["per_layer", "shared"] = "per_layer"
    """One pool of experts per edge layer, or one for all."""
    router: Literal["per_layer", "shared"] = "per_layer"
    """One router per edge layer, or one for all."""
    router_width: Width = 512
    """Hidden width of the router."""
    batch_norm: bool = True
    """BatchNorm over the logits, the last step of eq. 3."""
    bn_momentum: BelowOne = 0.9
    """Decay of BatchNorm's running statistics per step."""
    bn_eps: Epsilon = 1e-5
    """Added to BatchNorm's variance."""
    meta_tokens: Literal["per_layer", "shared"] = "per_layer"
    """One meta token per edge layer, or one vector for all."""
    balance_coefficient: NotNegative = 0.01
    """Weight of the balance loss (c in eq. 9)."""
    cloud_rank: Width = 16
    """Rank of the cloud model's own LoRA."""
    cloud_alpha: Positive = 16.0
    """That LoRA is scaled by cloud_alpha / cloud_rank."""
    cloud_dropout: BelowOne = 0.05
    """Dropout rate on that LoRA's input, in training."""
    cloud_targets: tuple[str, ...] = ("q", "v")
    """Kernels of the cloud model that it adapts."""
    edge_targets: tuple[str, ...] = ("gate", "up", "down")
    """Kernels of the edge model that an expert adapts."""
    last_layers: Size | None = None
    """Only so many of the edge's last layers have experts, and a meta token each; None: all."""

    def __post_init__(self):
        check(self)
        if self.top_k > self.n_experts:
            raise UserError(
                f"top_k is {self.top_k}: choose a number at most n_experts, {self.n_experts}"
            )
        for name in ("cloud_targets", "edge_targets"):
            names = getattr(self, name)
            if not 0 < len(set(names)) == len(names):
                raise UserError(f"{name} is {names!r}; list one or more kernels, each once")

    def layers(self, edge_layers: int) -> int:
        """How many layers of an edge have experts, L in everything that the generator makes.

        Raises UserError where `last_layers` is more than the edge has.
        """
        return select_layers(self.last_layers, edge_layers)

    def stored(self) -> dict[str, Any]:
        """Plain values, which of all layers are those of the first versions: no `last_layers`."""
        values = to_dict(self)
        return {k: v for k, v in values.items() if (k, v) != ("last_layers", None)}


class Generated(NamedTuple):
    """What one pass of the generator returns."""

    lora: Tree  # [L, B, ...] per example, alpha / r folded in
    gates: Array  # [B, L, N]
    stats: dict[str, Array]  # updated BatchNorm statistics


def init_generator(
    key: Array,
    config: GeneratorConfig,
    *,
    edge_layers: int,
    edge_shapes: Shapes,
    cloud_layers: int,
    cloud_shapes: Shapes,
    cloud_embedding: Array,
) -> tuple[dict[str, Any], dict[str, Array]]:
    """Initial trainables and BatchNorm statistics, fp32. The generated LoRA is zero at first.

    The trainables, with L = `config.layers(edge_layers)`, H = `router_width` and R = `rank`:

    * `meta_tokens`: `[L, D]`; `[1, D]` where `config.meta_tokens` is shared.
    * `cloud_lora`: for each of `cloud_targets` `a [C, D_in, cloud_rank]` and
      `b [C, cloud_rank, D_out]`.
    * `router`: `w1 [L, D, H]`, `b1 [L, H]`, `w2 [L, H, N]`, `b2 [L, N]`, `bn_scale [L, N]` and
      `bn_bias [L, N]`; without L where `config.router` is shared.
    * `pool`: for each of `edge_targets` `a [L, N, D_in, R]` and `b [L, N, R, D_out]`; without L
      where `config.pool` is shared.

    The statistics: `mean [L, N]` and `var [L, N]`, without L where `config.router` is shared.

    Args:
      edge_layers, cloud_layers: that the models have.
      edge_shapes, cloud_shapes: kernel name -> (D_in, D_out) of one layer; only targets are used.
      cloud_embedding: `[D]`, the existing embedding that the meta tokens are initialised from.

    Raises:
      UserError: a target is not a kernel of its model, or the edge has fewer than `last_layers`.
    """
    layers = config.layers(edge_layers)
    edge = select_kernels(edge_shapes, config.edge_targets, "edge")
    cloud = select_kernels(cloud_shapes, config.cloud_targets, "cloud")
    router_layers = layers if config.router == "per_layer" else None
    pool_layers = layers if config.pool == "per_layer" else None
    meta_key, cloud_key, router_key, pool_key = jax.random.split(key, 4)
    router, stats = init_router(
        router_key, cloud_embedding.shape[-1], config.router_width, config.n_experts, router_layers
    )
    params = {
        "meta_tokens": init_meta_tokens(meta_key, cloud_embedding, layers, config.meta_tokens),
        "cloud_lora": init_lora(cloud_key, cloud, config.cloud_rank, cloud_layers),
        "router": router,
        "pool": init_pool(pool_key, edge, config.rank, config.n_experts, pool_layers),
    }
    return params, stats


def select_layers(last_layers: int | None, layers: int) -> int:
    """How many of a model's layers are adapted; raises UserError where it has fewer."""
    if last_layers is not None and last_layers > layers:
        raise UserError(
            f"last_layers is {last_layers}, but the edge model has {layers} layers: choose that "
            "many or fewer"
        )
    return last_layers or layers


def select_kernels(shapes: Shapes, targets: tuple[str, ...], model: str) -> Shapes:
    """The shapes of the targets; raises UserError for one that is no kernel of the model."""
    for name in targets:
        if name not in shapes:
            raise UserError(
                f"{model}_targets names {name!r}, which the {model} model lacks: "
                f"choose from {sorted(shapes)}"
            )
    return {name: shapes[name] for name in targets}


def gates_from_states(
    params: dict[str, Any],
    stats: dict[str, Array],
    states: Array,
    config: GeneratorConfig,
    *,
    train: bool = False,
    key: Array | None = None,
    axis_name: str | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Eq. 3-7: meta states `[B, L, D]` to gates `[B, L, N]` and the updated statistics.

    Args:
      key: for the noise of the `gumbel` strategy in training; unused otherwise.
      axis_name: the mapped axis that the batch is sharded over (under pmap), else None.

    Raises:
      UserError: training with `gumbel` and no key.
    """
    logits, stats = router_logits(
        params["router"],
        stats,
        states,
        train=train,
        use_batch_norm=config.batch_norm,
        momentum=config.bn_momentum,
        eps=config.bn_eps,
        axis_name=axis_name,
    )
    if config.strategy == "keep_top_k":
        return keep_top_k(logits, config.top_k), stats
    if train and key is None:
        raise UserError("strategy 'gumbel' draws noise in training: pass a key")
    return gumbel(key if train else None, logits), stats


def lora_from_gates(pool: Tree, gates: Array, config: GeneratorConfig) -> Tree:
    """Eq. 8 with the scale alpha / r of eq. 1 folded in.

    Args:
      gates: `[L, N]` gives a tree of `[L, D, R]`; `[B, L, N]` one of `[L, B, D, R]`.
    """
    top_k = config.top_k if config.strategy == "keep_top_k" else None  # gumbel gates are dense
    return scaled(compose(pool, gates, config.composition, top_k), config.alpha / config.rank)


def generate(
    params: dict[str, Any],
    stats: dict[str, Array],
    states: Array,
    config: GeneratorConfig,
    *,
    train: bool = False,
    key: Array | None = None,
    axis_name: str | None = None,
) -> Generated:
    """Eq. 3-8: meta states `[B, L, D]` to one LoRA per example; see `gates_from_states`."""
    gates, stats = gates_from_states(
        params, stats, states, config, train=train, key=key, axis_name=axis_name
    )
    return Generated(lora_from_gates(params["pool"], gates, config), gates, stats)


def cloud_lora(params: dict[str, Any], config: GeneratorConfig) -> Tree:
    """The cloud model's own adapter, `[cloud layers, D, R]`, with its scale folded in."""
    return scaled(params["cloud_lora"], config.cloud_alpha / config.cloud_rank)
