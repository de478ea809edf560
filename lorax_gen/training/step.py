"""The train step and its losses.

A loss is `loss(params, stats, frozen, batch, key, axis_name) -> (scalar, (stats, metrics))`.
`make_train_step` turns any of them into

    train_step(state, frozen, batch, axis_name=None) -> (state, metrics)

for `jax.jit`, where the batch is global and XLA inserts the collectives, or for
`jax.pmap(..., axis_name=...)`, where each device holds a shard. Frozen weights are an argument:
neither constants of the program nor part of the state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lorax_gen.errors import UserError
from lorax_gen.method import balance, generator
from lorax_gen.models import decoder
from lorax_gen.models.adapter import Adapter
from lorax_gen.models.decoder import DecoderConfig, Execution
from lorax_gen.models.scoring import score_tokens
from lorax_gen.system import GeneratorSpec, meta_states
from lorax_gen.training.state import State

Array = jax.Array
Batch = dict[str, Any]
"""Arrays by name: of numpy on the host, of JAX in a step, or shapes; or groups of them."""
Loss = Callable[..., tuple[Array, tuple[Any, dict[str, Array]]]]


# --- losses --------------------------------------------------------------------------------------


def answer_loss(
    params: dict,
    config: DecoderConfig,
    batch: Batch,
    *,
    axis_name: str | None = None,
    **options: Any,
) -> tuple[Array, Array]:
    """Cross entropy on answer tokens (L_LM), and the fraction of rows whose answer greedy decoding
    gives.

    Args:
      batch: `tokens: [B, T]` int32 and `answer: [B, T]` bool, which marks the tokens to predict.
      axis_name: under pmap. The loss is a mean over the answer tokens of the global batch: each
        shard's is scaled so that the mean over shards equals it.
      options: see `answer_nll`.
    """
    nll, correct = answer_nll(params, config, batch, **options)
    return nll.sum() / answer_count(batch, axis_name), correct.mean()


def answer_count(batch: Batch, axis_name: str | None) -> Array:
    """Number of answer tokens in the batch; under pmap the mean over its shards."""
    count = batch["answer"][:, 1:].sum().astype(jnp.float32)
    return count if axis_name is None else jax.lax.pmean(count, axis_name)


def answer_nll(
    params: dict,
    config: DecoderConfig,
    batch: Batch,
    *,
    answer_length: int | None = None,
    chunk: int = 128,
    **options: Any,
) -> tuple[Array, Array]:
    """Negative log-likelihood `[B]` of each row's answer, and whether greedy decoding gives it.

    Args:
      batch: see `answer_loss`.
      answer_length, chunk: see `score_answers`.
      options: passed to `decoder.hidden_states`.
    """
    hidden = decoder.hidden_states(params, config, batch["tokens"][:, :-1], **options)
    return score_answers(params, config, batch, hidden, answer_length=answer_length, chunk=chunk)


def score_answers(
    params: dict,
    config: DecoderConfig,
    batch: Batch,
    hidden: Array,
    *,
    answer_length: int | None = None,
    chunk: int = 128,
) -> tuple[Array, Array]:
    """`answer_nll`, from hidden states `[B, T - 1, D]`.

    Logits are computed for `answer_length` positions of a row, `chunk` at a time (`score_tokens`).

    Args:
      answer_length: an upper bound on the answer tokens of a row, which the batch must keep;
        None: T.
    """
    targets, answer = batch["tokens"][:, 1:], batch["answer"][:, 1:]
    if answer_length is not None and answer_length < answer.shape[1]:
        # Answer positions first.
        indices = jnp.argsort(~answer, axis=1, stable=True)[:, :answer_length]
        hidden = jnp.take_along_axis(hidden, indices[:, :, None], axis=1)
        targets = jnp.take_along_axis(targets, indices, axis=1)
        answer = jnp.take_along_axis(answer, indices, axis=1)

    loglikelihoods, greedy = score_tokens(params, config, hidden, targets, chunk=chunk)
    return -jnp.sum(loglikelihoods * answer, axis=1), jnp.all(greedy | ~answer, axis=1)


def real_tokens(batch: Batch) -> Array:
    """`[B, T - 1]` bool: the tokens of a batch that a model reads and that are no padding, those up
    to the last token of the answer."""
    answer = batch["answer"]
    after = jnp.cumsum(answer[:, ::-1], axis=1)[:, ::-1]  # answer tokens from here on
    return after[:, :-1] > 0


def pretraining_loss(config: DecoderConfig, **options: Any) -> Loss:
    """Causal-LM loss on the documents of a batch: the mean over its groups, equally weighted.

    `options` are those of `decoder.hidden_states`.
    """

    def loss(params, stats, frozen, batch, key, axis_name):
        del frozen, key
        parts = {
            name: answer_loss(params, config, group, axis_name=axis_name, **options)
            for name, group in batch.items()
        }
        total = sum(nll for nll, _ in parts.values()) / len(parts)
        return total, (stats, {f"accuracy/{name}": acc for name, (_, acc) in parts.items()})

    return loss


class Routed(NamedTuple):
    """What meta states become, before the edge reads its questions.

    Attributes:
      gates: `[P, L, N]`, of which each prompt's LoRA is composed.
      loss: added to L_LM; None: nothing.
      stats, metrics: see `Loss`.
    """

    gates: Array
    stats: Any
    loss: Array | None
    metrics: dict[str, Array]


Route = Callable[..., Routed]
"""`route(params, stats, states, key, axis_name)` of meta states `[P, L, D]`."""


def generator_loss(spec: GeneratorSpec, **options: Any) -> Loss:
    """Eq. 10: L = L_LM + L_cv; see `prompted_loss` for the batch and the options."""
    config = spec.generator

    def route(params, stats, states, key, axis_name):
        gates, stats = generator.gates_from_states(
            params, stats, states, config, train=True, key=key, axis_name=axis_name
        )
        cv = balance.balance_loss(gates, config.balance_coefficient, axis_name)
        metrics = {
            "loss_cv": cv,
            "gate_entropy": balance.gate_entropy(gates),
            "gate_distance": balance.gate_distance(gates, axis_name),
            "expert_load": balance.expert_load(gates),
        }
        return Routed(gates, stats, cv, metrics)

    return prompted_loss(spec, route, **options)


def prompted_loss(
    spec: GeneratorSpec,
    route: Route,
    *,
    microbatches: int = 1,
    answer_length: int | None = None,
    execution: Execution = Execution(),
) -> Loss:
    """L_LM of the edge with the LoRA of each question's prompt, which the cloud reads. `frozen` is
    `{'cloud': params, 'edge': params}`.

    The batch holds `prompt: [P, T]`, `prompt_lengths: [P]` and `tokens`, `answer: [P * Q, T']`;
    row b of the latter belongs to prompt b // Q.

    Args:
      route: from meta states to gates over `params["pool"]`.
      microbatches: parts of the batch that pass through the cloud, and then through the edge, in
        sequence, each recomputed in the backward pass. The router, its BatchNorm and eq. 9 still
        see the full batch, so the gradients are those of the full batch.
      answer_length: see `answer_nll`.
      execution: see `decoder.Execution`.
    """
    config = spec.generator

    def loss(params, stats, frozen, batch, key, axis_name):
        dropout_key, route_key = jax.random.split(key)
        prompts = {name: batch[name] for name in ("prompt", "prompt_lengths")}
        questions = {name: batch[name] for name in ("tokens", "answer")}

        def read(part: Batch, key: Array) -> Array:
            return meta_states(
                params,
                frozen["cloud"],
                spec,
                part["prompt"],
                part["prompt_lengths"],
                dropout_key=key,
                execution=execution,
            )

        def answer(part: Batch, key: Array) -> tuple[Array, Array]:
            del key
            lora = generator.lora_from_gates(params["pool"], part.pop("gates"), config)
            return answer_nll(
                frozen["edge"],
                spec.edge,
                part,
                adapter=Adapter(rows=lora),
                answer_length=answer_length,
                execution=execution,
            )

        states = in_parts(read, prompts, microbatches, dropout_key)
        routed = route(params, stats, states, route_key, axis_name)
        nll, correct = in_parts(
            answer, {**questions, "gates": routed.gates}, microbatches, dropout_key
        )
        lm = nll.sum() / answer_count(batch, axis_name)
        metrics = {"loss_lm": lm, "accuracy/batch": correct.mean(), **routed.metrics}
        total = lm if routed.loss is None else lm + routed.loss
        return total, (routed.stats, metrics)

    return loss


def in_parts(compute: Callable, batch: Batch, count: int, key: Array) -> Any:
    """`compute(batch, key)`, or the same in `count` sequential parts with the memory of one: each
    is recomputed in the backward pass.

    The Q rows of a prompt stay together. Part i takes every `count`-th
    prompt, so that each device's shard contributes equally to every part.

    Raises UserError where the prompts cannot be split evenly.
    """
    if count == 1:
        return compute(dict(batch), key)
    prompts = min(leaf.shape[0] for leaf in batch.values())
    if prompts % count:
        raise UserError(
            f"{prompts} prompts cannot be split into {count} microbatches; choose a divisor"
        )

    def split(x: Array) -> Array:  # [P/M, M, Q, ...] -> [M, P/M * Q, ...]
        x = x.reshape(prompts // count, count, -1, *x.shape[1:]).swapaxes(0, 1)
        return x.reshape(count, -1, *x.shape[3:])

    def join(x: Array) -> Array:
        x = x.reshape(count, prompts // count, -1, *x.shape[2:]).swapaxes(0, 1)
        return x.reshape(-1, *x.shape[3:])

    parts = jax.tree.map(split, batch), jax.random.split(key, count)
    return jax.tree.map(join, jax.lax.map(jax.checkpoint(lambda part: compute(*part)), parts))


# --- the step ------------------------------------------------------------------------------------


def make_train_step(loss: Loss, optimizer: optax.GradientTransformation) -> Callable:
    """`train_step(state, frozen, batch, axis_name=None) -> (state, metrics)`, not yet jitted."""

    def train_step(
        state: State, frozen: Any, batch: Batch, axis_name: str | None = None
    ) -> tuple[State, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state["key"]), state["step"])
        if axis_name is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        compute = jax.value_and_grad(loss, has_aux=True)
        (value, (stats, metrics)), grads = compute(
            state["params"], state["stats"], frozen, batch, key, axis_name
        )
        metrics = {"loss": value, **metrics}
        if axis_name is not None:
            grads, metrics = jax.lax.pmean((grads, metrics), axis_name)
        metrics["grad_norm"] = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
        state = {
            **state,
            "step": state["step"] + 1,
            "params": optax.apply_updates(state["params"], updates),
            "stats": stats,
            "opt_state": opt_state,
        }
        return state, metrics

    return train_step
