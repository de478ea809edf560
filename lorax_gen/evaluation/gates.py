"""Gates of many prompts: the cloud reads each different one once, in batches of few shapes.

Dimensions: N prompts, P prompts of a batch, T time, L edge layers, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh

from lorax_gen.artifacts.generator import Generator
from lorax_gen.data.batches import pad_rows
from lorax_gen.evaluation.choices import TOKENS_PER_BATCH
from lorax_gen.evaluation.packing import deal
from lorax_gen.method.generator import gates_from_states
from lorax_gen.models.decoder import Array, DecoderConfig, Params
from lorax_gen.models.huggingface import Model
from lorax_gen.training import hosts
from lorax_gen.training.sharding import place, put_batch, row_shards, tree_shardings
from lorax_gen.training.step import GeneratorSpec, meta_states

Ids = Sequence[int]


@partial(jax.jit, static_argnames="spec")
def prompt_gates(
    params: dict, stats: dict, cloud: Params, spec: GeneratorSpec, prompt: Array, lengths: Array
) -> Array:
    """Gates `[P, L, N]` of prompts `[P, T]`, at inference: no prompt changes another's gates."""
    states = meta_states(params, cloud, spec, prompt, lengths)
    return gates_from_states(params, stats, states, spec.generator)[0]


def gates_of_prompts(
    prompts: Sequence[Ids],
    cloud: Model,
    edge: DecoderConfig,
    generator: Generator,
    *,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    mesh: Mesh | None = None,
    progress: Callable[[int], object] = lambda prompts: None,
) -> np.ndarray:
    """Gates `[N, L, E]` fp32 of prompts, token ids of the cloud's tokenizer.

    Args:
      mesh: prompts are split over its batch axes, weights as training splits them; None: no mesh.
      progress: called with the number of prompts finished since the last call.

    Raises UserError where a model is not of the shape that the generator was trained with.
    """
    spec = generator.spec(cloud.config, edge)
    shape = edge.num_hidden_layers, generator.config.n_experts
    if not len(prompts):
        return np.zeros((0, *shape), np.float32)
    distinct = {ids: i for i, ids in enumerate(dict.fromkeys(map(tuple, prompts)))}
    rows = list(distinct)
    index = np.array([distinct[tuple(ids)] for ids in prompts])
    weights, shards = (generator.params, generator.stats, cloud.params), 1
    if mesh is not None:
        shards = row_shards(mesh)
        weights = place(weights, tree_shardings(weights, mesh))
    params, stats, cloud_params = weights
    found = np.empty((len(rows), *shape), np.float32)

    def read(chosen: np.ndarray, gates: jax.Array) -> None:
        found[chosen] = np.asarray(hosts.gather(gates))[: len(chosen)]
        progress(int(np.isin(index, chosen).sum()))

    before = None
    lengths = np.array([max(len(ids), 1) for ids in rows])
    for length, share, parts in deal(lengths, lengths, tokens_per_batch, shards):
        for groups in parts:
            chosen = np.concatenate(groups)
            ids = [rows[i] for i in chosen]
            ids += [()] * (share * shards - len(ids))
            batch = {
                "prompt": pad_rows(ids, length, 0, "a prompt"),
                "lengths": np.array([len(row) for row in ids], np.int32),
            }
            batch = jax.device_put(batch) if mesh is None else put_batch(batch, mesh)
            gates = prompt_gates(
                params, stats, cloud_params, spec, batch["prompt"], batch["lengths"]
            )
            if before is not None:  # one batch late: the device never waits for the host
                read(*before)
            before = chosen, gates
    read(*before)
    return found[index]
