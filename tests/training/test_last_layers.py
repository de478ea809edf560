"""Training with adapters on the last layers of the edge alone: generator, LoRA, direct."""

import chex
import jax
import numpy as np
import pytest

from lorax_gen.baselines.direct import DirectConfig
from lorax_gen.config import from_dict
from lorax_gen.data.config import WorldConfig
from lorax_gen.data.world_batches import generator_batch
from lorax_gen.errors import UserError
from lorax_gen.evaluation.answerers import LoraGen
from lorax_gen.mesh.sharding import MeshConfig, init_sharded, parallelize
from lorax_gen.method import GeneratorConfig, generate, merge, take_example
from lorax_gen.models.decoder import Execution
from lorax_gen.recipes import direct, lora, lora_gen
from lorax_gen.recipes.direct import DirectTraining
from lorax_gen.recipes.lora import LoraConfig
from lorax_gen.recipes.lora_gen import LoraGenConfig
from lorax_gen.system import GeneratorSpec, gated_pool, meta_states
from lorax_gen.training.optimizer import OptimizerConfig, make_optimizer
from lorax_gen.training.state import init_state
from lorax_gen.training.step import answer_loss, generator_loss, make_train_step
from tests.tiny import make_generator, write_system

PROMPTS, QUERIES = 4, 2


@pytest.fixture(scope="module")
def system(tiny_world_system):
    return tiny_world_system


@pytest.fixture(scope="module")
def generator(system):
    return make_generator(system, last_layers=1, cloud_dropout=0.0)


@pytest.fixture(scope="module")
def batch(system):
    shape, encoder = WorldConfig(), system.encoder
    return generator_batch(
        system.world.select("seen"),
        encoder,
        encoder,
        seed=0,
        step=0,
        prompts=PROMPTS,
        queries=QUERIES,
        prompt_length=shape.prompt_length,
        question_length=shape.question_length,
    )


@pytest.fixture(scope="module")
def spec(system, generator):
    return GeneratorSpec(generator.config, system.cloud.config, system.edge.config)


@pytest.fixture(scope="module")
def gradients(system, generator, spec, batch):
    def compute(**options):
        loss = jax.value_and_grad(generator_loss(spec, **options), has_aux=True)
        return jax.jit(loss, static_argnums=5)(
            generator.params, generator.stats, system.frozen, batch, jax.random.key(0), None
        )

    return compute


def test_the_loss_is_that_of_the_edge_merged_for_each_prompt(
    system, generator, spec, batch, gradients
):
    """The cloud reads one meta token; only the last layer of the edge changes."""
    (_, (_, metrics)), grads = gradients()

    @jax.jit
    def loras(params, stats, frozen, prompt, lengths):
        states = meta_states(params, frozen["cloud"], spec, prompt, lengths)
        return states, generate(params, stats, states, spec.generator, train=True).lora

    inputs = batch["prompt"], batch["prompt_lengths"]
    states, tree = loras(generator.params, generator.stats, system.frozen, *inputs)
    assert states.shape == (PROMPTS, 1, system.cloud.config.hidden_size)
    loss = jax.jit(lambda params, rows: answer_loss(params, system.edge.config, rows)[0])
    losses = []
    for i in range(PROMPTS):
        rows = {name: batch[name][i * QUERIES :][:QUERIES] for name in ("tokens", "answer")}
        layers = merge(system.edge.params["layers"], take_example(tree, i))
        losses.append(loss({**system.edge.params, "layers": layers}, rows))
    np.testing.assert_allclose(metrics["loss_lm"], np.mean(losses), rtol=1e-4)
    assert metrics["expert_load"].shape == (1, spec.generator.n_experts)
    for name in ("meta_tokens", "cloud_lora", "router", "pool"):
        assert any(np.abs(leaf).max() > 1e-6 for leaf in jax.tree.leaves(grads[name])), name


@pytest.mark.parametrize(
    "options",
    [{"microbatches": 2}, {"execution": Execution(remat="dots")}],
    ids=["microbatches", "remat"],
)
def test_what_saves_memory_changes_nothing(gradients, options):
    chex.assert_trees_all_close(gradients(**options), gradients(), rtol=1e-4, atol=2e-6)


def test_gates_over_the_pool_are_the_lora_that_they_compose(system, generator):
    """As scoring and generation have it, with fewer layers of rows than the edge has."""
    answerer = LoraGen("lora_gen", "", system.edge, cloud=system.cloud, generator=generator)
    assert answerer.meta_tokens == 1
    assert answerer.room == system.cloud.config.max_position_embeddings - 1
    gates = np.full((3, 1, 4), 0.25, np.float32)
    adapter = gated_pool(generator.params["pool"], gates, generator.config)
    assert adapter.depth(system.edge.config.num_hidden_layers) == 1


# --- recipes -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(system, tmp_path_factory):
    folder = write_system(tmp_path_factory.mktemp("system"), system)
    return {"edge": str(folder / "edge"), "cloud": str(folder / "cloud")}


def recipe(method, models, last):
    """`(config, experiment)` of a tiny run."""
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    common = {"edge": models["edge"], "mesh": mesh}
    common |= {"optimizer": OptimizerConfig(learning_rate=0.03, warmup_steps=0)}
    if method == "lora":
        return LoraConfig(**common, batch_size=8, rank=2, last_layers=last), lora.experiment
    common |= {"cloud": models["cloud"], "prompts": 8, "queries_per_prompt": 2}
    sizes = {"rank": 2, "cloud_rank": 2, "last_layers": last}
    if method == "direct":
        return DirectTraining(**common, generator=DirectConfig(units=3, **sizes)), direct.experiment
    made = GeneratorConfig(n_experts=4, router_width=8, **sizes)
    return LoraGenConfig(**common, generator=made), lora_gen.experiment


@pytest.mark.parametrize("method", ["lora_gen", "lora", "direct"])
def test_a_recipe_trains_the_last_layers_over_a_mesh(method, models):
    config, experiment = recipe(method, models, 1)
    made = experiment(config)
    optimizer = make_optimizer(made.optimizer, 10)
    with jax.set_mesh(made.mesh):
        state = init_sharded(lambda: init_state(*made.init(), optimizer, seed=0), made.mesh)
        step = parallelize(make_train_step(made.loss, optimizer), state, made.mesh, "jit")
        losses = []
        for _ in range(6):
            state, metrics = step(state, made.frozen, made.batch(0))
            losses.append(float(metrics["loss_lm"]))
    assert losses[-1] < losses[0] - 0.05
    tree = state["params"] if method == "lora" else state["params"]["pool"]
    assert len(tree["up"]["a"]) == 1 or method == "direct"  # one network for all layers
    every = experiment(recipe(method, models, None)[0])
    found, more = made.work(made.batch(0)), every.work(made.batch(0))
    assert found["flops"] < more["flops"] and found["tokens"] == more["tokens"]


@pytest.mark.parametrize("method", ["lora_gen", "lora", "direct"])
def test_more_layers_than_the_edge_has_are_refused(method, models):
    config, experiment = recipe(method, models, 3)
    with pytest.raises(UserError, match="last_layers is 3, but the edge model has 2 layers"):
        experiment(config)


@pytest.mark.parametrize("value", [0, -1, 1.5, "all", True])
@pytest.mark.parametrize("cls", [GeneratorConfig, DirectConfig, LoraConfig])
def test_what_is_no_number_of_layers_is_refused(cls, value):
    with pytest.raises(UserError, match="last_layers is "):
        from_dict(cls, {"last_layers": value}, "config.yaml")
