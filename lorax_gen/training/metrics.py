"""Monitoring of a run: rows of metrics, speed, memory, router health, profiles."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from tqdm import tqdm

from lorax_gen import files
from lorax_gen.errors import UserError
from lorax_gen.files import AnyPath
from lorax_gen.mesh import hosts
from lorax_gen.mesh.chips import peak_flops
from lorax_gen.training.loggers import Logger
from lorax_gen.training.step import Batch

# --- the log -------------------------------------------------------------------------------------


class MetricsLog:
    """Appends rows to metrics.jsonl, and hands them to loggers.

    Rows after the resumed step are dropped first. With `write=False`, in all processes but the
    first, rows are built but not written. In a store the file lags by up to a minute until `flush`;
    flushed before each checkpoint, a run that is killed and resumed lacks no row.

    Attributes:
      last: the latest value of each metric.
      evaluations: the rows of evaluations, which have no loss, by step.
    """

    def __init__(
        self, path: AnyPath, start: int, loggers: Sequence[Logger] = (), write: bool = True
    ):
        self.path = path
        self.loggers: Sequence[Logger] = loggers if write else ()
        self.last: dict[str, Any] = {}
        self.evaluations: dict[int, dict[str, Any]] = {}
        self.file: files.Log | None = None
        if not write:
            return
        kept = [row for row in read_rows(path) if row["step"] <= start]
        for row in kept:
            self._note(row)
        self.file = files.Log(path, "".join(json.dumps(row) + "\n" for row in kept))

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with suppress(Exception) if kind else nullcontext(), ExitStack() as closing:
            for logger in self.loggers:
                closing.callback(logger.close)
            self.flush()

    def write(self, step: int, metrics: dict[str, Any]) -> dict[str, Any]:
        """Waits for the metrics and appends them as one line.

        Raises UserError where they cannot be written.
        """
        row = {"step": step} | {key: plain(value) for key, value in metrics.items()}
        self._note(row)
        if self.file is not None:
            with self._clear_errors():
                self.file.write(json.dumps(row) + "\n")
        for logger in self.loggers:
            logger.write(step, row)
        return row

    def flush(self) -> None:
        """Returns after all rows are written. Raises UserError where they cannot be."""
        with self._clear_errors():
            if self.file is not None:
                self.file.flush()
            for logger in self.loggers:
                logger.flush()

    @contextmanager
    def _clear_errors(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise UserError(
                f"{self.path} was removed while the run was writing to it; the same "
                "command starts it anew"
            ) from None
        except Exception as error:
            reason = files.store_error(error)
            if reason is None and isinstance(error, OSError):
                reason = error.strerror or str(error)
            if reason is None:
                raise
            raise UserError(
                f"cannot write to {self.path} ({reason}); what was "
                "saved before is complete, and the same command resumes the run from there"
            ) from error

    def _note(self, row: dict[str, Any]) -> None:
        self.last.update(row)
        if "loss" not in row:
            self.evaluations[row["step"]] = row


def read_rows(path: AnyPath) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl, without a truncated last one.

    Raises UserError where another line is not a row.
    """
    text = path.read_bytes().decode(errors="replace") if path.exists() else ""
    rows = []
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), 1):
        try:
            rows.append(json.loads(line))
            _ = rows[-1]["step"]
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"line {number} of {path} is not a row of metrics; repair or remove it"
            ) from None
    return rows


def plain(value: Any) -> Any:
    """A number or nested lists of numbers, to six significant digits."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    array = np.asarray(value)
    rounded = np.vectorize(lambda x: float(f"{x:.6g}"), otypes=[float])(array)
    return rounded.tolist()


# --- speed and memory ----------------------------------------------------------------------------


class Clock:
    """Speed of training, between one reading and the next."""

    def __init__(self, work: Callable[[Batch], dict[str, int]], devices: list[jax.Device]):
        self.work = work
        peak = peak_flops(devices[0].device_kind)
        self.peak = None if peak is None else peak * len(devices)

    def restart(self, step: int) -> None:
        """Restarts the measurement, for example after an evaluation."""
        self.since, self.time = step, time.perf_counter()
        self.done: Counter[str] = Counter()

    def count(self, batch: Batch) -> None:
        """Counts a step on a batch."""
        self.done.update(self.work(batch))

    def read(self, step: int) -> dict[str, float]:
        """Seconds per step, examples and tokens per second, MFU, where known.

        Call it after the devices have finished `step` and before the next step is counted.
        """
        done, steps, seconds = self.done, step - self.since, time.perf_counter() - self.time
        self.restart(step)
        flops, _ = done.pop("flops", None), done.pop("executed", None)
        rates = {"step_time": seconds / steps}
        rates |= {f"{name}_per_second": count / seconds for name, count in done.items()}
        if self.peak is not None and flops is not None:
            rates["mfu"] = flops / (self.peak * seconds)
        return rates


def device_memory() -> dict[str, float]:
    """Peak memory of this process's devices, the largest, in GiB; empty on CPUs."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [each["peak_bytes_in_use"] for each in stats if "peak_bytes_in_use" in each]
    return {"memory_gib": max(peaks) / 2**30} if peaks else {}


# --- the router ----------------------------------------------------------------------------------

# A router has collapsed when its gates no longer depend on the prompt. The loss may still fall,
# because one LoRA is then generated for all tasks. Two signs:
# Gates of two prompts differ, in the mean over pairs and layers, by less than 5 % of their mass. In
# the world they differ by 80 to 93 %, from the first step to the last; from a fresh router without
# BatchNorm by 60 %.
SAME_GATES = 0.05
# One expert carries over 95 % of the mass, in the mean over layers. In the world the most loaded
# of 32 carries 7 %, and of 8 at K = 2, untrained, 18 %.
ONE_EXPERT = 0.95
# A single row may come from a batch of similar prompts; this many in succession do not.
ROWS = 3


class RouterWatch:
    """Warns once when the router has collapsed."""

    def __init__(self):
        self.rows, self.warned = 0, False

    def __call__(self, row: dict[str, Any]) -> dict[str, float]:
        """`{'router_collapsed': 0 or 1}` for a row with gate metrics, else `{}`."""
        signs = []
        if "gate_distance" in row:
            signs.append(float(row["gate_distance"]) < SAME_GATES)
        load = np.asarray(row.get("expert_load", []))
        if load.ndim == 2 and load.shape[1] > 1:
            signs.append(load.max(1).mean() > ONE_EXPERT)
        if not signs or load.shape[-1] == 1:  # a pool of one expert cannot collapse
            return {}
        self.rows = self.rows + 1 if any(signs) else 0
        if self.rows >= ROWS and not self.warned and hosts.is_first():
            self.warned = True
            tqdm.write(
                f"lorax-gen: warning: the router has collapsed: for {ROWS} rows of metrics the "
                "gates have hardly depended on the prompt. See gate_distance and expert_load; a "
                "smaller learning rate, a larger generator.balance-coefficient or batches that mix "
                "more tasks may help",
                file=sys.stderr,
            )
        return {"router_collapsed": float(any(signs))}


# --- on request ----------------------------------------------------------------------------------


class Profiler:
    """Traces exactly the steps of a window.

    The trace can be opened in TensorBoard's profile plugin, XProf or Perfetto.
    """

    def __init__(self, window: tuple[int, int] | None, directory: AnyPath):
        self.first: int | None
        self.last: int | None
        self.first, self.last = window or (None, None)
        self.directory, self.running = directory, False

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, *_: object) -> None:
        if self.running:
            jax.profiler.stop_trace()

    def before(self, step: int, state: Any) -> None:
        if step == self.first:
            jax.block_until_ready(state)
            self.traces = files.staging(self.directory)
            jax.profiler.start_trace(str(self.traces))
            self.running = True

    def after(self, step: int, state: Any) -> None:
        if step == self.last and self.running:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            files.upload(self.traces, self.directory)
            self.running = False


def use_compilation_cache(directory: str) -> None:
    """Caches compiled programs in a directory, for later runs with the same shapes."""
    if directory:
        path = files.absolute(files.to_path(os.path.expanduser(directory)))
        jax.config.update("jax_compilation_cache_dir", str(path))
        compilation_cache.reset_cache()  # an earlier compilation may have disabled it
