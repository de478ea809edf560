"""The train step against the same step in torch: same models, same weights, one run.

    python benchmarks/train_step.py

On a CPU the models are small with a vocabulary of real size, in fp32; elsewhere LLaMA3-8B and
TinyLLaMA in bf16, with the lengths of the paper's Table 13: 200 tokens of prompt, 100 of input.
Weights are random; loss and gradients are compared before anything is timed; the sides alternate,
so that other load on the machine affects both. The peer is `torch_reference.py` with sdpa attention
and all cores, in two ways:

    lean    the cloud without its head, each prompt read once
    usual   the cloud called as a causal LM, each prompt read once for each of its questions

and the ratio is to the lean one. A row `lora` is a step of one plain LoRA on all kernels of the
edge. Without torch (pip install -e '.[parity]'), or without its CUDA where jax runs on a GPU, only
our side is timed.

MFU counts the FLOPs that the step needs, by `lorax_gen.cost` and without recomputation, over the
device's nominal peak or, for an unknown device, over the measured speed of a large matrix product.
Our memory is what XLA allocates for the step: arguments, frozen weights included, and temporaries;
theirs is the peak that was allocated.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch shares the GPU

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from lorax_gen import cost
from lorax_gen.mesh import chips
from lorax_gen.mesh.kernels import Name, make_attention
from lorax_gen.mesh.sharding import MeshConfig, make_mesh
from lorax_gen.method import GeneratorConfig, init_generator, init_lora
from lorax_gen.models import presets
from lorax_gen.models.config_json import write_config
from lorax_gen.models.decoder import (
    DecoderConfig,
    Execution,
    Params,
    abstract_params,
    kernel_shapes,
)
from lorax_gen.models.families import is_transposed, leaf_at, tensor_names
from lorax_gen.recipes.lora import LoraConfig, lora_loss
from lorax_gen.system import GeneratorSpec
from lorax_gen.training.optimizer import OptimizerConfig, make_optimizer
from lorax_gen.training.state import init_state
from lorax_gen.training.step import generator_loss, make_train_step

try:
    import torch
    import transformers
    from torch_reference import (
        LoraGen,
        Tuned,
        adapter_places,
        collect,
        load,
        places,
    )
    from torch_reference import make_optimizer as their_optimizer
    from torch_reference import train_step as their_train_step
except ImportError:
    torch = None

TARGETS = {"cpu": 0.95, "gpu": 0.7}  # ours / lean, at most
TARGET_MFU = 0.45  # on a GPU
SMALL = {
    "cloud": DecoderConfig(
        vocab_size=32000,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
    ),
    "edge": DecoderConfig(
        vocab_size=32000,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
    ),
}
Preset = Literal[
    "small", "tinyllama_1b", "llama3_2_1b", "llama3_8b", "gemma_2b", "gemma2_2b", "qwen2_1_5b"
]


@dataclasses.dataclass(frozen=True)
class Options:
    """What is timed."""

    cloud: Preset | None = None
    """Shape of the cloud model; None: small on a CPU, llama3_8b elsewhere."""
    edge: Preset | None = None
    """Shape of the edge model; None: small on a CPU, tinyllama_1b elsewhere."""
    cloud_layers: int | None = None
    """How many of its layers; None: all."""
    edge_layers: int | None = None
    """How many of its layers; None: all."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of frozen weights and activations; None: float32 on a CPU, bfloat16 elsewhere."""
    prompts: int = 8
    """Prompts in a batch."""
    queries: tuple[int, ...] | None = None
    """Questions under each prompt; None: 1 and 4 on a CPU, 1 elsewhere."""
    prompt_length: int = 200
    """Tokens of a prompt."""
    input_length: int = 100
    """Tokens of a question."""
    answer_length: int = 16
    """Tokens of its answer, after it."""
    remat: Literal["none", "dots", "full"] = "none"
    """What our step rematerialises."""
    microbatches: int = 1
    """Parts of the batch that our step processes in sequence."""
    attention: Name = "auto"
    """Our attention; auto: the one for the device."""
    repeats: int = 5
    """Of every measurement, after one that is not counted."""
    peer: bool = True
    """Time torch too, where it is installed for the same device."""
    baseline: bool = True
    """Also a step of the plain LoRA."""
    output: Path | None = None
    """Path for JSON with the table's numbers, quartiles and versions."""


@dataclasses.dataclass
class Side:
    """One way to take the step."""

    run: Callable[[], float]  # takes one step, returns its seconds
    reset_peak: Callable[[], None] = lambda: None
    peak: Callable[[], int | None] = lambda: None  # bytes since the reset


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table: a loss, its parameters and data, and the work of a step."""

    name: str
    queries: int
    batch: dict[str, np.ndarray]
    macs: cost.Macs
    params: Any
    stats: Any
    loss: Callable
    frozen: Any


# --- weights and data ----------------------------------------------------------------------------


def random_params(config: DecoderConfig, dtype: Any, seed: int) -> Params:
    """Normal of variance 1 / fan-in, drawn on the device layer by layer, to save memory."""

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name, stacked = path[-1].key, len(path) == 2
        shape = leaf.shape[1:] if stacked else leaf.shape
        norm = name.endswith("norm")
        scale = 0.1 if norm or name.endswith("bias") else shape[name == "embed"] ** -0.5
        offset = 1.0 if norm and not config.rms_norm_offset else 0.0

        def one(key):
            return (jax.random.normal(key, shape, dtype) * scale + offset).astype(dtype)

        key = jax.random.fold_in(jax.random.key(seed), hash_name(name))
        if stacked:
            keys = jax.random.split(key, leaf.shape[0])
            return jax.jit(lambda keys: jax.lax.map(one, keys))(keys)
        return jax.jit(one)(key)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(config))


def hash_name(name: str) -> int:
    return int.from_bytes(name.encode()[:8], "little") % (1 << 31)


def filled(tree: Any, seed: int) -> Any:
    """The trainables with random B factors, so that the loss depends on all of them."""
    rng = np.random.default_rng(seed)

    def fill(path: tuple, leaf: jax.Array) -> jax.Array:
        if path[-1].key != "b" or len(path) < 2:
            return leaf
        return jnp.asarray(rng.normal(0, 0.02, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, tree)


def make_batch(options: Options, queries: int, cloud_vocab: int, edge_vocab: int) -> dict:
    rng = np.random.default_rng(0)
    rows, length = options.prompts * queries, options.input_length + options.answer_length
    prompts = (options.prompts, options.prompt_length)
    return {
        "prompt": rng.integers(0, cloud_vocab, prompts).astype(np.int32),
        "prompt_lengths": np.full(options.prompts, options.prompt_length, np.int32),
        "tokens": rng.integers(0, edge_vocab, (rows, length)).astype(np.int32),
        "answer": np.tile(np.arange(length) >= options.input_length, (rows, 1)),
    }


# --- our side ------------------------------------------------------------------------------------


def our_side(case: Case) -> tuple[Side, Callable[[], tuple[float, dict]], dict[str, int]]:
    """The jitted step with its state donated; loss and gradients; the memory planned by XLA."""
    optimizer = make_optimizer(OptimizerConfig(), 1000)
    # The step donates its state: copy it, so that other steps can start from the same.
    params, stats = jax.tree.map(jnp.copy, (case.params, case.stats))
    state = init_state(params, stats, optimizer, seed=0)
    train_step = jax.jit(make_train_step(case.loss, optimizer), donate_argnums=0)
    batch = jax.device_put(case.batch)
    compiled = train_step.lower(state, case.frozen, batch).compile()
    planned = compiled.memory_analysis()
    memory = {
        "arguments": planned.argument_size_in_bytes,
        "temporaries": planned.temp_size_in_bytes,
    }
    device = jax.devices()[0]

    def run() -> float:
        nonlocal state
        start = time.perf_counter()
        state, metrics = compiled(state, case.frozen, batch)
        jax.block_until_ready((state, metrics))
        return time.perf_counter() - start

    def peak() -> int | None:
        return (device.memory_stats() or {}).get("peak_bytes_in_use")

    def gradients() -> tuple[float, dict[str, np.ndarray]]:
        def loss(params, frozen, batch):
            return case.loss(params, case.stats, frozen, batch, jax.random.key(0), None)[0]

        value, grads = jax.jit(jax.value_and_grad(loss))(case.params, case.frozen, batch)
        leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(grads))
        name = lambda path: jax.tree_util.keystr(path, simple=True, separator=".")  # noqa: E731
        return float(value), {name(path): leaf for path, leaf in leaves}

    return Side(run, peak=peak), gradients, memory


# --- their side ----------------------------------------------------------------------------------


def their_model(params: Params, config: DecoderConfig, device: str) -> Any:
    """The same model in `transformers`, with these weights, each kernel in torch's own layout."""
    # sdpa leaves the soft-caps of Gemma 2 out.
    attention = "eager" if config.attn_logit_softcapping else "sdpa"
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**write_config(config)),
            attn_implementation=attention,
            dtype=getattr(torch, params["embed"].dtype.name),
        )
    theirs = dict(model.named_parameters())
    with torch.no_grad():
        for ours, names in tensor_names(config).items():
            leaf = torch.from_dlpack(leaf_at(params, ours))
            for i, name in enumerate(names):
                value = leaf[i] if ours.startswith("layers/") else leaf
                theirs[name].copy_(value.T if is_transposed(ours) else value)
    return model


def their_side(model: Any, batch: dict[str, np.ndarray], device: str) -> tuple[Side, Callable]:
    cuda = device == "cuda"
    wait = torch.cuda.synchronize if cuda else lambda: None
    batch = {name: torch.from_numpy(value).to(device) for name, value in batch.items()}
    batch = {n: x.long() if x.dtype == torch.int32 else x for n, x in batch.items()}
    optimizer = their_optimizer(model)

    def run() -> float:
        wait()
        start = time.perf_counter()
        their_train_step(model, optimizer, batch)
        wait()
        return time.perf_counter() - start

    def gradients() -> tuple[float, dict[str, np.ndarray]]:
        model.train()
        loss = model(batch)["loss"]
        loss.backward()
        where = places(model) if isinstance(model, LoraGen) else adapter_places(model.adapters)
        found = collect(where, lambda parameter: parameter.grad)
        optimizer.zero_grad(set_to_none=True)
        return loss.item(), found

    side = Side(run)
    if cuda:
        side = Side(run, torch.cuda.reset_peak_memory_stats, torch.cuda.max_memory_allocated)
    return side, gradients


def check_agreement(ours: tuple, theirs: tuple, dtype: str) -> dict[str, float]:
    """Relative differences of loss and gradients. Raises AssertionError above the limits."""
    (our_loss, our_grads), (their_loss, their_grads) = ours, theirs
    total = np.sqrt(sum(np.sum(np.square(x)) for x in their_grads.values()))
    apart = np.sqrt(sum(np.sum(np.square(x - our_grads[n])) for n, x in their_grads.items()))
    found = {
        "loss": abs(our_loss - their_loss) / abs(their_loss),
        "gradients": float(apart / total),
    }
    # In bf16 a prompt may choose other experts.
    limits = {"loss": 1e-5, "gradients": 1e-3} if dtype == "float32" else {"loss": 0.02}
    for name, limit in limits.items():
        assert found[name] < limit, f"not the same step: {name} differ by {found[name]:.1e}"
    return found


# --- the run -------------------------------------------------------------------------------------


def peak_flops(device: jax.Device, dtype: str) -> tuple[float, str]:
    """FLOP per second of the device, and the source of the number."""
    nominal = chips.peak_flops(device.device_kind)
    if nominal is not None and dtype == "bfloat16":
        return nominal, "nominal"
    size = 2048 if device.platform == "cpu" else 8192
    matrix, seconds = jnp.ones((size, size), dtype), []
    multiply = jax.jit(jnp.matmul)
    for _ in range(6):
        start = time.perf_counter()
        jax.block_until_ready(multiply(matrix, matrix))
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds[1:]), "measured"


def alternate(sides: dict[str, Side], repeats: int) -> tuple[dict[str, list[float]], dict]:
    """Seconds of each side, round by round, and each side's peak memory.

    A side that runs out of memory in its first round, which is not counted, is left out.
    """
    seconds: dict[str, list[float]] = {}
    peaks: dict[str, int | None] = {}
    for name, side in sides.items():
        try:
            side.run()
            seconds[name] = []
        except Exception as error:
            if "out of memory" not in str(error).lower():
                raise
    for _ in range(repeats):
        for name in seconds:
            sides[name].reset_peak()
            seconds[name].append(sides[name].run())
            peaks[name] = sides[name].peak()
    return seconds, peaks


def resolve(options: Options, platform: str) -> Options:
    """The options with the platform's defaults filled in."""
    cpu = platform == "cpu"
    return dataclasses.replace(
        options,
        queries=options.queries or ((1, 4) if cpu else (1,)),
        cloud=options.cloud or ("small" if cpu else "llama3_8b"),
        edge=options.edge or ("small" if cpu else "tinyllama_1b"),
        dtype=options.dtype or ("float32" if cpu else "bfloat16"),
    )


def shape_of(part: Literal["cloud", "edge"], options: Options) -> DecoderConfig:
    name, layers = getattr(options, part), getattr(options, f"{part}_layers")
    config = SMALL[part] if name == "small" else getattr(presets, name)()
    if layers:
        types = config.layer_types[:layers]
        config = dataclasses.replace(config, num_hidden_layers=layers, layer_types=types)
    return config


def make_cases(options: Options, spec: GeneratorSpec, frozen: dict[str, Params]) -> list[Case]:
    cloud, edge, length = spec.cloud, spec.edge, options.input_length + options.answer_length
    vocabularies, cases = (cloud.vocab_size, edge.vocab_size), []
    params, stats = init_generator(
        jax.random.key(1),
        spec.generator,
        edge_layers=edge.num_hidden_layers,
        edge_shapes=kernel_shapes(edge),
        cloud_layers=cloud.num_hidden_layers,
        cloud_shapes=kernel_shapes(cloud),
        cloud_embedding=frozen["cloud"]["embed"][0],
    )
    params, mesh = filled(params, 2), make_mesh(MeshConfig(), jax.devices()[:1])
    for queries in options.queries:
        macs = cost.train_step_macs(
            spec,
            prompts=options.prompts,
            queries=queries,
            prompt_length=options.prompt_length,
            length=length,
            answered=options.answer_length,
        )
        batch = make_batch(options, queries, *vocabularies)
        loss = generator_loss(
            spec,
            microbatches=options.microbatches,
            answer_length=options.answer_length,
            execution=Execution(
                attention=make_attention(options.attention, mesh), remat=options.remat
            ),
        )
        cases.append(Case("lora-gen", queries, batch, macs, params, stats, loss, frozen))
    if options.baseline:
        shapes = kernel_shapes(edge)
        config = LoraConfig(dropout=0.0, answer_length=options.answer_length)
        lora = init_lora(jax.random.key(3), shapes, config.rank, edge.num_hidden_layers)
        for queries in options.queries:
            batch = make_batch(options, queries, *vocabularies)
            batch = {name: batch[name] for name in ("tokens", "answer")}
            macs = cost.tuning_step_macs(
                edge,
                options.prompts * queries,
                length,
                dict.fromkeys(shapes, config.rank),
                answered=options.answer_length,
            )
            loss = lora_loss(config, edge)
            cases.append(Case("lora", queries, batch, macs, filled(lora, 4), {}, loss, frozen))
    return cases


def their_sides(case: Case, spec: GeneratorSpec, frozen: dict[str, Params], device: str) -> dict:
    """`{name: (side, gradients)}` of the torch variants of a case."""
    edge = their_model(frozen["edge"], spec.edge, device)
    if case.name == "lora":
        config = LoraConfig()
        model = Tuned(edge, config.targets, config.rank, config.alpha)
        load(adapter_places(model.adapters), jax.device_get(case.params))
        return {"lean": their_side(model, case.batch, device)}
    cloud = their_model(frozen["cloud"], spec.cloud, device)
    model = LoraGen(cloud, edge, spec.generator).to(device)
    load(places(model), jax.device_get(case.params))
    lean, gradients = their_side(model, case.batch, device)

    def usual() -> float:
        model.lm_head = model.repeat_prompts = True
        seconds = lean.run()
        model.lm_head = model.repeat_prompts = False
        return seconds

    return {
        "lean": (lean, gradients),
        "usual": (Side(usual, lean.reset_peak, lean.peak), None),
    }


def gigabytes(count: int | None) -> str:
    return f"{count / 2**30:.2f}" if count else ""


def main(options: Options) -> None:
    console, device = Console(), jax.devices()[0]
    options = resolve(options, device.platform)
    if options.dtype == "float32":  # on both sides: no TF32 on a GPU, no bf16 passes on a TPU
        jax.config.update("jax_default_matmul_precision", "highest")
    generator = GeneratorConfig(cloud_dropout=0.0)  # so that the sides can be compared
    spec = GeneratorSpec(generator, shape_of("cloud", options), shape_of("edge", options))
    dtype = jnp.dtype(options.dtype)
    frozen = {
        "cloud": random_params(spec.cloud, dtype, 0),
        "edge": random_params(spec.edge, dtype, 1),
    }
    backend = {"cpu": "cpu", "gpu": "cuda"}.get(device.platform)
    peer = options.peer and torch and (backend == "cpu" or (backend and torch.cuda.is_available()))
    if peer:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    else:
        console.print(f"no peer on this {device.platform}: only our own times")

    peak, source = peak_flops(device, options.dtype)
    title = f"{options.cloud} and {options.edge}, {options.dtype}, on {device.device_kind}"
    title += f" ({peak / 1e12:.3g} TFLOP/s, {source}); {options.prompts} prompts of "
    title += f"{options.prompt_length}, rows of {options.input_length} + {options.answer_length}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    names = ("step", "queries", "ours ms", "MFU", "GiB", "lean ms", "GiB", "usual ms", "ratio")
    for name in names:
        table.add_column(name, justify="left" if name == "step" else "right")
    rows, load_before = [], os.getloadavg()
    cases = make_cases(options, spec, frozen)
    for case in track(cases, "timing", console=console, transient=True):
        ours, our_gradients, memory = our_side(case)
        sides, differences = {"ours": ours}, None
        if peer:
            theirs = their_sides(case, spec, frozen, backend)
            differences = check_agreement(our_gradients(), theirs["lean"][1](), options.dtype)
            sides |= {name: side for name, (side, _) in theirs.items()}
        seconds, peaks = alternate(sides, options.repeats)
        median = {name: float(np.median(values)) for name, values in seconds.items()}
        ratio = median["ours"] / median["lean"] if "lean" in median else None
        mfu = case.macs.flops / median["ours"] / peak
        milliseconds = {name: f"{value * 1e3:.1f}" for name, value in median.items()}
        table.add_row(
            *(case.name, str(case.queries), milliseconds["ours"], f"{mfu:.0%}"),
            gigabytes(sum(memory.values())),
            *(milliseconds.get("lean", ""), gigabytes(peaks.get("lean"))),
            *(milliseconds.get("usual", ""), f"{ratio:.2f}" if ratio else ""),
        )
        row = {"step": case.name, "queries": case.queries, "flops": case.macs.flops, "mfu": mfu}
        row |= {"ratio": ratio, "planned_bytes": memory, "differences": differences, "sides": {}}
        for name, values in seconds.items():
            quartiles = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
            row["sides"][name] = {"quartiles": quartiles, "seconds": values, "peak": peaks[name]}
        rows.append(row)
        sides = theirs = ours = our_gradients = None  # free both sides' models
        gc.collect()
        if backend == "cuda" and peer:
            torch.cuda.empty_cache()
    console.print(table)
    console.print("medians; ratio: ours to lean")
    cores = len(os.sched_getaffinity(0))
    if device.platform == "cpu" and load_before[0] > cores / 4:
        console.print(f"not to be quoted: {load_before[0]:.1f} of {cores} cores were at other work")
    if peer:
        aim = TARGETS[device.platform]
        console.print(
            f"aims: ratio {aim} or less" + f", MFU {TARGET_MFU:.0%}" * (backend == "cuda")
        )
        worst = {k: max(row["differences"][k] for row in rows) for k in ("loss", "gradients")}
        console.print(", ".join(f"{k} differ by {v:.0e} at most" for k, v in worst.items()))
    if options.output:
        versions = {"jax": jax.__version__}
        if torch:
            versions |= {"torch": torch.__version__, "transformers": transformers.__version__}
        report = {
            "device": device.device_kind,
            "cores": cores,
            "load_average": {"before": load_before[0], "after": os.getloadavg()[0]},
            "versions": versions,
            "options": dataclasses.asdict(options) | {"output": str(options.output)},
            "configs": {
                name: dataclasses.asdict(getattr(spec, name))
                for name in ("cloud", "edge", "generator")
            },
            "peak_flops": {"per_second": peak, "source": source},
            "rows": rows,
        }
        options.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
