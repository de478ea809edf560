"""The train step against the same method written in torch on models of `transformers`.

The other side is `benchmarks/torch_reference.py`, which knows the paper's equations and none of our
functions. Same weights, same batch, fp32, no dropout. Needs torch (pip install -e '.[parity]').
"""

import functools
import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("torch", reason="needs torch: pip install -e '.[parity]'")

import torch

from lorax_gen.method import GeneratorConfig, init_generator
from lorax_gen.models.checkpoint_files import read_params
from lorax_gen.models.config_json import read_config
from lorax_gen.models.decoder import Execution, kernel_shapes
from lorax_gen.system import GeneratorSpec
from lorax_gen.tensors import flatten
from lorax_gen.training import step as training
from lorax_gen.training.optimizer import OptimizerConfig, make_optimizer
from lorax_gen.training.state import init_state
from lorax_gen.training.step import generator_loss, make_train_step
from tests.golden.make import COMMON, case, random_model, rope, save

# By its place: benchmarks are no package.
PATH = Path(__file__).parents[2] / "benchmarks" / "torch_reference.py"
SPEC = importlib.util.spec_from_file_location("torch_reference", PATH)
reference = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(reference)

PROMPTS, QUERIES, PROMPT_LENGTH, LENGTH, ANSWER = 6, 3, 12, 10, 4
SMALL = {
    "n_experts": 5, "top_k": 2, "rank": 3, "alpha": 6.0, "router_width": 16,
    "cloud_rank": 4, "cloud_alpha": 2.0, "cloud_dropout": 0.0, "balance_coefficient": 0.1,
}  # fmt: skip
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup_steps=0, weight_decay=0.1, clip_norm=0.05)
WIDER = {"hidden_size": 48, "num_hidden_layers": 3}
CLOUDS = {
    "llama": case("llama", "float32", **WIDER, rope_parameters=rope(500.0)),
    "qwen2": case("qwen2", "float32", **WIDER),
    "gemma": case("gemma", "float32", **WIDER, head_dim=16, tie_word_embeddings=True),
}
EDGES = {
    "llama": case("llama", "float32", num_key_value_heads=4),
    "gemma2": case(
        "gemma2",
        "float32",
        num_hidden_layers=3,
        head_dim=16,
        query_pre_attn_scalar=24,
        sliding_window=4,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
        tie_word_embeddings=True,
    ),
    "qwen2": case("qwen2", "float32", num_hidden_layers=3, tie_word_embeddings=True),
}


class Variant(NamedTuple):
    """An edge, the generator's switches, and how our step goes about it."""

    edge: str
    switches: dict[str, Any]
    options: dict[str, Any]  # of `generator_loss`
    chunk: int = 128  # positions that go through the head together
    cloud: str = "llama"


VARIANTS = {
    "llama": Variant("llama", {}, {}),
    "llama, products, all shared": Variant(
        "llama",
        {"composition": "products", "pool": "shared", "router": "shared", "meta_tokens": "shared"},
        {"microbatches": 2, "execution": Execution(remat="dots")},
        chunk=4,
    ),
    "gemma2, products": Variant(
        "gemma2",
        {"composition": "products", "router": "shared"},
        {"microbatches": 3, "answer_length": ANSWER},
        chunk=3,
    ),
    "qwen2, shared pool": Variant(
        "qwen2",
        {"pool": "shared", "top_k": 3},
        {"answer_length": ANSWER, "execution": Execution(remat="full")},
        cloud="qwen2",
    ),
    "qwen2, no BatchNorm": Variant(
        "qwen2",
        {"composition": "products", "batch_norm": False},
        {"microbatches": 6},
        cloud="gemma",
    ),
}


class Result(NamedTuple):
    """Of one step: numbers, and trees as `{path: array}`."""

    metrics: dict[str, float]
    gradients: dict[str, np.ndarray]
    before: dict[str, np.ndarray]
    after: dict[str, np.ndarray]
    stats: dict[str, np.ndarray]


class Pair(NamedTuple):
    config: GeneratorConfig
    stats: dict[str, np.ndarray]  # before the step
    ours: Result
    theirs: Result
    model: torch.nn.Module  # the reference after its step
    batch: dict[str, torch.Tensor]


def make_batch() -> dict[str, np.ndarray]:
    """Prompts, questions and answers of unequal lengths; what pads them is noise."""
    rng = np.random.default_rng(0)
    rows = PROMPTS * QUERIES
    lengths = rng.permutation(np.linspace(2, PROMPT_LENGTH, PROMPTS).astype(np.int32))
    end = rng.integers(ANSWER + 2, LENGTH + 1, (rows, 1))
    begin = end - rng.integers(1, ANSWER + 1, (rows, 1))
    time = np.arange(LENGTH)
    vocabulary = COMMON["vocab_size"]
    return {
        "prompt": rng.integers(0, vocabulary, (PROMPTS, PROMPT_LENGTH)).astype(np.int32),
        "prompt_lengths": lengths,
        "tokens": rng.integers(0, vocabulary, (rows, LENGTH)).astype(np.int32),
        "answer": (begin <= time) & (time < end),
    }


def our_start(config, cloud, edge, cloud_params):
    """Trainables and statistics with nothing at its initial value; filled by numpy."""
    params, stats = jax.eval_shape(
        lambda: init_generator(
            jax.random.key(0),
            config,
            edge_layers=edge.num_hidden_layers,
            edge_shapes=kernel_shapes(edge),
            cloud_layers=cloud.num_hidden_layers,
            cloud_shapes=kernel_shapes(cloud),
            cloud_embedding=cloud_params["embed"][0],
        )
    )
    rng = np.random.default_rng(1)

    def fill(path, leaf):
        name, value = path[-1].key, rng.normal(size=leaf.shape)
        if name in ("a", "b", "w1", "w2"):
            value *= (0.5 if name == "b" else 1.0) * leaf.shape[-2] ** -0.5
        elif name == "bn_scale":
            value = 1 + 0.3 * value
        return jnp.asarray(value, leaf.dtype)

    params = jax.tree_util.tree_map_with_path(fill, params)
    mean = rng.normal(size=stats["mean"].shape)
    var = rng.uniform(0.5, 2, stats["var"].shape)
    return params, {"mean": jnp.float32(mean), "var": jnp.float32(var)}


def our_step(spec, frozen, params, stats, batch, variant) -> Result:
    remember = optax.GradientTransformation(  # the gradients, as they come
        lambda params: jax.tree.map(jnp.zeros_like, params), lambda grads, *_: (grads, grads)
    )
    optimizer = optax.chain(remember, make_optimizer(OPTIMIZER, 10))
    state = init_state(params, stats, optimizer, seed=0)
    step = jax.jit(make_train_step(generator_loss(spec, **variant.options), optimizer))
    with pytest.MonkeyPatch.context() as patch:
        nll = functools.partial(training.answer_nll, chunk=variant.chunk)
        patch.setattr(training, "answer_nll", nll)
        state, metrics = jax.device_get(step(state, frozen, batch))
    scalars = {name: float(value) for name, value in metrics.items() if np.ndim(value) == 0}
    gradients, after = flatten(state["opt_state"][0]), flatten(state["params"])
    return Result(scalars, gradients, flatten(jax.device_get(params)), after, state["stats"])


def their_step(config, model, params, stats, batch) -> Result:
    reference.load(reference.places(model), params)
    if config.batch_norm:
        reference.load(reference.statistics(model), stats)
    before = reference.collect(reference.places(model), torch.clone)
    optimizer = reference.make_optimizer(model, OPTIMIZER.learning_rate, OPTIMIZER.weight_decay)
    clip = torch.nn.utils.clip_grad_norm_
    gradients: dict[str, np.ndarray] = {}

    def remember(parameters, limit):
        found = reference.collect(reference.places(model), lambda p: torch.clone(p.grad))
        gradients.update(found)
        return clip(parameters, limit)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", remember)
        out = reference.train_step(model, optimizer, batch, OPTIMIZER.clip_norm)
    scalars = {name: float(value) for name, value in out.items() if value.ndim == 0}
    after = reference.collect(reference.places(model))
    moved = reference.collect(reference.statistics(model)) if config.batch_norm else {}
    return Result(scalars, gradients, before, after, moved)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """`both(name)`: one step of a variant on each side, taken once for all tests."""

    @functools.cache
    def take(name: str) -> Pair:
        variant = VARIANTS[name]
        config = GeneratorConfig(**SMALL | variant.switches)
        models, configs, frozen = {}, {}, {}
        cases = {"cloud": CLOUDS[variant.cloud], "edge": EDGES[variant.edge]}
        for seed, (part, what) in enumerate(cases.items()):
            directory = tmp_path_factory.mktemp(part)
            models[part] = random_model(what, seed)
            save(directory, models[part], what)
            configs[part] = read_config(directory / "config.json")
            frozen[part] = read_params(directory, configs[part])
        spec = GeneratorSpec(config, configs["cloud"], configs["edge"])
        params, stats = our_start(config, configs["cloud"], configs["edge"], frozen["cloud"])
        batch = make_batch()
        ours = our_step(spec, frozen, params, stats, batch, variant)
        model = reference.LoraGen(models["cloud"], models["edge"], config)
        tensors = {key: torch.from_numpy(value) for key, value in batch.items()}
        tensors["tokens"] = tensors["tokens"].long()
        params, stats = jax.device_get((params, stats))
        theirs = their_step(config, model, params, stats, tensors)
        return Pair(config, stats, ours, theirs, model, tensors)

    return take


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Norm of the difference over the norm."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("name", VARIANTS)
def test_losses_agree(both, name):
    pair = both(name)
    for key in ("loss", "loss_lm", "loss_cv", "grad_norm"):
        expected = pair.theirs.metrics[key]
        print(f"{key}: {pair.ours.metrics[key]:.7f} and {expected:.7f}")
        assert pair.ours.metrics[key] == pytest.approx(expected, rel=1e-5), key


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_agree(both, name):
    """Leaf by leaf. That of the router's b2 is zero where BatchNorm takes the mean off again."""
    pair = both(name)
    ours, theirs = pair.ours.gradients, pair.theirs.gradients
    names = set(ours) - ({"router.bn_scale", "router.bn_bias"} - set(theirs))
    assert names == set(theirs)
    for key, expected in theirs.items():
        if key == "router.b2" and pair.config.batch_norm:
            for found in (ours[key], expected):
                assert np.linalg.norm(found) < 1e-6 * pair.theirs.metrics["grad_norm"]
            continue
        assert np.linalg.norm(expected) > 1e-4 * pair.theirs.metrics["grad_norm"], key
        print(f"{key}: {difference(ours[key], expected):.1e}")
        assert difference(ours[key], expected) < 1e-5, key


@pytest.mark.parametrize("name", VARIANTS)
def test_a_step_of_the_optimizer_agrees(both, name):
    """Clipped, decayed where it should be, and moved by AdamW."""
    pair = both(name)
    assert pair.theirs.metrics["grad_norm"] > 2 * OPTIMIZER.clip_norm
    for key, expected in pair.theirs.after.items():
        if key == "router.b2" and pair.config.batch_norm:  # Adam's step on rounding is any step
            continue
        before, found = pair.theirs.before[key], pair.ours.after[key]
        np.testing.assert_array_equal(pair.ours.before[key], before)
        step = difference(found - before, expected - before)
        print(f"{key}: {difference(found, expected):.1e}, of the step {step:.1e}")
        assert difference(found, expected) < 1e-5, key
        assert step < 1e-2, key


@pytest.mark.parametrize(
    "name", [n for n, v in VARIANTS.items() if v.switches.get("batch_norm", 1)]
)
def test_running_statistics_agree(both, name):
    """But for this: torch keeps the variance of a sample, n / (n - 1) of that which it normalises
    by; we keep the latter, as flax does."""
    pair = both(name)
    ours, theirs = pair.ours.stats, pair.theirs.stats
    n = PROMPTS * (len(pair.model.edge.model.layers) if ours["mean"].ndim == 1 else 1)
    old, keep = pair.stats, pair.config.bn_momentum
    np.testing.assert_allclose(ours["mean"], theirs["mean"], rtol=1e-5, atol=1e-6)
    biased = keep * old["var"] + (theirs["var"] - keep * old["var"]) * (n - 1) / n
    np.testing.assert_allclose(ours["var"], biased, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("switches", [{"lm_head": True}, {"repeat_prompts": True}])
def test_the_reference_gives_the_same_where_it_works_more(both, switches):
    model, batch = both("llama").model, both("llama").batch
    with torch.no_grad():
        expected = model(batch)
        for name, value in switches.items():
            setattr(model, name, value)
        found = model(batch)
        for name in switches:
            setattr(model, name, False)
    for name in ("loss_lm", "loss_cv"):
        assert found[name].item() == pytest.approx(expected[name].item(), rel=1e-5), name
