"""GPT4Tools: requests for tools, to an answerer with or without the tools in its context.

Without a prompt, an answerer reads the request, the conversation before it and the reminder to use
tools after it; with a prompt, the entire instruction. The cloud reads the rest of the instruction:
the assistant's role, its tools and the format of answers.

`agent_metrics.score_answer` compares the full gold answer, which continues after the tool's
observation up to the reply, with the greedy completion up to "Observation:", where the tool would
write. In the test set a gold answer uses at most one tool, so nothing that is scored comes after
it. The original evaluation does not stop there: its models invent the observation and continue, and
a second call counts against them (`stop=()` does the same).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from lorax_gen.cost import mean_flops
from lorax_gen.data.agent import AgentItem, full_prompt
from lorax_gen.data.tokens import Encoder
from lorax_gen.errors import UserError
from lorax_gen.evaluation.agent_metrics import ToolScores, score_answer
from lorax_gen.evaluation.answerers import Answerer
from lorax_gen.evaluation.item_log import ItemLog, ItemRow, digest
from lorax_gen.evaluation.report import Cell, cell
from lorax_gen.files import AnyPath
from lorax_gen.inference.continuations import TOKENS_PER_BATCH, continue_texts, room_for

MAX_NEW_TOKENS = 512
STOP = ("Observation:",)
SCORES = tuple(field.name for field in dataclasses.fields(ToolScores))
ENTIRE = "the entire instruction"
REQUEST = "previous conversation, new input, and the reminder to use tools after it"


@dataclasses.dataclass(frozen=True)
class AgentCases:
    """Requests, see `answerers.Cases`; `seed` is that of the control's permutation of prompts."""

    items: Sequence[AgentItem]
    seed: int = 0

    def bare(self) -> list[tuple[str, ...]]:
        return [(item.request,) for item in self.items]

    def prompted(self) -> list[tuple[str, ...]]:
        return [(full_prompt(item),) for item in self.items]

    def prompts(self) -> list[str]:
        return [item.prompt for item in self.items]

    def other_prompts(self) -> list[str]:
        """Replaces each prompt by the next one in a random order of the distinct prompts."""
        different = list(dict.fromkeys(self.prompts()))
        if len(different) < 2:
            raise UserError("all items have the same prompt: there is nothing to shuffle")
        order = np.random.default_rng(self.seed).permutation(len(different))
        others = {different[i]: different[j] for i, j in zip(order, np.roll(order, 1), strict=True)}
        return [others[prompt] for prompt in self.prompts()]


def evaluate_agent(
    answerer: Answerer,
    items: Sequence[AgentItem],
    *,
    path: AnyPath | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    stop: Sequence[str] = STOP,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    seed: int = 0,
    mesh: Mesh | None = None,
    progress: Callable[[int], object] = lambda items: None,
) -> dict[str, Any]:
    """Generates an answerer's responses to all items and scores them.

    Args:
      path: of a JSONL file of the items' results; items that it has are not computed again.
      tokens_per_batch: rows times tokens, read and written, of one batch on the device.
      seed: of the control's permutation of prompts.
      mesh: rows are sharded over its batch axes, weights as in training; None: no mesh.
      progress: called with the number of items finished since the last call.

    Returns:
      `summary` of the items' results.

    Raises UserError where ids are not unique, or the file at `path` has other settings.
    """
    if not items:
        raise UserError("no items to evaluate; give at least one")
    if len({item.id for item in items}) < len(items):
        raise UserError("two items have the same id, which names their results; make ids unique")
    done: dict[str, ItemRow] = {}
    log, cases = None, AgentCases(items, seed)
    if path is not None:
        log = ItemLog(path, describe(answerer, cases, max_new_tokens, stop))
        done = {row["id"]: row for row in log.rows}
    progress(sum(item.id in done for item in items))
    left = [i for i, item in enumerate(items) if item.id not in done]
    if left:
        start = time.perf_counter()
        encoder = Encoder.of(answerer.model)
        room = room_for(answerer.model, max_new_tokens, answerer.max_length)
        contexts, prompts = answerer.contexts(cases), answerer.prompts(cases)
        entire = [encoder.ids(full_prompt(item)) for item in items]
        seen = [encoder.ids(context[0]) for context in contexts]
        adapter = answerer.adapter
        if prompts is not None:
            adapter = answerer.specialise(
                prompts, tokens_per_batch=tokens_per_batch, wanted=left, mesh=mesh
            )

        def on_batch(indices: list[int], texts: list[str]) -> None:
            nonlocal start
            now = time.perf_counter()
            seconds, start = (now - start) / len(indices), now
            rows = [
                {
                    "id": items[i].id,
                    "written": text,
                    "edge_tokens": min(len(seen[i]), room),
                    "full_tokens": len(entire[i]),
                    "cut_tokens": max(len(seen[i]) - room, 0),
                    "prompt_tokens": len(prompts[i].ids) if prompts else 0,
                    "prompt_cut_tokens": prompts[i].truncated if prompts else 0,
                    "seconds": round(seconds, 4),
                    **dataclasses.asdict(score_answer(items[i].output, text)),
                }
                for i, text in zip(indices, texts, strict=True)
            ]
            if log is not None:
                log.append(rows)
            done.update({row["id"]: row for row in rows})
            progress(len(rows))

        continue_texts(
            answerer.model,
            [ids[-room:] for ids in seen],
            max_new_tokens=max_new_tokens,
            tokens_per_batch=tokens_per_batch,
            wanted=left,
            on_batch=on_batch,
            stop=stop,
            mesh=mesh,
            adapter=adapter,
        )
    if log is not None:
        log.flush()
    return summary(answerer, [done[item.id] for item in items])


def summary(answerer: Answerer, rows: Sequence[ItemRow]) -> dict[str, Any]:
    """The fields of a report's row (see `report`), from the items' results.

    cells           of the five scores of `agent_metrics.ToolScores`
    compression     tokens of the entire instructions / tokens read by the edge
    edge_sees       which part of the instruction that is
    cut_items       items whose context was truncated on the left to fit the edge
    cut_prompts     items whose prompt was truncated on the left to fit the cloud
    seconds         of all items together, compilation included
    """
    seen = [row["edge_tokens"] for row in rows]
    read = [row["prompt_tokens"] for row in rows]
    cells: dict[str, Cell] = {
        name: cell(np.array([row[name] for row in rows], float)) for name in SCORES
    }
    return {
        "cells": cells,
        "context_tokens": sum(seen) / len(rows),
        "prompt_tokens": sum(read) / len(rows),
        "flops": mean_flops(seen, answerer.macs),
        "cloud_flops": mean_flops(read, answerer.prompt_macs),
        "compression": sum(row["full_tokens"] for row in rows) / sum(seen),
        "edge_sees": ENTIRE if answerer.in_context else REQUEST,
        "cut_items": sum(row["cut_tokens"] > 0 for row in rows),
        "cut_prompts": sum(row["prompt_cut_tokens"] > 0 for row in rows),
        "seconds": sum(row["seconds"] for row in rows),
    }


def describe(
    answerer: Answerer, cases: AgentCases, max_new_tokens: int, stop: Sequence[str]
) -> ItemRow:
    """Everything that the results of single items depend on, as plain values."""
    found = answerer.identity() | {
        "n": len(cases.items),
        "items": digest(list(map(dataclasses.asdict, cases.items))),
        "max_new_tokens": max_new_tokens,
        "stop": list(stop),
    }
    return found | ({"seed": cases.seed} if answerer.name == "shuffled" else {})
