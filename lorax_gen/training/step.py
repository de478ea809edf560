"""The train step, and the losses it steps on: the one place where method and models meet.

A loss is `loss(params, stats, frozen, batch, key, axis_name) -> (scalar, (stats, metrics))`.
`make_train_step` turns any of them into

    train_step(state, frozen, batch, axis_name=None) -> (state, metrics)

for `jax.jit`, where the batch is global and sharded arrays make the collectives, or for
`jax.pmap(..., axis_name=...)`, where each device holds a shard. Frozen weights are an argument:
they are never constants of the program, nor part of the state.

Dimensions: P prompts, Q queries per prompt, B = P * Q rows, T time, L edge layers, D cloud width,
N experts, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lorax_gen.method import balance, generator, meta_tokens
from lorax_gen.method.generator import GeneratorConfig
from lorax_gen.method.lora import Tree
from lorax_gen.models import decoder
from lorax_gen.models.decoder import DecoderConfig
from lorax_gen.training.state import State

Array = jax.Array
Batch = dict[str, Array]
Loss = Callable[..., tuple[Array, tuple[Any, dict[str, Array]]]]


# --- losses --------------------------------------------------------------------------------------


def answer_loss(
    params: dict,
    config: DecoderConfig,
    batch: Batch,
    *,
    lora: Tree | None = None,
    axis_name: str | None = None,
    **options: Any,
) -> tuple[Array, Array]:
    """Cross entropy on answer tokens (L_LM), and the share of rows that greedy decoding has right.

    Args:
      batch: `tokens: [B, T]` int32 and `answer: [B, T]` bool, which marks the tokens to predict.
      lora: a tree for the whole batch or per example, or None.
      axis_name: under pmap. The mean is over the answer tokens of the global batch: a shard's loss
        is scaled so that the mean over shards is that.
      options: passed on to `decoder.hidden_states`.
    """
    tokens, answer = batch["tokens"], batch["answer"][:, 1:]
    hidden = decoder.hidden_states(params, config, tokens[:, :-1], lora=lora, **options)
    scores = decoder.logits(params, config, hidden)
    nll = optax.softmax_cross_entropy_with_integer_labels(scores, tokens[:, 1:])
    right = (jnp.argmax(scores, axis=-1) == tokens[:, 1:]) | ~answer
    count = answer.sum()
    if axis_name is not None:
        count = jax.lax.pmean(count.astype(jnp.float32), axis_name)
    return jnp.sum(nll * answer) / count, jnp.mean(jnp.all(right, axis=1))


def pretraining_loss(config: DecoderConfig, remat: str = "none") -> Loss:
    """Causal-LM loss on the documents of one or more groups of a batch, groups in equal parts."""

    def loss(params, stats, frozen, batch, key, axis_name):
        del frozen, key
        parts = {
            name: answer_loss(params, config, group, axis_name=axis_name, remat=remat)
            for name, group in batch.items()
        }
        total = sum(nll for nll, _ in parts.values()) / len(parts)
        return total, (stats, {f"accuracy/{name}": acc for name, (_, acc) in parts.items()})

    return loss


@dataclasses.dataclass(frozen=True)
class GeneratorSpec:
    """The static part of a LoRA-Gen system: the generator's and both models' shapes."""

    generator: GeneratorConfig
    cloud: DecoderConfig
    edge: DecoderConfig


def meta_states(
    params: dict,
    cloud_params: dict,
    spec: GeneratorSpec,
    prompt: Array,
    lengths: Array,
    **options: Any,
) -> Array:
    """The cloud LM reads prompts `[P, T]` in one forward pass; its states `[P, L, D]`.

    L meta tokens stand directly behind each prompt; T^i is the final-norm hidden state at the
    i-th. The cloud's own LoRA is applied, its head never computed.
    """
    layers = spec.edge.num_hidden_layers
    embeddings = decoder.embed(cloud_params, spec.cloud, prompt)
    embeddings = meta_tokens.insert(embeddings, lengths, params["meta_tokens"], layers)
    lora = generator.cloud_lora(params, spec.generator)
    hidden = decoder.hidden_states(
        cloud_params, spec.cloud, embeddings=embeddings, lora=lora, **options
    )
    return meta_tokens.read(hidden, lengths, layers)


def generator_loss(spec: GeneratorSpec, remat: str = "none") -> Loss:
    """Eq. 10: L = L_LM + L_cv. `frozen` is `{'cloud': params, 'edge': params}`.

    The batch holds `prompt: [P, T]`, `prompt_lengths: [P]` and `tokens`, `answer: [P * Q, T']`;
    row b of the latter is asked under prompt b // Q.
    """
    config = spec.generator

    def loss(params, stats, frozen, batch, key, axis_name):
        dropout_key, gumbel_key = jax.random.split(key)
        states = meta_states(
            params,
            frozen["cloud"],
            spec,
            batch["prompt"],
            batch["prompt_lengths"],
            dropout=config.cloud_dropout,
            dropout_key=dropout_key if config.cloud_dropout else None,
            remat=remat,
        )
        made = generator.generate(
            params, stats, states, config, train=True, key=gumbel_key, axis_name=axis_name
        )
        lm, accuracy = answer_loss(
            frozen["edge"], spec.edge, batch, lora=made.lora, axis_name=axis_name, remat=remat
        )
        cv = balance.balance_loss(made.gates, config.balance_coefficient, axis_name)
        metrics = {
            "loss_lm": lm,
            "loss_cv": cv,
            "accuracy/batch": accuracy,
            "gate_entropy": balance.gate_entropy(made.gates),
            "expert_load": balance.expert_load(made.gates),
        }
        return lm + cv, (made.stats, metrics)

    return loss


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
