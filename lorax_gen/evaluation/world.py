"""The methods side by side on the world's unseen tasks, as one report.

Bare questions for the edge model as it is, fine-tuned by one LoRA, and specialised by LoRA-Gen from
the task's prompt (as a control, from the prompt of another task of its family); questions behind
the prompt for the edge and for the cloud model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lorax_gen.data.config import WorldConfig
from lorax_gen.data.tasks import behind_prompt
from lorax_gen.data.tokens import Encoder
from lorax_gen.data.world import World
from lorax_gen.evaluation.greedy import Question, right_answers, right_specialised
from lorax_gen.evaluation.latency import measure_latency
from lorax_gen.evaluation.system import System
from lorax_gen.models.adapter import Adapter
from lorax_gen.models.model import Model

METHODS = {
    "edge": "edge, no prompt",
    "edge_icl": "edge, prompt in context",
    "edge_lora": "edge + one LoRA on all tasks",
    "cloud_icl": "cloud, prompt in context",
    "lora_gen": "edge + LoRA-Gen, no prompt",
    "lora_gen_shuffled": "LoRA-Gen, prompts shuffled",
}


def evaluate_world(
    system: System,
    data: WorldConfig,
    *,
    split: str = "unseen",
    questions: int = 16,
    seed: int = 0,
    latency_runs: int = 50,
    progress: Callable[[Sequence], Sequence] = lambda items: items,
) -> dict[str, Any]:
    """Accuracy per family and method, context tokens and latency per question.

    Args:
      questions: asked per task, or all of a task's questions where it has fewer.
      latency_runs: timed questions per method, after warm-up; one at a time.
      progress: wraps the list of families, for a progress bar.

    Returns:
      `{'accuracy': {family: {method: share}}, 'mean': {method: share}, 'chance': {family: share},
      'questions': {family: count}, 'tasks': {family: count}, 'context_tokens': {method: mean},
      'latency_ms': {method: median}, 'seed', 'split'}`.
    """
    world, rng = data.world(), np.random.default_rng(seed)
    edge, cloud = system.edge, system.cloud
    edge_encoder, cloud_encoder = Encoder.of(edge), Encoder.of(cloud)
    report: dict[str, Any] = {"accuracy": {}, "chance": {}, "tasks": {}, "questions": {}}
    contexts: dict[str, list[tuple[Model, str]]] = {}
    for family in progress(data.families):
        tasks = world.select(split, family)
        prompts = [task.prompt(rng) for task in tasks]
        # A derangement: every task gets the prompt of the next one in a random order.
        order = rng.permutation(len(tasks))
        shuffled = [prompts[i] for i in order[np.argsort(np.roll(order, 1))]]
        asked = [(i, pair) for i, task in enumerate(tasks) for pair in task.sample(rng, questions)]
        bare = [pair for _, pair in asked]
        prompted = [
            (f"{prompts[i]} {behind_prompt(question)}", answer) for i, (question, answer) in asked
        ]

        right = {"edge": right_answers(edge, bare), "edge_icl": right_answers(edge, prompted)}
        if system.lora is not None:
            right["edge_lora"] = right_answers(edge, bare, adapter=Adapter(system.lora))
        right["cloud_icl"] = right_answers(cloud, prompted)
        right["lora_gen"] = right_specialised(system, prompts, asked)
        right["lora_gen_shuffled"] = right_specialised(system, shuffled, asked)
        report["accuracy"][family] = {name: float(share.mean()) for name, share in right.items()}
        report["chance"][family] = world.chance(family)
        report["tasks"][family], report["questions"][family] = len(tasks), len(asked)
        for name in right:
            model = cloud if name.startswith("cloud") else edge
            texts = [q for q, _ in (prompted if name.endswith("icl") else bare)]
            contexts.setdefault(name, []).extend((model, text) for text in texts)

    report["mean"] = {
        name: float(np.mean([row[name] for row in report["accuracy"].values()]))
        for name in contexts
    }
    encoders = {id(edge): edge_encoder, id(cloud): cloud_encoder}
    report["context_tokens"] = {
        name: float(np.mean([len(encoders[id(model)].ids(text)) for model, text in texts]))
        for name, texts in contexts.items()
    }
    report["latency_ms"] = {
        name: latency_ms(served(system, name), [text for _, text in texts], latency_runs, rng)
        for name, texts in contexts.items()
    }
    return report | {"split": split, "seed": seed}


def served(system: System, method: str) -> Model:
    """The model that answers in a method. Merged models are shaped as the edge is, so the edge
    stands for a specialised one where only time matters."""
    if method.startswith("cloud"):
        return system.cloud
    if method == "edge_lora":
        return system.edge.merged(system.lora)
    return system.edge


def latency_ms(model: Model, texts: Sequence[str], runs: int, rng: np.random.Generator) -> float:
    """Median milliseconds per question, of `runs` drawn questions."""
    encoder = Encoder.of(model)
    drawn = [encoder.ids(texts[i]) for i in rng.integers(0, len(texts), runs)]
    return measure_latency(model, drawn).median


class WorldQuiz:
    """Some questions about every task of the world, and the shares of them that are right.

    Attributes:
      prompts: of all tasks; questions: `(i, pair)`, asked under prompt i.
    """

    def __init__(self, world: World, families: Sequence[str], per_task: int = 12):
        self.prompts: list[str] = []
        self.questions: list[tuple[int, Question]] = []
        self.groups: list[tuple[str, str]] = []  # split and family of each question
        for split in ("seen", "unseen"):
            for family in families:
                rng, tasks = np.random.default_rng(0), world.select(split, family)
                first = len(self.prompts)
                self.prompts += [task.prompt(rng) for task in tasks]
                for i, task in enumerate(tasks, first):
                    drawn = task.sample(rng, per_task)
                    self.questions += [(i, pair) for pair in drawn]
                    self.groups += [(split, family)] * len(drawn)

    @property
    def bare(self) -> list[Question]:
        """The questions without their prompts."""
        return [pair for _, pair in self.questions]

    @property
    def prompted(self) -> list[Question]:
        """The questions behind their prompts."""
        return [
            (f"{self.prompts[i]} {behind_prompt(question)}", answer)
            for i, (question, answer) in self.questions
        ]

    def accuracy(self, right: np.ndarray) -> dict[str, float]:
        """`accuracy/split/family`, and their means `accuracy/split`, of `right: [N]` bool."""
        result: dict[str, float] = {}
        for split in ("seen", "unseen"):
            shares = {
                family: float(right[[group == (split, family) for group in self.groups]].mean())
                for family in dict.fromkeys(family for _, family in self.groups)
            }
            result |= {f"accuracy/{split}/{family}": share for family, share in shares.items()}
            result[f"accuracy/{split}"] = float(np.mean(list(shares.values())))
        return result
