"""The command line: parse, call, print. Bad input is one line on stderr and exit code 2."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import tyro

from lorax_gen.errors import UserError
from lorax_gen.options import (
    Command,
    Demo,
    Evaluate,
    Export,
    Generate,
    Plan,
    RunDir,
    Specialize,
    Target,
    Train,
    Verify,
)


def main(arguments: list[str] | None = None) -> None:
    """The `lorax-gen` command."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # orbax narrates every save, and a failed one in tracebacks of its threads; it also raises it.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    try:
        sys.exit(run(arguments))
    except UserError as error:
        print(f"lorax-gen: error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # python flushes it at exit
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:  # a full disk, a place where nothing may be written
        print(f"lorax-gen: error: {error}; choose another place", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def run(arguments: list[str]) -> int:
    """Parses and calls; returns the exit code."""
    if arguments[:1] == ["train"] and len(arguments) > 1 and not arguments[1].startswith("-"):
        return train(arguments[1], arguments[2:])
    if arguments[:1] == ["plan"] and len(arguments) > 1 and not arguments[1].startswith("-"):
        return plan(arguments[1], arguments[2:])
    if arguments[:1] == ["lm-eval"]:
        from lorax_gen.evaluation.harness import main as lm_eval

        return lm_eval(arguments[1:])
    command = tyro.cli(
        Command,
        args=arguments,
        prog="lorax-gen",
        description="LoRA-Gen in JAX: specialise a small language model from a task's prompt.",
    )
    return RUN[type(command)](command)


def demo(command: Demo) -> int:
    from lorax_gen.demo import run_demo

    run_demo(command.run_dir, command.questions, command.seed)
    return 0


def train(name: str, overrides: list[str]) -> int:
    from lorax_gen import config as configs
    from lorax_gen.mesh.hosts import Hosts, initialize, is_first
    from lorax_gen.recipes.registry import RECIPES, load_config
    from lorax_gen.training.loop import Interrupted, fit

    method, config = load_config(name)
    options = dataclasses.make_dataclass(
        "Options",
        [
            ("config", Annotated[type(config), tyro.conf.arg(name="")], dataclasses.field()),
            ("run_dir", RunDir, dataclasses.field(default=Path("runs") / Path(name).stem)),
            ("hosts", Hosts, dataclasses.field(default=Hosts())),
        ],
        frozen=True,
    )
    options.__doc__ = type(config).__doc__
    parsed: Any = tyro.cli(
        options,
        default=options(config),
        args=overrides,
        prog=f"lorax-gen train {name}",
        config=(tyro.conf.AvoidSubcommands,),  # the config's file says which data it has
    )
    initialize(parsed.hosts)
    resolved = {"method": method, **configs.to_dict(parsed.config)}
    try:
        released = fit(RECIPES[method].experiment(parsed.config), parsed.run_dir, resolved)
    except Interrupted as stop:
        if is_first():
            print(f"lorax-gen: {stop}; the same command resumes the run", file=sys.stderr)
        return 0 if stop.signal == signal.SIGTERM else 128 + signal.SIGINT
    if is_first():
        print(f"released: {released}")
    return 0


def plan(name: str, overrides: list[str]) -> int:
    import jax

    from lorax_gen import files
    from lorax_gen.planning.plan import make_plan
    from lorax_gen.planning.table import print_plan
    from lorax_gen.recipes.registry import load_config

    jax.config.update("jax_platforms", "cpu")  # whatever this machine has is left alone
    _, config = load_config(name)
    options = dataclasses.make_dataclass(
        "Options",
        [
            ("config", Annotated[type(config), tyro.conf.arg(name="")], dataclasses.field()),
            (
                "target",
                Annotated[Target, tyro.conf.arg(name="")],
                dataclasses.field(default=Target()),
            ),
        ],
        frozen=True,
    )
    options.__doc__ = Plan.__doc__
    parsed: Any = tyro.cli(
        options,
        default=options(config),
        args=overrides,
        prog=f"lorax-gen plan {name}",
        config=(tyro.conf.AvoidSubcommands,),
    )
    target = parsed.target
    if target.output is not None:
        files.must_be_new(target.output)
    report = make_plan(parsed.config, target.topology, target.utilisation)
    print_plan(report)
    if target.output is not None:
        with files.new_file(target.output) as path:
            files.write_json(path, report)
    return 0 if report["fits"] else 1


def specialize(command: Specialize) -> int:
    import lorax_gen
    from lorax_gen import files
    from lorax_gen.files import read_prompt

    files.must_be_new(command.output)
    if command.merged is not None:
        files.must_be_new(command.merged)
    cloud = lorax_gen.load_model(command.cloud, command.dtype, in_int8=command.cloud_int8)
    edge = lorax_gen.load_model(command.edge)
    generator = lorax_gen.load_generator(command.generator)
    card = lorax_gen.specialize(read_prompt(command.prompt), cloud, edge, generator)
    lorax_gen.save_card(command.output, card)
    print(f"card: {command.output}")
    if command.merged is not None:
        lorax_gen.export(command.output, command.merged, "merged", edge, lambda: generator)
        print(f"merged edge model: {command.merged}")
    return 0


def generate(command: Generate) -> int:
    import lorax_gen
    from lorax_gen.artifacts.export import lora_of

    if not command.questions:
        raise UserError('no question given; for example: lorax-gen generate "apple :"')
    model = lorax_gen.load_model(command.model, command.dtype)
    if command.card is not None:
        tree, *_ = lora_of(command.card, model, lambda: lorax_gen.load_generator(command.generator))
        model = model.merged(tree)
    texts = list(command.questions)
    if not command.chat:
        texts = [f"{command.context} {question}".strip() for question in texts]
    stream = lorax_gen.stream_text(
        model,
        texts,
        max_new_tokens=command.max_new_tokens,
        temperature=command.temperature,
        top_k=command.top_k,
        top_p=command.top_p,
        seed=command.seed,
        stop=command.stop,
        chat=command.chat,
        system=command.context if command.chat else "",
    )
    if len(texts) == 1:
        shown = ""
        for [answer] in stream:
            text = f"{command.questions[0]} {answer}"
            print(text[len(shown) :], end="", flush=True)
            shown = text
        print()
        return 0
    answers = []
    for answers in stream:  # noqa: B007
        pass
    for question, answer in zip(command.questions, answers, strict=True):
        print(f"{question} {answer}")
    return 0


def export(command: Export) -> int:
    import lorax_gen

    edge = lorax_gen.load_model(command.edge)
    lorax_gen.export(
        command.artifact,
        command.output,
        command.format,
        edge,
        lambda: lorax_gen.load_generator(command.generator),
        dtype=command.dtype,
        max_shard_size=command.max_shard_size,
    )
    print(f"{command.format}: {command.output}")
    return 0


def verify(command: Verify) -> int:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    import lorax_gen

    edge = lorax_gen.load_model(command.edge, command.dtype)
    generator = functools.cache(lambda: lorax_gen.load_generator(command.generator))
    comparisons = lorax_gen.verify(command.artifact, edge, generator)
    table = Table(title="beside the unmerged LoRA", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("form", "logits differ by", "allowed", "same argmax", ""):
        table.add_column(name, justify="left" if name == "form" else "right")
    for row in comparisons:
        allowed = "" if row.tolerance is None else f"{row.tolerance:.1e}"
        verdict = "" if row.tolerance is None else ("ok" if row.holds else "[red]differs[/red]")
        table.add_row(
            row.form, f"{row.difference:.1e}", allowed, f"{100 * row.agreement:.2f} %", verdict
        )
    Console(highlight=False).print(table)
    return 0 if all(row.holds for row in comparisons) else 1


def evaluate(command: Evaluate) -> int:
    world, run_dir = command.tasks == ("world",), command.run_dir
    if "world" in command.tasks and not world:
        raise UserError("world is evaluated by itself; leave out the other tasks, or it")
    if command.seed is not None and command.seed < 0:
        raise UserError(f"seed={command.seed}: choose 0 or more")
    if command.questions < 1:
        raise UserError(f"questions={command.questions}: choose 1 or more")
    if run_dir is not None and run_dir.exists():
        ours = run_dir.is_dir() and (run_dir / "items").is_dir() and not world
        if not ours and not (run_dir.is_dir() and not any(run_dir.iterdir())):
            raise UserError(f"{run_dir} exists and is no evaluation to go on with; choose another")
    return evaluate_world(command) if world else evaluate_real(command)


def evaluate_world(command: Evaluate) -> int:
    from lorax_gen import files
    from lorax_gen.data.config import WorldConfig
    from lorax_gen.demo import load_system, print_table, progress
    from lorax_gen.evaluation import world as world

    lora = command.lora or ("world/lora" if command.edge == "world/edge" else None)
    system = load_system(command.cloud, command.edge, command.generator, lora)
    report = world.evaluate_world(
        system,
        WorldConfig(),
        split=command.split,
        questions=command.questions,
        seed=command.seed or 0,
        progress=progress,
    )
    print_table(report)
    if command.run_dir is not None:
        command.run_dir.mkdir(parents=True, exist_ok=True)
        files.write_json(command.run_dir / "report.json", report)
    return 0


def evaluate_real(command: Evaluate) -> int:
    from tqdm import tqdm

    import lorax_gen
    from lorax_gen.artifacts.export import lora_of
    from lorax_gen.data.agent import load_agent
    from lorax_gen.data.benchmarks import REASONING, find_benchmark
    from lorax_gen.evaluation import suite, tables
    from lorax_gen.evaluation.benchmark import BY_CLOUD
    from lorax_gen.evaluation.system import System
    from lorax_gen.mesh.sharding import serving_mesh, tree_shardings

    if command.limit is not None and command.limit < 1:
        raise UserError(f"limit={command.limit}: choose 1 or more, or leave it out for all")
    if command.tokens_per_batch < 1:
        raise UserError(f"tokens_per_batch={command.tokens_per_batch}: choose 1 or more")
    groups = {"reasoning": REASONING}
    names = list(dict.fromkeys(n for task in command.tasks for n in groups.get(task, (task,))))
    agent = names == ["gpt4tools"]
    if "gpt4tools" in names and not agent:
        raise UserError("gpt4tools is evaluated by itself; leave out the other tasks, or it")
    if agent and command.data_dir is None:
        raise UserError("gpt4tools has no copy on the hub; give --data-dir with its files")
    if not agent:
        for name in names:
            find_benchmark(name)
    usual = ("full", "request", "lora_gen") if agent else ("plain", "icl", "lora_gen")
    modes = command.modes or (*usual, *(("card",) if command.card and not agent else ()))
    if "card" in modes and command.card is None:
        raise UserError("mode card needs --card, a task card or a PEFT adapter directory")

    mesh = serving_mesh(command.fsdp, command.tensor)
    place = functools.partial(tree_shardings, mesh=mesh) if mesh else None
    load = functools.partial(lorax_gen.load_model, dtype=command.dtype, shardings=place)
    generator = functools.cache(lambda: lorax_gen.load_generator(command.generator))
    system = System(load(command.edge))
    if any(mode in (*BY_CLOUD, "lora_gen_shuffled") for mode in modes):
        cloud = load(command.cloud, in_int8=command.cloud_int8)
        system = dataclasses.replace(system, cloud=cloud, generator=generator())
    options = {
        "run_dir": command.run_dir,
        "tokens_per_batch": command.tokens_per_batch,
        "mesh": mesh,
        "bar": tqdm(unit="question", leave=False, disable=not sys.stderr.isatty()),
    }
    if agent:
        items = load_agent("test", command.data_dir)[: command.limit]
        options["max_new_tokens"] = command.max_new_tokens
        tables.print_agent(suite.evaluate_agent_suite(system, items, modes, **options))
        return 0
    card = None
    if command.card is not None:
        tree, *_ = lora_of(command.card, system.edge, generator)
        card = system.edge.merged(tree)
    report = suite.evaluate_suite(
        system,
        names,
        modes,
        card=card,
        shots=command.shots,
        seed=command.seed,
        limit=command.limit,
        directory=command.data_dir,
        **options,
    )
    tables.print_suite(report)
    return 0


RUN = {
    Demo: demo,
    Train: lambda command: train(
        command.config, ["--run-dir", str(command.run_dir)] if command.run_dir else []
    ),
    Plan: lambda command: plan(command.config, []),
    Specialize: specialize,
    Generate: generate,
    Export: export,
    Verify: verify,
    Evaluate: evaluate,
}
