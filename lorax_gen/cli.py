"""The command line: parse, call, print. Bad input is one line on stderr and exit code 2."""

from __future__ import annotations

import dataclasses
import logging
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from lorax_gen.errors import UserError


@dataclasses.dataclass(frozen=True)
class Demo:
    """See the method work: specialise a small model to tasks that it never met, in minutes.

    Uses the shipped models. Prints answers before and after, a table of methods, and writes
    report.json and pictures into the run directory.
    """

    run_dir: Path = Path("runs/demo")
    """Where the report and the pictures go."""
    questions: int = 16
    """Questions asked per task."""
    seed: int = 0
    """Seed of wordings and questions."""


@dataclasses.dataclass(frozen=True)
class Train:
    """Train a generator, a baseline or a language model, as a config says.

    CONFIG is a YAML file or a shipped config: world (the generator), world-lora (the baseline),
    world-cloud and world-edge (the language models). Any field can be overridden; see
    `lorax-gen train CONFIG --help`. An interrupted run resumes with the same command.
    """

    config: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")]
    """A YAML file, or the name of a shipped config."""
    run_dir: Path | None = None
    """Where the run lives; default runs/<name of the config>."""


@dataclasses.dataclass(frozen=True)
class Specialize:
    """Read a task's prompt once and write a task card: a few hundred bytes that, merged into the
    edge model, stand for the prompt.

    Example: lorax-gen specialize "Look at the color of each thing : red=alpha , else=beta ."
    """

    prompt: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT")]
    """The system prompt; `-` reads it from standard input, `@FILE` from a file."""
    output: Path = Path("task.card.safetensors")
    """The card, a new file."""
    merged: Path | None = None
    """Also write the merged edge model into this new directory."""
    cloud: str = "world/cloud"
    """Cloud model directory."""
    edge: str = "world/edge"
    """Edge model directory."""
    generator: str = "world/generator"
    """Generator directory."""


@dataclasses.dataclass(frozen=True)
class Generate:
    """Answer questions: with a task card, with a prompt in context, or with neither.

    Example: lorax-gen generate --card task.card.safetensors "apple :" "bell :"
    """

    questions: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="QUESTION ...")
    ]
    """Texts to continue."""
    card: Path | None = None
    """A task card, merged into the edge model first."""
    context: str = ""
    """A prompt put before every question, in the model's context."""
    model: str = "world/edge"
    """The model directory that answers."""
    generator: str = "world/generator"
    """Generator directory that the card was made with."""
    max_new_tokens: int = 16
    """Longest answer."""


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Compare the methods on the world's tasks and print the table of the demo."""

    cloud: str = "world/cloud"
    """Cloud model directory."""
    edge: str = "world/edge"
    """Edge model directory."""
    generator: str = "world/generator"
    """Generator directory."""
    lora: str | None = None
    """Directory of a released LoRA baseline; the shipped one if the edge is the shipped one."""
    split: Literal["unseen", "seen"] = "unseen"
    """Tasks to ask about."""
    questions: int = 16
    """Questions asked per task."""
    seed: int = 0
    """Seed of wordings and questions."""
    output: Path | None = None
    """Also write the report as JSON to this new file."""


Command = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Specialize, tyro.conf.subcommand("specialize")]
    | Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
)


def main(arguments: list[str] | None = None) -> None:
    """The `lorax-gen` command."""
    arguments = sys.argv[1:] if arguments is None else arguments
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax narrates every save
    try:
        sys.exit(run(arguments))
    except UserError as error:
        print(f"lorax-gen: error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a full disk, a place where nothing may be written
        print(f"lorax-gen: error: {error}; choose another place", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def run(arguments: list[str]) -> int:
    """Parses and calls; returns the exit code."""
    if arguments[:1] == ["train"] and len(arguments) > 1 and not arguments[1].startswith("-"):
        return train(arguments[1], arguments[2:])
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
    from lorax_gen.training.loop import Interrupted, fit
    from lorax_gen.training.methods import METHODS, load_config

    method, config = load_config(name)
    options = dataclasses.make_dataclass(
        "Options",
        [
            ("config", Annotated[type(config), tyro.conf.arg(name="")], dataclasses.field()),
            ("run_dir", Path, dataclasses.field(default=Path("runs") / Path(name).stem)),
        ],
        frozen=True,
    )
    options.__doc__ = type(config).__doc__
    parsed: Any = tyro.cli(
        options,
        default=options(config),
        args=overrides,
        prog=f"lorax-gen train {name}",
    )
    resolved = {"method": method, **configs.to_dict(parsed.config)}
    try:
        released = fit(METHODS[method].experiment(parsed.config), parsed.run_dir, resolved)
    except Interrupted as stop:
        print(f"lorax-gen: {stop}; the same command resumes the run", file=sys.stderr)
        return 0 if stop.signal == signal.SIGTERM else 128 + signal.SIGINT
    print(f"released: {released}")
    return 0


def specialize(command: Specialize) -> int:
    import lorax_gen
    from lorax_gen import files

    files.must_be_new(command.output)
    if command.merged is not None:
        files.must_be_new(command.merged)
    cloud = lorax_gen.load_model(command.cloud)
    edge = lorax_gen.load_model(command.edge)
    generator = lorax_gen.load_generator(command.generator)
    card = lorax_gen.specialize(read_prompt(command.prompt), cloud, edge, generator)
    lorax_gen.save_card(command.output, card)
    print(f"card: {command.output}")
    if command.merged is not None:
        merged = card.merge(edge, generator)
        provenance = {"card": dataclasses.asdict(card) | {"indices": None, "gates": None}}
        lorax_gen.save_model(command.merged, merged, provenance)
        print(f"merged edge model: {command.merged}")
    return 0


def read_prompt(text: str) -> str:
    """The prompt itself, or the text of standard input (`-`) or of a file (`@FILE`)."""
    if text == "-":
        return sys.stdin.read()
    if text.startswith("@"):
        path = Path(text[1:])
        try:
            return path.read_text()
        except (OSError, UnicodeDecodeError):
            raise UserError(
                f"cannot read the prompt file {path}; after @ stands the name of a text file"
            ) from None
    return text


def generate(command: Generate) -> int:
    import lorax_gen

    model = lorax_gen.load_model(command.model)
    if command.card is not None:
        card = lorax_gen.load_card(command.card)
        model = card.merge(model, lorax_gen.load_generator(command.generator))
    if not command.questions:
        raise UserError('no question given; for example: lorax-gen generate "apple :"')
    texts = [f"{command.context} {question}".strip() for question in command.questions]
    answers = lorax_gen.generate_text(model, texts, max_new_tokens=command.max_new_tokens)
    for question, answer in zip(command.questions, answers, strict=True):
        print(f"{question} {answer}")
    return 0


def evaluate(command: Evaluate) -> int:
    from lorax_gen import files
    from lorax_gen.data.sources import WorldConfig
    from lorax_gen.demo import load_system, print_table, progress
    from lorax_gen.evaluation.report import evaluate_world

    if command.output is not None:
        files.must_be_new(command.output)
    lora = command.lora or ("world/lora" if command.edge == "world/edge" else None)
    system = load_system(command.cloud, command.edge, command.generator, lora)
    report = evaluate_world(
        system,
        WorldConfig(),
        split=command.split,
        questions=command.questions,
        seed=command.seed,
        progress=progress,
    )
    print_table(report)
    if command.output is not None:
        files.write_json(command.output, report)
    return 0


RUN = {
    Demo: demo,
    Train: lambda command: train(
        command.config, ["--run-dir", str(command.run_dir)] if command.run_dir else []
    ),
    Specialize: specialize,
    Generate: generate,
    Evaluate: evaluate,
}
