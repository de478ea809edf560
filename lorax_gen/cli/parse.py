"""Command-line options: parsers and `--help` from dataclasses by tyro; errors in one line."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from lorax_gen import config as configs
from lorax_gen import files
from lorax_gen.errors import UserError


class BadPath(Exception):
    """A path is refused. Not a ValueError, which tyro would frame, or catch to try another type."""


def _to_path(words: list[str]) -> files.AnyPath:
    try:
        return files.to_path(words[0])
    except UserError as error:
        raise BadPath(str(error)) from None


# A path as a user writes it: a local one, or a URL, of which pathlib would drop a slash. For tyro
# it is PathLike, as it does not accept the union AnyPath in an Optional.
if TYPE_CHECKING:
    UserPath = files.AnyPath
else:
    UserPath = Annotated[
        os.PathLike,
        tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="PATH",
            instance_from_str=_to_path,
            is_instance=lambda value: isinstance(value, files.AnyPath),
            str_from_instance=lambda path: [str(path)],
        ),
    ]


def parse(options: Any, arguments: Sequence[str], prog: str, **more: Any) -> Any:
    """An instance of a dataclass of options; `--help` prints and exits.

    Args:
      prog: the command, for `--help` and errors; more: options of `tyro.cli`.

    Raises UserError for unknown or missing options, and for values of a wrong type or out of range.
    """
    # tyro frames its errors for the terminal. It has no public way to change their wording (the
    # hooks of tyro._errors are private), so its output is parsed and reworded.
    said = io.StringIO()
    wide = contextlib.nullcontext() if {"-h", "--help"} & set(arguments) else unwrapped()
    try:
        with contextlib.redirect_stderr(said), wide:
            parsed = tyro.cli(options, args=arguments, prog=prog, **more)
    except BadPath as error:
        raise UserError(str(error)) from None
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(one_line(said.getvalue(), prog)) from None
    sys.stderr.write(said.getvalue())  # warnings
    configs.check(parsed)
    return parsed


def parse_config(
    config: Any, arguments: Sequence[str], prog: str, about: str | None, **more: tuple[Any, Any]
) -> Any:
    """Like `parse`, with the fields of a training config as options, and further ones.

    Args:
      config: gives the defaults.
      about: the description in `--help`; more: name -> its annotation and default.

    Returns an object with the fields `config` and the names of `more`.
    """
    named = [(name, kind, dataclasses.field(default=value)) for name, (kind, value) in more.items()]
    fields: list[Any] = [("config", Annotated[type(config), tyro.conf.arg(name="")]), *named]
    options = dataclasses.make_dataclass("Options", fields, frozen=True)
    options.__doc__ = about
    # the config's file determines the kind of data, so there is no subcommand to choose
    markers = (tyro.conf.AvoidSubcommands,)
    return parse(options, arguments, prog, default=options(config), config=markers)


@contextlib.contextmanager
def unwrapped() -> Iterator[None]:
    """Makes the terminal so wide that tyro wraps no lines, which it would do within words."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "10000"
    try:
        yield
    finally:
        del os.environ["COLUMNS"]
        if before is not None:
            os.environ["COLUMNS"] = before


def one_line(said: str, prog: str) -> str:
    """tyro's framed error as one line: the error, and the options that may have been meant.

    Within the frame, rules separate the error from hints; option names are indented by 4, their
    help by 8.
    """
    lines = re.sub(r"\x1b\[[\d;]*m", "", said).splitlines()
    lines = lines[1:-1] if "╭" in said else lines[2:]  # without UTF-8 only the title is underlined
    lines = [re.sub(r"^(─+|-+)$", "\0", line[2:].rstrip(" │")) for line in lines]
    error, *hints = "\n".join(lines).split("\0")
    names = re.findall(r"^ {4}(\S.*)", error, re.MULTILINE)
    message = " ".join(re.sub(r"^ {4}.*", "", error, flags=re.MULTILINE).split())
    message = f"{message} {', '.join(names)}".strip()
    if message.startswith("Error parsing "):
        return message.removeprefix("Error parsing ").removeprefix("config.")
    near = [re.search(r"^ {4}(--[^\s,]+)", hint, re.MULTILINE) for hint in hints]
    meant = sorted({found[1] for found in near if found})
    advice = f"did you mean {' and '.join(meant)}?" if meant else f"see {prog} --help"
    return f"{message[:1].lower()}{message[1:].rstrip('.')}; {advice}"
