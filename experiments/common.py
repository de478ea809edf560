"""What the experiments share: variants x seeds, trained and evaluated by `lorax-gen`, one report.

An experiment is a list of `Variant`s. Each is trained by `lorax-gen train` with each seed and asked
by `lorax-gen evaluate`, in processes of their own, as many at once as there are cores. Runs are
called by what they differ in, so that experiments share those that are the same; what is complete
is not run again, and an interrupted experiment goes on with the same command.

By default everything happens in the embedded world. `--cloud`, `--edge` and `--data` take the real
thing: the paper's five sources in training, its eight benchmarks in evaluation.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import queue
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
import yaml
from tqdm import tqdm

from lorax_gen import documents, files
from lorax_gen.errors import UserError
from lorax_gen.evaluation.metrics import standard_error
from lorax_gen.evaluation.report import FORMAT, Report, save_report
from lorax_gen.evaluation.tables import print_report
from lorax_gen.method.lora import count_params
from lorax_gen.planning.plan import abstract_step
from lorax_gen.recipes.registry import SHIPPED, load_config
from lorax_gen.training.metrics import read_rows

PIN = "import os; os.sched_setaffinity(0, {{{core}}}); "


@dataclasses.dataclass(frozen=True)
class Options:
    """Where and how an experiment runs."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Each variant is trained with each seed."""
    steps: float = 1.0
    """Training steps, as a share of those that the experiment names."""
    runs: Path = Path("runs/tables")
    """Directory of the runs and of the report."""
    jobs: int = os.cpu_count() or 1
    """Processes at once, each on a core of its own where there are as many."""
    cloud: str | None = None
    """Cloud model, with --edge and --data; default the embedded world."""
    edge: str | None = None
    """Edge model."""
    data: Path | None = None
    """Directory of the paper's benchmarks and of Alpaca."""
    config: str = "reasoning-tinyllama"
    """Shipped config of the real run."""
    shots: int = 5
    """Solved examples in the prompts of real benchmarks."""

    def __post_init__(self):
        if not self.seeds or not self.steps > 0 or self.jobs < 1:
            raise UserError("give one seed or more, --steps above 0 and --jobs of 1 or more")
        if len({value is None for value in (self.cloud, self.edge, self.data)}) > 1:
            raise UserError("--cloud, --edge and --data belong together; give all three or none")

    @property
    def world(self) -> bool:
        return self.data is None


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row of an experiment.

    Attributes:
      method: of the config that trains it; None: nothing is trained.
      changes: fields of that config, dotted, and their values.
      steps: training steps in the world.
      mode: of `lorax-gen evaluate`, where it is not what the run releases.
      parts: for LoraHub, which is not trained itself: what trains its LoRAs.
    """

    name: str
    label: str
    method: str | None = "lora_gen"
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    steps: int = 2000
    mode: str | None = None
    parts: tuple[Variant, ...] = ()

    def run_name(self, options: Options) -> str:
        """What the run differs in; for real models with a hash of what they are."""
        if self.method is None:
            return mode_of(self)
        words = [f"{key.split('.')[-1]}={plain(value)}" for key, value in self.changes.items()]
        words.sort()
        if not options.world:
            real = f"{options.cloud} {options.edge} {options.config}"
            words.append(hashlib.sha256(real.encode()).hexdigest()[:8])
        return ",".join([self.method, *words, f"steps={self.steps_of(options)}"])

    def steps_of(self, options: Options) -> int:
        steps = self.steps if options.world else base_config(self, options)["run"]["steps"]
        return max(1, round(steps * options.steps))


def plain(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


def base_config(variant: Variant, options: Options) -> dict[str, Any]:
    """The shipped config that a variant changes. The real one is LoRA-Gen's, of which other methods
    take what they have in common."""
    if options.world:
        name = "world" if variant.method == "lora_gen" else f"world-{variant.method}"
        config = documents.read_yaml(SHIPPED / f"{name}.yaml")
        return {"data": {"kind": "world"}} | config
    config = documents.read_yaml(SHIPPED / f"{options.config}.yaml")
    if variant.method != "lora_gen":
        shared = ("dtype", "remat", "answer_length", "data", "optimizer", "run", "mesh")
        config = {key: config[key] for key in shared} | {"method": variant.method}
    assert options.data is not None
    config |= {"edge": options.edge}
    config["data"] |= {"directory": str(options.data)}
    if variant.method in ("lora_gen", "direct"):
        config["cloud"] = options.cloud
    return config


def config_of(variant: Variant, seed: int, options: Options) -> dict[str, Any]:
    """The config of one run."""
    config = base_config(variant, options)
    steps = variant.steps_of(options)
    config["run"] = config.get("run", {}) | {"steps": steps, "seed": seed}
    if options.world:  # the reports come from `evaluate`
        config["run"] |= {"evaluate_every": steps}
    for key, value in variant.changes.items():
        *path, last = key.split(".")
        inner = config
        for name in path:
            inner = inner.setdefault(name, {})
        inner[last] = value
    return config


# --- running -------------------------------------------------------------------------------------


def run_experiment(
    name: str, title: str, variants: Sequence[Variant], *, paper: str | None = None
) -> None:
    """Reads the options, runs what is not complete, prints the report and saves it in
    `RUNS/NAME`, where `lorax-gen report` finds it.

    Args:
      paper: number of the paper's table that it stands beside; see `evaluation.paper`.
    """
    try:
        options = tyro.cli(Options, description=title)
        report = experiment(name, title, variants, options, paper)
    except UserError as error:
        sys.exit(f"{name}: {error}")
    print_report(report)
    save_report(report, options.runs / name)
    print(f"report: {options.runs / name}/report.json; lorax-gen report {options.runs}")


def experiment(
    name: str,
    title: str,
    variants: Sequence[Variant],
    options: Options,
    paper: str | None = None,
) -> Report:
    """The report of an experiment whose runs are complete afterwards."""
    trained = {v.name: bool(v.method or v.parts) for v in variants}
    seeds = {name: options.seeds if own else options.seeds[:1] for name, own in trained.items()}
    work = [(variant, seed) for variant in variants for seed in seeds[variant.name]]
    # The same run twice would wait for its own lock; what has parts needs them first.
    alone = [(each, seed) for own, seed in work for each in own.parts or (own,)]
    distinct = {(variant.run_name(options), seed): (variant, seed) for variant, seed in alone}
    cores: queue.SimpleQueue[int] = queue.SimpleQueue()
    for core in itertools.islice(itertools.cycle(range(os.cpu_count() or 1)), options.jobs):
        cores.put(core)

    def complete(job: tuple[Variant, int]) -> None:
        core = cores.get()
        try:
            complete_run(*job, options, core)
        finally:
            cores.put(core)

    with ThreadPoolExecutor(options.jobs) as pool:
        jobs = [pool.submit(complete, job) for job in distinct.values()]
        try:
            for job in tqdm(jobs, desc=name, unit="run", disable=not sys.stderr.isatty()):
                job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    # A mode may share a run with another variant, and is asked for by itself; so has LoraHub.
    for variant, seed in work:
        evaluate_run(variant, seed, options, core=None)
    return summary(name, title, variants, seeds, options, paper)


def run_dir_of(variant: Variant, seed: int, options: Options) -> Path:
    return options.runs / "runs" / variant.run_name(options) / f"seed-{seed}"


def complete_run(variant: Variant, seed: int, options: Options, core: int) -> None:
    """Trains and evaluates one run on a core, unless it is complete."""
    run_dir = run_dir_of(variant, seed, options)
    if variant.method is not None and not (run_dir / "released").is_dir():
        config = run_dir.with_name(f"{run_dir.name}.yaml")
        files.make_directory(config.parent)
        files.write_text(config, yaml.safe_dump(config_of(variant, seed, options)))
        lorax_gen(["train", str(config), "--run-dir", str(run_dir)], run_dir, core)
    evaluate_run(variant, seed, options, core)


def evaluations(options: Options) -> dict[str, list[str]]:
    """The evaluations of a run: their name and their arguments."""
    if options.world:
        return {split: ["world", "--split", split] for split in ("unseen", "seen")}
    models = ["--edge", str(options.edge), "--data-dir", str(options.data)]
    return {"reasoning": ["reasoning", *models, "--shots", str(options.shots)]}


def evaluate_run(variant: Variant, seed: int, options: Options, core: int | None) -> None:
    """Asks what a run has released, unless it has been."""
    run_dir = run_dir_of(variant, seed, options)
    mode = mode_of(variant)
    for name, arguments in evaluations(options).items():
        directory = run_dir.with_name(f"{run_dir.name}-{name}")
        path = directory / "report.json"
        if path.exists() and mode in documents.read_json(path)["rows"]:
            continue
        words = ["evaluate", *arguments, "--run-dir", str(directory)]
        words += ["--cloud", options.cloud] if options.cloud else []
        if variant.method in ("lora_gen", "lora"):
            kind = {"lora_gen": "generator", "lora": "lora"}[variant.method]
            words += [f"--{kind}", str(run_dir / "released"), "--modes", mode]
        elif variant.parts:
            released = [run_dir_of(part, seed, options) / "released" for part in variant.parts]
            words += ["--modes", mode, "--lorahub", *map(str, released)]
        elif variant.method is None:
            words += ["--modes", mode]
        else:
            words += ["--modes", mode, "--baseline", str(run_dir / "released")]
        lorax_gen(words, run_dir, core)


def mode_of(variant: Variant) -> str:
    """The row of an evaluation's report that is the variant's."""
    return variant.mode or str(variant.method)


def lorax_gen(words: list[str], run_dir: Path, core: int | None) -> None:
    """Runs a command in a process of its own, whose output is beside the run as `.log`.

    Raises UserError with the last line of it where it fails.
    """
    log = run_dir.with_name(f"{run_dir.name}.log")
    files.make_directory(log.parent)
    # Set within the process: JAX has threads here, beside which `preexec_fn` could lock up.
    pin = "" if core is None or not hasattr(os, "sched_setaffinity") else PIN.format(core=core)
    program = f"{pin}from lorax_gen.cli import main; main()"
    with log.open("ab") as out:
        out.write(f"\n$ lorax-gen {' '.join(words)}\n".encode())
        out.flush()
        command = [sys.executable, "-c", program, *words]
        done = subprocess.run(command, stdout=out, stderr=out, check=False)
    if done.returncode:
        last = log.read_text(errors="replace").strip().splitlines()[-1]
        raise UserError(f"lorax-gen {words[0]} failed, see {log}: {last}")
    if words[0] == "train" and not (run_dir / "released").is_dir():
        raise UserError(f"{run_dir} was interrupted; the same command goes on")


# --- reporting -----------------------------------------------------------------------------------


def summary(
    name: str,
    title: str,
    variants: Sequence[Variant],
    seeds: Mapping[str, Sequence[int]],
    options: Options,
    paper: str | None = None,
) -> Report:
    """The report of complete runs: means over seeds, and their standard errors."""
    rows, columns, first = {}, {}, None
    for variant in variants:
        own = [reports_of(variant, seed, options) for seed in seeds[variant.name]]
        first = first or next(iter(own[0].values()))
        shares = [scores_of(each, mode_of(variant)) for each in own]
        columns |= {column: {"title": column} for column in shares[0]}
        cells = {
            column: {
                "score": statistics.mean(share[column] for share in shares),
                "stderr": standard_error(np.array([share[column] for share in shares]))
                if len(shares) > 1
                else 0.0,
                "n": len(shares),
            }
            for column in shares[0]
        }
        rows[variant.name] = {
            "label": variant.label,
            "cells": cells,
            "average": next(iter(cells.values()))["score"],
            **costs_of(variant, own, seeds[variant.name], options),
        }
    assert first is not None
    return {
        "format": FORMAT,
        "kind": "experiment",
        "name": name,
        "title": title,
        **({"paper": paper} if paper else {}),
        **{key: first[key] for key in ("edge", "device", "versions")},
        "cloud": options.cloud or "world/cloud",
        "settings": {"seeds": list(options.seeds), "steps": options.steps},
        "columns": columns,
        "rows": rows,
    }


def reports_of(variant: Variant, seed: int, options: Options) -> dict[str, Report]:
    run_dir = run_dir_of(variant, seed, options)
    return {
        name: documents.read_json(run_dir.with_name(f"{run_dir.name}-{name}") / "report.json")
        for name in evaluations(options)
    }


def scores_of(reports: Mapping[str, Report], mode: str) -> dict[str, float]:
    """Scores by column, the main one first."""
    if "unseen" in reports:
        unseen, seen = (reports[split]["rows"][mode] for split in ("unseen", "seen"))
        families = {family: cell["score"] for family, cell in unseen["cells"].items()}
        return {"unseen": unseen["average"], "seen": seen["average"], **families}
    (report,) = reports.values()
    row, columns = report["rows"][mode], report["columns"]
    means = {"AVE": row["average"], "HAR": row["harmonic"]}
    return means | {columns[task]["title"]: cell["score"] for task, cell in row["cells"].items()}


def costs_of(
    variant: Variant,
    reports: Sequence[Mapping[str, Report]],
    seeds: Sequence[int],
    options: Options,
) -> dict[str, Any]:
    """Of a question, the median over seeds; of training."""
    rows = [next(iter(each.values()))["rows"][mode_of(variant)] for each in reports]
    found = {
        key: statistics.median(row[key] for row in rows)
        for key in ("context_tokens", "prompt_tokens", "flops", "cloud_flops")
    }
    latency = {
        key: statistics.median(row["latency_ms"][key] for row in rows)
        for key in ("median", "p90", "questions")
    }
    found["latency_ms"] = latency
    if variant.method is not None:
        found["training"] = training_of(variant, seeds, options)
    return found


def training_of(variant: Variant, seeds: Sequence[int], options: Options) -> dict[str, Any]:
    """Trained parameters, FLOPs of the useful work, steps and seconds of a run."""
    run_dirs = [run_dir_of(variant, seed, options) for seed in seeds]
    _, config = load_config(str(run_dirs[0].with_name(f"{run_dirs[0].name}.yaml")))
    step = abstract_step(config, jax.devices()[:1])
    params, _ = jax.eval_shape(step.experiment.init)
    per_step = step.experiment.work(step.experiment.shapes)["flops"]
    return {
        "parameters": count_params(params),
        "flops": per_step * config.run.steps,
        "steps": config.run.steps,
        "seconds": statistics.median(map(seconds_of, run_dirs)),
    }


def seconds_of(run_dir: Path) -> float:
    """Training time of a run by its log, compilation and evaluations left out: a row's rate is that
    of the steps since the row before."""
    rows = [row for row in read_rows(run_dir / "metrics.jsonl") if "examples_per_second" in row]
    rate = statistics.median(row["examples_per_second"] for row in rows)
    config = documents.read_yaml(run_dir / "config.yaml")
    per_step = config.get("batch_size") or config["prompts"] * config["queries_per_prompt"]
    return rows[-1]["step"] * per_step / rate
