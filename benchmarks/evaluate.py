"""Scoring of choices against lm-evaluation-harness on torch: same model, same items, one run.

    python benchmarks/evaluate.py

Times run from text to log-likelihoods, tokenisation included. The model is TinyLLaMA's shape with
4 of its layers, weights random, fp32 on a CPU; the items have HellaSwag's form, four endings after
one context, with as many tokens as those of its validation split have in LLaMA 2's tokenizer; words
are random, each one token. `--data FOLDER --model FOLDER` takes the real items and a real
tokenizer. The peer is lm-eval's own `hf` backend over transformers with sdpa attention and all
cores, in batches of several sizes; the ratio is to the fastest of them. All log-likelihoods are
compared before anything is timed, and the sides alternate, so that other load on the machine
affects both.

A second table gives our time against the tokens of a batch and the number of items; `programs` are
those that the first call compiled.

Without lm-eval and torch (pip install -e '.[harness,parity]'), or without torch's CUDA where jax
runs on a GPU, only our side is timed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch shares the GPU

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from lorax_gen.data.benchmarks import find_benchmark, load_questions
from lorax_gen.inference import choices
from lorax_gen.inference.choices import TOKENS_PER_BATCH, encode_items, score_items
from lorax_gen.models import presets
from lorax_gen.models.config_json import write_config
from lorax_gen.models.decoder import DecoderConfig, Params, abstract_params
from lorax_gen.models.families import is_transposed, leaf_at, tensor_names
from lorax_gen.models.model import Model
from lorax_gen.tokenizers import SPECIAL, load_tokenizer, word_level

try:
    import torch
    import transformers
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
except ImportError:
    torch = None

TARGET = 0.6  # ours / theirs, at most
CLOSE = 1e-3  # of a log-likelihood, relative to its size, in fp32

Item = tuple[str, list[str]]  # a context, and the continuation of each choice


@dataclasses.dataclass(frozen=True)
class Options:
    """What is timed."""

    preset: Literal["tinyllama_1b", "llama3_2_1b", "qwen2_1_5b"] = "tinyllama_1b"
    """Shape of the model."""
    layers: int = 4
    """How many of its layers; TinyLLaMA has 22."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of parameters and activations."""
    items: int = 24
    """Items that both sides score."""
    tokens_per_batch: int = TOKENS_PER_BATCH
    """Tokens of our batch in the comparison."""
    peer_batches: tuple[int, ...] = (1, 8)
    """Batch sizes of the peer, in choices."""
    grow_tokens: tuple[int, ...] = (512, 2048, 8192)
    """Tokens of our batches, for the second table."""
    grow_items: tuple[int, ...] = (4, 12, 48)
    """Numbers of items, for the second table."""
    repeats: int = 3
    """Of every measurement, after one that is not counted."""
    peer: bool = True
    """Time lm-eval too, where it is installed with torch for the same device."""
    data: Path | None = None
    """Folder with hellaswag.test.jsonl; None: random items."""
    model: Path | None = None
    """Model directory whose tokenizer is used; None: one of random words."""
    output: Path | None = None
    """Path for JSON with the tables' numbers, quartiles and versions."""


# --- model and items -----------------------------------------------------------------------------


def random_params(config: DecoderConfig, dtype: Any) -> Params:
    """Normal of variance 1 / fan-in."""
    shapes, key = abstract_params(config), jax.random.key(0)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = path[-1].key
        scale = 0.1 if name.endswith("norm") else leaf.shape[-1 if name == "embed" else -2] ** -0.5
        own = jax.random.fold_in(key, int.from_bytes(name.encode()[:8], "little") % (1 << 31))
        x = jax.random.normal(own, leaf.shape) * scale
        return (x + 1.0 if name.endswith("norm") else x).astype(dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def invented_items(count: int, words: list[str]) -> list[Item]:
    """Items of HellaSwag's form and lengths: a context of 56 tokens on average, endings of 33."""
    rng = np.random.default_rng(0)

    def text(mean: float, spread: float, least: int, most: int) -> str:
        length = np.clip(rng.normal(mean, spread), least, most).astype(int)
        return " ".join(rng.choice(words, length))

    return [
        (text(56, 28, 8, 130), [f" {text(33, 14, 4, 80)}" for _ in range(4)]) for _ in range(count)
    ]


def real_items(count: int, folder: Path) -> list[Item]:
    benchmark = find_benchmark("hellaswag")
    questions = load_questions(benchmark, "test", folder)[:count]
    return [(benchmark.contexts(q)[0], list(benchmark.continuations(q))) for q in questions]


# --- the two sides -------------------------------------------------------------------------------

Side = Callable[[list[Item]], np.ndarray]  # log-likelihoods of all choices, one after the other


def our_side(model: Model, tokens_per_batch: int) -> Side:
    def run(items: list[Item]) -> np.ndarray:
        encoded = encode_items(model, [([context], endings) for context, endings in items])
        scores = score_items(model, encoded, tokens_per_batch=tokens_per_batch)
        return np.concatenate([score.loglikelihoods for score in scores])

    return run


def their_model(model: Model, device: str) -> Any:
    """The same model in `transformers`, with these weights."""
    params, config = model.params, model.config
    with torch.device(device):
        theirs = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**write_config(config)),
            attn_implementation="sdpa",
            dtype=getattr(torch, params["embed"].dtype.name),
        )
    parameters = dict(theirs.named_parameters())
    with torch.no_grad():
        for ours, names in tensor_names(config).items():
            leaf = torch.from_dlpack(leaf_at(params, ours))
            for i, name in enumerate(names):
                value = leaf[i] if ours.startswith("layers/") else leaf
                parameters[name].copy_(value.T if is_transposed(ours) else value)
    return theirs.eval()


def their_side(theirs: Any, tokenizer: Any, batch: int) -> Side:
    harness = HFLM(pretrained=theirs, tokenizer=tokenizer, batch_size=batch, add_bos_token=False)

    def run(items: list[Item]) -> np.ndarray:
        pairs = [(context, ending) for context, endings in items for ending in endings]
        asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
        found = harness.loglikelihood(asked, disable_tqdm=True)
        return np.array([likelihood for likelihood, _ in found])

    return run


# --- the run -------------------------------------------------------------------------------------


def alternate(sides: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each side, round by round; the first one, which compiles, is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def check_agreement(found: dict[str, np.ndarray], dtype: str) -> float:
    """Largest difference of a log-likelihood. Raises AssertionError above the limit."""
    ours = found["ours"]
    worst = max(float(np.abs(ours - theirs).max()) for theirs in found.values())
    limit = CLOSE if dtype == "float32" else 0.05
    assert worst < limit * np.abs(ours).mean(), f"log-likelihoods differ by {worst}"
    return worst


def measured(seconds: list[float], items: int) -> dict[str, Any]:
    median = float(np.median(seconds))
    quartiles = np.quantile(seconds, [0.25, 0.5, 0.75]).tolist()
    return {"seconds": seconds, "quartiles": quartiles, "items_per_second": items / median}


def beside(
    model: Model, items: list[Item], options: Options, backend: str | None
) -> dict[str, Any]:
    """Both sides on the same items."""
    sides = {"ours": our_side(model, options.tokens_per_batch)}
    worst = None
    if backend:
        theirs = their_model(model, backend)
        for batch in options.peer_batches:
            sides[f"lm-eval, {batch}"] = their_side(theirs, model.tokenizer, batch)
        worst = check_agreement({name: run(items) for name, run in sides.items()}, options.dtype)
    seconds = alternate({n: lambda run=run: run(items) for n, run in sides.items()},
                        options.repeats)  # fmt: skip
    rows = {name: measured(values, len(items)) for name, values in seconds.items()}
    times = {name: row["quartiles"][1] for name, row in rows.items()}
    peers = [time for name, time in times.items() if name != "ours"]
    ratio = times["ours"] / min(peers) if peers else None
    return {"items": len(items), "ratio": ratio, "difference": worst, "sides": rows}


def growth(model: Model, make_items: Callable[[int], list[Item]], options: Options) -> list[dict]:
    """Our time against the number of items and the tokens of a batch."""
    rows = []
    for tokens in options.grow_tokens:
        run = our_side(model, tokens)
        for count in options.grow_items:
            items = make_items(count)
            choices.score_rows.clear_cache()
            start = time.perf_counter()
            run(items)
            first = time.perf_counter() - start
            programs = choices.score_rows._cache_size()
            seconds = alternate({"ours": lambda run=run, items=items: run(items)}, options.repeats)
            rows.append(
                {"tokens_per_batch": tokens, "items": count, "programs": programs}
                | {"first_seconds": first}
                | measured(seconds["ours"], count)
            )
    return rows


def main(options: Options) -> None:
    console, device = Console(), jax.devices()[0]
    if options.dtype == "float32":  # on both sides: no TF32 on a GPU, no bf16 passes on a TPU
        jax.config.update("jax_default_matmul_precision", "highest")
    config = getattr(presets, options.preset)()
    if options.model:
        tokenizer = load_tokenizer(options.model)
        config = dataclasses.replace(config, vocab_size=max(config.vocab_size, len(tokenizer)))
    else:
        words = [f"w{i}" for i in range(config.vocab_size - len(SPECIAL))]
        tokenizer = word_level(words)
    config = dataclasses.replace(config, num_hidden_layers=options.layers)
    model = Model(config, random_params(config, jnp.dtype(options.dtype)), tokenizer, bos=False)

    def make_items(count: int) -> list[Item]:
        return real_items(count, options.data) if options.data else invented_items(count, words)

    backend = {"cpu": "cpu", "gpu": "cuda"}.get(device.platform)
    if options.peer and torch and (backend == "cpu" or (backend and torch.cuda.is_available())):
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    else:
        backend = None
        console.print(f"no peer on this {device.platform}: only our own times")

    load = os.getloadavg()
    found = beside(model, make_items(options.items), options, backend)
    title = f"{options.preset}, {options.layers} layers, {options.dtype}, on {device.device_kind}; "
    title += f"{options.items} items of four choices"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("", "seconds", "items/s"):
        table.add_column(name, justify="right" if name else "left")
    for name, row in found["sides"].items():
        label = f"ours, {options.tokens_per_batch} tokens" if name == "ours" else f"{name} choices"
        table.add_row(label, f"{row['quartiles'][1]:.2f}", f"{row['items_per_second']:.2f}")
    console.print(table)
    if found["ratio"]:
        console.print(f"ratio of time to the fastest peer {found['ratio']:.2f}; aim: {TARGET}")
        console.print(f"log-likelihoods differ by {found['difference']:.0e} at most")

    rows = growth(model, make_items, options)
    table = Table(title="ours alone", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("tokens a batch", "items", "seconds", "items/s", "first call", "programs"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            *(str(row["tokens_per_batch"]), str(row["items"]), f"{row['quartiles'][1]:.2f}"),
            *(f"{row['items_per_second']:.2f}", f"{row['first_seconds']:.2f}"),
            str(row["programs"]),
        )
    console.print(table)
    cores = len(os.sched_getaffinity(0))
    if device.platform == "cpu" and load[0] > cores / 4:
        console.print(f"not to be quoted: {load[0]:.1f} of {cores} cores were at other work")
    names = ["jax", *(["torch", "transformers", "lm_eval"] if torch else [])]
    versions = {name: version(name) for name in names}
    console.print(", ".join(f"{name} {number}" for name, number in versions.items()))
    if options.output:
        report = {
            "device": device.device_kind,
            "cores": cores,
            "load_average": {"before": load[0], "after": os.getloadavg()[0]},
            "versions": versions,
            "options": {
                key: str(value) if isinstance(value, Path) else value
                for key, value in dataclasses.asdict(options).items()
            },
            "config": dataclasses.asdict(config),
            "beside": found,
            "growth": rows,
        }
        options.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
