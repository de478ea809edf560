"""What a train step needs on devices that are not attached, and whether it fits.

For a TPU topology the real step is compiled ahead of time with the TPU's compiler (libtpu) for
described devices: memory and collectives are those of the program that would run. For GPUs there is
no such compiler: the generator's step is estimated (see `planning.memory`) and the report says so.

    report = make_plan(config, "v5e:4x4", utilisation=0.4)
    print_plan(report)

Models are given by the name of a preset or by a directory with a config.json: only shapes are read,
nothing is downloaded or allocated.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lorax_gen import assets, cost
from lorax_gen import config as configs
from lorax_gen.errors import UserError
from lorax_gen.hub import find_gguf, is_gguf
from lorax_gen.mesh.chips import Chip
from lorax_gen.mesh.kernels import kernel_of
from lorax_gen.mesh.sharding import BATCH_AXES, jit_step, row_shards, tree_shardings
from lorax_gen.method.lora import count_params
from lorax_gen.models import int8, presets
from lorax_gen.models.config_json import read_config
from lorax_gen.models.decoder import DecoderConfig, abstract_params, kernel_shapes
from lorax_gen.models.gguf_config import read_gguf_config
from lorax_gen.models.gguf_files import open_gguf
from lorax_gen.models.model import Model
from lorax_gen.planning import hlo, memory
from lorax_gen.planning.compiling import compile_aloud
from lorax_gen.planning.topology import Absent, find_devices
from lorax_gen.recipes.base import EdgeConfig, RecipeConfig
from lorax_gen.recipes.lora_gen import LoraGenConfig
from lorax_gen.recipes.registry import recipe_of
from lorax_gen.system import GeneratorSpec
from lorax_gen.training.experiment import Experiment

GIB = 2**30

# --- what is planned -----------------------------------------------------------------------------

PRESETS = {
    name: function
    for name, function in inspect.getmembers(presets, inspect.isfunction)
    if function.__module__ == presets.__name__
}


def read_shape(name: str) -> DecoderConfig:
    """The config of a preset, of a local model directory or GGUF file, or of a shipped model."""
    if name in PRESETS:
        return PRESETS[name]()
    if is_gguf(name) and assets.resolve(name).is_file():
        return read_gguf_config(open_gguf(find_gguf(name)))
    path = assets.resolve(name) / "config.json"
    if path.is_file():
        return read_config(path)
    raise UserError(
        f"no model {name} to plan for; give a preset ({', '.join(PRESETS)}) or a directory with a "
        "config.json; nothing is downloaded"
    )


def abstract_model(
    name: str,
    dtype: Any = jnp.float32,
    *,
    in_int8: bool = False,
    shardings: Callable[[Any], Any],
) -> Model:
    """Like `models.huggingface.load_model`, but shapes with shardings and no tokenizer."""
    config = read_shape(name)
    params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), abstract_params(config)
    )
    if in_int8:
        params = jax.eval_shape(int8.quantize_kernels, params)
    return Model(config, placed(params, shardings(params)), None, name=name)


def placed(tree: Any, shardings: Any) -> Any:
    """Shapes with the shardings that their arrays would have."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings,
    )


@dataclasses.dataclass(frozen=True)
class Step:
    """A train step to compile: the experiment of a config, and its arguments as shapes."""

    config: RecipeConfig
    experiment: Experiment
    state: Any
    batch: Any

    @property
    def frozen(self) -> dict[str, Any]:
        return self.experiment.frozen

    @property
    def mesh(self) -> Mesh:
        return self.experiment.mesh

    @property
    def models(self) -> dict[str, DecoderConfig]:
        """Shapes of the frozen models, by their role."""
        return {role: read_shape(getattr(self.config, role)) for role in self.frozen}

    @property
    def settings(self) -> dict[str, Any]:
        """The config's fields, of those that its recipe has, that change how the step computes."""
        names = ("answer_length", "dtype", "cloud_int8", "remat", "microbatches", "attention")
        values = configs.to_dict(self.config)
        return {name: values[name] for name in names if name in values}


def abstract_step(config: RecipeConfig, devices: list) -> Step:
    """The step of the experiment that `train` would run, with abstract models.

    Raises UserError where the mesh does not fit the devices, or the batch not the mesh.
    """
    if config.mesh.mode != "jit":
        raise UserError(f"plan supports mesh.mode=jit only, not {config.mesh.mode}")
    experiment = recipe_of(config).experiment(config, abstract_model, devices)
    state, mesh = jax.eval_shape(experiment.fresh_state), experiment.mesh
    split = NamedSharding(mesh, P(BATCH_AXES))
    return Step(
        config,
        experiment,
        state=placed(state, tree_shardings(state, mesh)),
        batch=placed(experiment.shapes, jax.tree.map(lambda _: split, experiment.shapes)),
    )


# --- memory and collectives ----------------------------------------------------------------------


def compile_step(
    step: Step, what: str = "the train step"
) -> tuple[dict[str, Any], dict[str, hlo.Traffic] | None]:
    """Memory and collectives of the step as compiled for the mesh's devices.

    Where it does not fit, XLA gives no program, only the memory that it would need. Collectives
    are also None where libtpu is newer than jaxlib and jaxlib cannot read its programs.

    Args:
      what: names what is compiled, for the user who waits.
    """
    held = arguments(step)["total"]
    jitted = jit_step(step.experiment.train_step(), step.state, step.mesh)
    with jax.set_mesh(step.mesh):
        lowered = jitted.lower(step.state, step.frozen, step.batch)
        try:
            compiled = compile_aloud(lowered.compile, what)
        except jax.errors.JaxRuntimeError as error:
            return read_out_of_memory(str(error), held), None
    sizes = compiled.memory_analysis()
    found = {
        "method": "compiled",
        "arguments": sizes.argument_size_in_bytes,
        "outputs": sizes.output_size_in_bytes,
        "aliased": sizes.alias_size_in_bytes,
        "temporaries": sizes.temp_size_in_bytes,
        "program": sizes.generated_code_size_in_bytes,
        "peak": sizes.peak_memory_in_bytes,
    }
    # Arrays that the step does not read, such as the cloud's head, are pruned but stay allocated.
    found["arguments"] = max(found["arguments"], held)
    new_outputs = found["outputs"] - found["aliased"]
    found["needed"] = found["arguments"] + new_outputs + found["temporaries"] + found["program"]
    try:
        return found, hlo.collectives(compiled.as_text())
    except jax.errors.JaxRuntimeError:
        return found, None


def read_out_of_memory(message: str, arguments: int) -> dict[str, Any]:
    """Memory of a program that does not fit, from XLA's error message.

    Raises UserError where the message is about something else.
    """
    size = r"([\d.]+)([KMGT]?)i?B?"
    temporaries = re.search(rf"required for HLO temporaries \({size}\)", message)
    used = re.search(rf"Used {size} of {size}", message)
    found = temporaries or used
    if found is None:
        line = next(iter(message.splitlines()), "")
        raise UserError(f"the step does not compile for this topology: {line}")
    number, unit = found.groups()[:2]
    needed = int(float(number) * 2 ** {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}[unit])
    if used:
        return {"method": "refused", "arguments": arguments, "needed": needed}
    return {
        "method": "refused",
        "arguments": arguments,
        "temporaries": needed,
        "needed": arguments + needed,
    }


def estimate_step(step: Step) -> tuple[dict[str, Any], dict[str, hlo.Traffic]]:
    """The same estimated, for the generator's step; see `planning.memory` for the formula.

    Counted are the collectives of sharded weights: all-gathers in the forward and the backward
    pass of each microbatch and in recomputed forward passes, and the all-reduce of gradients.
    All-reduces of activations over `tensor` are not counted.

    Raises UserError for the step of another recipe.
    """
    config, mesh, shards = step.config, step.mesh, row_shards(step.mesh)
    if not isinstance(config, LoraGenConfig):
        raise UserError(
            "for GPUs only the generator's step is estimated; for this recipe choose a TPU, as in "
            "--topology v5e:2x2, for which the step is compiled"
        )
    spec = GeneratorSpec(config.generator, **step.models)
    held = arguments(step)["total"]
    parts = memory.activations(
        spec,
        prompts=config.prompts // shards,
        queries=config.queries_per_prompt,
        prompt_length=config.data.prompt_length,
        length=config.data.question_length,
        answered=config.answered(config.data.question_length),
        bytes_each=jnp.dtype(config.dtype).itemsize,
        remat=config.remat,
        flash={role: each["kernel"] != "xla" for role, each in attention_kernels(step).items()},
        sharded=mesh.shape["fsdp"] > 1,
        microbatches=config.microbatches,
    )
    temporaries = sum(parts.values())
    found = {"method": "estimated", "arguments": held, "temporaries": temporaries}
    found |= {"parts": parts, "needed": held + temporaries}
    traffic = {}
    fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
    passes = 2 + (config.remat != "none") + (config.microbatches > 1)
    passes *= config.microbatches
    if fsdp > 1:
        gathered = tree_bytes(step.frozen) // tensor * passes
        layers = spec.cloud.num_hidden_layers + spec.edge.num_hidden_layers
        kernels = len(kernel_shapes(spec.cloud))
        times = layers * kernels * passes
        if below := spec.edge.num_hidden_layers - spec.layers:  # a forward pass alone
            saved = passes - config.microbatches * (1 + (config.microbatches > 1))
            share = below / spec.edge.num_hidden_layers
            gathered -= int(tree_bytes(step.frozen["edge"]["layers"]) // tensor * saved * share)
            times -= below * kernels * saved
        traffic["all-gather"] = hlo.Traffic(times, int(gathered * (fsdp - 1) / fsdp))
    if shards > 1:
        trained = tree_bytes(step.state["params"])
        leaves = len(jax.tree.leaves(step.state["params"]))
        traffic["all-reduce"] = hlo.Traffic(leaves, int(2 * trained * (shards - 1) / shards))
    return found, traffic


def attention_kernels(step: Step) -> dict[str, dict[str, str | None]]:
    """The attention kernel of each model, and why it is `xla` where `auto` cannot use its own."""
    found: dict[str, dict[str, str | None]] = {}
    if isinstance(step.config, EdgeConfig):
        for role, model in step.models.items():
            name, reason = kernel_of(step.config.attention, step.mesh, model, step.config.dtype)
            found[role] = {"kernel": name, "reason": reason}
    return found


def arguments(step: Step) -> dict[str, int]:
    """Bytes on each device of the step's arguments."""
    parts = {
        **step.frozen,
        "trained": (step.state["params"], step.state["stats"]),
        "optimizer": step.state["opt_state"],
        "batch": step.batch,
    }
    sizes = {name: memory.bytes_per_device(tree) for name, tree in parts.items()}
    return sizes | {"total": sum(sizes.values())}


def tree_bytes(tree: Any) -> int:
    return sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


# --- time ----------------------------------------------------------------------------------------


def estimate_time(
    flops: dict[str, int], chip: Chip, devices: int, utilisation: float, sent: int | None
) -> dict[str, float | None]:
    """Seconds of a step, and its MFU, if it computes at `utilisation` of the peak FLOPs.

    Communication runs at the links' peak and overlaps: the step takes the longer of the two.
    """
    peak = devices * chip.peak_flops
    computing = flops["executed"] / (peak * utilisation)
    sending = None if sent is None or chip.link is None else sent / chip.link
    seconds = max(computing, sending or 0.0)
    return {
        "utilisation": utilisation,
        "peak_flops": peak,
        "computing": computing,
        "sending": sending,
        "step": seconds,
        "mfu": flops["useful"] / (peak * seconds),
    }


# --- the plan ------------------------------------------------------------------------------------


def make_plan(config: RecipeConfig, topology: str, utilisation: float = 0.4) -> dict[str, Any]:
    """The report as plain values; bytes are of one device, FLOPs of one step on all.

    Raises UserError for a topology, model, mesh or batch that is not valid.
    """
    if not 0 < utilisation <= 1:
        raise UserError(f"utilisation is {utilisation}; expected a share of the peak, such as 0.4")
    chip, devices = find_devices(topology)
    step = abstract_step(config, devices)
    models = {
        role: {"name": getattr(config, role), "parameters": cost.parameters(model)}
        for role, model in step.models.items()
    }
    traffic: dict[str, hlo.Traffic] | None
    if isinstance(devices[0], Absent):
        needs, traffic = estimate_step(step)
    else:
        names = " and ".join(model["name"] for model in models.values()) or "the model"
        needs, traffic = compile_step(
            step, f"the train step of {names} for {len(devices)} x {chip.kind}"
        )
    assert chip.usable is not None  # of every chip that a topology names
    usable = int(chip.usable * GIB)
    work = step.experiment.work(step.batch)
    flops = {"useful": work["flops"], "executed": work["executed"]}
    sent = None if traffic is None else sum(each.bytes for each in traffic.values())
    fits = needs["method"] != "refused" and needs["needed"] <= usable
    batch = jax.tree_util.tree_flatten_with_path(step.batch)[0]
    return {
        "topology": topology,
        "devices": len(devices),
        "chip": dataclasses.asdict(chip),
        "mesh": dict(step.mesh.shape),
        "models": models,
        "trained": count_params(step.state["params"]),
        "batch": {"/".join(key.key for key in path): list(leaf.shape) for path, leaf in batch},
        "settings": step.settings,
        "attention": attention_kernels(step),
        "arguments": arguments(step),
        "memory": needs | {"usable": usable, "share": needs["needed"] / usable},
        "flops": flops,
        "collectives": None
        if traffic is None
        else {kind: dataclasses.asdict(each) for kind, each in sorted(traffic.items())},
        "time": estimate_time(flops, chip, len(devices), utilisation, sent),
        "fits": fits,
        "advice": [] if fits else advice(step, needs, usable),
    }


def advice(step: Step, needs: dict[str, Any], usable: int) -> list[str]:
    """Settings of the recipe that would reduce the memory of a step, cheapest first."""
    settings, shape, held = step.settings, step.mesh.shape, arguments(step)
    found = []
    if settings.get("dtype") == "float32":
        found.append("dtype=bfloat16: the frozen models in half the bytes")
    if shape["data"] > 1:
        found.append(
            f"mesh.data=1, mesh.fsdp={shape['data'] * shape['fsdp']}: weights in more shards, at "
            "the same batch per device"
        )
    if isinstance(step.config, EdgeConfig) and step.config.attention == "xla":
        auto = dataclasses.replace(step, config=dataclasses.replace(step.config, attention="auto"))
        roles = [role for role, each in attention_kernels(auto).items() if each["kernel"] != "xla"]
        if roles:
            whose = " and ".join(f"the {role}'s" for role in roles)
            found.append(f"attention=auto: a kernel that never materialises {whose} scores")
    if settings.get("remat") in ("none", "dots"):
        found.append("remat=full: only each layer's input is saved, for half the FLOPs again")
    if isinstance(step.config, LoraGenConfig):
        own, parts = step.config.prompts // row_shards(step.mesh), step.config.microbatches
        more = next((n for n in range(parts + 1, own + 1) if not own % n), None)
        if more:
            found.append(
                f"microbatches={more}: {own // more} of {own} prompts per device at a time, for "
                "one more forward pass"
            )
    if settings.get("cloud_int8") is False:
        found.append("cloud_int8=true: the cloud's kernels, rounded, in half the bytes of bfloat16")
    if settings.get("answer_length", 0) is None:
        found.append("answer_length: logits only where answers are")
    if held["total"] > 0.5 * usable or not found:
        devices = math.prod(shape.values())
        found.append(
            f"more devices: weights, state and batch alone are {held['total'] / GIB:.2f} GiB on "
            f"each of these {devices}"
        )
    return found
