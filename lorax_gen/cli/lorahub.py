"""`lorax-gen lorahub`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from lorax_gen.cli.parse import UserPath
from lorax_gen.config import Seed, Size
from lorax_gen.errors import UserError

if TYPE_CHECKING:
    from lorax_gen.data.own_tasks import RowTask


@dataclasses.dataclass(frozen=True)
class LoraHub:
    """Combine trained LoRAs for a new task from a few solved examples (the baseline LoraHub).

    Searches a weight in [-1.5, 1.5] for each adapter, without gradients, and writes their sum as a
    PEFT adapter, for evaluate --lora, export and others. Needs pip install 'lorax-gen[lorahub]'.

    Example: lorax-gen lorahub shots.jsonl combined --adapters runs/a/released runs/b/released
    """

    rows: Annotated[UserPath, tyro.conf.Positional, tyro.conf.arg(metavar="ROWS")]
    """A file of rows (.jsonl, .json or .parquet) with an input and an output, as for training."""
    output: Annotated[UserPath, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """A new directory for the adapter."""
    adapters: tuple[UserPath, ...]
    """PEFT adapters of one edge model, with the same kernels and rank."""
    edge: str | None = None
    """Edge model; default the one that the first adapter names."""
    task: str | None = None
    """Task of the rows, where the file has several."""
    shots: Size = 5
    """Solved examples, the first ones of the task."""
    budget: Size = 40
    """Weights that are tried."""
    seed: Seed = 0
    """Seed of the search."""
    columns: tuple[str, ...] = ()
    """FIELD=COLUMN where the file calls a field otherwise: input=question output=label."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the edge model's parameters."""

    def run(self) -> int:
        from lorax_gen import files
        from lorax_gen.artifacts.peft import save_adapter
        from lorax_gen.cli.artifacts import load_for
        from lorax_gen.data.own_tasks import load_row_tasks
        from lorax_gen.recipes.lorahub import load_loras, make_lorahub

        files.must_be_new(self.output)
        if not self.adapters:
            raise UserError("no adapters to combine; give --adapters DIR DIR ...")
        task = self.choose(load_row_tasks(self.rows, self.columns)[0])
        edge, _ = load_for(self.adapters[0], self.edge, None, self.dtype)
        loras, frame = load_loras(self.adapters, edge)
        names = ["/".join(path.parts[-2:]) for path in self.adapters]  # all may be "released"
        shots = [frame.pair(item.input, item.outputs[0]) for item in task.items[: self.shots]]
        hub = make_lorahub(edge, loras, names, budget=self.budget, seed=self.seed)
        fitted = hub.fit(task.name, shots)
        weights = [round(float(weight), 6) for weight in fitted.weights]
        save_adapter(
            self.output,
            fitted.lora,
            edge.config,
            base_model=edge.name,
            provenance={
                "method": "lorahub",
                "task": task.name,
                "adapters": names,
                "weights": weights,
                "shots": len(shots),
                "budget": self.budget,
                "seed": self.seed,
            },
            frame=frame,
        )
        for name, weight in zip(names, weights, strict=True):
            print(f"{weight:+.3f}  {name}")
        print(f"adapter: {self.output}")
        return 0

    def choose(self, tasks: list[RowTask]) -> RowTask:
        """The task of the option, or the only one."""
        known = {task.name: task for task in tasks}
        if self.task is None and len(tasks) > 1:
            raise UserError(f"{self.rows.name} has {len(tasks)} tasks; choose one with --task NAME")
        if self.task is not None and self.task not in known:
            there = ", ".join(list(known)[:5])
            raise UserError(f"{self.rows.name} has no task {self.task!r}; it has {there}")
        return tasks[0] if self.task is None else known[self.task]
