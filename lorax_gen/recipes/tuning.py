"""What the recipes share that train one adapter of the edge on all seen tasks: LoRA, LoRAMoE and
MixLoRA. They differ in the `Tuned` that they pass to `tune`, and in what is released."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from lorax_gen import config as configs
from lorax_gen.artifacts.baseline import Baseline, save_baseline
from lorax_gen.artifacts.identity import identify
from lorax_gen.config import BelowOne, Size
from lorax_gen.cost import Macs, no_macs, tuning_step_macs
from lorax_gen.evaluation.answerers import Answerer
from lorax_gen.frames import Frame
from lorax_gen.mesh import hosts
from lorax_gen.mesh.sharding import make_mesh
from lorax_gen.models.adapter import Adapter
from lorax_gen.models.decoder import Array, DecoderConfig, Execution, hidden_and_aux
from lorax_gen.models.model import Model
from lorax_gen.recipes.base import EdgeConfig, Load, assemble
from lorax_gen.recipes.data import open_data
from lorax_gen.training.experiment import Experiment
from lorax_gen.training.state import State
from lorax_gen.training.step import Batch, Loss, answer_count, real_tokens, score_answers


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuningConfig(EdgeConfig):
    """Fields of recipes that train one adapter of the edge on all seen tasks."""

    dropout: BelowOne = 0.05
    """Rate on the input of the trained factors."""
    batch_size: Size = 128
    """Questions per batch, of mixed tasks."""
    in_context: bool = False
    """Read each question after its prompt, in training and from then on: the edge pays for the
    prompt's tokens. No: it reads the question alone, and cannot know which task it is from."""

    @property
    def groups(self) -> tuple[str, ...]:
        """Tasks whose rows are marked in a batch; see `recipes.data.open_data`."""
        return ()


class MakeAdapter(Protocol):
    def __call__(
        self, params: Any, /, real: Array | None = None, dropout: float = 0.0
    ) -> Adapter: ...


Balance = Callable[[dict[str, Array], Batch, "str | None"], Array]


class Tuned(NamedTuple):
    """An adapter to train.

    Attributes:
      name: of the recipe; label: in tables.
      init: fresh parameters.
      adapter: of parameters, as `adapter(params, real, dropout)`. `real: [B, T]` marks tokens that
        are no padding; with it the adapter gives the auxiliary values that `balance` takes.
      balance: `balance(aux, batch, axis_name)`, added to the loss with its coefficient; None: none.
      macs: what the adapter adds to a forward pass over so many tokens.
      layers: of the edge, the last so many, that it adapts; None: all.
    """

    name: str
    label: str
    init: Callable[[], Any]
    adapter: MakeAdapter
    balance: Balance | None = None
    macs: Callable[[int], Macs] = no_macs
    layers: int | None = None


def tuning_loss(
    edge: DecoderConfig,
    adapter: MakeAdapter,
    balance: Balance | None = None,
    *,
    dropout: float = 0.0,
    answer_length: int | None = None,
    execution: Execution = Execution(),
) -> Loss:
    """L_LM of the frozen edge with the trained adapter, and its balance loss; `frozen` is
    `{'edge': params}`. See `Tuned` and `training.step`."""

    def loss(params, stats, frozen, batch, key, axis_name):
        real = None if balance is None else real_tokens(batch)
        hidden, aux = hidden_and_aux(
            frozen["edge"],
            edge,
            batch["tokens"][:, :-1],
            adapter=adapter(params, real, dropout),
            dropout_key=key,
            execution=execution,
        )
        nll, correct = score_answers(
            frozen["edge"], edge, batch, hidden, answer_length=answer_length
        )
        lm = nll.sum() / answer_count(batch, axis_name)
        metrics = {"loss_lm": lm, "accuracy/batch": correct.mean()}
        if balance is None:
            return lm, (stats, metrics)
        added = balance(aux, batch, axis_name)
        return lm + added, (stats, {**metrics, "loss_balance": added})

    return loss


def tune(
    config: TuningConfig,
    load: Load,
    devices: list | None,
    tuned: Callable[[Model], Tuned],
    release: Callable[[Any, Model, Frame, Path, dict[str, Any]], None],
) -> Experiment:
    """Assembles the run; see `recipes.base` and `training.loop.fit`.

    Args:
      tuned: what is trained on an edge.
      release: `release(params, edge, frame, directory, provenance)`.
    """
    mesh = make_mesh(config.mesh, devices)
    edge = config.loader(mesh, load)(config.edge)
    made = tuned(edge)
    data = open_data(
        config,
        mesh,
        edge,
        samples=config.batch_size,
        in_context=config.in_context,
        groups=config.groups,
    )

    def answerer(state: State) -> Answerer:
        return answerer_of(made, state["params"], edge, config.in_context)

    def work(batch: Batch) -> dict[str, int]:
        rows, length = batch["tokens"].shape
        options: dict[str, Any] = {"adapter": made.macs, "answered": config.answered(length)}
        options |= {"layers": made.layers}
        macs = [
            tuning_step_macs(edge.config, rows, length, **options, remat=remat)
            for remat in ("none", config.remat)
        ]
        useful, executed = (each.flops for each in macs)
        return {"examples": rows, "tokens": rows * length, "flops": useful, "executed": executed}

    if hosts.several():  # all processes take part, but only the first one releases
        identify(edge, reads=False)
    return assemble(
        config,
        mesh,
        data,
        init=lambda: (made.init(), {}),
        loss=tuning_loss(
            edge.config,
            made.adapter,
            made.balance,
            dropout=config.dropout,
            answer_length=config.answer_length,
            execution=config.execution(mesh, edge.config),
        ),
        frozen={"edge": edge.params},
        answerer=answerer,
        release=lambda state, directory, provenance: release(
            state["params"], edge, data.frame, directory, provenance
        ),
        work=work,
    )


def answerer_of(tuned: Tuned, params: Any, edge: Model, in_context: bool) -> Answerer:
    """The answerer of trained parameters, unmerged."""
    return Answerer(
        tuned.name,
        tuned.label,
        edge,
        in_context=in_context,
        adapter=tuned.adapter(params),
        adapter_macs=tuned.macs,
    )


def release_baseline(
    config: TuningConfig,
    method: str,
    adapter: Any,
    params: Any,
    edge: Model,
    frame: Frame,
    directory: Path,
    provenance: dict[str, Any],
) -> None:
    """Writes trained parameters as an `artifacts.baseline`; `adapter` is the config that is needed
    to use them."""
    made = Baseline(
        method,
        configs.to_dict(adapter),
        params,
        identify(edge, reads=False),
        frame=frame,
        in_context=config.in_context,
    )
    save_baseline(directory, made, provenance)
