"""Training of a LoRA-Gen generator: what the config says, assembled into an experiment."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from lorax_gen.artifacts.generator import Generator, make_generator, save_generator
from lorax_gen.config import at_least_one
from lorax_gen.cost import train_step_macs
from lorax_gen.data.benchmarks import find_benchmark, load_questions, load_shots
from lorax_gen.data.config import MixtureConfig, WorldConfig
from lorax_gen.data.tokens import Encoder
from lorax_gen.data.unseen import without_texts
from lorax_gen.data.world_batches import generator_batch
from lorax_gen.evaluation.benchmark import Setting, evaluate_benchmark
from lorax_gen.evaluation.greedy import right_specialised
from lorax_gen.evaluation.world import WorldQuiz
from lorax_gen.mesh import hosts
from lorax_gen.mesh.kernels import execution_over
from lorax_gen.mesh.sharding import MeshConfig, make_mesh, tree_shardings
from lorax_gen.method.generator import GeneratorConfig, init_generator
from lorax_gen.models.decoder import embed, kernel_shapes
from lorax_gen.models.huggingface import load_model
from lorax_gen.models.model import Model
from lorax_gen.system import GeneratorSpec
from lorax_gen.training.experiment import Experiment
from lorax_gen.training.optimizer import OptimizerConfig
from lorax_gen.training.run import RunConfig
from lorax_gen.training.state import State
from lorax_gen.training.step import Batch, generator_loss


@dataclasses.dataclass(frozen=True)
class LoraGenConfig:
    """Train a generator: meta tokens, the cloud model's LoRA, router and pool of experts.

    The cloud and the edge model stay as they are."""

    cloud: str = "world/cloud"
    """Cloud model: a model directory, or the name of a shipped one."""
    edge: str = "world/edge"
    """Edge model: a model directory, or the name of a shipped one."""
    prompts: int = 32
    """Prompts per batch; each batch mixes tasks."""
    queries_per_prompt: int = 4
    """Questions asked under each prompt; the cloud reads a prompt once for all of them."""
    loss: Literal["answer", "sequence"] = "answer"
    """L_LM on the answer's tokens, or on the whole sequence that the edge model sees."""
    answer_length: int | None = None
    """Most answer tokens of a row, its end of text included; no logits are computed beyond."""
    microbatches: int = 1
    """Parts of a batch that run one after the other, to save memory; the gradients are the same."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the two models; bfloat16 on GPUs and TPUs. What is trained is float32."""
    cloud_int8: bool = False
    """Keep the cloud model's kernels in int8, half the bytes of bfloat16 (pip install
    'lorax-gen[int8]')."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass computes again, per layer: nothing, all but matmuls, everything."""
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    """auto is splash on TPU, cudnn on GPU, xla elsewhere, and where those do not fit."""
    data: WorldConfig | MixtureConfig = dataclasses.field(default_factory=WorldConfig)
    generator: GeneratorConfig = dataclasses.field(default_factory=GeneratorConfig)
    run: RunConfig = dataclasses.field(default_factory=RunConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    def __post_init__(self):
        sizes = ("prompts", "queries_per_prompt", "answer_length", "microbatches")
        at_least_one(self, sizes)


def experiment(config: LoraGenConfig) -> Experiment:
    """Assembles the run; see `training.loop.fit`."""
    mesh = make_mesh(config.mesh)
    shardings = partial(tree_shardings, mesh=mesh) if config.mesh.mode == "jit" else None
    load = partial(load_model, dtype=config.dtype, shardings=shardings)
    cloud, edge = load(config.cloud, in_int8=config.cloud_int8), load(config.edge)
    spec = GeneratorSpec(config.generator, cloud.config, edge.config)
    of_kind = world_data if isinstance(config.data, WorldConfig) else mixture_data
    data = of_kind(config, cloud, edge)
    key = jax.random.key(config.run.seed)
    # On the host: within `init`, which is compiled, all embeddings would become a constant.
    start = hosts.gather(embed(cloud.params, cloud.config, cloud.tokenizer.eos_token_id))

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

    def release(state: State, directory: Path, provenance: dict[str, Any]) -> None:
        save_generator(directory, generator_of(config, cloud, edge, state), provenance)

    def work(batch: dict[str, np.ndarray]) -> dict[str, float]:
        (prompts, prompt_length), (rows, length) = batch["prompt"].shape, batch["tokens"].shape
        macs = train_step_macs(
            spec,
            prompts=prompts,
            queries=config.queries_per_prompt,
            prompt_length=prompt_length,
            length=length,
            answered=min(config.answer_length or length, length - 1),
        )
        tokens = prompts * prompt_length + rows * length
        return {"examples": rows, "tokens": tokens, "flops": macs.flops}

    return Experiment(
        init=init,
        loss=generator_loss(
            spec,
            microbatches=config.microbatches,
            answer_length=config.answer_length,
            execution=execution_over(mesh, config.attention, config.remat, config.mesh.mode),
        ),
        frozen={"cloud": cloud.params, "edge": edge.params},
        batch=data.batch,
        evaluate=data.evaluate,
        counts=data.counts,
        release=release,
        work=work,
        run=config.run,
        optimizer=config.optimizer,
        mesh=config.mesh,
    )


# --- data ----------------------------------------------------------------------------------------


class Data(NamedTuple):
    """What an `Experiment` wants of its data, under the same names."""

    batch: Callable[[int], Batch]
    evaluate: Callable[[State], dict[str, float]]
    counts: Callable[[], dict[str, int]] = dict


def world_data(config: LoraGenConfig, cloud: Model, edge: Model) -> Data:
    """The embedded world: accuracy of seen and unseen tasks, by family."""
    world, data = config.data.world(), config.data
    cloud_encoder, edge_encoder = Encoder.of(cloud), Encoder.of(edge)
    seen = [task for task in world.select("seen") if task.family in data.families]

    def batch(step: int) -> dict[str, np.ndarray]:
        return generator_batch(
            seen,
            cloud_encoder,
            edge_encoder,
            seed=config.run.seed,
            step=step,
            prompts=config.prompts,
            queries=config.queries_per_prompt,
            prompt_length=data.prompt_length,
            question_length=data.question_length,
            max_shots=data.max_shots,
            whole=config.loss == "sequence",
            answer_length=config.answer_length,
        )

    quiz = WorldQuiz(world, data.families)
    mesh = evaluation_mesh(config)

    def evaluate(state: State) -> dict[str, float]:
        return quiz.accuracy(
            right_specialised(system_of(state), quiz.prompts, quiz.questions, mesh)
        )

    return Data(batch, evaluate)


def mixture_data(config: LoraGenConfig, cloud: Model, edge: Model) -> Data:
    """Real tasks: accuracy on benchmarks, each question under a prompt of its own."""
    data = config.data
    missing = ", ".join(without_texts(data.root))
    if missing and hosts.is_first():
        print(
            f"lorax-gen: warning: {data.root} has no files of {missing}: whether the training data "
            "holds these unseen tasks is told by names alone, not by texts",
            file=sys.stderr,
        )
    mixture = data.mixture(
        Encoder.of(cloud),
        Encoder.of(edge),
        seed=config.run.seed,
        prompts=config.prompts,
        queries=config.queries_per_prompt,
        whole=config.loss == "sequence",
        answer_length=config.answer_length,
    )

    records = [find_benchmark(name) for name in data.evaluate_on]
    asked = {
        record.name: load_questions(record, "test", data.root)[: data.evaluate_questions]
        for record in records
    }
    train = {
        record.name: load_shots(record, data.root) if data.evaluate_shots else []
        for record in records
    }
    system_of, mesh = system_maker(config, cloud, edge), evaluation_mesh(config)

    def evaluate(state: State) -> dict[str, float]:
        system = system_of(state)
        result: dict[str, float] = {}
        for record in records:
            found = evaluate_benchmark(
                record,
                asked[record.name],
                Setting("lora_gen", data.evaluate_shots),
                system,
                train=train[record.name],
                mesh=mesh,
            )
            result[f"accuracy/{record.name}"] = found.acc
        for split in ("seen", "unseen"):
            accuracies = [
                result[f"accuracy/{record.name}"]
                for record in records
                if record.unseen == (split == "unseen")
            ]
            if accuracies:
                result[f"accuracy/{split}"] = float(np.mean(accuracies))
        return result

    return Data(mixture.batch, evaluate, lambda: mixture.counts)


def generator_of(config: LoraGenConfig, cloud: Model, edge: Model, state: State) -> Generator:
    """The generator that a state of training holds."""
    return make_generator(
        config.generator, state["params"], state["stats"], cloud=cloud.config, edge=edge.config
    )


def evaluation_mesh(config: LoraGenConfig) -> Mesh | None:
    """The mesh that evaluations run over; under pmap, whose weights lie everywhere, none."""
    return make_mesh(config.mesh) if config.mesh.mode == "jit" else None
