"""What a train step of the generator needs on devices that are not here, and whether it fits.

For a TPU topology the real step is compiled ahead of time, by the compiler that the TPU would use
(libtpu), for devices that are only described: memory and collectives are those of the program that
would run. For GPUs there is no such compiler; the same table is filled by arithmetic (see
`planning.memory`) and says so.

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
import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lorax_gen import assets, cost
from lorax_gen.errors import UserError
from lorax_gen.mesh.chips import Chip
from lorax_gen.mesh.kernels import BLOCK, execution_over
from lorax_gen.mesh.sharding import BATCH_AXES, make_mesh, row_shards, tree_shardings
from lorax_gen.method import init_generator
from lorax_gen.models import int8, presets
from lorax_gen.models.decoder import DecoderConfig, abstract_params, kernel_shapes
from lorax_gen.models.families import read_config
from lorax_gen.planning import hlo, memory
from lorax_gen.planning.topology import Absent, find_devices
from lorax_gen.recipes.lora_gen import LoraGenConfig
from lorax_gen.system import GeneratorSpec
from lorax_gen.training.optimizer import make_optimizer
from lorax_gen.training.state import init_state
from lorax_gen.training.step import generator_loss, make_train_step

GIB = 2**30

# --- what is planned -----------------------------------------------------------------------------

PRESETS = {
    name: function
    for name, function in inspect.getmembers(presets, inspect.isfunction)
    if function.__module__ == presets.__name__
}


def read_shape(name: str) -> DecoderConfig:
    """The config of a preset, of a local model directory or of a shipped model."""
    if name in PRESETS:
        return PRESETS[name]()
    path = assets.resolve(name) / "config.json"
    if path.is_file():
        return read_config(path)
    raise UserError(
        f"no model {name} to plan for; give a preset ({', '.join(PRESETS)}) or a directory with a "
        "config.json; nothing is downloaded"
    )


@dataclasses.dataclass(frozen=True)
class Work:
    """A train step as shapes: what `recipes.lora_gen.experiment` would make of a config."""

    config: LoraGenConfig
    spec: GeneratorSpec
    mesh: Mesh
    state: Any
    frozen: Any
    batch: Any

    @property
    def shards(self) -> int:
        """Parts that the batch is split into."""
        return row_shards(self.mesh)

    @property
    def answered(self) -> int:
        longest = self.config.data.question_length - 1
        return min(self.config.answer_length or longest, longest)


def make_work(config: LoraGenConfig, devices: list) -> Work:
    """Shapes with shardings of the state, the frozen models and the batch.

    Raises UserError where the mesh does not fit the devices, or the batch not the mesh.
    """
    if config.mesh.mode != "jit":
        raise UserError(f"plan knows mesh.mode=jit only, and not {config.mesh.mode}")
    mesh = make_mesh(config.mesh, devices)
    cloud, edge = read_shape(config.cloud), read_shape(config.edge)
    optimizer = make_optimizer(config.optimizer, config.run.steps)

    def fresh():
        params, stats = init_generator(
            jax.random.key(0),
            config.generator,
            edge_layers=edge.num_hidden_layers,
            edge_shapes=kernel_shapes(edge),
            cloud_layers=cloud.num_hidden_layers,
            cloud_shapes=kernel_shapes(cloud),
            cloud_embedding=jnp.zeros(cloud.hidden_size, config.dtype),
        )
        return init_state(params, stats, optimizer, config.run.seed)

    def placed(tree: Any, shardings: Any) -> Any:
        return jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            tree,
            shardings,
        )

    def loaded(model: DecoderConfig) -> Any:
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, config.dtype), abstract_params(model)
        )

    by_name = partial(tree_shardings, mesh=mesh)
    state = jax.eval_shape(fresh)
    frozen = {"cloud": loaded(cloud), "edge": loaded(edge)}
    if config.cloud_int8:
        frozen["cloud"] = jax.eval_shape(int8.quantize_kernels, frozen["cloud"])
    prompts, rows = config.prompts, config.prompts * config.queries_per_prompt
    length = config.data.question_length
    batch = {
        "prompt": jax.ShapeDtypeStruct((prompts, config.data.prompt_length), jnp.int32),
        "prompt_lengths": jax.ShapeDtypeStruct((prompts,), jnp.int32),
        "tokens": jax.ShapeDtypeStruct((rows, length), jnp.int32),
        "answer": jax.ShapeDtypeStruct((rows, length), jnp.bool),
    }
    split = NamedSharding(mesh, P(BATCH_AXES))
    work = Work(
        config,
        GeneratorSpec(config.generator, cloud, edge),
        mesh,
        state=placed(state, by_name(state)),
        frozen=placed(frozen, by_name(frozen)),
        batch=placed(batch, jax.tree.map(lambda _: split, batch)),
    )
    if prompts % work.shards:
        raise UserError(
            f"{prompts} prompts cannot be split over {work.shards} devices; make prompts a "
            f"multiple of it, or give devices to mesh.tensor, which does not split the batch"
        )
    if prompts % config.microbatches:
        raise UserError(
            f"{prompts} prompts cannot be split into {config.microbatches} microbatches; "
            "choose a divisor"
        )
    own = prompts // work.shards
    if own % config.microbatches:
        raise UserError(
            f"{own} prompts of a device cannot be split into {config.microbatches} microbatches; "
            "choose a divisor, so that every device has its share of each"
        )
    return work


# --- memory and collectives ----------------------------------------------------------------------


def compile_step(work: Work) -> tuple[dict[str, Any], dict[str, hlo.Traffic] | None]:
    """Memory and collectives of the step as compiled for the mesh's devices.

    Where it does not fit, XLA gives no program, only how much it would have needed. No collectives
    either where libtpu is newer than jaxlib and writes programs that jaxlib cannot read.
    """
    config = work.config
    loss = generator_loss(
        work.spec,
        microbatches=config.microbatches,
        answer_length=config.answer_length,
        execution=execution_over(work.mesh, config.attention, config.remat),
    )
    step = make_train_step(loss, make_optimizer(config.optimizer, config.run.steps))
    places = jax.tree.map(lambda leaf: leaf.sharding, work.state)
    everywhere = NamedSharding(work.mesh, P())
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(places, everywhere))
    with jax.set_mesh(work.mesh):
        lowered = jitted.lower(work.state, work.frozen, work.batch)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            return read_out_of_memory(str(error), arguments(work)["total"]), None
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
    # What the step does not read, such as the cloud's head, is no argument of it but lies there.
    found["arguments"] = max(found["arguments"], arguments(work)["total"])
    new_outputs = found["outputs"] - found["aliased"]
    found["needed"] = found["arguments"] + new_outputs + found["temporaries"] + found["program"]
    try:
        return found, hlo.collectives(compiled.as_text())
    except jax.errors.JaxRuntimeError:
        return found, None


def read_out_of_memory(message: str, arguments: int) -> dict[str, Any]:
    """What XLA says of a program that does not fit.

    Raises UserError where the message is about something else.
    """
    size = r"([\d.]+)([KMGT]?)i?B?"
    temporaries = re.search(rf"required for HLO temporaries \({size}\)", message)
    used = re.search(rf"Used {size} of {size}", message)
    if not temporaries and not used:
        line = next(iter(message.splitlines()), "")
        raise UserError(f"the step does not compile for this topology: {line}")
    number, unit = (temporaries or used).groups()[:2]
    found = int(float(number) * 2 ** {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}[unit])
    if used:
        return {"method": "refused", "arguments": arguments, "needed": found}
    return {
        "method": "refused",
        "arguments": arguments,
        "temporaries": found,
        "needed": arguments + found,
    }


def estimate_step(work: Work) -> tuple[dict[str, Any], dict[str, hlo.Traffic]]:
    """The same by arithmetic; see `planning.memory` for the formula.

    Collectives are those that weights in shards ask for: they are gathered in the forward and in
    the backward pass of each microbatch, and where a forward pass is computed again; gradients of
    what is trained are added up. Sums of activations over `tensor` are not counted.
    """
    config, spec = work.config, work.spec
    held = arguments(work)["total"]
    parts = memory.activations(
        spec,
        prompts=config.prompts // work.shards,
        queries=config.queries_per_prompt,
        prompt_length=config.data.prompt_length,
        length=config.data.question_length,
        answered=work.answered,
        bytes_each=jnp.dtype(config.dtype).itemsize,
        remat=config.remat,
        flash=(is_flash(work, spec.cloud), is_flash(work, spec.edge)),
        sharded=work.mesh.shape["fsdp"] > 1,
        microbatches=config.microbatches,
    )
    found = {"method": "estimated", "arguments": held, "temporaries": sum(parts.values())}
    found |= {"parts": parts, "needed": held + found["temporaries"]}
    traffic = {}
    fsdp, tensor = work.mesh.shape["fsdp"], work.mesh.shape["tensor"]
    passes = 2 + (config.remat != "none") + (config.microbatches > 1)
    passes *= config.microbatches
    if fsdp > 1:
        gathered = tree_bytes(work.frozen) // tensor * passes
        layers = spec.cloud.num_hidden_layers + spec.edge.num_hidden_layers
        kernels = len(kernel_shapes(spec.cloud))
        traffic["all-gather"] = hlo.Traffic(
            layers * kernels * passes, int(gathered * (fsdp - 1) / fsdp)
        )
    if work.shards > 1:
        trained = tree_bytes(work.state["params"])
        leaves = len(jax.tree.leaves(work.state["params"]))
        traffic["all-reduce"] = hlo.Traffic(
            leaves, int(2 * trained * (work.shards - 1) / work.shards)
        )
    return found, traffic


def is_flash(work: Work, config: DecoderConfig) -> bool:
    """Whether attention runs in a kernel that never holds the scores; see `mesh.kernels`."""
    if config.attn_logit_softcapping is not None or any(config.windows):
        return False
    name = work.config.attention
    if name == "auto":
        platform = work.mesh.devices.flat[0].platform
        name = {"tpu": "splash", "gpu": "cudnn"}.get(platform, "xla")
    if name == "cudnn":
        return work.config.dtype == "bfloat16" and config.head_dim <= 128
    return name == "splash" and config.head_dim % BLOCK == 0


def arguments(work: Work) -> dict[str, int]:
    """Bytes on each device of what the step is given."""
    parts = {
        "cloud": work.frozen["cloud"],
        "edge": work.frozen["edge"],
        "trained": (work.state["params"], work.state["stats"]),
        "optimizer": work.state["opt_state"],
        "batch": work.batch,
    }
    sizes = {name: memory.bytes_per_device(tree) for name, tree in parts.items()}
    return sizes | {"total": sum(sizes.values())}


def tree_bytes(tree: Any) -> int:
    return sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


# --- time ----------------------------------------------------------------------------------------


def count_flops(work: Work) -> dict[str, int]:
    """Of one step on all devices: `useful` as MFU counts, `executed` with what is recomputed."""
    config, spec = work.config, work.spec
    shape = {
        "prompts": config.prompts,
        "queries": config.queries_per_prompt,
        "prompt_length": config.data.prompt_length,
        "length": config.data.question_length,
        "answered": work.answered,
    }
    useful = cost.train_step_macs(spec, **shape).flops
    executed = cost.train_step_macs(spec, **shape, remat=config.remat).flops
    if config.microbatches > 1:  # each is computed once more as a whole
        rows = config.prompts * config.queries_per_prompt
        executed += cost.generator_macs(spec, config.data.prompt_length, config.prompts).flops
        executed += cost.prefill_macs(
            spec.edge,
            config.data.question_length - 1,
            rows,
            logits=work.answered,
            lora=cost.generated_ranks(spec.generator),
        ).flops
    return {"useful": useful, "executed": executed}


def estimate_time(
    flops: dict[str, int], chip: Chip, devices: int, utilisation: float, sent: int | None
) -> dict[str, float | None]:
    """Seconds of a step, and its MFU, if it multiplies at `utilisation` of the peak.

    What is sent goes over the links at their peak meanwhile; the step takes as long as the longer.
    """
    peak = devices * chip.peak_flops
    computing = flops["executed"] / (peak * utilisation)
    sending = None if sent is None else sent / chip.link
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


def make_plan(config: LoraGenConfig, topology: str, utilisation: float = 0.4) -> dict[str, Any]:
    """The whole report as plain values; bytes are of one device, FLOPs of one step on all.

    Raises UserError where the topology, the models, the mesh or the batch cannot be.
    """
    if not 0 < utilisation <= 1:
        raise UserError(f"utilisation is {utilisation}; expected a share of the peak, such as 0.4")
    chip, devices = find_devices(topology)
    work = make_work(config, devices)
    if isinstance(devices[0], Absent):
        needs, traffic = estimate_step(work)
    else:
        print(f"compiling the step for {topology} ...", file=sys.stderr)
        needs, traffic = compile_step(work)
    usable = int(chip.usable * GIB)
    flops = count_flops(work)
    sent = None if traffic is None else sum(each.bytes for each in traffic.values())
    fits = needs["method"] != "refused" and needs["needed"] <= usable
    return {
        "topology": topology,
        "devices": len(devices),
        "chip": dataclasses.asdict(chip),
        "mesh": dict(work.mesh.shape),
        "cloud": {"name": config.cloud, "parameters": cost.parameters(work.spec.cloud)},
        "edge": {"name": config.edge, "parameters": cost.parameters(work.spec.edge)},
        "trained": sum(leaf.size for leaf in jax.tree.leaves(work.state["params"])),
        "step": {
            "prompts": config.prompts,
            "queries_per_prompt": config.queries_per_prompt,
            "prompt_length": config.data.prompt_length,
            "question_length": config.data.question_length,
            "answer_length": work.answered,
            "dtype": config.dtype,
            "cloud_int8": config.cloud_int8,
            "remat": config.remat,
            "microbatches": config.microbatches,
            "attention": config.attention,
        },
        "arguments": arguments(work),
        "memory": needs | {"usable": usable, "share": needs["needed"] / usable},
        "flops": flops,
        "collectives": None
        if traffic is None
        else {kind: dataclasses.asdict(each) for kind, each in sorted(traffic.items())},
        "time": estimate_time(flops, chip, len(devices), utilisation, sent),
        "fits": fits,
        "advice": [] if fits else advice(work, needs, usable),
    }


def advice(work: Work, needs: dict[str, Any], usable: int) -> list[str]:
    """What makes a step smaller, the cheapest first."""
    config, shape, held = work.config, work.mesh.shape, arguments(work)
    found = []
    if config.dtype == "float32":
        found.append("dtype=bfloat16: the frozen models in half the bytes")
    if shape["data"] > 1:
        found.append(
            f"mesh.data=1, mesh.fsdp={shape['data'] * shape['fsdp']}: weights in more shards, at "
            "the same batch per device"
        )
    if config.attention == "xla" and (
        is_flash(dataclasses.replace(work, config=dataclasses.replace(config, attention="auto")),
                 work.spec.cloud)
    ):  # fmt: skip
        found.append("attention=auto: a kernel that never holds the cloud's scores")
    if config.remat != "full":
        found.append("remat=full: of each layer only its input is kept, for half the FLOPs again")
    per_device = config.prompts // work.shards
    parts = [n for n in range(config.microbatches + 1, per_device + 1) if not per_device % n]
    if parts:
        found.append(
            f"microbatches={parts[0]}: {per_device // parts[0]} of {per_device} prompts per device "
            "at a time, for one more forward pass"
        )
    if not config.cloud_int8:
        found.append("cloud_int8=true: the cloud's kernels, rounded, in half the bytes of bfloat16")
    if config.answer_length is None:
        found.append("answer_length: logits only where answers are")
    if held["total"] > 0.5 * usable or not found:
        devices = math.prod(shape.values())
        found.append(
            f"more devices: weights, state and batch alone are {held['total'] / GIB:.2f} GiB on "
            f"each of these {devices}"
        )
    return found
