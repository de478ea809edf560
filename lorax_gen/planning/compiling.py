"""Waiting for a compiler that takes minutes: it says so, and can be interrupted."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any


def compile_aloud(compiling: Callable[[], Any], what: str) -> Any:
    """What `compiling` returns or raises, with a line on stderr before and after it; on a terminal
    the seconds are counted.

    It runs in another thread, since Python handles no signal while the main one is in a compiler.
    """
    from rich.console import Console

    console, start = Console(stderr=True, soft_wrap=True), time.monotonic()
    text = f"compiling {what}; for models of billions of parameters it takes minutes"
    done = threading.Event()
    result: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            result.append(compiling())
        except BaseException as error:
            errors.append(error)
        done.set()

    threading.Thread(target=run, daemon=True).start()
    if console.is_terminal:
        with console.status(text) as status:
            while not done.wait(0.5):
                status.update(f"{text} ... {time.monotonic() - start:.0f} s")
    else:
        print(f"{text} ...", file=sys.stderr, flush=True)
        while not done.wait(0.5):  # a wait without end would let no signal through
            pass
    if errors:
        raise errors[0]
    print(f"compiled in {time.monotonic() - start:.0f} s", file=sys.stderr)
    return result[0]


def plain_signals() -> None:
    """SIGINT and SIGTERM as Python has them: libtpu, as it is loaded, replaces the handlers by one
    that prints a stack trace as after a crash."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.getsignal(signal.SIGINT))
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
