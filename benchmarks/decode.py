"""Prefill and decoding against `transformers` on torch: same shape, same weights, one run.

    python benchmarks/decode.py                                # a CPU: TinyLLaMA's shape, 4 layers
    python benchmarks/decode.py --layers 22 --dtype bfloat16   # a GPU: all layers

Prefill is prompt -> logits after its last token, chosen token and filled cache; decoding is greedy
from there, per token. Weights are random, logits are compared before anything is timed, and the
sides alternate, so that other load on the machine affects both. The peer has all cores, sdpa
attention, no gradients, and both of its caches; the ratio is to the faster one in each row. Without
torch (pip install -e '.[parity]'), or without its CUDA where jax runs on a GPU, only our side is
timed.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import time
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import transformers
import tyro
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from lorax_gen.inference.generation import advance, prefill
from lorax_gen.models import decoding, presets
from lorax_gen.models.config_json import write_config
from lorax_gen.models.decoder import DecoderConfig, Params, abstract_params, logits
from lorax_gen.models.families import is_transposed, leaf_at, tensor_names

try:
    import torch
except ImportError:
    torch = None

TARGETS = {"prefill": 1.0, "decode": 0.7}  # ours / theirs, at most
# Bytes per second of a device's memory, by the prefix of its name; the vendors' numbers.
PEAKS = {
    "NVIDIA H200": 4.8e12,
    "NVIDIA H100 PCIe": 2.0e12,
    "NVIDIA H100 80GB HBM3": 3.35e12,  # SXM
    "NVIDIA A100-SXM4-80GB": 2.039e12,
    "NVIDIA A100-SXM4-40GB": 1.555e12,
    "TPU v6 lite": 1.64e12,
    "TPU v5 lite": 8.19e11,
    "TPU v4": 1.2288e12,
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What is timed."""

    preset: Literal["tinyllama_1b", "llama3_2_1b", "llama3_8b", "gemma_2b", "qwen2_1_5b"] = (
        "tinyllama_1b"
    )
    """Shape of the model. No Gemma 2: the peer's sdpa attention omits its soft-caps."""
    layers: int = 4
    """How many of its layers; TinyLLaMA has 22."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of parameters, activations and cache."""
    prompts: tuple[int, ...] = (100, 600)
    """Lengths of prompts."""
    batches: tuple[int, ...] = (1, 8)
    """Prompts at a time."""
    new_tokens: int = 32
    """Tokens decoded after each prompt."""
    repeats: int = 7
    """Of every measurement, after one that is not counted."""
    peer: bool = True
    """Time transformers too, where torch is installed for the same device."""
    compile: bool = False
    """Also the peer's decoding step under torch.compile, with CUDA graphs on a GPU."""
    output: Path | None = None
    """Path for JSON with the table's numbers, quartiles and versions."""


# --- the two sides -------------------------------------------------------------------------------


def random_params(config: DecoderConfig, dtype: Any) -> Params:
    """Normal of variance 1 / fan-in; `layers` is a list, as decoding takes it."""
    shapes = abstract_params(config)
    layer = {name: x.shape[1:] for name, x in shapes["layers"].items()}
    outer = {name: x.shape for name, x in shapes.items() if name != "layers"}
    key = jax.random.key(0)

    def draw(tree: dict, number: int) -> dict:
        def leaf(i: int, name: str, shape: tuple[int, ...]) -> jax.Array:
            scale = 1.0 if name.endswith("norm") else shape[name == "embed"] ** -0.5
            x = jax.random.normal(jax.random.fold_in(key, 100 * number + i), shape) * scale
            return (1.0 + 0.1 * x if name.endswith("norm") else x).astype(dtype)

        return {name: leaf(i, name, shape) for i, (name, shape) in enumerate(tree.items())}

    layers = [draw(layer, i) for i in range(config.num_hidden_layers)]
    return {**draw(outer, config.num_hidden_layers), "layers": layers}


def our_side(params: Params, config: DecoderConfig, options: Options):
    """A function of tokens `[B, T]` -> seconds of prefill, seconds per token, the tokens."""

    def run(tokens: np.ndarray) -> tuple[float, float, np.ndarray]:
        batch, length = tokens.shape
        lengths = jnp.full(batch, length, jnp.int32)
        tokens, lengths = jax.block_until_ready((jnp.asarray(tokens), lengths))
        slots, steps = length + options.new_tokens, options.new_tokens
        start = time.perf_counter()
        state = jax.block_until_ready(prefill(params, config, tokens, lengths, slots=slots))
        middle = time.perf_counter()
        _, out = jax.block_until_ready(advance(params, config, state, steps=steps))
        return middle - start, (time.perf_counter() - middle) / steps, np.asarray(out)

    return run


def their_model(params: Params, config: DecoderConfig, device: str):
    """The same model in `transformers`, with these weights."""
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**write_config(config)),
            attn_implementation="sdpa",
            dtype=getattr(torch, params["embed"].dtype.name),
        )
    state = {}
    for ours, names in tensor_names(config).items():
        for i, name in enumerate(names):
            parts = params["layers"][i] if ours.startswith("layers/") else params
            value = torch.from_dlpack(leaf_at(parts, ours.removeprefix("layers/")))
            state[name] = value.T if is_transposed(ours) else value
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)  # copies each kernel into torch's own layout
    return model.eval()


def their_side(model, kind: str, options: Options):
    """As `our_side`, with a cache that grows (`dynamic`) or one of fixed size (`static`)."""
    cuda, caches = model.device.type == "cuda", {}
    wait = torch.cuda.synchronize if cuda else lambda: None
    step = model
    if kind == "compiled":
        step = torch.compile(model, mode="reduce-overhead" if cuda else None)

    def read(module, tokens, cache):
        scores = module(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return scores[:, -1:].argmax(-1)

    @torch.inference_mode()
    def run(tokens: np.ndarray) -> tuple[float, float, np.ndarray]:
        shape, tokens, out = tokens.shape, torch.from_numpy(tokens).to(model.device), []
        wait()
        start = time.perf_counter()
        if kind == "dynamic":
            cache = transformers.DynamicCache(config=model.config)
        elif shape in caches:  # a compiled step needs the same buffers
            cache = caches[shape]
            cache.reset()
        else:
            slots = shape[1] + options.new_tokens
            cache = transformers.StaticCache(config=model.config, max_cache_len=slots)
            caches[shape] = cache
        token = read(model, tokens, cache)
        wait()
        middle = time.perf_counter()
        for _ in range(options.new_tokens):
            token = read(step, token, cache)
            out.append(token)
        wait()
        seconds = (time.perf_counter() - middle) / options.new_tokens
        return middle - start, seconds, torch.cat(out, dim=1).cpu().numpy()

    return run


def check_agreement(params: Params, config: DecoderConfig, model, tokens: np.ndarray) -> float:
    """RMS difference of logits over their deviation. Raises AssertionError above the limit."""

    @jax.jit
    def forward(params, tokens):
        cache = decoding.init_cache(config, *tokens.shape, params["embed"].dtype)
        hidden, _ = decoding.forward_with_cache(params, config, tokens, cache, None)
        return logits(params, config, hidden)

    ours = np.asarray(forward(params, jnp.asarray(tokens)))
    with torch.inference_mode():
        theirs = model(torch.from_numpy(tokens).to(model.device)).logits.float().cpu().numpy()
    difference = float(np.sqrt(np.mean((ours - theirs) ** 2)) / theirs.std())
    limit = 1e-4 if params["embed"].dtype == jnp.float32 else 0.05
    assert difference < limit, f"not the same model: logits differ by {difference} of their spread"
    return difference


# --- the run -------------------------------------------------------------------------------------


def bytes_per_token(params: Params, config: DecoderConfig, batch: int, filled: float) -> float:
    """What one decoding step has to read: all weights but untied embeddings, and the cache."""
    weights = sum(x.nbytes for x in jax.tree.leaves(params))
    weights -= 0 if config.tie_word_embeddings else params["embed"].nbytes
    slot = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return weights + batch * filled * slot * params["embed"].dtype.itemsize


def peak_bandwidth(device: jax.Device) -> tuple[float, str]:
    """Bytes per second of the device's memory, and the source of the number."""
    for name, peak in PEAKS.items():
        if device.device_kind.startswith(name):
            return peak, "nominal"
    matrix, vector = (
        jnp.ones((32768, 8192)),
        jnp.ones(8192),
    )  # 1 GiB, far larger than any CPU's caches
    read, seconds = jax.jit(jnp.matmul), []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(read(matrix, vector))
        seconds.append(time.perf_counter() - start)
    return matrix.nbytes / min(seconds), "measured"


def alternate(sides: dict, tokens: np.ndarray, repeats: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of each side and phase, round by round."""
    seconds = {name: {"prefill": [], "decode": []} for name in sides}
    for repeat in range(repeats + 1):
        for name, run in sides.items():
            first, each, _ = run(tokens)
            if repeat:  # the first one compiles
                seconds[name]["prefill"].append(first)
                seconds[name]["decode"].append(each)
    return seconds


def main(options: Options) -> None:
    console, device = Console(), jax.devices()[0]
    config = getattr(presets, options.preset)()
    config = dataclasses.replace(config, num_hidden_layers=options.layers)
    if options.dtype == "float32":  # on both sides: no TF32 on a GPU, no bf16 passes on a TPU
        jax.config.update("jax_default_matmul_precision", "highest")
    params = random_params(config, options.dtype)
    sides = {"ours": our_side(params, config, options)}
    model = difference = None
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.integers(0, config.vocab_size, shape, np.int32)  # noqa: E731

    backend = {"cpu": "cpu", "gpu": "cuda"}.get(device.platform)
    if options.peer and torch and (backend == "cpu" or (backend and torch.cuda.is_available())):
        torch.set_num_threads(os.cpu_count())
        model = their_model(params, config, backend)
        difference = check_agreement(params, config, model, draw(2, 64))
        kinds = ["dynamic", "static"] + ["compiled"] * options.compile
        sides |= {kind: their_side(model, kind, options) for kind in kinds}
        console.print(f"logits agree: rms difference {difference:.0e} of their spread")
    else:
        console.print(f"no peer on this {device.platform}: only our own times")

    peak, source = peak_bandwidth(device)
    title = f"{options.preset}, {options.layers} layers, {options.dtype}, on {device.device_kind}"
    title += f"; memory {peak / 1e9:.0f} GB/s ({source})"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("", "batch", "prompt", "ours ms", "of peak", "theirs ms", "cache", "ratio"):
        table.add_column(name, justify="left" if name in ("", "cache") else "right")
    rows, load = [], os.getloadavg()
    cases = list(itertools.product(options.batches, options.prompts))
    for batch, length in track(cases, "timing", console=console, transient=True):
        seconds = alternate(sides, draw(batch, length), options.repeats)
        read = bytes_per_token(params, config, batch, length + options.new_tokens / 2)
        for phase in TARGETS:
            median = {side: float(np.median(times[phase])) for side, times in seconds.items()}
            ours = median.pop("ours")
            of_peak = read / ours / peak if phase == "decode" else None
            best = min(median, key=median.get, default=None)
            ratio = ours / median[best] if best else None
            table.add_row(
                *(phase, str(batch), str(length), f"{ours * 1e3:.2f}"),
                f"{of_peak:.0%}" if of_peak else "",
                *([f"{median[best] * 1e3:.2f}", best, f"{ratio:.2f}"] if best else []),
            )
            row = {"phase": phase, "batch": batch, "prompt": length, "peer": best, "ratio": ratio}
            row |= {"of_peak": of_peak, "sides": {}}
            for side, times in seconds.items():
                quartiles = np.quantile(times[phase], [0.25, 0.5, 0.75]).tolist()
                row["sides"][side] = {"quartiles": quartiles, "seconds": times[phase]}
            rows.append(row)
    console.print(table)
    console.print("medians; decode: one step of all rows; of peak: weights and cache read for it")
    if model is not None:
        console.print(f"aims: prefill {TARGETS['prefill']}, decode {TARGETS['decode']} or less")
    if options.output:
        versions = {"jax": jax.__version__, "transformers": transformers.__version__}
        versions["torch"] = torch.__version__ if torch else None
        report = {
            "device": device.device_kind,
            "cores": os.cpu_count(),
            "load_average": {"before": load[0], "after": os.getloadavg()[0]},
            "versions": versions,
            "options": dataclasses.asdict(options) | {"output": str(options.output)},
            "config": dataclasses.asdict(config),
            "logits_difference": difference,
            "peak_bandwidth": {"bytes_per_second": peak, "source": source},
            "rows": rows,
        }
        options.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
