"""Accuracy on questions with one right answer, in jitted batches of one shape.

A question counts as right when every token of its answer is the most likely one given what stands
before it: exactly when greedy decoding would write that answer.

Dimensions: B rows, T time, L edge layers, N experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from lorax_gen.data import batches
from lorax_gen.data.batches import Encoder
from lorax_gen.method.generator import GeneratorConfig, gates_from_states, lora_from_gates
from lorax_gen.method.lora import Tree
from lorax_gen.models import decoder
from lorax_gen.models.decoder import Array, DecoderConfig, Params
from lorax_gen.models.huggingface import Model
from lorax_gen.training import hosts
from lorax_gen.training.step import GeneratorSpec, meta_states

Question = tuple[str, str]


@partial(jax.jit, static_argnames="config")
def answers_right(
    params: Params, config: DecoderConfig, tokens: Array, answer: Array, lora: Tree | None = None
) -> Array:
    """`[B]` bool: all marked tokens of `tokens: [B, T]` are the most likely ones."""
    hidden = decoder.hidden_states(params, config, tokens[:, :-1], lora=lora)
    likeliest = jnp.argmax(decoder.logits(params, config, hidden), axis=-1)
    return jnp.all((likeliest == tokens[:, 1:]) | ~answer[:, 1:], axis=1)


@partial(jax.jit, static_argnames=("config", "generator"))
def answers_right_with_gates(
    params: Params,
    config: DecoderConfig,
    tokens: Array,
    answer: Array,
    pool: Tree,
    gates: Array,
    generator: GeneratorConfig,
) -> Array:
    """As `answers_right`, row b answered by the edge with the LoRA of `gates: [B, L, N]`."""
    return answers_right(params, config, tokens, answer, lora_from_gates(pool, gates, generator))


@partial(jax.jit, static_argnames="spec")
def prompt_gates(
    params: dict, stats: dict, cloud: Params, spec: GeneratorSpec, prompt: Array, lengths: Array
) -> Array:
    """Gates `[P, L, N]` of prompts `[P, T]`, at inference: no prompt changes another's gates."""
    states = meta_states(params, cloud, spec, prompt, lengths)
    return gates_from_states(params, stats, states, spec.generator)[0]


def in_batches(score: Callable[..., Array], batch: dict[str, np.ndarray], size: int) -> np.ndarray:
    """`score(part)` over slices of `size` rows, the last one padded by repeating its last row."""
    rows = len(next(iter(batch.values())))
    parts = []
    for start in range(0, rows, size):
        index = np.minimum(np.arange(start, start + size), rows - 1)
        part = score({name: value[index] for name, value in batch.items()})
        parts.append(hosts.gather(part))
    return np.concatenate([np.asarray(part) for part in parts])[:rows]


def score_questions(
    model_params: Params,
    config: DecoderConfig,
    encoder: Encoder,
    questions: Sequence[Question],
    length: int,
    *,
    lora: Tree | None = None,
    batch_size: int = 128,
) -> np.ndarray:
    """`[len(questions)]` bool, with one LoRA for all of them or none."""
    batch = batches.question_batch(encoder, questions, length)
    return in_batches(
        lambda part: answers_right(model_params, config, part["tokens"], part["answer"], lora),
        batch,
        batch_size,
    )


def score_specialised(
    params: dict,
    stats: dict,
    cloud: Model,
    edge: Model,
    spec: GeneratorSpec,
    prompts: Sequence[str],
    questions: Sequence[tuple[int, Question]],
    *,
    prompt_length: int,
    length: int,
    batch_size: int = 128,
) -> np.ndarray:
    """`[len(questions)]` bool: bare questions `(i, pair)`, the edge specialised by prompt i."""
    gates = in_batches(
        lambda part: prompt_gates(
            params, stats, cloud.params, spec, part["prompt"], part["prompt_lengths"]
        ),
        batches.prompt_batch(Encoder(cloud.tokenizer), prompts, prompt_length),
        32,
    )
    batch = batches.question_batch(Encoder(edge.tokenizer), [pair for _, pair in questions], length)
    return in_batches(
        lambda part: answers_right_with_gates(
            edge.params,
            edge.config,
            part["tokens"],
            part["answer"],
            params["pool"],
            part["gates"],
            spec.generator,
        ),
        batch | {"gates": gates[[i for i, _ in questions]]},
        batch_size,
    )
