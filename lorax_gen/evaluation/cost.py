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
N experts, M router width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from lorax_gen.method.generator import GeneratorConfig
from lorax_gen.models.decoder import DecoderConfig, kernel_shapes
from lorax_gen.training.step import GeneratorSpec

Attention = Literal["full", "causal"]
"""Pairs of query and position: all of them, as the decoder computes, or only those that the causal
mask and windows let through, as a kernel that skips the rest would."""
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
        is computed again, which is a little too much for `full`: what no gradient needs, such as
        the product with `down`, is left out by the compiler.
        """
        weights = ("kernels", "head") if frozen else ()
        again = RECOMPUTED[remat]
        return Macs(
            **{
                name: (3 - (name in weights) + (name in again)) * count
                for name, count in dataclasses.asdict(self).items()
            }
        )


# --- a model -------------------------------------------------------------------------------------


def parameters(config: DecoderConfig) -> int:
    """V D (twice if the head is untied) + D + L (kernels + 2 or 4 norms of D + biases of q, k, v)."""
    shapes, d = kernel_shapes(config), config.hidden_size
    layer = sum(d_in * d_out for d_in, d_out in shapes.values())
    layer += (4 if config.post_norms else 2) * d
    if config.qkv_bias:
        layer += sum(shapes[name][1] for name in ("q", "k", "v"))
    tables = 1 if config.tie_word_embeddings else 2
    return tables * config.vocab_size * d + d + config.num_hidden_layers * layer


def prefill_macs(
    config: DecoderConfig,
    tokens: int,
    batch: int = 1,
    *,
    logits: int | None = None,
    attention: Attention = "full",
    lora: Ranks | None = None,
) -> Macs:
    """One forward pass over B rows of T tokens.

        kernels     B T L (2 D H E + 2 D K E + 3 D F)
        attention   B 2 H E S, S summed over layers and queries: `full` L T T, `causal` at most
                    L T (T + 1) / 2, in a layer with a window of W less (T - W) (T - W + 1) / 2
        head        B logits D V
        lora        B T L R (D_in + D_out), summed over the kernels that have one

    Args:
      logits: positions of a row that go through the head: None is all, 1 the last, 0 none.
    """
    pairs = sum(_pairs(tokens, window, attention) for window in config.windows)
    return batch * _forward(config, tokens, pairs, tokens if logits is None else logits, lora)


def decode_macs(
    config: DecoderConfig,
    context: int,
    batch: int = 1,
    *,
    attention: Attention = "full",
    lora: Ranks | None = None,
) -> Macs:
    """One more token of each of B rows, S = `context` tokens with itself, the others being cached.

    As `prefill_macs` with T = 1 and one position through the head; `causal` ends S at a window.
    """
    seen = (min(context, window or context) for window in config.windows)
    pairs = sum(seen) if attention == "causal" else config.num_hidden_layers * context
    return batch * _forward(config, 1, pairs, 1, lora)


def question_macs(
    config: DecoderConfig, context: int, new_tokens: int = 1, *, attention: Attention = "full"
) -> Macs:
    """One question: `context` tokens read and an answer of `new_tokens` written, from a cache.

    The context is the bare question for LoRA-Gen, and the prompt too for in-context learning.
    """
    total = prefill_macs(config, context, logits=1, attention=attention)
    for position in range(context + 1, context + new_tokens):  # the last one written is never read
        total += decode_macs(config, position, attention=attention)
    return total


def _pairs(tokens: int, window: int | None, attention: Attention) -> int:
    if attention == "full":
        return tokens * tokens
    beyond = max(tokens - window, 0) if window else 0
    return tokens * (tokens + 1) // 2 - beyond * (beyond + 1) // 2


def _forward(config: DecoderConfig, tokens: int, pairs: int, logits: int, lora: Ranks | None):
    shapes = kernel_shapes(config)
    per_token = {name: d_in * d_out for name, (d_in, d_out) in shapes.items()}
    low_rank = (rank * sum(shapes[name]) for name, rank in (lora or {}).items())
    return Macs(
        kernels=tokens * config.num_hidden_layers * sum(per_token.values()),
        attention=2 * config.num_attention_heads * config.head_dim * pairs,
        head=logits * config.hidden_size * config.vocab_size,
        lora=tokens * config.num_hidden_layers * sum(low_rank),
    )


# --- the generator -------------------------------------------------------------------------------


def generated_ranks(generator: GeneratorConfig) -> dict[str, int]:
    """Ranks of a generated LoRA: R over `factors`, R for each expert kept over `products`."""
    experts = 1 if generator.composition == "factors" else _kept(generator)
    return dict.fromkeys(generator.edge_targets, experts * generator.rank)


def generator_macs(
    spec: GeneratorSpec, prompt_length: int, prompts: int = 1, *, attention: Attention = "full"
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
        attention=attention,
        lora=dict.fromkeys(generator.cloud_targets, generator.cloud_rank),
    )
    router = generator.router_width * (spec.cloud.hidden_size + generator.n_experts)
    shapes = [kernel_shapes(spec.edge)[name] for name in generator.edge_targets]
    if generator.composition == "factors":
        pool = generator.n_experts * generator.rank * sum(d_in + d_out for d_in, d_out in shapes)
    else:
        pool = _kept(generator) * generator.rank * sum(d_out for _, d_out in shapes)
    return cloud + Macs(generator=prompts * layers * (router + pool))


def merge_macs(config: DecoderConfig, lora: Ranks) -> Macs:
    """Eq. 1, once for each task: L R D_in D_out, summed over the kernels of a LoRA."""
    shapes = kernel_shapes(config)
    layer = sum(rank * shapes[name][0] * shapes[name][1] for name, rank in lora.items())
    return Macs(lora=config.num_hidden_layers * layer)


def _kept(generator: GeneratorConfig) -> int:
    return generator.top_k if generator.strategy == "keep_top_k" else generator.n_experts


# --- training ------------------------------------------------------------------------------------


def tuning_step_macs(
    config: DecoderConfig,
    rows: int,
    length: int,
    lora: Ranks | None = None,
    *,
    answered: int | None = None,
    remat: str = "none",
    attention: Attention = "full",
) -> Macs:
    """A step of `lora` on frozen weights, or of the weights themselves where there is none.

    Args:
      length: of a row in the batch; the model reads all but the last of its tokens.
      answered: positions of a row that go through the head; None is all that the model reads.
      remat: leave it out for the useful work alone, which is what utilisation (MFU) is a share of.
    """
    forward = prefill_macs(
        config, length - 1, rows, logits=answered, attention=attention, lora=lora
    )
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
    attention: Attention = "full",
) -> Macs:
    """A step of LoRA-Gen: P prompts, and P Q rows of the edge with the LoRA of their prompt.

    Both models are frozen, so their kernels count twice; the cloud's LoRA, the router, the pool and
    the generated LoRA count three times. See `tuning_step_macs` for the other arguments.
    """
    reading = generator_macs(spec, prompt_length, prompts, attention=attention)
    return reading.training(frozen=True, remat=remat) + tuning_step_macs(
        spec.edge,
        prompts * queries,
        length,
        generated_ranks(spec.generator),
        answered=answered,
        remat=remat,
        attention=attention,
    )
