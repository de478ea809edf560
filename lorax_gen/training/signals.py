"""SIGINT and SIGTERM during a run: it stops after a step, when its state is saved."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Interrupted(Exception):
    """A run was stopped by the signal `signal`; its state is saved."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that gets the first SIGINT or SIGTERM; a second one has its usual effect."""
    caught: list[int] = []
    kinds = (signal.SIGINT, signal.SIGTERM)
    previous: dict[signal.Signals, Any] = {}

    def handler(number, frame):
        caught.append(number)
        for kind in kinds:
            signal.signal(kind, previous[kind])

    try:
        previous = {kind: signal.signal(kind, handler) for kind in kinds}
    except ValueError:  # not in the main thread: the caller handles signals
        previous = {}
    try:
        yield caught
    finally:
        for kind, old in previous.items():
            signal.signal(kind, old)
