"""An adapter of the last m layers is one of all layers that is zero below; and costs less."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from lorax_gen.baselines.mixlora import MixLoraConfig, init_mixlora, mixlora_adapter
from lorax_gen.errors import UserError
from lorax_gen.mesh.sharding import MeshConfig, keep_rows, make_mesh, place, tree_shardings
from lorax_gen.method import init_lora, merge
from lorax_gen.method.lora import deepened
from lorax_gen.models import decoder, decoding
from lorax_gen.models.adapter import Adapter, LowRank
from lorax_gen.models.decoder import REMAT_POLICIES, Execution, kernel_shapes
from tests.models.configs import CONFIGS, LLAMA

L, LAST = LLAMA.num_hidden_layers, 2
NAMES = ("llama", "gemma2", "gemma3", "opt", "qwen2-window")  # kinds of layers, biases, positions

hidden_and_aux = jax.jit(decoder.hidden_and_aux, static_argnames=("config", "execution"))


def hidden(params, config, tokens, adapter=None, **options):
    return hidden_and_aux(params, config, tokens, adapter=adapter, **options)[0]


def draw(config, *lead, seed=0, names=("q", "down"), rank=3):
    """Factors of no meaning `{name: {'a': [*lead, D, R], 'b': [*lead, R, F]}}`."""
    rng, tree = np.random.default_rng(seed), {}
    for name in names:
        d_in, d_out = kernel_shapes(config)[name]
        tree[name] = {
            "a": jnp.asarray(rng.normal(0, d_in**-0.5, (*lead, d_in, rank)), jnp.float32),
            "b": jnp.asarray(rng.normal(0, 0.3, (*lead, rank, d_out)), jnp.float32),
        }
    return tree


def below(tree, layers):
    """The same for all layers, with zeros in those before."""
    return jax.tree.map(
        lambda x: jnp.concatenate([jnp.zeros((layers - len(x), *x.shape[1:]), x.dtype), x]), tree
    )


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(1), (4, 7), 0, LLAMA.vocab_size)


@pytest.fixture(scope="module")
def params(random_params):
    return random_params(LLAMA)


# --- the same function ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("last", [1, 2])
def test_states_are_those_of_a_lora_that_is_zero_below(name, last, random_params, tokens):
    config = CONFIGS[name]
    params, shared, rows = random_params(config), draw(config, last), draw(config, last, 4, seed=1)
    deep = Adapter(below(shared, L), below(rows, L))
    found = hidden(params, config, tokens, Adapter(shared, rows))
    np.testing.assert_allclose(found, hidden(params, config, tokens, deep), atol=2e-5)
    assert np.abs(found - hidden(params, config, tokens)).max() > 0.1


@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_the_loss_and_its_gradients_are_those_of_a_lora_that_is_zero_below(params, tokens, remat):
    """With dropout: a layer has the key that it has when all are adapted."""
    rows = draw(LLAMA, LAST, 4)

    def loss(params, rows):
        adapter = Adapter(rows=rows, apply=LowRank(0.3))
        execution = Execution(remat=remat)
        return jnp.sin(
            hidden(
                params, LLAMA, tokens, adapter, dropout_key=jax.random.key(3), execution=execution
            )
        ).sum()

    grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    value, (of_params, of_rows) = grad(params, rows)
    wanted, (params_wanted, rows_wanted) = grad(params, below(rows, L))
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    chex.assert_trees_all_close(of_params, params_wanted, rtol=1e-4, atol=1e-4)
    rows_wanted = jax.tree.map(lambda leaf: leaf[L - LAST :], rows_wanted)
    chex.assert_trees_all_close(of_rows, rows_wanted, rtol=1e-4, atol=1e-4)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(of_rows)) > 0.1


def test_an_adapter_of_all_layers_is_one_scan(params, tokens):
    """The program of before there were others; its results are held by the golden files."""

    def program(adapter):
        return jax.make_jaxpr(
            lambda: decoder.hidden_states(params, LLAMA, tokens, adapter=adapter)
        )()

    assert [eqn.params["length"] for eqn in scans(program(None))] == [L]
    assert [eqn.params["length"] for eqn in scans(program(Adapter(draw(LLAMA, L))))] == [L]
    assert [eqn.params["length"] for eqn in scans(program(Adapter(draw(LLAMA, 1))))] == [L - 1, 1]


def test_prefix_positions_and_masks_hold_in_both_parts(params, tokens):
    adapter, deep = Adapter(draw(LLAMA, LAST)), Adapter(below(draw(LLAMA, LAST), L))
    prefix = decoder.embed(params, LLAMA, tokens[:, :3])
    positions = jnp.broadcast_to(jnp.array([0, 1, 2, 0, 1, 2, 3]), tokens.shape)
    text = jnp.array([0, 0, 0, 1, 1, 1, 1])
    mask = jnp.tril(text[:, None] == text)[None, None].repeat(4, 0)
    for options in ({"prefix": prefix}, {"positions": positions, "mask": mask}):
        found = hidden(params, LLAMA, tokens, adapter, **options)
        wanted = hidden(params, LLAMA, tokens, deep, **options)
        np.testing.assert_allclose(found, wanted, atol=2e-5)


def test_auxiliary_values_are_those_of_the_adapted_layers(params, tokens):
    config = MixLoraConfig(n_experts=4, top_k=2, rank=2, alpha=2.0)
    tree, real = init_mixlora(jax.random.key(0), config, LLAMA), jnp.ones(tokens.shape, bool)
    deep = mixlora_adapter(tree, config, real)
    last = mixlora_adapter(jax.tree.map(lambda leaf: leaf[L - LAST :], tree), config, real)
    # B is zero at first, so the states are those of the frozen model either way.
    _, wanted = hidden_and_aux(params, LLAMA, tokens, adapter=deep)
    _, found = hidden_and_aux(params, LLAMA, tokens, adapter=last)
    assert set(found) == {"chosen", "probability"}
    for name, value in found.items():
        np.testing.assert_allclose(value, wanted[name][L - LAST :], atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_decoding_with_a_cache_gives_the_states_of_the_forward_pass(name, random_params, tokens):
    config = CONFIGS[name]
    params, adapter = random_params(config), Adapter(draw(config, LAST), draw(config, LAST, 4))
    wanted, steps = hidden(params, config, tokens, adapter), []
    step = jax.jit(decoding.forward_with_cache, static_argnums=1)
    cache = decoding.init_cache(config, 4, 7, jnp.float32)
    states, cache = step(params, config, tokens[:, :3], cache, adapter)
    for t in range(3, 7):
        at = jnp.full((4, 1), t)
        one, cache = step(params, config, tokens[:, t : t + 1], cache, adapter, at)
        steps.append(one)
    found = jnp.concatenate([states, *steps], axis=1)
    np.testing.assert_allclose(found, wanted, atol=3e-5)


def test_merging_changes_the_last_kernels_alone(params, tokens):
    tree = draw(LLAMA, LAST)
    merged = {**params, "layers": merge(params["layers"], tree)}
    found = hidden(merged, LLAMA, tokens)
    np.testing.assert_allclose(found, hidden(params, LLAMA, tokens, Adapter(tree)), atol=2e-5)
    first = L - LAST
    for name, kernel in params["layers"].items():
        np.testing.assert_array_equal(merged["layers"][name][:first], kernel[:first])
        same = np.array_equal(merged["layers"][name][first:], kernel[first:])
        assert same == (name not in tree)
    deep = merge(params["layers"], deepened(tree, L))
    chex.assert_trees_all_equal(merged["layers"], deep)


@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_a_mesh_gives_the_same_loss_and_gradients(params, random_params, sizes):
    mesh = make_mesh(MeshConfig(**sizes), jax.devices("cpu")[:8])
    tokens = jax.random.randint(jax.random.key(1), (8, 7), 0, LLAMA.vocab_size)
    rows = draw(LLAMA, LAST, 8)

    def loss(rows, params, execution):
        adapter = Adapter(rows=rows)
        states = decoder.hidden_states(params, LLAMA, tokens, adapter=adapter, execution=execution)
        return jnp.sin(states).sum()

    grad = jax.jit(jax.value_and_grad(loss), static_argnums=2)
    sharded = place(params, tree_shardings(params, mesh))
    with jax.set_mesh(mesh):
        found = grad(rows, sharded, Execution(constrain=keep_rows(mesh), remat="dots"))
    chex.assert_trees_all_close(found, grad(rows, params, Execution()), rtol=1e-4, atol=1e-4)


# --- what it saves -------------------------------------------------------------------------------


def scans(jaxpr):
    """The scans of a program, in order."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            yield eqn
        else:
            for inner in jaxprs_in_params(eqn.params):
                yield from scans(inner)


def gradient(config, params, tokens, depth, remat="none"):
    """The gradient of a loss by a LoRA of the last `depth` layers, as a function and its input."""
    lora = jax.eval_shape(lambda: init_lora(jax.random.key(0), kernel_shapes(config), 4, depth))
    execution = Execution(remat=remat)

    def loss(lora, params, tokens):
        adapter = Adapter(lora)
        return decoder.hidden_states(
            params, config, tokens, adapter=adapter, execution=execution
        ).sum()

    return jax.value_and_grad(loss), (lora, params, tokens)


def stacked(scan):
    """Shapes of what a scan keeps of each layer: `[length, ...]` of the body's `[...]`. How many of
    its outputs are carried is written differently in every jax."""
    body = scan.params["jaxpr"]
    inner = getattr(body, "jaxpr", body).outvars
    pairs = zip(scan.outvars, inner, strict=True)
    return [out.aval.shape for out, own in pairs if out.aval.shape != own.aval.shape]


@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_the_backward_pass_ends_at_the_first_adapted_layer_and_saves_nothing_below(remat):
    params = decoder.abstract_params(LLAMA)
    tokens = jax.ShapeDtypeStruct((4, 7), jnp.int32)
    function, inputs = gradient(LLAMA, params, tokens, LAST, remat)
    lower, upper, backward = scans(jax.make_jaxpr(function)(*inputs))
    lengths = [eqn.params["length"] for eqn in (lower, upper, backward)]
    assert lengths == [L - LAST, LAST, LAST] and backward.params["reverse"]
    assert not stacked(lower)  # no value of each layer is kept
    kept = stacked(upper)
    assert kept and all(shape[0] == LAST for shape in kept)
    for d_in, d_out in kernel_shapes(LLAMA).values():  # nor copies of the weights
        assert (LAST, d_in, d_out) not in kept


def test_the_weights_are_not_copied(random_params):
    """A system whose weights are far larger than its activations, compiled."""
    config = CONFIGS["llama"]
    wide = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6}
    config = type(config)(**{**vars(config), **wide})
    params, tokens = decoder.abstract_params(config), jax.ShapeDtypeStruct((1, 4), jnp.int32)
    layer = sum(leaf.size // 6 for leaf in jax.tree.leaves(params["layers"])) * 4

    def temporaries(depth):
        function, inputs = gradient(config, params, tokens, depth)
        return jax.jit(function).lower(*inputs).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(3) < temporaries(6) + layer


# --- what does not fit ---------------------------------------------------------------------------


def test_more_layers_than_the_model_has_or_unequal_numbers_are_refused(params, tokens):
    for adapter, shown in (
        (Adapter(draw(LLAMA, L + 1)), rf"\[{L + 1}\] layers, the model has {L}"),
        (Adapter(draw(LLAMA, L), draw(LLAMA, LAST, 4)), rf"\[{LAST}, {L}\] layers"),
    ):
        with pytest.raises(UserError, match=shown):
            decoder.hidden_states(params, LLAMA, tokens, adapter=adapter)
        with pytest.raises(UserError, match=shown):
            decoding.forward_with_cache(
                params, LLAMA, tokens, decoding.init_cache(LLAMA, 4, 7, jnp.float32), adapter
            )
    unequal = {**draw(LLAMA, LAST, names=("q",)), **draw(LLAMA, L, names=("down",))}
    for tree in (draw(LLAMA, L + 1), unequal):
        with pytest.raises(UserError, match="do not fit the kernels"):
            merge(params["layers"], tree)
