"""The embedded world's tasks: all answerers side by side, and a quiz for training runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from lorax_gen.cost import mean_flops
from lorax_gen.data.config import WorldConfig
from lorax_gen.data.tasks import Task, behind_prompt
from lorax_gen.data.world import World
from lorax_gen.evaluation.answerers import Answerer, System
from lorax_gen.evaluation.exact import correct_answers
from lorax_gen.evaluation.report import Report, add_row, cell, new_report, serving_cost
from lorax_gen.files import AnyPath

Pair = tuple[str, str]
SHOTS = 5  # solved examples of a task, for answerers that are fitted to it
NAMES = ("plain", "icl", "lora", "cloud_icl", "lora_gen", "shuffled")


@dataclasses.dataclass(frozen=True)
class WorldCases:
    """Questions `(i, (question, answer))`, asked under prompt i; see `answerers.Cases`.

    Attributes:
      others: for each prompt, the prompt of another task.
      shots: for each prompt, solved examples of its task that are not asked, or all of its
        questions where all are asked; for answerers that are fitted to a task.
    """

    texts: Sequence[str]
    questions: Sequence[tuple[int, Pair]]
    others: Sequence[str] = ()
    shots: Sequence[Sequence[Pair]] = ()

    @property
    def answers(self) -> list[str]:
        return [answer for _, (_, answer) in self.questions]

    def bare(self) -> list[tuple[str, ...]]:
        return [(question,) for _, (question, _) in self.questions]

    def prompted(self) -> list[tuple[str, ...]]:
        return [(f"{self.texts[i]} {behind_prompt(q)}",) for i, (q, _) in self.questions]

    def prompts(self) -> list[str]:
        return [self.texts[i] for i, _ in self.questions]

    def other_prompts(self) -> list[str]:
        return [self.others[i] for i, _ in self.questions]


def ask_tasks(tasks: Sequence[Task], count: int, rng: np.random.Generator) -> WorldCases:
    """`count` questions of each task, or all of a task's where it has fewer.

    The other prompt of a task is that of the next task in a random order, so never its own.
    """
    prompts = [task.prompt(rng) for task in tasks]
    order = rng.permutation(len(tasks))
    others = [prompts[i] for i in order[np.argsort(np.roll(order, 1))]]
    drawn = [task.sample(rng, count) for task in tasks]
    asked = [(i, pair) for i, pairs in enumerate(drawn) for pair in pairs]
    rng, shots = np.random.default_rng(len(asked)), []
    for task, pairs in zip(tasks, drawn, strict=True):
        rest = [pair for pair in task.questions if pair not in pairs] or list(task.questions)
        shots.append([rest[i] for i in rng.permutation(len(rest))[:SHOTS]])
    return WorldCases(prompts, asked, others, shots)


def correct_by_task(
    answerer: Answerer, asked: WorldCases, *, mesh: Mesh | None = None
) -> np.ndarray:
    """`[N]` bool, see `correct_answers`; of an answerer that is fitted, by the one of each task."""
    if not answerer.is_fitted:
        return correct_answers(answerer, asked, asked.answers, mesh=mesh)
    correct = np.zeros(len(asked.questions), bool)
    prompt_of = np.array([i for i, _ in asked.questions])
    for i, text in enumerate(asked.texts):
        own = np.flatnonzero(prompt_of == i)
        # A shot is a pair as the edge reads it: the answer comes with the space before it.
        shots = [(question, f" {answer}") for question, answer in asked.shots[i]]
        part = WorldCases([text], [(0, pair) for j, pair in asked.questions if j == i])
        fitted = answerer.fit(text, shots)
        correct[own] = correct_answers(fitted, part, part.answers, mesh=mesh)
    return correct


def evaluate_world(
    system: System,
    data: WorldConfig,
    names: Sequence[str] | None = None,
    *,
    split: str = "unseen",
    questions: int = 16,
    seed: int = 0,
    timed: int = 50,
    mesh: Mesh | None = None,
    path: AnyPath | None = None,
    progress: Callable[[Sequence], Sequence] = lambda items: items,
) -> Report:
    """Accuracy of answerers by family of tasks, and the cost of a question; see `report`.

    Args:
      names: of answerers; None: those of `NAMES`, without `lora` where the system has none.
      questions: asked of each task, or all of a task's questions where it has fewer.
      timed: questions whose latency is measured, after warm-up; one at a time.
      path: of a report whose rows are kept; None: no earlier report.
      progress: wraps the list of families, for a progress bar.
    """
    world, rng = data.world(), np.random.default_rng(seed)
    if names is None:
        names = [name for name in NAMES if name != "lora" or system.lora is not None]
    answerers = [system.answerer(name) for name in names]
    cases, columns = {}, {}
    for family in data.families:
        tasks = world.select(split, family)
        cases[family] = asked = ask_tasks(tasks, questions, rng)
        columns[family] = {
            "title": family,
            "n": len(asked.questions),
            "tasks": len(tasks),
            "chance": world.chance(family),
        }
    report = new_report("world", system, columns, path, split=split, questions=questions, seed=seed)
    cells: dict[str, dict[str, Any]] = {name: {} for name in names}
    for family, asked in progress(list(cases.items())):
        for answerer in answerers:
            correct = correct_by_task(answerer, asked, mesh=mesh)
            cells[answerer.name][family] = cell(correct)
    for answerer in answerers:
        contexts = [text for asked in cases.values() for (text,) in answerer.contexts(asked)]
        tokens = [len(answerer.model.encode(text)) for text in contexts]
        read = [
            len(prompt.ids) for asked in cases.values() for prompt in answerer.prompts(asked) or ()
        ]
        add_row(
            report,
            answerer,
            cells[answerer.name],
            context_tokens=float(np.mean(tokens)),
            prompt_tokens=float(np.mean(read)) if read else 0.0,
            flops=mean_flops(tokens, answerer.macs),
            cloud_flops=mean_flops(read, answerer.prompt_macs) if read else 0.0,
            **serving_cost(answerer, [contexts[i] for i in rng.integers(0, len(contexts), timed)]),
        )
    return report


class WorldQuiz:
    """A few questions of every task of the world, for evaluation during training.

    Attributes:
      cases: the questions of seen and unseen tasks; groups: split and family of each.
    """

    def __init__(self, world: World, families: Sequence[str], per_task: int = 12):
        prompts: list[str] = []
        questions: list[tuple[int, Pair]] = []
        self.groups: list[tuple[str, str]] = []
        for split in ("seen", "unseen"):
            for family in families:
                rng, tasks = np.random.default_rng(0), world.select(split, family)
                first = len(prompts)
                prompts += [task.prompt(rng) for task in tasks]
                for i, task in enumerate(tasks, first):
                    drawn = task.sample(rng, per_task)
                    questions += [(i, pair) for pair in drawn]
                    self.groups += [(split, family)] * len(drawn)
        self.cases = WorldCases(prompts, questions)

    def accuracy(self, answerer: Answerer, mesh: Mesh | None = None) -> dict[str, float]:
        """`accuracy/split/family`, and their means `accuracy/split`."""
        return self.shares(correct_answers(answerer, self.cases, self.cases.answers, mesh=mesh))

    def shares(self, correct: np.ndarray) -> dict[str, float]:
        """As `accuracy`, from `correct: [N]` bool."""
        result: dict[str, float] = {}
        for split in ("seen", "unseen"):
            shares = {
                family: float(correct[[group == (split, family) for group in self.groups]].mean())
                for family in dict.fromkeys(family for _, family in self.groups)
            }
            result |= {f"accuracy/{split}/{family}": share for family, share in shares.items()}
            result[f"accuracy/{split}"] = float(np.mean(list(shares.values())))
        return result
