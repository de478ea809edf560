"""The `lorax-gen` command: parse, call, print. Bad input is one line on stderr, exit code 2."""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from typing import Annotated

import tyro

from lorax_gen import files
from lorax_gen.cli import (
    demo,
    evaluate,
    export,
    generate,
    lm_eval,
    plan,
    specialize,
    train,
    verify,
)
from lorax_gen.cli.parse import parse
from lorax_gen.errors import UserError

Command = (
    Annotated[demo.Demo, tyro.conf.subcommand("demo")]
    | Annotated[train.Train, tyro.conf.subcommand("train")]
    | Annotated[plan.Plan, tyro.conf.subcommand("plan")]
    | Annotated[specialize.Specialize, tyro.conf.subcommand("specialize")]
    | Annotated[generate.Generate, tyro.conf.subcommand("generate")]
    | Annotated[export.Export, tyro.conf.subcommand("export")]
    | Annotated[verify.Verify, tyro.conf.subcommand("verify")]
    | Annotated[evaluate.Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[lm_eval.LmEval, tyro.conf.subcommand("lm-eval")]
)
# Commands that pass on what follows their first argument: a config has options of its own.
PASSED_ON = {"train": train.run_config, "plan": plan.run_config}


def main(arguments: list[str] | None = None) -> None:
    """The entry point."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # orbax narrates every save, and a failed one in tracebacks of its threads; it also raises it.
    # So does gcsfs with each request that fails.
    for name in ("absl", "gcsfs"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    try:
        sys.exit(run(arguments))
    except UserError as error:
        print(f"lorax-gen: error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # python flushes it at exit
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:  # a full disk, a directory where nothing may be written
        print(f"lorax-gen: error: {error}; choose another place", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Exception as error:  # of a store: no sign-in, no connection, no such bucket
        if (reason := files.store_error(error)) is None:
            raise
        print(f"lorax-gen: error: the store cannot be used ({reason})", file=sys.stderr)
        sys.exit(2)


def run(arguments: list[str]) -> int:
    """Parses and calls; returns the exit code."""
    if arguments == ["--version"]:
        import lorax_gen

        print(f"lorax-gen {lorax_gen.__version__}")
        return 0
    if not arguments or arguments in (["train"], ["plan"]):
        arguments = [*arguments, "--help"]
    command, *rest = arguments
    if command in PASSED_ON and rest and not rest[0].startswith("-"):
        return PASSED_ON[command](rest[0], rest[1:])
    if command == "lm-eval":
        return lm_eval.run(rest)
    parsed = parse(
        Command,
        arguments,
        "lorax-gen",
        description="LoRA-Gen in JAX: specialise a small language model from a task's prompt.",
    )
    return parsed.run()
