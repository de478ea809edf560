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


class StopSignal:
    """The first SIGINT or SIGTERM of a run.

    Attributes:
      number: of the signal; 0 before it comes.
      at_once: whether it also raises KeyboardInterrupt where it comes; see `interrupts`.
    """

    def __init__(self):
        self.number, self.at_once = 0, False

    @contextmanager
    def interrupts(self, message: str) -> Iterator[None]:
        """Within it the signal ends the block at once: it raises Interrupted at the next
        instruction of Python, which comes after the batch that the devices compute.

        For what may be cut off anywhere and is done again. Not with several processes: one of them
        would leave the others in a collective operation.
        """
        try:
            self.at_once = True
            if self.number:  # it came since the run looked for it last
                raise KeyboardInterrupt
            yield
        except KeyboardInterrupt:  # no Exception, which libraries may catch
            if not self.number:  # of a handler that is not ours
                raise
            raise Interrupted(message, self.number) from None
        finally:
            self.at_once = False


@contextmanager
def stop_signals() -> Iterator[StopSignal]:
    """Gets the first SIGINT or SIGTERM; a second one has its usual effect."""
    stop = StopSignal()
    kinds = (signal.SIGINT, signal.SIGTERM)
    previous: dict[signal.Signals, Any] = {}

    def handler(number, frame):
        stop.number = number
        for kind in kinds:
            signal.signal(kind, previous[kind])
        if stop.at_once:
            raise KeyboardInterrupt

    try:
        previous = {kind: signal.signal(kind, handler) for kind in kinds}
    except ValueError:  # not in the main thread: the caller handles signals
        previous = {}
    try:
        yield stop
    finally:
        for kind, old in previous.items():
            signal.signal(kind, old)
