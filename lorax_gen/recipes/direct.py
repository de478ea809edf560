"""Training of direct generation, an ablation of the paper: LoRA-Gen's recipe and data, with a
network in place of router and pool; see `baselines.direct`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lorax_gen import config as configs
from lorax_gen.artifacts.baseline import Baseline, save_baseline
from lorax_gen.baselines.direct import (
    DirectConfig,
    direct_spec,
    init_direct,
    units_config,
    units_of_states,
)
from lorax_gen.cost import Macs, direct_router, generator_macs
from lorax_gen.evaluation.answerers import Answerer, CloudAnswerer, Prompt
from lorax_gen.inference.choices import TOKENS_PER_BATCH
from lorax_gen.inference.reading import read_prompts
from lorax_gen.models.adapter import Adapter
from lorax_gen.models.decoder import Array, Execution
from lorax_gen.models.huggingface import load_model
from lorax_gen.models.model import Model
from lorax_gen.recipes.base import CloudConfig, Load
from lorax_gen.recipes.lora_gen import assemble_parts, open_parts
from lorax_gen.system import GeneratorSpec, gated_pool, meta_states
from lorax_gen.tensors import tree_hash
from lorax_gen.training.experiment import Experiment
from lorax_gen.training.state import State
from lorax_gen.training.step import Routed, prompted_loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class DirectTraining(CloudConfig):
    """Train direct generation: meta tokens, the cloud model's LoRA, and the network from meta
    states to LoRA factors.

    The cloud and the edge model stay frozen."""

    generator: DirectConfig = dataclasses.field(default_factory=DirectConfig)


def route(
    params: dict, stats: Any, states: Array, key: Array | None, axis_name: str | None
) -> Routed:
    """The units as gates that nothing restricts or balances; see `step.Route`."""
    return Routed(units_of_states(params["network"], states), stats, None, {})


@partial(jax.jit, static_argnames=("spec", "execution"))
def prompt_units(
    params: dict,
    cloud: dict,
    spec: GeneratorSpec,
    prompt: Array,
    lengths: Array,
    *,
    execution: Execution = Execution(),
) -> Array:
    """The units `[P, L, H + 1]` of prompts `[P, T]`, at inference."""
    states = meta_states(params, cloud, spec, prompt, lengths, execution=execution)
    return units_of_states(params["network"], states)


@dataclasses.dataclass(frozen=True, eq=False)
class Direct(CloudAnswerer):
    """The edge with the LoRA that is generated directly from each question's prompt.

    Attributes:
      params, config: of `init_direct`.
    """

    params: dict[str, Any] = dataclasses.field(kw_only=True)
    config: DirectConfig = dataclasses.field(kw_only=True)

    @property
    def spec(self) -> GeneratorSpec:
        return direct_spec(self.config, self.cloud.config, self.model.config)

    @property
    def meta_tokens(self) -> int:
        return self.spec.layers

    def specialise(
        self,
        prompts: Sequence[Prompt],
        *,
        tokens_per_batch: int = TOKENS_PER_BATCH,
        wanted: Sequence[int] | None = None,
        mesh: Mesh | None = None,
        progress: Callable[[int], object] = lambda prompts: None,
    ) -> Adapter:
        """The adapter with one row per prompt: its units. The decoder composes a row's LoRA from
        them layer by layer."""
        spec = self.spec

        def read(weights: Any, prompt: Array, lengths: Array, execution: Execution) -> Array:
            return prompt_units(*weights, spec, prompt, lengths, execution=execution)

        reading = {name: self.params[name] for name in ("meta_tokens", "cloud_lora", "network")}
        units = read_prompts(
            [prompt.ids for prompt in prompts],
            self.cloud,
            read,
            (reading, self.cloud.params),
            (spec.layers, spec.generator.n_experts),
            room=self.room,
            tokens_per_batch=tokens_per_batch,
            wanted=wanted,
            mesh=mesh,
            progress=progress,
        )
        return gated_pool(self.params["pool"], units, spec.generator)

    def prompt_macs(self, prompt_tokens: int) -> Macs:
        spec = self.spec
        return generator_macs(spec, prompt_tokens, router=direct_router(spec))

    def identity(self) -> dict[str, Any]:
        own = {"params": tree_hash(self.params), "config": configs.to_dict(self.config)}
        return super().identity() | own


def experiment(
    config: DirectTraining, load: Load = load_model, devices: list | None = None
) -> Experiment:
    """Assembles the run; see `recipes.base` and `training.loop.fit`."""
    parts = open_parts(config, units_config(config.generator), load, devices)
    plain = configs.to_dict(config.generator)

    def release(state: State, directory: Path, provenance: dict[str, Any]) -> None:
        edge, cloud = (getattr(parts.identities(), role) for role in ("edge", "cloud"))
        made = Baseline("direct", plain, state["params"], edge, cloud, parts.data.frame)
        save_baseline(directory, made, provenance)

    return assemble_parts(
        config,
        parts,
        partial(prompted_loss, parts.spec, route),
        init=lambda: (init_direct(parts.key, parts.spec, parts.start), {}),
        answerer=lambda state: direct(state["params"], config.generator, parts.edge, parts.cloud),
        release=release,
        router=direct_router(parts.spec),
    )


def direct(params: dict[str, Any], config: DirectConfig, edge: Model, cloud: Model) -> Direct:
    """The answerer of trained parameters."""
    return Direct("direct", "edge + direct LoRA", edge, cloud=cloud, params=params, config=config)


def answerer(baseline: Baseline, edge: Model, cloud: Model | None = None) -> Answerer:
    """The answerer of a released baseline; see `registry.answerer_of`."""
    assert cloud is not None  # `check_models` has asked for it
    config = configs.from_dict(DirectConfig, baseline.config, baseline.name)
    spec = direct_spec(config, cloud.config, edge.config)
    start = jax.ShapeDtypeStruct((cloud.config.hidden_size,), jnp.float32)
    init = lambda start: init_direct(jax.random.key(0), spec, start)  # noqa: E731
    baseline.check_params(jax.eval_shape(init, start))
    return direct(baseline.params, config, edge, cloud)
