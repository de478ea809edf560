"""The cost of a model, counted from its shapes: parameters, multiply-accumulates, FLOPs.

A multiply-accumulate (MAC) is one product and its addition, two FLOPs. Only matrix products are
counted. Norms, rotary embeddings, activations, softmax, biases, lookups, losses and the optimizer
are not: in models of a useful width they are below one per cent. All counts are exact integers and
do not depend on the device.

The "FLOPs" of the paper's Table 13 are MACs of this count, forward passes only, every token through
the head, attention as T x T:

    prefill_macs(qwen2_1_5b(), 100)     1.5522e11   LoRA-Gen: the question alone   printed 1.552E+11
    prefill_macs(qwen2_1_5b(), 300)     4.7081e11   LoRA: after its instruction    printed 4.708E+11
    prefill_macs(llama3_8b(), 200)      1.5114e12   the cloud on the instruction
    the first and the third together    1.6666e12   LoRA-Gen's training step       printed 1.667E+12

so its training step has no meta tokens, generator or backward pass; `train_step_macs` counts them.

Dims beyond the legend (`lorax_gen.method`): S positions that a query attends to, K key/value heads,
E head size, M router width.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lorax_gen.baselines.autocompressor import CompressorConfig
from lorax_gen.baselines.loramoe import LoraMoeConfig
from lorax_gen.baselines.mixlora import MixLoraConfig
from lorax_gen.method.generator import GeneratorConfig
from lorax_gen.method.lora import count_params
from lorax_gen.models.config import MLP_KERNELS
from lorax_gen.models.decoder import DecoderConfig, abstract_params, kernel_shapes
from lorax_gen.system import GeneratorSpec

Ranks = Mapping[str, int]
"""Kernel name -> rank of its unmerged LoRA; a merged one adds no cost."""

RECOMPUTED = {"none": (), "dots": ("attention",), "full": ("kernels", "attention", "lora")}
"""What each entry of `decoder.REMAT_POLICIES` recomputes in the backward pass."""


@dataclasses.dataclass(frozen=True)
class Macs:
    """Multiply-accumulates by what they multiply; supports `+`, and `*` with an integer."""

    kernels: int = 0
    """Activations with the kernels of the layers."""
    attention: int = 0
    """Queries with keys, weights with values."""
    head: int = 0
    """Hidden states with the head, tied or not."""
    lora: int = 0
    """Activations with unmerged LoRA factors, or the factors with each other when merging."""
    generator: int = 0
    """Router and pool of experts."""

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))

    @property
    def flops(self) -> int:
        return 2 * self.total

    def __add__(self, other: Macs) -> Macs:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Macs(*(a + b for a, b in pairs))

    def __sub__(self, other: Macs) -> Macs:
        return self + -1 * other

    def __rmul__(self, times: int) -> Macs:
        return Macs(*(times * part for part in dataclasses.astuple(self)))

    def training(self, *, frozen: bool, remat: str = "none") -> Macs:
        """MACs of forward and backward pass, where `self` counts the forward pass.

        A product's backward pass is two products of its size, one for the gradient of each factor:
        three in total. A frozen kernel or head needs no gradient: two. `remat` adds the forward
        pass of what is recomputed; for `full` this is up to a tenth too much, since no gradient
        needs the product with `down` where no norm follows it, and it is not recomputed.
        """
        weights = ("kernels", "head") if frozen else ()
        counts = dataclasses.asdict(self).items()
        times = {name: 3 - (name in weights) + (name in RECOMPUTED[remat]) for name, _ in counts}
        return Macs(**{name: times[name] * count for name, count in counts})


# --- a model -------------------------------------------------------------------------------------


def parameters(config: DecoderConfig) -> int:
    """The number of scalars in the parameter tree."""
    return count_params(abstract_params(config))


def prefill_macs(
    config: DecoderConfig,
    tokens: int,
    batch: int = 1,
    *,
    cached: int = 0,
    logits: int | None = None,
    causal: bool = False,
    lora: Ranks | None = None,
    layers: int | None = None,
) -> Macs:
    """One forward pass over B rows of T tokens.

        kernels     B T L (2 D H E + 2 D K E + 3 D F), without a gate 2 D F, and
                    B T D W where embeddings of another width W are projected
        attention   2 B H E pairs, the pairs of query and position summed over layers
        head        B logits D V; of another width B logits (D + V) W
        lora        B T L R (D_in + D_out), summed over the kernels that have one

    Args:
      layers: that have a LoRA, the last so many; None: all.
      cached: earlier tokens whose keys and values are cached: S = cached + T.
      logits: positions of a row that go through the head; None: all.
      causal: counts only pairs that the causal mask and windows allow, at most T (T + 1) / 2 per
        layer, as for a kernel that skips the others; else T S, as the decoder computes.
    """
    projection = config.hidden_size * (config.word_embed_proj_dim or 0)
    per_logits = config.embedding_size * config.vocab_size + projection
    other = Macs(
        kernels=tokens * projection,
        head=(tokens if logits is None else logits) * per_logits,
        lora=lora_macs(config, tokens, lora or {}, layers).lora,
    )
    return batch * (_layers_macs(config, tokens, config.windows, cached, causal) + other)


def _layers_macs(
    config: DecoderConfig,
    tokens: int,
    windows: Sequence[int | None],
    cached: int = 0,
    causal: bool = False,
) -> Macs:
    """Kernels and attention of the layers that these are the windows of; see `prefill_macs`."""
    last = cached + tokens
    pairs = len(windows) * tokens * last
    if causal:
        pairs = sum(_seen(last, window) - _seen(cached, window) for window in windows)
    layer = sum(d_in * d_out for d_in, d_out in kernel_shapes(config).values())
    return Macs(
        kernels=len(windows) * tokens * layer,
        attention=2 * config.num_attention_heads * config.head_dim * pairs,
    )


def _seen(tokens: int, window: int | None) -> int:
    """Keys that the first `tokens` queries attend to: 1 + 2 + 3 + ..., each at most `window`."""
    beyond = max(tokens - window, 0) if window else 0
    return tokens * (tokens + 1) // 2 - beyond * (beyond + 1) // 2


def mean_flops(tokens: Iterable[float], macs: Callable[[int], Macs]) -> float:
    """Mean FLOPs of `macs(T)` over texts with these numbers of tokens."""
    counts = Counter(map(int, tokens))
    return sum(n * macs(length).flops for length, n in counts.items()) / counts.total()


def decode_macs(config: DecoderConfig, context: int, batch: int = 1, **options: Any) -> Macs:
    """One decoding step of B rows, whose token attends to `context` tokens including itself.

    `options` are `causal`, `lora` and `layers` of `prefill_macs`.
    """
    return prefill_macs(config, 1, batch, cached=context - 1, **options)


def question_macs(
    config: DecoderConfig, tokens: int, new_tokens: int = 1, *, cached: int = 0, **options: Any
) -> Macs:
    """One question: prefill of `tokens`, then an answer of `new_tokens` decoded with a cache.

    For LoRA-Gen the tokens are the bare question; for in-context learning they include the prompt,
    or it is `cached` where its keys and values are kept from the previous question.
    """
    total = prefill_macs(config, tokens, cached=cached, logits=1, **options)
    for written in range(1, new_tokens):  # the last one is never fed back
        total += decode_macs(config, cached + tokens + written, **options)
    return total


# --- the generator -------------------------------------------------------------------------------


def generated_ranks(generator: GeneratorConfig) -> dict[str, int]:
    """Ranks of a generated LoRA: R for `factors`, R per expert kept for `products`."""
    kept = generator.top_k if generator.strategy == "keep_top_k" else generator.n_experts
    experts = 1 if generator.composition == "factors" else kept
    return dict.fromkeys(generator.edge_targets, experts * generator.rank)


def generator_macs(
    spec: GeneratorSpec,
    prompt_length: int,
    prompts: int = 1,
    *,
    causal: bool = False,
    router: int | None = None,
) -> Macs:
    """A LoRA for each of P prompts of T tokens: the cloud with its own LoRA, the router, and eq. 8.

    cloud       `prefill_macs` of T + L tokens (L edge layers with experts: the meta tokens), no
                head
    router      P L M (D + N), D that of the cloud
    factors     P L N R (D_in + D_out), summed over targets: all N gates, including zeros
    products    P L R D_out per expert kept: gates into B; indexing experts needs no products

    Args:
      router: what stands in place of the router's M (D + N).
    """
    generator, layers = spec.generator, spec.layers
    cloud = prefill_macs(
        spec.cloud,
        prompt_length + layers,
        prompts,
        logits=0,
        causal=causal,
        lora=dict.fromkeys(generator.cloud_targets, generator.cloud_rank),
    )
    if router is None:
        router = generator.router_width * (spec.cloud.hidden_size + generator.n_experts)
    shapes, ranks = kernel_shapes(spec.edge), generated_ranks(generator).items()
    if generator.composition == "factors":
        pool = generator.n_experts * sum(rank * sum(shapes[name]) for name, rank in ranks)
    else:
        pool = sum(rank * shapes[name][1] for name, rank in ranks)
    return cloud + Macs(generator=prompts * layers * (router + pool))


def direct_router(spec: GeneratorSpec) -> int:
    """`router` of direct generation: D H, from a meta state to its units; the network's last layer
    counts as `factors` of H + 1 experts."""
    return spec.cloud.hidden_size * (spec.generator.n_experts - 1)


def merge_macs(config: DecoderConfig, lora: Ranks, layers: int | None = None) -> Macs:
    """Eq. 1, once per task: L R D_in D_out, summed over the kernels of a LoRA of L `layers`."""
    shapes = kernel_shapes(config)
    layer = sum(rank * shapes[name][0] * shapes[name][1] for name, rank in lora.items())
    return Macs(lora=(layers or config.num_hidden_layers) * layer)


# --- prompts that are compressed -----------------------------------------------------------------


def compressor_ranks(compressor: CompressorConfig) -> dict[str, int]:
    """Ranks of the LoRA that a compressor reads and answers with."""
    return dict.fromkeys(compressor.targets, compressor.rank)


def compress_macs(
    config: DecoderConfig,
    compressor: CompressorConfig,
    prompt_length: int,
    prompts: int = 1,
    *,
    head: bool = False,
    **options: Any,
) -> Macs:
    """A soft prompt for each of P prompts of T tokens: `prefill_macs` of each segment, after the
    soft prompt of those before it (segment s: s K vectors) and before K summary tokens.

    Args:
      head: the prompt's tokens go through the head, as in training on them.
      options: `causal` and `lora` of `prefill_macs`.
    """
    total, count, k = Macs(), compressor.segments, compressor.vectors
    for s in range(count):
        own = prompt_length * (s + 1) // count - prompt_length * s // count
        tokens = s * k + own + k
        total += prefill_macs(config, tokens, prompts, logits=own if head else 0, **options)
    return total


def compressed_macs(
    config: DecoderConfig, compressor: CompressorConfig, tokens: int, **options: Any
) -> Macs:
    """A question of T tokens after a soft prompt, read with it: `prefill_macs` of S K + T."""
    return prefill_macs(config, compressor.length + tokens, **options)


# --- adapters that are not merged ----------------------------------------------------------------


def no_macs(tokens: int) -> Macs:
    """Of an adapter that is merged, or of none."""
    return Macs()


def lora_macs(config: DecoderConfig, tokens: int, ranks: Ranks, layers: int | None = None) -> Macs:
    """What LoRAs of L `layers`, None: all, add to a forward pass over T tokens:
    T L R (D_in + D_out), summed over kernels."""
    shapes = kernel_shapes(config)
    layer = sum(rank * sum(shapes[name]) for name, rank in ranks.items())
    return Macs(lora=tokens * (layers or config.num_hidden_layers) * layer)


def loramoe_macs(config: DecoderConfig, tokens: int, moe: LoraMoeConfig) -> Macs:
    """What LoRAMoE adds: T L N (D_in + R (D_in + D_out)) summed over feed-forward kernels, the
    routers and all experts."""
    shapes = [shape for name, shape in kernel_shapes(config).items() if name in MLP_KERNELS]
    expert = sum(d_in + moe.rank * (d_in + d_out) for d_in, d_out in shapes)
    return Macs(lora=tokens * config.num_hidden_layers * moe.n_experts * expert)


def mixlora_macs(config: DecoderConfig, tokens: int, mix: MixLoraConfig) -> Macs:
    """What MixLoRA adds, as `baselines.mixlora` computes it.

        router         T L D N
        experts        T L N R (D + K F) for each feed-forward kernel: the factors of N experts at
                       once, on the K hidden vectors of a token
        attention      `lora_macs` of q, k, v and o

    The frozen network is that of the model, once for each token. Were tokens sorted by expert, the
    factors of K experts would do: K R (D + F) for each kernel.
    """
    shapes, n = kernel_shapes(config), mix.n_experts
    kernels = sum(name in MLP_KERNELS for name in shapes)
    wide = config.hidden_size + mix.top_k * config.intermediate_size
    layer = config.hidden_size * n + kernels * n * mix.rank * wide
    attention = {name: mix.rank for name in shapes if name not in MLP_KERNELS}
    return Macs(lora=tokens * config.num_hidden_layers * layer) + lora_macs(
        config, tokens, attention
    )


# --- training ------------------------------------------------------------------------------------


def tuning_step_macs(
    config: DecoderConfig,
    rows: int,
    length: int,
    lora: Ranks | None = None,
    *,
    adapter: Callable[[int], Macs] | None = None,
    layers: int | None = None,
    answered: int | None = None,
    remat: str = "none",
    causal: bool = False,
) -> Macs:
    """A training step of `lora` or of an `adapter` on frozen weights, or of the weights themselves
    without either.

    Args:
      length: tokens per row of the batch; the model reads all but the last.
      adapter: what an adapter adds to a forward pass over so many tokens.
      layers: that are adapted, the last so many; None: all. The others have a forward pass alone.
      answered: positions of a row that go through the head; None: all that the model reads.
      remat: "none" counts useful work only, the numerator of the model FLOPs utilisation (MFU).
    """
    tokens = length - 1
    options: dict[str, Any] = {"causal": causal, "lora": lora, "layers": layers}
    forward = prefill_macs(config, tokens, rows, logits=answered, **options)
    if adapter is not None:
        forward += rows * adapter(tokens)
    adapts, below = bool(lora) or adapter is not None, Macs()
    if adapts and layers is not None:
        windows = config.windows[: config.num_hidden_layers - layers]
        below = rows * _layers_macs(config, tokens, windows, causal=causal)
    return below + (forward - below).training(frozen=adapts, remat=remat)


def train_step_macs(
    spec: GeneratorSpec,
    *,
    prompts: int,
    queries: int,
    prompt_length: int,
    length: int,
    answered: int | None = None,
    remat: str = "none",
    causal: bool = False,
    router: int | None = None,
) -> Macs:
    """A training step of LoRA-Gen: P prompts, and P Q rows of the edge with their prompt's LoRA.

    Both models are frozen, so their kernels count twice, or once in edge layers before the first
    one with experts; the cloud's LoRA, the router, the pool and
    the generated LoRA count three times. See `generator_macs` for `router`, `tuning_step_macs` for
    the other arguments.
    """
    reading = generator_macs(spec, prompt_length, prompts, causal=causal, router=router)
    return reading.training(frozen=True, remat=remat) + tuning_step_macs(
        spec.edge,
        prompts * queries,
        length,
        generated_ranks(spec.generator),
        layers=spec.layers,
        answered=answered,
        remat=remat,
        causal=causal,
    )


def compressor_step_macs(
    config: DecoderConfig,
    compressor: CompressorConfig,
    *,
    prompts: int,
    queries: int,
    prompt_length: int,
    length: int,
    head: bool,
    answered: int | None = None,
    remat: str = "none",
    causal: bool = False,
) -> Macs:
    """A training step of a compressor: P prompts, and P Q questions after their soft prompts.

    As if no gradient were stopped between sub-steps; see `compress_macs` and `tuning_step_macs` for
    the arguments.
    """
    options: dict[str, Any] = {"causal": causal, "lora": compressor_ranks(compressor)}
    reading = compress_macs(config, compressor, prompt_length, prompts, head=head, **options)
    rows, answered = prompts * queries, length - 1 if answered is None else answered
    answering = compressed_macs(
        config, compressor, length - 1, batch=rows, logits=answered, **options
    )
    return (reading + answering).training(frozen=True, remat=remat)
