"""Tiny systems as files and commands take them, made from the models of the shared fixture."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lorax_gen.artifacts.generator import Generator, save_generator
from lorax_gen.files import new_directory
from lorax_gen.mesh.sharding import MeshConfig, make_mesh
from lorax_gen.method import init_generator
from lorax_gen.models.adapter import Adapter
from lorax_gen.models.decoder import kernel_shapes
from lorax_gen.models.huggingface import save_model
from lorax_gen.models.model import Model
from lorax_gen.system import model_shape
from lorax_gen.tensors import write_tensors
from lorax_gen.tokenizers import SPECIAL
from lorax_gen.training.experiment import Experiment
from lorax_gen.training.optimizer import OptimizerConfig
from lorax_gen.training.run import RunConfig

PROMPTS = (
    "Grade each thing by its color and say the grade in tikaish .",
    "Put each thing into a box by its size : tiny=alpha , small=beta , big=gamma , huge=delta .",
    "Look at the place of each thing : garden=alpha , else=beta .",
)


def adapter_of(tree) -> Adapter | None:
    """The adapter of a LoRA tree for all rows, `[L, D, R]`, or of one each, `[L, B, D, R]`."""
    if tree is None:
        return None
    own = all(leaf.ndim == 4 for leaf in jax.tree.leaves(tree))
    return Adapter(rows=tree) if own else Adapter(shared=tree)


def make_generator(system, seed: int = 0, **overrides) -> Generator:
    """As if after training: numbers of no meaning in every place, in the shapes of a config."""
    config = dataclasses.replace(system.spec.generator, **overrides)
    cloud, edge = system.cloud, system.edge

    def init():
        return init_generator(
            jax.random.key(0),
            config,
            edge_layers=edge.config.num_hidden_layers,
            edge_shapes=kernel_shapes(edge.config),
            cloud_layers=cloud.config.num_hidden_layers,
            cloud_shapes=kernel_shapes(cloud.config),
            cloud_embedding=cloud.params["embed"][0],
        )

    rng = np.random.default_rng(seed)
    params, stats = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 0.5, leaf.shape), leaf.dtype), jax.eval_shape(init)
    )
    stats["var"] = 1 + jnp.abs(stats["var"])
    shapes = {"cloud": model_shape(cloud.config), "edge": model_shape(edge.config)}
    return Generator(config, params, stats, {"shapes": shapes})


def write_generator(directory: Path, generator: Generator, system) -> None:
    save_generator(directory, generator)


def write_system(directory: Path, system, generator: Generator | None = None) -> Path:
    """Directories `cloud`, `edge` and, where there is one, `generator`."""
    save_model(directory / "cloud", system.cloud)
    save_model(directory / "edge", system.edge)
    if generator is not None:
        write_generator(directory / "generator", generator, system)
    return directory


def one_word_edge(system) -> Model:
    """An edge that answers a question with one word and then ends the text, as a trained one does.

    One dimension, which no layer writes to, tells whether a token is of those that end questions;
    the head reads it for the end of text, and the other dimensions for words.
    """
    edge = system.edge
    eos = edge.tokenizer.eos_token_id
    last = {question.split()[-1] for task in system.world.tasks for question, _ in task.questions}
    asked = jnp.asarray(edge.tokenizer.convert_tokens_to_ids(sorted(last)))
    embed = edge.params["embed"].at[:, 0].set(4.0).at[asked, 0].set(-4.0)
    head = edge.params["embed"].T.at[0].set(0.0)
    never = jnp.asarray([*asked.tolist(), *(i for i in range(len(SPECIAL)) if i != eos)])
    for tokens, weight in ((eos, 8.0), (never, 4.0)):  # none of them is ever an answer
        head = head.at[:, tokens].set(0.0).at[0, tokens].set(weight)
    layers = dict(edge.params["layers"])
    for name in ("o", "down"):
        layers[name] = layers[name].at[:, :, 0].set(0.0)
    config = dataclasses.replace(edge.config, tie_word_embeddings=False)
    params = {**edge.params, "embed": embed, "lm_head": head, "layers": layers}
    return Model(config, params, edge.tokenizer)


def linear_experiment(run: RunConfig, batch=None) -> Experiment:
    """A run that compiles at once: four weights, linear regression."""

    def loss(params, stats, frozen, batch, key, axis_name):
        error = batch["x"] @ params["w"] - batch["y"]
        return jnp.mean(error**2), (stats, {})

    def make_batch(step):
        x = np.random.default_rng([run.seed, step]).normal(size=(8, 4)).astype(np.float32)
        return {"x": x, "y": x.sum(1)}

    def release(state, directory, provenance):
        with new_directory(directory) as partial:
            write_tensors(partial / "weights.safetensors", {"w": np.asarray(state["params"]["w"])})

    return Experiment(
        init=lambda: ({"w": jnp.zeros(4)}, {}),
        loss=loss,
        frozen={},
        batch=batch or make_batch,
        evaluate=lambda state: {"error": abs(state["params"]["w"] - 1).max()},
        release=release,
        work=lambda batch: {"examples": 8},
        run=run,
        optimizer=OptimizerConfig(learning_rate=0.1, warmup_steps=0),
        mesh=make_mesh(MeshConfig()),
    )


# The head of a config that trains the system of `write_system`; `.format(system=, family=)`.
TINY_RUN = """\
method: lora_gen
cloud: {system}/cloud
edge: {system}/edge
prompts: 8
queries_per_prompt: 2
data: {{kind: world, families: [{family}]}}
generator: {{n_experts: 4, rank: 2, alpha: 2, router_width: 8, cloud_rank: 2, cloud_alpha: 2}}"""
