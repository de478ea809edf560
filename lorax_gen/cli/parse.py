"""Arguments to dataclasses by tyro, whose boxes of several lines become one line."""

from __future__ import annotations

import contextlib
import io
import re
from typing import Annotated, Any

import tyro

from lorax_gen import files
from lorax_gen.errors import UserError

OPTION = re.compile(r"--[\w-]+")
# A path as a user writes it: a local one, or a URL, of which pathlib would drop a slash.
UserPath = Annotated[
    files.AnyPath,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: files.to_path(words[0]),
        is_instance=lambda value: isinstance(value, files.AnyPath),
        str_from_instance=lambda path: [str(path)],
    ),
]
RULE = re.compile(r"^[│\s]*─{5,}[│\s]*$")


def parse(kind: Any, arguments: list[str], prog: str, **options: Any) -> Any:
    """`tyro.cli`; `--help` prints and exits as it does there.

    Raises UserError where the arguments are wrong: tyro has no other way to say so than its box.
    """
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown):
            return tyro.cli(kind, args=arguments, prog=prog, **options)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(one_line(shown.getvalue(), prog)) from None


def one_line(box: str, prog: str) -> str:
    """What a box of tyro's says, the names of options without their help.

    A box has sections: what is wrong, perhaps what was meant, and how to get help.
    """
    sections: list[list[str]] = [[]]
    for line in box.splitlines():
        if RULE.match(line):
            sections.append([])
        elif line.strip().startswith("│"):
            sections[-1].append(line.strip().strip("│")[1:].rstrip())
    wrong, *others = sections
    names = [line.strip() for line in wrong if re.match(r" {4}\S", line)]
    text = [line.strip() for line in wrong if not line.startswith("    ")]
    message = " ".join([*text, ", ".join(names)]).strip()
    for section in others:
        first, *rest = [line.strip() for line in section] or [""]
        if first.startswith("Perhaps you meant") and OPTION.search("".join(rest[:1])):
            message += f"; did you mean {OPTION.findall(rest[0])[-1]}?"
        elif first.startswith("Available subcommands"):
            message += "; " + " ".join([first, *rest])
    message = message[:1].lower() + message[1:]
    return f"{message.rstrip('.')}; `{prog} --help` lists what there is"
