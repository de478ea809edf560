"""SIGTERM while `lorax-gen train` starts or ends: nothing is lost, so it exits with 0 at once.

In between the training loop handles it: see `training.signals`. This module imports nothing large,
so that the signal is handled from the first moment on.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Within it SIGTERM ends the process with exit code 0, where nothing else handles it."""
    old = _install()
    try:
        yield
    finally:
        if old is not None:
            signal.signal(signal.SIGTERM, old)


def watch_from_the_start() -> None:
    """`exit_on_sigterm` from now on if this is the program `lorax-gen train`."""
    if Path(sys.argv[0]).name in ("lorax-gen", "__main__.py") and sys.argv[1:2] == ["train"]:
        _install()


def _install() -> Any:
    try:
        return signal.signal(signal.SIGTERM, _exit)
    except ValueError:  # not in the main thread: the caller handles signals
        return None


def _exit(number: int, frame: object) -> None:
    """Ends the process as it is: an exception would abort libraries that are being imported."""
    with suppress(Exception):
        # Not by `sys.stderr`, which may be in the middle of another write.
        os.write(2, b"lorax-gen: stopped; the same command resumes the run\n")
        sys.stdout.flush()
        sys.stderr.flush()
        if files := sys.modules.get("lorax_gen.files"):
            files.remove_copies()
    os._exit(0)
