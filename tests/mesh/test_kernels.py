"""Flash kernels give what `attend` gives: splash interpreted on the CPU, cuDNN by its arguments."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_gen.errors import UserError
from lorax_gen.mesh.kernels import cudnn, flash, kernel_of, make_attention
from lorax_gen.mesh.sharding import MeshConfig, make_mesh
from lorax_gen.models import presets
from lorax_gen.models.adapter import Adapter, LowRank
from lorax_gen.models.attention import attend
from lorax_gen.models.checkpoint_files import read_params
from lorax_gen.models.config_json import read_config
from lorax_gen.models.decoder import Execution, hidden_states
from lorax_gen.planning.topology import Absent
from lorax_gen.tensors import read_tensors

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
interpreted = partial(flash, kernel="splash", mesh=None, strict=True, interpret=True)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices("cpu")[:8])


def of(platform, tensor=1):
    """As much of a mesh as `make_attention` asks for."""
    devices = np.array([Absent(0, platform, platform)])
    return SimpleNamespace(devices=devices, shape={"data": 1, "fsdp": 1, "tensor": tensor})


def random_qkv(size, time, heads=4, kv_heads=2, batch=1):
    """Queries, keys, values, and a cotangent of the output."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(batch, time, count, size) for count in (heads, kv_heads, kv_heads, heads)]
    return [2 * jax.random.normal(*pair) for pair in zip(keys, shapes, strict=True)]


def output_and_gradients(attention, q, k, v, cotangent, which=None, **options):
    def run(q, k, v, which):
        return attention(q, k, v, scale=q.shape[-1] ** -0.5, which=which, **options)

    @jax.jit
    def both(q, k, v, which):
        output, back = jax.vjp(partial(run, which=which), q, k, v)
        return output, back(cotangent)

    return both(q, k, v, which)


# --- splash --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "time", "options"),
    [
        (64, 20, {}),
        (80, 140, {"windows": (7,)}),  # over the edge of a tile
        (128, 20, {"windows": (300,)}),  # longer than the text
        (256, 20, {"windows": (7, None), "softcap": 2.0}),  # of layers that differ
    ],
    ids=["64", "80-window", "128-wide-window", "256-cap-windows"],
)
def test_splash_gives_what_attend_gives_and_its_gradients(size, time, options):
    arrays = random_qkv(size, time)
    indices = range(len(options.get("windows", ()))) if "softcap" in options else [None]
    outputs = []
    for index in indices:
        which = None if index is None else jnp.int32(index)
        expected = output_and_gradients(attend, *arrays, which, **options)
        found = output_and_gradients(interpreted, *arrays, which, **options)
        chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=2e-5)
        outputs.append(expected[0])
    plain = output_and_gradients(attend, *arrays)[0]
    limited = options.get("windows", (None,))[0] == 7
    assert (np.abs(outputs[0] - plain).max() > 0.1) == limited  # a window that does something


def test_rows_and_heads_are_split_over_the_mesh(mesh):
    q, k, v, _ = random_qkv(64, 20, batch=4)
    attention = partial(interpreted, mesh=mesh)
    program = str(jax.make_jaxpr(partial(attention, scale=0.1))(q, k, v))
    assert "pallas_call" in program and "fsdp" in program
    found = jax.jit(partial(attention, scale=0.1))(q, k, v)
    np.testing.assert_allclose(found, attend(q, k, v, scale=0.1), atol=2e-5)


def test_under_pmap_each_device_has_its_own(mesh):
    attention = make_attention("splash", of("tpu"), "pmap")
    devices = mesh.devices.ravel().tolist()
    step = jax.pmap(lambda q: attention(q, q, q, scale=0.1), devices=devices)
    q = jax.ShapeDtypeStruct((8, 2, 20, 4, 128), jnp.float32)
    assert "pallas_call" in str(jax.make_jaxpr(step)(q))


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "qwen2-window"])
def test_scanned_layers_of_different_windows_choose_their_kernel(name):
    """Gradients, too, of an adapter with dropout, by layers that are computed again."""
    directory = GOLDEN / name
    config = read_config(directory / "config.json")
    params = read_params(directory, config)
    tokens = read_tensors(directory / "expected.safetensors")["tokens"]
    assert {*config.windows} == {6, None} and tokens.shape[1] > 6
    layers, width = config.num_hidden_layers, config.num_attention_heads * config.head_dim
    a = jax.random.normal(jax.random.key(1), (layers, config.hidden_size, 2))
    b = jax.random.normal(jax.random.key(2), (layers, len(tokens), 2, width)) / 8

    @partial(jax.jit, static_argnums=0)
    def run(execution, a, b):
        adapter = Adapter(
            rows={"q": {"a": jnp.stack([a] * len(tokens), 1), "b": b}}, apply=LowRank(0.5)
        )
        states = hidden_states(
            params, config, tokens, adapter=adapter, dropout_key=jax.random.key(3),
            execution=execution,
        )  # fmt: skip
        return jnp.sum(jnp.sin(states)), states

    gradients = jax.value_and_grad(run, argnums=(1, 2), has_aux=True)
    expected = gradients(Execution(), a, b)
    found = gradients(Execution(interpreted, remat="full"), a, b)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-4)
    assert min(np.abs(gradient).max() for gradient in expected[1]) > 1e-2


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_a_window_that_holds_the_sequence_is_none(name):
    config = read_config(GOLDEN / name / "config.json")
    params = read_params(GOLDEN / name, config)

    def program(length):
        tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
        execution = Execution(partial(interpreted, interpret=False))
        forward = partial(hidden_states, params, config, execution=execution)
        return str(jax.make_jaxpr(forward)(tokens)).count("pallas_call")

    assert (program(6), program(7)) == (1, 2)


# --- cuDNN ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 1, 7])
def test_cudnn_gets_the_window_as_such(window, monkeypatch):
    given = {}
    real = jax.nn.dot_product_attention

    def dot_product_attention(q, k, v, **options):
        given.update(options)
        return real(q, k, v, **(options | {"implementation": "xla"}))  # same meaning, on the CPU

    monkeypatch.setattr(jax.nn, "dot_product_attention", dot_product_attention)
    q, k, v, _ = random_qkv(16, 20)
    found = cudnn(q, k, v, scale=0.1, window=window)
    monkeypatch.undo()
    assert given["implementation"] == "cudnn" and "mask" not in given
    np.testing.assert_allclose(found, attend(q, k, v, scale=0.1, windows=(window,)), atol=1e-5)


# --- which one -----------------------------------------------------------------------------------


def test_auto_is_what_the_platform_has():
    found = {name: make_attention("auto", of(name)) for name in ("cpu", "gpu", "tpu")}
    assert found["cpu"] is attend
    assert [found[name].keywords["kernel"] for name in ("gpu", "tpu")] == ["cudnn", "splash"]


@pytest.mark.parametrize(
    "name, platform", [("cudnn", "cpu"), ("cudnn", "tpu"), ("splash", "cpu"), ("splash", "gpu")]
)
def test_a_kernel_of_other_devices_is_refused(name, platform):
    with pytest.raises(UserError, match=f"attention={name} does not run on a {platform}; auto"):
        make_attention(name, of(platform))


@pytest.mark.parametrize(
    "model",
    ["tinyllama_1b", "llama3_2_1b", "smollm2_360m", "qwen2_1_5b", "opt_2_7b", "gemma2_2b",
     "gemma3_1b"],
)  # fmt: skip
def test_every_family_has_splash_on_a_tpu(model):
    assert kernel_of("auto", of("tpu"), getattr(presets, model)(), "bfloat16") == ("splash", None)


@pytest.mark.parametrize(
    ("kernel", "platform", "model", "dtype", "reason"),
    [
        ("cudnn", "gpu", "gemma2_2b", "bfloat16", "has no soft-cap"),
        ("cudnn", "gpu", "gemma_2b", "bfloat16", "does not take heads of 256 features"),
        ("cudnn", "gpu", "tinyllama_1b", "float32", "does not take float32, only bfloat16"),
        ("splash", "tpu", "gemma3_1b", "bfloat16", "cannot split 1 key/value heads over"),
        ("splash", "tpu", "tinyllama_1b", "float16", "does not take float16"),
    ],
)
def test_what_a_kernel_cannot_compute_is_refused_or_under_auto_xlas(
    kernel, platform, model, dtype, reason
):
    mesh, config = of(platform, tensor=2), getattr(presets, model)()
    with pytest.raises(UserError, match=f"attention={kernel} {reason}.*; choose attention=auto"):
        kernel_of(kernel, mesh, config, dtype)
    name, why = kernel_of("auto", mesh, config, dtype)
    assert name == "xla" and why.startswith(f"{kernel} {reason}")
    assert kernel_of("auto", of(platform), presets.opt_2_7b(), "bfloat16") == (kernel, None)


def test_rows_that_cannot_be_split_are_attended_to_by_xla_or_refused(mesh):
    """Six rows are not to be split over four devices."""
    q, k, v, _ = random_qkv(64, 20, batch=6)
    attention = partial(interpreted, mesh=mesh, scale=0.1)
    with pytest.raises(UserError, match="splash cannot split 6 rows over 4 devices"):
        attention(q, k, v)
    found = attention(q, k, v, strict=False, windows=(7,))
    np.testing.assert_array_equal(found, attend(q, k, v, scale=0.1, windows=(7,)))


def test_several_texts_in_a_row_are_attended_to_by_xla():
    q, k, v, _ = random_qkv(64, 4)
    mask = jnp.eye(4, dtype=bool)[None, None]
    found = interpreted(q, k, v, scale=0.1, mask=mask)
    np.testing.assert_array_equal(found, attend(q, k, v, scale=0.1, mask=mask))
