"""GPT4Tools: an edge model answers requests for tools, with the tools in its context or without.

    full                the whole instruction is in the edge's context
    request             the edge reads the request alone
    lora_gen            as `request`, with a LoRA that the cloud made of the rest of the instruction
    lora_gen_shuffled   as `lora_gen`, of the instruction of another item: the control

What is compared, by `agent_metrics.score_answer`: the whole right answer, which goes on behind the
tool's observation up to the reply, and what greedy decoding wrote up to "Observation:", which the
tool would write. In the test set a right answer uses at most one tool, so nothing that is asked for
comes behind it. The original's own evaluation does not stop: its models imagine the observation and
go on, and pay for a second call (`stop=()` does the same).

Dimensions: B rows, L edge layers.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jax.sharding import Mesh

from lorax_gen.cost import generator_macs, mean_flops, prefill_macs
from lorax_gen.data.agent import AgentItem, full_prompt
from lorax_gen.data.tokens import Encoder
from lorax_gen.errors import UserError
from lorax_gen.evaluation.agent_metrics import ToolScores, mean_scores, score_answer
from lorax_gen.evaluation.item_log import ItemLog, Row, digest
from lorax_gen.evaluation.system import System, identity
from lorax_gen.inference.cards import gates_of_prompts
from lorax_gen.inference.continuations import TOKENS_PER_BATCH, continue_texts, room_for
from lorax_gen.models.adapter import Adapter
from lorax_gen.system import gated_pool
from lorax_gen.tensors import tree_hash

Mode = Literal["full", "request", "lora_gen", "lora_gen_shuffled"]
BY_CLOUD = ("lora_gen", "lora_gen_shuffled")
MAX_NEW_TOKENS = 512
STOP = ("Observation:",)
REQUEST = "previous conversation, new input, and the reminder to use tools behind it"
SEES = {"full": "the whole instruction"} | dict.fromkeys(get_args(Mode)[1:], REQUEST)


def evaluate_agent(
    system: System,
    items: Sequence[AgentItem],
    mode: Mode,
    *,
    path: Path | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    stop: Sequence[str] = STOP,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    seed: int = 0,
    mesh: Mesh | None = None,
    progress: Callable[[int], object] = lambda items: None,
) -> dict[str, Any]:
    """Has the edge answer all items and scores the answers.

    Args:
      path: of a JSONL file of the items' results; where it has some, they are not computed again.
      tokens_per_batch: rows times tokens, read and written, that the device works on at a time.
      seed: of who gets whose prompt in the control.
      mesh: rows are split over its batch axes, weights as training splits them; None: no mesh.
      progress: called with the number of items finished since the last call.

    Returns:
      the report of `summary`.

    Raises UserError where the mode lacks a model, ids are not unique, or the file at `path` was
    made otherwise.
    """
    check(system, items, mode)
    done: dict[str, Row] = {}
    log = None
    if path is not None:
        log = ItemLog(path, settings(system, items, mode, max_new_tokens, stop, seed))
        done = {row["id"]: row for row in log.rows}
    progress(sum(item.id in done for item in items))
    left = [i for i, item in enumerate(items) if item.id not in done]
    if left:
        start = time.perf_counter()
        encoder, room = (
            Encoder.of(system.edge),
            room_for(system.edge, max_new_tokens, system.max_length),
        )
        todo = [items[i] for i in left]
        whole = [encoder.ids(full_prompt(item)) for item in todo]
        seen = whole if mode == "full" else [encoder.ids(item.request) for item in todo]
        prompts = read = [[] for _ in todo]
        adapter = None
        if mode in BY_CLOUD:
            texts = prompts_read(items, mode, seed)
            cloud = Encoder.of(system.cloud)
            prompts = [cloud.ids(texts[i]) for i in left]
            read = [ids[-system.prompt_room :] for ids in prompts]
            adapter = gated(system, read, tokens_per_batch, mesh)

        def on_batch(indices: list[int], texts: list[str]) -> None:
            nonlocal start
            now = time.perf_counter()
            seconds, start = (now - start) / len(indices), now
            rows = [
                {
                    "id": todo[i].id,
                    "written": text,
                    "edge_tokens": min(len(seen[i]), room),
                    "full_tokens": len(whole[i]),
                    "cut_tokens": max(len(seen[i]) - room, 0),
                    "prompt_tokens": len(read[i]),
                    "prompt_cut_tokens": len(prompts[i]) - len(read[i]),
                    "seconds": round(seconds, 4),
                    **dataclasses.asdict(score_answer(todo[i].output, text)),
                }
                for i, text in zip(indices, texts, strict=True)
            ]
            if log is not None:
                log.append(rows)
            done.update({row["id"]: row for row in rows})
            progress(len(rows))

        continue_texts(
            system.edge,
            [ids[-room:] for ids in seen],
            max_new_tokens=max_new_tokens,
            tokens_per_batch=tokens_per_batch,
            on_batch=on_batch,
            stop=stop,
            mesh=mesh,
            adapter=adapter,
        )
    return summary(system, mode, [done[item.id] for item in items])


def summary(system: System, mode: Mode, rows: Sequence[Row]) -> dict[str, Any]:
    """The report of items' results.

    scores          {score: mean} of `agent_metrics.ToolScores`, and their `average`
    edge_tokens     read by the edge per item, mean; prompt_tokens: by the cloud
    flops           of the edge reading a request up to the first token of an answer, mean;
                    cloud_flops: of the cloud and the generator, for one prompt
    compression     tokens of the whole instructions / tokens read by the edge
    edge_sees       which part of the instruction that is
    items, cut_items    counted; those that are cut off on the left, for the edge is too short
    cut_prompts     the same of their prompts and the cloud
    seconds         of all items together, compilation included
    """
    names = [field.name for field in dataclasses.fields(ToolScores)]
    mean = mean_scores(ToolScores(*(row[name] for name in names)) for row in rows)
    seen = sum(row["edge_tokens"] for row in rows)
    prompts, cloud_flops = [row["prompt_tokens"] for row in rows], 0.0
    if mode in BY_CLOUD:
        spec = system.generator.spec(system.cloud.config, system.edge.config)
        cloud_flops = mean_flops(prompts, partial(generator_macs, spec))
    return {
        "mode": mode,
        "items": len(rows),
        "scores": dataclasses.asdict(mean) | {"average": mean.average},
        "edge_tokens": seen / len(rows),
        "prompt_tokens": sum(prompts) / len(rows),
        "flops": mean_flops(
            (row["edge_tokens"] for row in rows),
            partial(prefill_macs, system.edge.config, logits=1),
        ),
        "cloud_flops": cloud_flops,
        "compression": sum(row["full_tokens"] for row in rows) / seen,
        "edge_sees": SEES[mode],
        "cut_items": sum(row["cut_tokens"] > 0 for row in rows),
        "cut_prompts": sum(row["prompt_cut_tokens"] > 0 for row in rows),
        "seconds": sum(row["seconds"] for row in rows),
    }


# --- what the cloud reads ------------------------------------------------------------------------


def prompts_read(items: Sequence[AgentItem], mode: Mode, seed: int) -> list[str]:
    """The prompt that the cloud reads for each item, in a mode that has it read one.

    Raises UserError where prompts should be shuffled and all are the same.
    """
    prompts = [item.prompt for item in items]
    if mode == "lora_gen":
        return prompts
    different = list(dict.fromkeys(prompts))
    if len(different) < 2:
        raise UserError("all items have the same prompt: there is nothing to shuffle")
    order = np.random.default_rng(seed).permutation(len(different))
    # Each gets that of the next one in a random order, so none its own.
    others = {different[i]: different[j] for i, j in zip(order, np.roll(order, 1), strict=True)}
    return [others[prompt] for prompt in prompts]


def gated(
    system: System,
    prompts: Sequence[Sequence[int]],
    tokens_per_batch: int,
    mesh: Mesh | None = None,
) -> Adapter:
    """The edge's adapter of one row for each prompt, token ids."""
    generator = system.generator
    gates = gates_of_prompts(
        prompts,
        system.cloud,
        system.edge.config,
        generator,
        tokens_per_batch=tokens_per_batch,
        mesh=mesh,
    )
    return gated_pool(generator.params["pool"], gates, generator.config)


# --- what must hold ------------------------------------------------------------------------------


def check(system: System, items: Sequence[AgentItem], mode: Mode) -> None:
    if mode not in get_args(Mode):
        raise UserError(f"mode is {mode!r}: choose one of {', '.join(get_args(Mode))}")
    if not items:
        raise UserError("no items to evaluate; give at least one")
    if len({item.id for item in items}) < len(items):
        raise UserError("two items have the same id, by which results are kept; make them differ")
    if mode in BY_CLOUD and (system.cloud is None or system.generator is None):
        raise UserError(f"mode {mode} needs a cloud model and a generator; give both")


def settings(
    system: System,
    items: Sequence[AgentItem],
    mode: Mode,
    max_new_tokens: int,
    stop: Sequence[str],
    seed: int,
) -> Row:
    """What results depend on."""
    generator = system.generator
    row = {
        "mode": mode,
        "edge": identity(system.edge),
        "edge_dtype": str(system.edge.params["embed"].dtype),
        "n": len(items),
        "items": digest(list(map(dataclasses.asdict, items))),
        "max_length": system.max_length,
        "max_new_tokens": max_new_tokens,
        "stop": list(stop),
    }
    if mode in BY_CLOUD:
        row["cloud"] = identity(system.cloud)
        row["generator"] = tree_hash({"params": generator.params, "stats": generator.stats})
    if mode == "lora_gen_shuffled":
        row["seed"] = seed
    return row
