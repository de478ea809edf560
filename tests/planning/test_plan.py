"""A plan is of the step that `train` would run, its bytes are those that would be held."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lorax_gen import cli
from lorax_gen.data.config import WorldConfig
from lorax_gen.errors import UserError
from lorax_gen.mesh.chips import peak_flops
from lorax_gen.mesh.kernels import make_attention
from lorax_gen.mesh.sharding import MeshConfig, make_mesh
from lorax_gen.models import presets
from lorax_gen.models.decoder import kernel_shapes
from lorax_gen.planning import memory, plan, topology
from lorax_gen.planning.table import print_plan
from lorax_gen.recipes.registry import load_config, recipe_of

MESH = MeshConfig(data=2, fsdp=2, tensor=2)


@pytest.fixture(scope="module")
def config():
    """The shipped world, on a mesh with every axis."""
    return dataclasses.replace(load_config("world")[1], prompts=8, queries_per_prompt=2, mesh=MESH)


@pytest.fixture(scope="module")
def paper():
    return load_config("paper")[1]


def change(config, **fields):
    """A config with other fields, `data__x` being one of `data`."""
    for name, value in fields.items():
        parent, _, child = name.rpartition("__")
        if parent:
            value = dataclasses.replace(getattr(config, parent), **{child: value})
        config = dataclasses.replace(config, **{parent or name: value})
    return config


# --- the same step ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("world", {"prompts": 8, "queries_per_prompt": 2}),
        ("world", {"prompts": 8, "queries_per_prompt": 2, "cloud_int8": True}),
        ("world-lora", {}),
        ("world-autocompressor", {}),
        ("world-direct", {"prompts": 8, "queries_per_prompt": 2}),
        ("world-edge", {}),
    ],
    ids=["lora_gen", "lora_gen-int8", "lora", "autocompressor", "direct", "pretrain"],
)
def test_the_plan_has_the_shapes_of_the_run(name, fields):
    config = dataclasses.replace(load_config(name)[1], mesh=MESH, **fields)
    step = plan.abstract_step(config, jax.devices())
    experiment = recipe_of(config).experiment(config)
    state = jax.eval_shape(experiment.fresh_state)
    shape = lambda leaf: (leaf.shape, jnp.dtype(leaf.dtype))  # noqa: E731
    for ours, theirs in (
        (step.state, state),
        (step.frozen, experiment.frozen),
        (step.batch, experiment.batch(0)),
    ):
        assert jax.tree.map(shape, ours) == jax.tree.map(shape, theirs)
    places = jax.tree.map(lambda leaf: leaf.sharding, step.frozen)
    assert places == jax.tree.map(lambda leaf: leaf.sharding, experiment.frozen)


@pytest.mark.parametrize("name", ["world-lora", "world-autocompressor", "world-edge"])
def test_the_step_of_every_recipe_is_compiled(name):
    config = dataclasses.replace(load_config(name)[1], mesh=MESH)
    step = plan.abstract_step(config, jax.devices())
    found, traffic = plan.compile_step(step)
    assert found["arguments"] == pytest.approx(plan.arguments(step)["total"], rel=0.02)
    assert traffic["all-reduce"].bytes > 0  # gradients are added up over devices


def test_bytes_are_those_of_a_device(config):
    step = plan.abstract_step(config, jax.devices())
    held = jax.tree.map(
        lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding), step.frozen
    )
    device = jax.devices()[0]
    shards = [
        shard.data.nbytes
        for leaf in jax.tree.leaves(held)
        for shard in leaf.addressable_shards
        if shard.device == device
    ]
    assert memory.bytes_per_device(step.frozen) == sum(shards)


def test_a_mixture_is_planned_without_its_data(paper):
    assert paper.data.kind == "mixture"
    shapes = {
        name: leaf.shape for name, leaf in plan.abstract_step(paper, jax.devices()).batch.items()
    }
    assert shapes == {
        "prompt": (64, 2048), "prompt_lengths": (64,), "tokens": (64, 512), "answer": (64, 512),
    }  # fmt: skip


def test_a_preset_is_planned_without_its_memory(paper):
    step = plan.abstract_step(paper, jax.devices())
    assert step.models["cloud"] == presets.llama3_8b()
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(step.frozen))
    held = plan.arguments(step)
    assert held["cloud"] == pytest.approx(8_030_261_248 * 2 / 8, rel=1e-3)  # but for the norms
    assert held["total"] == sum(held[name] for name in held if name != "total")


def test_the_compiled_step_is_read(config):
    """Here compiled for simulated devices; for a TPU the same way."""
    step = plan.abstract_step(config, jax.devices())
    found, traffic = plan.compile_step(step)
    assert found["method"] == "compiled"
    assert found["arguments"] == pytest.approx(plan.arguments(step)["total"], rel=0.02)
    assert found["aliased"] > 0.9 * found["outputs"]  # the state is donated
    assert found["needed"] >= found["arguments"] + found["temporaries"]
    layers = step.models["cloud"].num_hidden_layers
    assert traffic["all-gather"].count > layers  # more than one a layer
    assert all(each.bytes > 0 for each in traffic.values())


def test_a_program_that_jaxlib_cannot_read_is_planned_all_the_same(config, monkeypatch, capsys):
    def as_text(self):
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure")

    monkeypatch.setattr(jax.stages.Compiled, "as_text", as_text)
    monkeypatch.setattr(plan, "find_devices", lambda name: (topology.TPUS["v5e"], jax.devices()))
    report = plan.make_plan(config, "v5e:2x4")
    assert report["fits"] and report["memory"]["method"] == "compiled"
    assert report["collectives"] is None and report["time"]["sending"] is None
    print_plan(report)
    assert "collectives are not known" in capsys.readouterr().out


# --- estimates -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "less",
    [
        {"remat": "dots"},
        {"remat": "full"},
        {"microbatches": 2, "remat": "full"},
        {"attention": "auto"},
        {"cloud_int8": True},
        {"dtype": "bfloat16", "attention": "xla"},
        {"mesh": MeshConfig(data=1, fsdp=-1)},
    ],
    ids=str,
)
def test_what_saves_memory_is_estimated_to(paper, less):
    more = {"remat": "none", "microbatches": 1, "attention": "xla", "mesh": MeshConfig(data=-1)}
    more |= {"dtype": "bfloat16" if "attention" in less and "dtype" not in less else "float32"}
    before = plan.make_plan(change(paper, **more), "gpu:8")
    after = plan.make_plan(change(paper, **(more | less)), "gpu:8")
    assert after["memory"]["needed"] < before["memory"]["needed"]


def test_fewer_layers_with_experts_need_less_memory_time_and_traffic(paper):
    more = change(paper, microbatches=1, remat="none", mesh=MeshConfig(data=1, fsdp=-1))
    every = plan.make_plan(change(more, generator__last_layers=22), "gpu:8")
    last = plan.make_plan(change(more, generator__last_layers=6), "gpu:8")
    assert every == plan.make_plan(more, "gpu:8")  # 22 are all
    for part in ("arguments", "needed"):
        assert last["memory"][part] < every["memory"][part]
    for part in ("kept", "lora"):
        assert last["memory"]["parts"][part] < every["memory"]["parts"][part]
    assert last["flops"]["useful"] < every["flops"]["useful"]
    for kind in ("all-gather", "all-reduce"):
        assert last["collectives"][kind]["bytes"] < every["collectives"][kind]["bytes"]


@pytest.mark.parametrize("edge", ["tinyllama_1b", "gemma2_2b"])
def test_flash_is_estimated_for_what_the_kernel_computes(paper, edge):
    """All that cuDNN lacks here is the soft-cap of Gemma 2, which XLA then computes."""
    few = change(paper, edge=edge, prompts=8, queries_per_prompt=8, remat="none")
    layer = {
        name: plan.make_plan(change(few, attention=name), "gpu:8")["memory"]["parts"]["layer"]
        for name in ("auto", "xla")
    }
    report = plan.make_plan(few, "gpu:8")["attention"]
    assert report["cloud"] == {"kernel": "cudnn", "reason": None}
    capped = edge == "gemma2_2b"
    reason = "cudnn has no soft-cap" if capped else None
    assert report["edge"] == {"kernel": "xla" if capped else "cudnn", "reason": reason}
    assert (layer["auto"] == layer["xla"]) == capped


def test_the_advice_is_followed_until_it_fits(paper):
    config = change(paper, dtype="float32", remat="none", attention="xla", mesh=MeshConfig(data=-1))
    steps = [
        {},
        {"dtype": "bfloat16"},
        {"mesh": MeshConfig(data=1, fsdp=8)},
        {"attention": "auto"},
        {"remat": "full"},
    ]
    for step, then in zip(steps, [*steps[1:], None], strict=True):
        config = change(config, **step)
        report = plan.make_plan(config, "gpu:8")
        if then is None or report["fits"]:
            break
        first = report["advice"][0]
        name = next(iter(then))
        assert first.startswith(name)
    assert report["fits"] and report["advice"] == []
    assert report["memory"]["share"] <= 1


def test_a_model_too_large_for_its_devices_asks_for_more(paper):
    report = plan.make_plan(change(paper, dtype="float32", prompts=1), "gpu:1")
    assert report["arguments"]["total"] > 0.4 * report["memory"]["usable"]
    report = plan.make_plan(change(paper, prompts=64, remat="none"), "gpu:1")
    assert not report["fits"]
    assert any(line.startswith("microbatches=2") for line in report["advice"])


def test_more_shards_hold_less_and_send_more(paper):
    small, large = (plan.make_plan(paper, f"gpu:{count}") for count in (4, 8))
    assert large["arguments"]["cloud"] == pytest.approx(small["arguments"]["cloud"] / 2, rel=1e-3)
    sent = [report["collectives"]["all-gather"]["bytes"] for report in (small, large)]
    assert sent[1] == pytest.approx(sent[0] * (7 / 8) / (3 / 4), rel=1e-6)
    assert plan.make_plan(change(paper, prompts=1), "gpu:1")["collectives"] == {}


def test_time_follows_from_flops(paper):
    report = plan.make_plan(paper, "gpu:8", utilisation=0.5)
    time, flops = report["time"], report["flops"]
    assert time["step"] == flops["executed"] / (8 * peak_flops("NVIDIA H100") * 0.5)
    assert time["mfu"] == pytest.approx(0.5 * flops["useful"] / flops["executed"])
    assert plan.make_plan(paper, "gpu:8", utilisation=0.25)["time"]["step"] == 2 * time["step"]


def test_a_step_is_no_faster_than_its_links(paper):
    short = change(paper, prompts=8, data__prompt_length=16, data__question_length=16)
    time = plan.make_plan(short, "gpu:8")["time"]
    assert time["step"] == time["sending"] > time["computing"]


def test_each_microbatch_computes_the_forward_pass_once_more(paper):
    useful = [
        plan.make_plan(change(paper, remat="none", microbatches=n), "gpu:8")["flops"]
        for n in (1, 2, 4)
    ]
    assert useful[0]["useful"] == useful[0]["executed"] == useful[1]["useful"]
    assert 1.4 < useful[1]["executed"] / useful[1]["useful"] < 1.6
    assert useful[1] == useful[2]


@pytest.mark.parametrize(
    "chip", [*topology.TPUS.values(), *topology.GPUS.values()], ids=lambda c: c.kind
)
def test_every_chip_has_a_known_peak(chip):
    assert peak_flops(chip.kind) > 1e14
    assert chip.usable < chip.capacity * 1.01  # v5p's 95 GB are a little more


# --- a TPU's compiler ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (56.50G) exceeds available HBM (15.75G).",
            10 + int(56.5 * 2**30),
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory "
            "space hbm. Used 20.25G of 15.75G hbm. Exceeded hbm capacity by 4.50G.",
            int(20.25 * 2**30),
        ),
    ],
)
def test_a_refusal_is_read(message, needed):
    found = plan.read_out_of_memory(message, 10)
    assert (found["method"], found["needed"]) == ("refused", needed)


def test_another_error_of_the_compiler_is_one_line():
    with pytest.raises(UserError, match="does not compile for this topology: INTERNAL: no"):
        plan.read_out_of_memory("INTERNAL: no\nstack\ntrace", 10)


@pytest.fixture
def libtpu():
    """The compiler for TPUs."""
    reason = "compiling for a TPU takes libtpu: pip install 'lorax-gen[plan]'"
    return pytest.importorskip("libtpu", reason=reason)


def test_a_tpu_is_compiled_for(config, libtpu):
    config = change(config, prompts=4, mesh=MeshConfig(data=1, fsdp=-1))
    report = plan.make_plan(config, "v5e:2x2")
    assert report["fits"] and report["memory"]["method"] == "compiled"
    assert report["chip"]["kind"] == "TPU v5 lite" and report["devices"] == 4
    assert report["collectives"]


@pytest.mark.parametrize(
    ("size", "options"),
    [(64, {}), (80, {}), (128, {"windows": (100,)}), (256, {"windows": (100, None)})],
    ids=["64", "80", "128-window", "256-cap-windows"],
)
def test_splash_compiles_for_a_tpu_with_its_backward_pass(size, options, libtpu):
    _, devices = topology.find_devices("v5e:2x2")
    mesh = make_mesh(MeshConfig(data=2, tensor=2), devices)
    rows = NamedSharding(mesh, P("data"))
    attention = make_attention("splash", mesh)
    if len(options.get("windows", ())) > 1:
        options |= {"which": jnp.int32(0), "softcap": 50.0}

    def total(q, k):
        return attention(q, k, k, scale=0.1, **options).astype(jnp.float32).sum()

    q, k = (
        jax.ShapeDtypeStruct((2, 300, heads, size), jnp.bfloat16, sharding=rows) for heads in (4, 2)
    )
    program = jax.jit(jax.grad(total, argnums=(0, 1))).lower(q, k).compile().as_text()
    assert "tpu_custom_call" in program


def test_an_int8_cloud_is_sent_in_half_the_bytes(config, libtpu):
    config = change(config, prompts=4, mesh=MeshConfig(data=1, fsdp=-1), dtype="bfloat16")
    whole, half = (
        plan.make_plan(change(config, cloud_int8=int8), "v5e:2x2")["collectives"]["all-gather"]
        for int8 in (False, True)
    )
    cloud = plan.read_shape(config.cloud)
    kernels = sum(d_in * d_out for d_in, d_out in kernel_shapes(cloud).values())
    one_byte_less = cloud.num_hidden_layers * kernels * 3 / 4  # three shards of four come in
    assert whole["bytes"] - half["bytes"] >= 0.99 * one_byte_less


def test_what_a_tpu_cannot_hold_is_refused(config, libtpu):
    long = {"prompts": 16384, "mesh": MeshConfig(), "data": WorldConfig(prompt_length=508)}
    report = plan.make_plan(change(config, **long), "v5e:2x2")
    assert not report["fits"] and report["memory"]["method"] == "refused"
    assert report["memory"]["needed"] > report["memory"]["usable"]
    assert report["collectives"] is None and report["advice"]


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture
def call(capsys):
    """`call(*words) -> (exit code, stdout, stderr)` of `lorax-gen plan`."""

    def call(*words):
        with pytest.raises(SystemExit) as stop:
            cli.main(["plan", *map(str, words)])
        return stop.value.code, *capsys.readouterr()

    return call


def test_the_command_prints_tables_and_writes_json(call, tmp_path):
    path = tmp_path / "plans" / "paper.json"
    code, out, _ = call("paper", "--topology", "gpu:8", "--edge", "qwen2_1_5b", "--output", path)
    assert code == 0
    for words in ("fits", "estimated", "arguments", "all-gather", "FLOPs", "qwen2_1_5b"):
        assert words in out
    assert "kernels: cloud cudnn, edge cudnn" in out
    report = json.loads(path.read_text())
    assert report["fits"] and report["models"]["edge"]["parameters"] == 1_543_714_304
    assert call("paper", "--topology", "gpu:8", "--output", path)[0] == 2  # nothing is overwritten


def test_what_does_not_fit_ends_with_1_and_says_what_to_change(call):
    code, out, _ = call("paper", "--topology", "gpu:1", "--remat", "none", "--attention", "xla")
    assert code == 1
    assert "does not fit" in out and "try attention=auto" in out and "try remat=full" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("paper", "--topology", "v9:2x2"), r"unknown topology 'v9:2x2'; expected v5e:4x4 or"),
        (("paper", "--topology", "v5e:4"), r"unknown topology 'v5e:4'"),
        (("paper", "--topology", "v5p:4x4"), r"v5p:2x2x1 \(three\)"),
        (("paper", "--topology", "gpu:0"), r"unknown topology 'gpu:0'.*gpu-h200:8"),
        (("paper", "--topology", "gpu:8", "--mesh.fsdp", "3"), "does not fit 8 devices"),
        (("paper", "--topology", "gpu:6"), "64 prompts cannot be split over 6 devices"),
        (("paper", "--topology", "gpu:8", "--microbatches", "3"), "into 3 microbatches"),
        (("paper", "--topology", "gpu:8", "--microbatches", "64"), "8 prompts of a device cannot"),
        (("paper", "--topology", "gpu:8", "--mesh.mode", "pmap"), "mesh.mode=jit only"),
        (("paper", "--topology", "gpu:8", "--edge", "org/name"), "no model org/name.*tinyllama_1b"),
        (("paper", "--topology", "gpu:8", "--utilisation", "0"), "utilisation is 0"),
        (
            ("paper", "--topology", "gpu:8", "--edge", "gemma2_2b", "--attention", "cudnn"),
            "attention=cudnn has no soft-cap; choose attention=auto or xla",
        ),
        (("world-lora", "--topology", "gpu:8"), "for GPUs only the generator's step is"),
        (("papr",), "did you mean paper"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_is_wrong_is_one_line(call, words, message):
    code, out, err = call(*words)
    assert (code, out) == (2, "")
    assert err.startswith("lorax-gen: error: ") and err.count("\n") == 1
    assert re.search(message, err), err


def test_without_libtpu_it_says_what_to_install(call, monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    code, _, err = call("paper", "--topology", "v5e:4x4")
    assert code == 2 and "pip install 'lorax-gen[plan]'" in err


def test_a_gguf_file_is_a_shape_to_plan_for(tmp_path, random_params):
    from tests.models.configs import LLAMA
    from tests.models.gguf_models import write_model

    path = write_model(tmp_path / "model.gguf", LLAMA, random_params(LLAMA))
    assert plan.read_shape(str(path)) == LLAMA
    with pytest.raises(UserError, match="to plan for"):
        plan.read_shape("org/name::model.gguf")
