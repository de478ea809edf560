"""The `lorax-gen` command. An error of the user's is one line on stderr, with exit code 2."""

from __future__ import annotations

import difflib
import functools
import logging
import operator
import os
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Annotated

import tyro

from lorax_gen import __version__, files
from lorax_gen.cli import (
    convert,
    data,
    demo,
    evaluate,
    export,
    generate,
    lm_eval,
    lorahub,
    plan,
    report,
    specialize,
    train,
    verify,
)
from lorax_gen.cli.parse import parse
from lorax_gen.errors import UserError
from lorax_gen.prompts import check_text

COMMANDS = {
    "demo": demo.Demo,
    "data": data.Data,
    "train": train.Train,
    "plan": plan.Plan,
    "specialize": specialize.Specialize,
    "generate": generate.Generate,
    "export": export.Export,
    "convert": convert.Convert,
    "verify": verify.Verify,
    "evaluate": evaluate.Evaluate,
    "report": report.Report,
    "lm-eval": lm_eval.LmEval,
    "lorahub": lorahub.LoraHub,
}
# Commands whose options depend on the config that is their first argument.
PASSED_ON: dict[str, Callable[[str, list[str]], int]]
PASSED_ON = {"data": data.run_config, "train": train.run_config, "plan": plan.run_config}

ABOUT = """LoRA-Gen in JAX: specialise a small language model from a task's prompt.

lorax-gen COMMAND --help explains a command, lorax-gen --version prints the version."""


def main(arguments: list[str] | None = None) -> None:
    """The entry point."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # orbax logs every save, and a failed one with the tracebacks of its threads, though it raises
    # too. gcsfs does the same for failed requests.
    for name in ("absl", "gcsfs"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.formatwarning = lambda message, *_, **__: f"lorax-gen: warning: {message}\n"
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    try:
        sys.exit(run(arguments))
    except UserError as error:
        # Threads of a failed save still report to a closed event loop.
        sys.excepthook = lambda *_: None
        print(f"lorax-gen: error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader, such as `head`, closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # python flushes it at exit
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:  # a full disk, or a directory without write permission
        print(f"lorax-gen: error: {error}; choose another path", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Exception as error:  # from a store: no credentials, no connection, no such bucket
        if (reason := files.store_error(error)) is None:
            raise
        print(f"lorax-gen: error: the store cannot be used ({reason})", file=sys.stderr)
        sys.exit(2)


def run(arguments: list[str]) -> int:
    """Parses the arguments and runs the command; returns the exit code.

    Raises UserError for bad input, SystemExit after `--help`.
    """
    for argument in arguments:
        check_text(argument)
    if arguments == ["--version"]:
        print(f"lorax-gen {__version__}")
        return 0
    if not arguments or arguments in ([name] for name in PASSED_ON):
        arguments = [*arguments, "--help"]
    name, *rest = arguments
    if name in PASSED_ON and not rest[0].startswith("-"):
        return PASSED_ON[name](rest[0], rest[1:])
    if name == "lm-eval":
        return lm_eval.run(rest)
    if name in COMMANDS:  # parsed alone, so that suggestions are options of this command
        return parse(COMMANDS[name], rest, f"lorax-gen {name}").run()
    if not name.startswith("-"):
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(COMMANDS)}"
        raise UserError(f"no command {name}; {hint}")
    kinds = [Annotated[kind, tyro.conf.subcommand(name)] for name, kind in COMMANDS.items()]
    any_of_them = functools.reduce(operator.or_, kinds)
    return parse(any_of_them, arguments, "lorax-gen", description=ABOUT).run()
