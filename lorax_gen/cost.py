"""What a model costs, counted from its shapes: parameters, multiply-accumulates, FLOPs.

A multiply-accumulate (MAC) is one product and its addition, two FLOPs. Counted are the products of
matrices; norms, rotations, activations, softmax, biases, lookups, losses and the optimizer are not:
in models of a useful width they are below one per cent. Everything is an exact integer and knows no
device.

The "FLOPs" of the paper's Table 13 are MACs of this count, forward passes only, every token through
the head, attention as T x T:

    prefill_macs(qwen2_1_5b(), 100)     1.5522e11   LoRA-Gen: the question alone   printed 1.552E+11
    prefill_macs(qwen2_1_5b(), 300)     4.7081e11   LoRA: behind its instruction   printed 4.708E+11
    prefill_macs(llama3_8b(), 200)      1.5114e12   the cloud on the instruction
    the first and the third together    1.6666e12   LoRA-Gen's training step       printed 1.667E+12

so its training step has no meta tokens, no generator and no backward pass; `train_step_macs` has.

Dimensions: B rows, T tokens, S positions that a query attends to, D model, F feed-forward, H heads,
K key/value heads, E head size, L layers, V vocabulary, R rank, P prompts, Q queries per prompt,
N experts, M width of the router.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from lorax_gen.method.generator import GeneratorConfig
from lorax_gen.method.lora import count_params
from lorax_gen.models.decoder import DecoderConfig, abstract_params, kernel_shapes
from lorax_gen.system import GeneratorSpec

Ranks = Mapping[str, int]
"""Kernel name -> rank of the LoRA that is applied beside it; a merged one costs nothing."""

RECOMPUTED = {"none": (), "dots": ("attention",), "full": ("kernels", "attention", "lora")}
"""What each entry of `decoder.REMAT_POLICIES` computes again in the backward pass."""


@dataclasses.dataclass(frozen=True)
class Macs:
    """Multiply-accumulates by what they multiply; they add up, and multiply by whole numbers."""

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

    def __rmul__(self, times: int) -> Macs:
        return Macs(*(times * part for part in dataclasses.astuple(self)))

    def training(self, *, frozen: bool, remat: str = "none") -> Macs:
        """Forward and backward, of what these are the forward pass of.

        A product's backward pass is two of its size, one for the gradient of each factor: three in
        all. A frozen kernel or head needs no gradient: two. `remat` adds the forward pass of what
        is computed again; for `full` up to a tenth too much, as the product with `down`, where no
        norm follows it, is needed by no gradient and not really computed again.
        """
        weights = ("kernels", "head") if frozen else ()
        counts = dataclasses.asdict(self).items()
        times = {name: 3 - (name in weights) + (name in RECOMPUTED[remat]) for name, _ in counts}
        return Macs(**{name: times[name] * count for name, count in counts})


# --- a model -------------------------------------------------------------------------------------


def parameters(config: DecoderConfig) -> int:
    """All numbers of the parameter tree."""
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
) -> Macs:
    """One forward pass over B rows of T tokens.

        kernels     B T L (2 D H E + 2 D K E + 3 D F)
        attention   2 B H E pairs, the pairs of query and position summed over layers
        head        B logits D V
        lora        B T L R (D_in + D_out), summed over the kernels that have one

    Args:
      cached: tokens before these, whose keys and values are kept: S = cached + T.
      logits: positions of a row that go through the head; None is all, 0 none.
      causal: pairs are only those that the causal mask and windows let through, at most
        T (T + 1) / 2 a layer, as for a kernel that skips the rest; else T S, as the decoder does.
    """
    layers, shapes = config.num_hidden_layers, kernel_shapes(config)
    pairs = layers * tokens * (cached + tokens)
    if causal:
        last = cached + tokens
        pairs = sum(_seen(last, window) - _seen(cached, window) for window in config.windows)
    low_rank = (rank * sum(shapes[name]) for name, rank in (lora or {}).items())
    return batch * Macs(
        kernels=tokens * layers * sum(d_in * d_out for d_in, d_out in shapes.values()),
        attention=2 * config.num_attention_heads * config.head_dim * pairs,
        head=(tokens if logits is None else logits) * config.hidden_size * config.vocab_size,
        lora=tokens * layers * sum(low_rank),
    )


def _seen(tokens: int, window: int | None) -> int:
    """What the first `tokens` queries see together: 1 + 2 + 3 + ..., each at most a window."""
    beyond = max(tokens - window, 0) if window else 0
    return tokens * (tokens + 1) // 2 - beyond * (beyond + 1) // 2


def mean_flops(tokens: Iterable[float], macs: Callable[[int], Macs]) -> float:
    """FLOPs of `macs(T)`, mean over texts of so many tokens each."""
    counts = Counter(map(int, tokens))
    return sum(n * macs(length).flops for length, n in counts.items()) / counts.total()


def decode_macs(config: DecoderConfig, context: int, batch: int = 1, **options) -> Macs:
    """One more token of each of B rows, which sees `context` tokens, itself among them.

    `options` are `causal` and `lora` of `prefill_macs`.
    """
    return prefill_macs(config, 1, batch, cached=context - 1, **options)


def question_macs(
    config: DecoderConfig, tokens: int, new_tokens: int = 1, *, cached: int = 0, **options
) -> Macs:
    """One question: `tokens` read and an answer of `new_tokens` written, from a cache.

    For LoRA-Gen the tokens are the bare question; for in-context learning the prompt is among them,
    or `cached` where its keys and values are kept from the question before.
    """
    total = prefill_macs(config, tokens, cached=cached, logits=1, **options)
    for written in range(1, new_tokens):  # the last one is never read
        total += decode_macs(config, cached + tokens + written, **options)
    return total


# --- the generator -------------------------------------------------------------------------------


def generated_ranks(generator: GeneratorConfig) -> dict[str, int]:
    """Ranks of a generated LoRA: R over `factors`, R for each expert kept over `products`."""
    kept = generator.top_k if generator.strategy == "keep_top_k" else generator.n_experts
    experts = 1 if generator.composition == "factors" else kept
    return dict.fromkeys(generator.edge_targets, experts * generator.rank)


def generator_macs(
    spec: GeneratorSpec, prompt_length: int, prompts: int = 1, *, causal: bool = False
) -> Macs:
    """A LoRA for each of P prompts of T tokens: the cloud with its own LoRA, router, and eq. 8.

    cloud       `prefill_macs` of T + L tokens (L edge layers: the meta tokens), no head
    router      P L M (D + N), D that of the cloud
    factors     P L N R (D_in + D_out), summed over targets: all N gates, zeros too
    products    P L R D_out for each expert kept: gates into B; picking experts multiplies nothing
    """
    generator, layers = spec.generator, spec.edge.num_hidden_layers
    cloud = prefill_macs(
        spec.cloud,
        prompt_length + layers,
        prompts,
        logits=0,
        causal=causal,
        lora=dict.fromkeys(generator.cloud_targets, generator.cloud_rank),
    )
    router = generator.router_width * (spec.cloud.hidden_size + generator.n_experts)
    shapes, ranks = kernel_shapes(spec.edge), generated_ranks(generator).items()
    if generator.composition == "factors":
        pool = generator.n_experts * sum(rank * sum(shapes[name]) for name, rank in ranks)
    else:
        pool = sum(rank * shapes[name][1] for name, rank in ranks)
    return cloud + Macs(generator=prompts * layers * (router + pool))


def merge_macs(config: DecoderConfig, lora: Ranks) -> Macs:
    """Eq. 1, once for each task: L R D_in D_out, summed over the kernels of a LoRA."""
    shapes = kernel_shapes(config)
    layer = sum(rank * shapes[name][0] * shapes[name][1] for name, rank in lora.items())
    return Macs(lora=config.num_hidden_layers * layer)


# --- training ------------------------------------------------------------------------------------


def tuning_step_macs(
    config: DecoderConfig,
    rows: int,
    length: int,
    lora: Ranks | None = None,
    *,
    answered: int | None = None,
    remat: str = "none",
    causal: bool = False,
) -> Macs:
    """A step of `lora` on frozen weights, or of the weights themselves where there is none.

    Args:
      length: of a row in the batch; the model reads all but the last of its tokens.
      answered: positions of a row that go through the head; None is all that the model reads.
      remat: leave it out for the useful work alone, which is what utilisation (MFU) is a share of.
    """
    forward = prefill_macs(config, length - 1, rows, logits=answered, causal=causal, lora=lora)
    return forward.training(frozen=bool(lora), remat=remat)


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
) -> Macs:
    """A step of LoRA-Gen: P prompts, and P Q rows of the edge with the LoRA of their prompt.

    Both models are frozen, so their kernels count twice; the cloud's LoRA, the router, the pool and
    the generated LoRA count three times. See `tuning_step_macs` for the other arguments.
    """
    reading = generator_macs(spec, prompt_length, prompts, causal=causal)
    return reading.training(frozen=True, remat=remat) + tuning_step_macs(
        spec.edge,
        prompts * queries,
        length,
        generated_ranks(spec.generator),
        answered=answered,
        remat=remat,
        causal=causal,
    )
