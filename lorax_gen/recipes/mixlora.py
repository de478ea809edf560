"""MixLoRA, a baseline of the paper: feed-forward networks with LoRAs, two for each token; see
`baselines.mixlora`. It cannot be merged and is released as an `artifacts.baseline`."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax

from lorax_gen import config as configs
from lorax_gen.artifacts.baseline import Baseline
from lorax_gen.baselines.mixlora import (
    MixLoraConfig,
    balance_loss,
    init_mixlora,
    mixlora_adapter,
)
from lorax_gen.config import NotNegative
from lorax_gen.cost import mixlora_macs
from lorax_gen.evaluation.answerers import Answerer
from lorax_gen.models.huggingface import load_model
from lorax_gen.models.model import Model
from lorax_gen.recipes.base import Load
from lorax_gen.recipes.tuning import Tuned, TuningConfig, answerer_of, release_baseline, tune
from lorax_gen.training.experiment import Experiment
from lorax_gen.training.step import real_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixLoraTraining(TuningConfig):
    """Train MixLoRA on the edge model, on all seen tasks."""

    adapter: MixLoraConfig = dataclasses.field(default_factory=MixLoraConfig)
    balance: NotNegative = 1e-2
    """Coefficient of the balance loss."""


def experiment(
    config: MixLoraTraining, load: Load = load_model, devices: list | None = None
) -> Experiment:
    """Assembles the run; see `recipes.tuning`."""
    release = partial(release_baseline, config, "mixlora", config.adapter)
    return tune(config, load, devices, partial(training, config), release)


def tuned(adapter: MixLoraConfig, edge: Model, seed: int = 0) -> Tuned:
    """MixLoRA on an edge, without its balance loss."""
    return Tuned(
        "mixlora",
        "edge + MixLoRA",
        lambda: init_mixlora(jax.random.key(seed), adapter, edge.config),
        lambda params, real=None, dropout=0.0: mixlora_adapter(params, adapter, real, dropout),
        macs=lambda tokens: mixlora_macs(edge.config, tokens, adapter),
    )


def training(config: MixLoraTraining, edge: Model) -> Tuned:
    """`tuned`, with the balance loss where it has a coefficient."""

    def balance(aux, batch, axis_name):
        return config.balance * balance_loss(aux, real_tokens(batch), axis_name)

    made = tuned(config.adapter, edge, config.run.seed)
    return made._replace(balance=balance) if config.balance else made


def answerer(baseline: Baseline, edge: Model, cloud: Model | None = None) -> Answerer:
    """The answerer of a released baseline; see `registry.answerer_of`."""
    adapter = configs.from_dict(MixLoraConfig, baseline.config, baseline.name)
    made = tuned(adapter, edge)
    baseline.check_params(jax.eval_shape(made.init))
    return answerer_of(made, baseline.params, edge, baseline.in_context)
