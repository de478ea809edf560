"""Training of a LoRA-Gen generator: its config and its experiment."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lorax_gen.artifacts.generator import Generator, make_generator, save_generator
from lorax_gen.artifacts.identity import Identities, identify
from lorax_gen.cost import generated_ranks, generator_macs, prefill_macs, train_step_macs
from lorax_gen.data.tokens import Encoder
from lorax_gen.errors import UserError
from lorax_gen.evaluation.answerers import LoraGen
from lorax_gen.mesh import hosts
from lorax_gen.mesh.sharding import make_mesh, row_shards
from lorax_gen.method.generator import GeneratorConfig, init_generator
from lorax_gen.models.decoder import Array, embed, kernel_shapes
from lorax_gen.models.huggingface import load_model
from lorax_gen.models.model import Model
from lorax_gen.recipes.base import CloudConfig, Data, Load, assemble
from lorax_gen.recipes.data import needs_end_of_text, open_data
from lorax_gen.system import GeneratorSpec
from lorax_gen.training.experiment import Experiment
from lorax_gen.training.state import State
from lorax_gen.training.step import Batch, Loss, generator_loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraGenConfig(CloudConfig):
    """Train a generator: meta tokens, the cloud model's LoRA, router and pool of experts.

    The cloud and the edge model stay frozen."""

    generator: GeneratorConfig = dataclasses.field(default_factory=GeneratorConfig)


class Parts(NamedTuple):
    """What a recipe is made of in which the cloud reads prompts.

    Attributes:
      start: `[D]`, the embedding that initialises meta tokens.
      key: of the initial parameters.
    """

    mesh: Mesh
    cloud: Model
    edge: Model
    spec: GeneratorSpec
    data: Data
    start: Array
    key: Array

    def identities(self) -> Identities:
        """Of both models."""
        return Identities(
            cloud=identify(self.cloud, reads=True), edge=identify(self.edge, reads=False)
        )


def open_parts(
    config: CloudConfig, generator: GeneratorConfig, load: Load, devices: list | None
) -> Parts:
    """Loads the models and opens the data of a config."""
    mesh = make_mesh(config.mesh, devices)
    check_parts(config, mesh)
    load = config.loader(mesh, load)
    cloud, edge = load(config.cloud, in_int8=config.cloud_int8), load(config.edge)
    spec = GeneratorSpec(generator, cloud.config, edge.config)
    start = end_of_text(cloud, "cloud")
    data = open_data(
        config,
        mesh,
        edge,
        cloud,
        samples=config.prompts,
        queries=config.queries_per_prompt,
        full_sequence=config.loss == "sequence",
        meta_tokens=spec.layers,
    )
    parts = Parts(mesh, cloud, edge, spec, data, start, jax.random.key(config.run.seed))
    if hosts.several():  # all processes take part, but only the first one releases
        parts.identities()
    return parts


def assemble_parts(
    config: CloudConfig,
    parts: Parts,
    loss: Callable[..., Loss],
    *,
    router: int | None = None,
    **options: Any,
) -> Experiment:
    """The experiment of the parts.

    Args:
      loss: a loss, once it knows the options of `step.prompted_loss`.
      router: see `cost.generator_macs`.
      options: `init`, `answerer` and `release` of `base.assemble`.
    """
    return assemble(
        config,
        parts.mesh,
        parts.data,
        loss=loss(
            microbatches=config.microbatches,
            answer_length=config.answer_length,
            execution=config.execution(parts.mesh, parts.cloud.config, parts.edge.config),
        ),
        frozen={"cloud": parts.cloud.params, "edge": parts.edge.params},
        work=lambda batch: count_work(config, parts.spec, batch, router),
        **options,
    )


def experiment(
    config: LoraGenConfig, load: Load = load_model, devices: list | None = None
) -> Experiment:
    """Assembles the run; see `recipes.base` and `training.loop.fit`."""
    parts = open_parts(config, config.generator, load, devices)
    cloud, edge = parts.cloud, parts.edge

    def init() -> tuple[dict, dict]:
        return init_generator(
            parts.key,
            config.generator,
            edge_layers=edge.config.num_hidden_layers,
            edge_shapes=kernel_shapes(edge.config),
            cloud_layers=cloud.config.num_hidden_layers,
            cloud_shapes=kernel_shapes(cloud.config),
            cloud_embedding=parts.start,
        )

    def generator(state: State, models: Identities | None = None) -> Generator:
        return make_generator(
            config.generator,
            state["params"],
            state["stats"],
            cloud=cloud.config,
            edge=edge.config,
            models=models,
            frame=parts.data.frame,
        )

    def answerer(state: State) -> LoraGen:
        made = generator(state)
        return LoraGen("lora_gen", "edge + LoRA-Gen", edge, cloud=cloud, generator=made)

    def release(state: State, directory: Path, provenance: dict[str, Any]) -> None:
        save_generator(directory, generator(state, parts.identities()), provenance)

    loss = partial(generator_loss, parts.spec)
    return assemble_parts(config, parts, loss, init=init, answerer=answerer, release=release)


def check_parts(config: CloudConfig, mesh: Mesh) -> None:
    """Raises UserError where devices or microbatches would get unequal numbers of prompts."""
    prompts, devices, parts = config.prompts, row_shards(mesh), config.microbatches
    if prompts % devices:
        raise UserError(
            f"{prompts} prompts cannot be split over {devices} devices; make prompts a multiple of "
            "that, or use mesh.tensor, which does not split the batch"
        )
    if prompts % parts:
        raise UserError(
            f"{prompts} prompts cannot be split into {parts} microbatches; choose a divisor"
        )
    own = prompts // devices
    if own % parts:
        raise UserError(
            f"{own} prompts of a device cannot be split into {parts} microbatches; choose a "
            "divisor, so that every device has an equal part of each"
        )


def end_of_text(model: Model, role: str, why: str = "meta tokens begin as copies of it") -> Array:
    """The embedding `[D]` that initialises meta tokens; on the host, because within `init`, which
    is compiled, all embeddings would become a constant."""
    if model.is_abstract:
        return jnp.zeros(model.config.hidden_size, model.params["embed"].dtype)
    needs_end_of_text(model, role, why)
    return hosts.gather(embed(model.params, model.config, Encoder.of(model).end_of_text))


def count_work(
    config: CloudConfig, spec: GeneratorSpec, batch: Batch, router: int | None = None
) -> dict[str, int]:
    """See `Experiment.work`."""
    (prompts, prompt_length), (rows, length) = batch["prompt"].shape, batch["tokens"].shape
    answered = config.answered(length)
    shape: dict[str, Any] = {"prompts": prompts, "queries": config.queries_per_prompt}
    shape |= {"prompt_length": prompt_length, "length": length, "answered": answered}
    shape |= {"router": router}
    executed = train_step_macs(spec, **shape, remat=config.remat)
    if config.microbatches > 1:  # each is recomputed in full
        options: dict[str, Any] = {"lora": generated_ranks(spec.generator), "layers": spec.layers}
        executed += generator_macs(spec, prompt_length, prompts, router=router)
        executed += prefill_macs(spec.edge, length - 1, rows, logits=answered, **options)
    return {
        "examples": rows,
        "tokens": prompts * prompt_length + rows * length,
        "flops": train_step_macs(spec, **shape).flops,
        "executed": executed.flops,
    }
