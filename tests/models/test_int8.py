"""A decoder with its kernels in int8 is the decoder of the rounded kernels, in fewer bytes."""

import sys
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_gen.errors import UserError
from lorax_gen.mesh.sharding import MeshConfig, make_mesh, tree_shardings
from lorax_gen.models import decoder, decoding, int8
from lorax_gen.models.adapter import Adapter
from lorax_gen.models.decoder import Execution, kernel_shapes
from lorax_gen.models.huggingface import load_model, save_model
from lorax_gen.models.model import Model
from lorax_gen.tokenizers import word_level
from tests.models.configs import CONFIGS

CONFIG = CONFIGS["qwen2-window"]


@pytest.fixture(scope="module")
def params(random_params):
    return random_params(CONFIG)


@pytest.fixture(scope="module")
def pairs(params):
    return int8.quantize_kernels(params)


@pytest.fixture(scope="module")
def rounded(params, pairs):
    """The parameters with the values that the pairs stand for."""
    return {
        **params,
        "layers": {name: rounded_kernel(leaf) for name, leaf in pairs["layers"].items()},
    }


def rounded_kernel(leaf):
    return leaf["qvalue"] * leaf["scale"] if int8.is_quantized(leaf) else leaf


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 9)), jnp.int32)


@pytest.fixture(scope="module")
def saved(params, tmp_path_factory):
    directory = tmp_path_factory.mktemp("int8") / "model"
    tokenizer = word_level([f"w{i}" for i in range(CONFIG.vocab_size - 4)])
    save_model(directory, Model(CONFIG, params, tokenizer))
    return directory


def test_no_value_moves_by_more_than_half_a_step(params, rounded):
    for name in kernel_shapes(CONFIG):
        kernel, found = params["layers"][name], rounded["layers"][name]
        step = jnp.abs(kernel).max(-2, keepdims=True) / 127
        assert jnp.all(jnp.abs(kernel - found) <= step / 2 * (1 + 1e-5))
        assert jnp.any(kernel != found)


def test_a_kernel_of_zeros_stays_one():
    found = rounded_kernel(int8.quantize(jnp.zeros((2, 3, 4))))
    np.testing.assert_array_equal(found, 0)


def test_kernels_and_nothing_else_are_pairs(params, pairs):
    kernels = {name for name, leaf in pairs["layers"].items() if int8.is_quantized(leaf)}
    assert kernels == set(kernel_shapes(CONFIG))
    rest = lambda tree: {name: tree["layers"][name] for name in set(tree["layers"]) - kernels}  # noqa: E731
    chex.assert_trees_all_equal(rest(pairs), rest(params))
    for name, (d_in, d_out) in kernel_shapes(CONFIG).items():
        chex.assert_shape(pairs["layers"][name]["qvalue"], (3, d_in, d_out))
        chex.assert_shape(pairs["layers"][name]["scale"], (3, 1, d_out))
        chex.assert_type(pairs["layers"][name]["qvalue"], jnp.int8)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_states_and_gradients_are_those_of_the_rounded_kernels(remat, pairs, rounded, tokens):
    rng = np.random.default_rng(1)
    lora = {
        name: {
            "a": jnp.asarray(rng.normal(0, d_in**-0.5, (3, d_in, 2)), jnp.float32),
            "b": jnp.asarray(rng.normal(0, 0.5, (3, 2, d_out)), jnp.float32),
        }
        for name, (d_in, d_out) in kernel_shapes(CONFIG).items()
    }

    @jax.jit
    def loss(lora, params):
        hidden = decoder.hidden_states(
            params, CONFIG, tokens, adapter=Adapter(lora), execution=Execution(remat=remat)
        )
        return jnp.square(decoder.logits(params, CONFIG, hidden)).mean()

    compute = jax.value_and_grad(loss)
    chex.assert_trees_all_close(compute(lora, pairs), compute(lora, rounded), rtol=1e-5, atol=1e-6)


def test_decoding_reads_them_too(pairs, rounded, tokens):
    write = partial(
        decoding.generate_tokens,
        config=CONFIG,
        tokens=tokens,
        lengths=jnp.array([9, 5]),
        max_new_tokens=4,
    )
    np.testing.assert_array_equal(write(pairs), write(rounded))


@pytest.mark.parametrize("on_mesh", [False, True])
def test_a_model_loads_into_int8_in_its_shards(on_mesh, saved, pairs):
    shardings = None
    if on_mesh:
        mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices("cpu")[:8])
        shardings = partial(tree_shardings, mesh=mesh)
    params = load_model(saved, in_int8=True, shardings=shardings).params
    chex.assert_trees_all_close(params, pairs, rtol=1e-6)
    if on_mesh:
        jax.tree.map(lambda leaf, place: chex.assert_equal(leaf.sharding, place),
                     params, shardings(params))  # fmt: skip
        q, scale = params["layers"]["q"]["qvalue"], params["layers"]["q"]["scale"]
        assert q.addressable_shards[0].data.shape == (3, 8, 12)
        assert scale.addressable_shards[0].data.shape == (3, 1, 12)


def test_it_is_another_model_by_its_fingerprint(saved):
    assert load_model(saved, in_int8=True).fingerprint != load_model(saved).fingerprint


def test_what_is_rounded_is_not_merged_or_saved(saved, tmp_path):
    model = load_model(saved, in_int8=True)
    lora = {"q": {"a": jnp.zeros((3, 16, 2)), "b": jnp.zeros((3, 2, 24))}}
    with pytest.raises(UserError, match="cannot merge a LoRA into a model whose kernels are in"):
        model.merged(lora)
    with pytest.raises(UserError, match="cannot save a model whose kernels are in int8"):
        save_model(tmp_path / "again", model)
    assert not (tmp_path / "again").exists()


def test_without_qwix_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)  # as where it is not installed
    with pytest.raises(UserError, match=r"pip install 'lorax-gen\[int8\]'"):
        int8.quantize(jnp.ones((2, 3)))
