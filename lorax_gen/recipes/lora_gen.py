"""Training of a LoRA-Gen generator: its config and its experiment."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lorax_gen.artifacts.generator import Generator, make_generator, save_generator
from lorax_gen.artifacts.identity import Identities, identify
from lorax_gen.config import Size
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
from lorax_gen.recipes.base import EdgeConfig, Load, assemble
from lorax_gen.recipes.data import needs_end_of_text, open_data
from lorax_gen.system import GeneratorSpec
from lorax_gen.training.experiment import Experiment
from lorax_gen.training.state import State
from lorax_gen.training.step import Batch, generator_loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraGenConfig(EdgeConfig):
    """Train a generator: meta tokens, the cloud model's LoRA, router and pool of experts.

    The cloud and the edge model stay frozen."""

    cloud: str = "world/cloud"
    """Cloud model: a model directory, or the name of a shipped one."""
    cloud_int8: bool = False
    """Keep the cloud model's kernels in int8, half the bytes of bfloat16 (pip install
    'lorax-gen[int8]')."""
    prompts: Size = 32
    """Prompts per batch; each batch mixes tasks."""
    queries_per_prompt: Size = 4
    """Questions per prompt; the cloud reads a prompt once for all of them."""
    loss: Literal["answer", "sequence"] = "answer"
    """L_LM on the answer's tokens, or on the full sequence that the edge model reads."""
    microbatches: Size = 1
    """Parts of a batch that run in sequence to save memory; the gradients are the same."""
    generator: GeneratorConfig = dataclasses.field(default_factory=GeneratorConfig)


def experiment(
    config: LoraGenConfig, load: Load = load_model, devices: list | None = None
) -> Experiment:
    """Assembles the run; see `recipes.base` and `training.loop.fit`."""
    mesh = make_mesh(config.mesh, devices)
    check_parts(config, mesh)
    load = config.loader(mesh, load)
    cloud, edge = load(config.cloud, in_int8=config.cloud_int8), load(config.edge)
    spec = GeneratorSpec(config.generator, cloud.config, edge.config)
    key, start = jax.random.key(config.run.seed), end_of_text(cloud)

    def init() -> tuple[dict, dict]:
        return init_generator(
            key,
            config.generator,
            edge_layers=edge.config.num_hidden_layers,
            edge_shapes=kernel_shapes(edge.config),
            cloud_layers=cloud.config.num_hidden_layers,
            cloud_shapes=kernel_shapes(cloud.config),
            cloud_embedding=start,
        )

    data = open_data(
        config,
        mesh,
        edge,
        cloud,
        samples=config.prompts,
        queries=config.queries_per_prompt,
        full_sequence=config.loss == "sequence",
    )

    def generator(state: State, models: Identities | None = None) -> Generator:
        return make_generator(
            config.generator,
            state["params"],
            state["stats"],
            cloud=cloud.config,
            edge=edge.config,
            models=models,
            frame=data.frame,
        )

    def identities() -> Identities:
        return Identities(cloud=identify(cloud, reads=True), edge=identify(edge, reads=False))

    if hosts.several():  # all processes take part, but only the first one releases
        identities()

    def answerer(state: State) -> LoraGen:
        made = generator(state)
        return LoraGen("lora_gen", "edge + LoRA-Gen", edge, cloud=cloud, generator=made)

    def release(state: State, directory: Path, provenance: dict[str, Any]) -> None:
        save_generator(directory, generator(state, identities()), provenance)

    return assemble(
        config,
        mesh,
        data,
        init=init,
        loss=generator_loss(
            spec,
            microbatches=config.microbatches,
            answer_length=config.answer_length,
            execution=config.execution(mesh, cloud.config, edge.config),
        ),
        frozen={"cloud": cloud.params, "edge": edge.params},
        answerer=answerer,
        release=release,
        work=lambda batch: count_work(config, spec, batch),
    )


def check_parts(config: LoraGenConfig, mesh: Mesh) -> None:
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


def end_of_text(cloud: Model) -> Array:
    """The embedding `[D]` that initialises meta tokens; on the host, because within `init`, which
    is compiled, all embeddings would become a constant."""
    if cloud.is_abstract:
        return jnp.zeros(cloud.config.hidden_size, cloud.params["embed"].dtype)
    needs_end_of_text(cloud, "cloud", "meta tokens begin as copies of it")
    return hosts.gather(embed(cloud.params, cloud.config, Encoder.of(cloud).end_of_text))


def count_work(config: LoraGenConfig, spec: GeneratorSpec, batch: Batch) -> dict[str, int]:
    """See `Experiment.work`."""
    (prompts, prompt_length), (rows, length) = batch["prompt"].shape, batch["tokens"].shape
    answered = config.answered(length)
    shape: dict[str, Any] = {"prompts": prompts, "queries": config.queries_per_prompt}
    shape |= {"prompt_length": prompt_length, "length": length, "answered": answered}
    executed = train_step_macs(spec, **shape, remat=config.remat)
    if config.microbatches > 1:  # each is recomputed in full
        lora = generated_ranks(spec.generator)
        executed += generator_macs(spec, prompt_length, prompts)
        executed += prefill_macs(spec.edge, length - 1, rows, logits=answered, lora=lora)
    return {
        "examples": rows,
        "tokens": prompts * prompt_length + rows * length,
        "flops": train_step_macs(spec, **shape).flops,
        "executed": executed.flops,
    }
