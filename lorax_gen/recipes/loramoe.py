"""LoRAMoE, a baseline of the paper: token-routed experts at the feed-forward kernels; see
`baselines.loramoe`. It cannot be merged and is released as an `artifacts.baseline`."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax

from lorax_gen import config as configs
from lorax_gen.artifacts.baseline import Baseline
from lorax_gen.baselines.loramoe import (
    LoraMoeConfig,
    init_loramoe,
    localized_balance,
    loramoe_adapter,
)
from lorax_gen.config import Fraction, NotNegative
from lorax_gen.cost import loramoe_macs
from lorax_gen.evaluation.answerers import Answerer
from lorax_gen.models.huggingface import load_model
from lorax_gen.models.model import Model
from lorax_gen.recipes.base import Load
from lorax_gen.recipes.tuning import Tuned, TuningConfig, answerer_of, release_baseline, tune
from lorax_gen.training.experiment import Experiment


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraMoeTraining(TuningConfig):
    """Train LoRAMoE on the edge model, on all seen tasks."""

    adapter: LoraMoeConfig = dataclasses.field(default_factory=LoraMoeConfig)
    balance: NotNegative = 0.0
    """Coefficient of the localized balance loss."""
    balance_delta: Fraction = 0.1
    """How much more the first half of the experts counts for the tasks of `balance_tasks`, and the
    other half for the rest."""
    balance_tasks: tuple[str, ...] = ()
    """Families of the world, or sources or tasks of a mixture, as glob patterns, that the first
    half of the experts is for. None named: all experts are for all tasks."""

    @property
    def groups(self) -> tuple[str, ...]:
        return self.balance_tasks if self.balance else ()


def experiment(
    config: LoraMoeTraining, load: Load = load_model, devices: list | None = None
) -> Experiment:
    """Assembles the run; see `recipes.tuning`."""
    release = partial(release_baseline, config, "loramoe", config.adapter)
    return tune(config, load, devices, partial(training, config), release)


def tuned(adapter: LoraMoeConfig, edge: Model, seed: int = 0) -> Tuned:
    """LoRAMoE on an edge, without its balance loss."""
    return Tuned(
        "loramoe",
        "edge + LoRAMoE",
        lambda: init_loramoe(jax.random.key(seed), adapter, edge.config),
        lambda params, real=None, dropout=0.0: loramoe_adapter(params, adapter, real, dropout),
        macs=lambda tokens: loramoe_macs(edge.config, tokens, adapter),
    )


def training(config: LoraMoeTraining, edge: Model) -> Tuned:
    """`tuned`, with the balance loss where it has a coefficient."""

    def balance(aux, batch, axis_name):
        group, delta = batch.get("group"), config.balance_delta
        return config.balance * localized_balance(aux, group, delta, axis_name)

    made = tuned(config.adapter, edge, config.run.seed)
    return made._replace(balance=balance) if config.balance else made


def answerer(baseline: Baseline, edge: Model, cloud: Model | None = None) -> Answerer:
    """The answerer of a released baseline; see `registry.answerer_of`."""
    adapter = configs.from_dict(LoraMoeConfig, baseline.config, baseline.name)
    made = tuned(adapter, edge)
    baseline.check_params(jax.eval_shape(made.init))
    return answerer_of(made, baseline.params, edge, baseline.in_context)
