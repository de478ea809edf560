"""Evaluation during training, on what a mixture's config names and on what it holds out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jax.sharding import Mesh

from lorax_gen.data.benchmarks import find_benchmark, load_questions, load_shots
from lorax_gen.data.config import MixtureConfig, Opened, is_row_file
from lorax_gen.data.own_tasks import RowTask
from lorax_gen.evaluation.answerers import Answerer
from lorax_gen.evaluation.benchmark import evaluate_benchmark
from lorax_gen.evaluation.floors import floors
from lorax_gen.evaluation.rows import RowCases, ask_rows, cells_of, row_results
from lorax_gen.frames import Frame

Evaluate = Callable[[Answerer], dict[str, float]]


def mixture_metrics(data: MixtureConfig, opened: Opened, mesh: Mesh | None, shots: int) -> Evaluate:
    """Metrics of an answerer on benchmarks and on sets of rows, by name.

        accuracy/<benchmark>, accuracy/seen, accuracy/unseen     the latter two are means
        <metric>/<set>                                           see `evaluation.rows`
        floor/<metric>/<set>, chance/<set>                       the best of the floors

    For an answerer that reads prompts, each question has its own prompt. `truncated/questions` and
    `truncated/prompts` count those that were truncated on the left to fit their model.
    """
    records = [find_benchmark(name) for name in data.evaluate_on or () if not is_row_file(name)]
    asked = [load_questions(r, "test", data.root)[: data.evaluate_questions] for r in records]
    train = [load_shots(record, data.root) if shots else [] for record in records]
    sets = row_sets(opened.held, opened.frame, data.evaluate_questions, shots)
    constants = {
        name: value for own, cases in sets.items() for name, value in floor_metrics(own, cases)
    }

    def evaluate(answerer: Answerer) -> dict[str, float]:
        result: dict[str, float] = {}
        splits: dict[str, list[float]] = {"seen": [], "unseen": []}
        cut: Counter[str] = Counter()
        for record, questions, solved in zip(records, asked, train, strict=True):
            found = evaluate_benchmark(
                record,
                questions,
                answerer,
                shots=shots,
                train=solved,
                mesh=mesh,
                frame=opened.frame,
            )
            result[f"accuracy/{record.name}"] = found.acc
            splits["unseen" if record.unseen else "seen"].append(found.acc)
            cut.update(questions=found.truncated, prompts=found.prompts_truncated)
        for name, cases in sets.items():
            rows = row_results(
                answerer,
                cases,
                max_new_tokens=data.evaluate_new_tokens,
                generate=data.evaluate_new_tokens > 0,
                mesh=mesh,
            )
            result |= {f"{metric}/{name}": cell["score"] for metric, cell in cells_of(rows).items()}
            cut.update(
                questions=sum(row["truncated"] > 0 for row in rows),
                prompts=sum(row["prompt_truncated"] > 0 for row in rows),
            )
        means = {f"accuracy/{split}": float(np.mean(own)) for split, own in splits.items() if own}
        return result | means | constants | {f"truncated/{what}": cut[what] for what in cut}

    return evaluate


def row_sets(
    held: Mapping[str, Sequence[RowTask]], frame: Frame, count: int, shots: int
) -> dict[str, RowCases]:
    """The rows to ask of each set, the same ones in every evaluation."""
    return {
        name: RowCases(ask_rows(tasks, count, others=max(shots, 1)), frame, shots)
        for name, tasks in held.items()
    }


def floor_metrics(name: str, cases: RowCases) -> list[tuple[str, float]]:
    """What answers without a model reach on a set: of each metric the best."""
    best: dict[str, float] = {}
    for key, score in floors(cases.asked).items():
        metric = key.partition("/")[2]
        where = f"floor/{metric}/{name}" if metric else f"{key}/{name}"
        best[where] = max(score, best.get(where, 0.0))
    return list(best.items())
