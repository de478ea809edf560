"""Several processes that train one model, each with its own devices: one per host, or per GPU.

`initialize` connects them through JAX's distributed runtime. Every process then runs the same
program over the mesh of all devices; this module has what only process 0 may do, and what all
processes must agree on.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lorax_gen.errors import UserError
from lorax_gen.files import store_error


@dataclasses.dataclass(frozen=True)
class Hosts:
    """The processes of a run over several hosts. On Cloud TPUs, SLURM and Open MPI they are
    detected; elsewhere set all three, here or in the environment."""

    coordinator_address: str | None = None
    """HOST:PORT at which process 0 can be reached; else JAX_COORDINATOR_ADDRESS."""
    num_processes: int | None = None
    """Number of processes; else JAX_NUM_PROCESSES."""
    process_id: int | None = None
    """Index of this process, from 0; else JAX_PROCESS_ID."""


@dataclasses.dataclass(frozen=True)
class Launcher:
    """A program that starts several processes, and the variables that it sets."""

    name: str
    count: str
    rank: str
    needs: tuple[str, ...] = ()
    """What JAX finds the other processes by; empty: JAX does not know this launcher."""

    def several(self) -> bool:
        return (_number(self.count) or 1) > 1 or (_number(self.rank) or 0) > 0

    def missing(self) -> list[str]:
        return [name for name in self.needs if not os.environ.get(name)]

    def check(self) -> None:
        """Raises UserError where JAX would count other processes than the launcher started."""
        for name in self.needs:
            if "NTASKS" in name and _number(self.count) not in (None, _number(name)):
                raise UserError(
                    f"{name} is {os.environ[name]}, but {self.seen()}; give the processes the "
                    f"environment of their own step, or {GIVE}"
                )

    def seen(self) -> str:
        there = [name for name in (self.count, self.rank) if name in os.environ]
        return ", ".join(f"{name}={os.environ[name]}" for name in there)


LAUNCHERS = (
    Launcher(
        "SLURM",
        "SLURM_STEP_NUM_TASKS",
        "SLURM_PROCID",
        (
            "SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID",
            "SLURM_LOCALID",
        ),
    ),
    Launcher(
        "Open MPI", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", ("OMPI_MCA_orte_hnp_uri",)
    ),
    Launcher("MPICH", "PMI_SIZE", "PMI_RANK"),
    Launcher("torchrun", "WORLD_SIZE", "RANK"),
)  # fmt: skip
GIVE = (
    "give --hosts.coordinator-address HOST:PORT, --hosts.num-processes and --hosts.process-id (or "
    "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID)"
)

# --- joining -------------------------------------------------------------------------------------


def initialize(hosts: Hosts | None = None, timeout: int = 300) -> None:
    """Connects to the other processes of a run, if any. Call it before JAX initialises its devices.

    Args:
      timeout: seconds to wait for the others.

    Raises:
      UserError: a setting is missing or invalid, the environment is that of one of several
        processes but JAX cannot find the others from it, or not all connected in time.
    """
    given = _resolve(hosts or Hosts())
    missing = [name for name, value in given.items() if value is None]
    if jax.distributed.is_initialized() or given["num_processes"] == 1:
        return
    launcher = _launcher() if missing else ""
    # JAX sets it where it has TPUs; its stub of Config leaves the settings out.
    platforms = jax.config.jax_platforms or ""  # type: ignore[attr-defined]
    detected = bool(launcher) or "tpu" in platforms
    if len(missing) == 3 and not detected:
        return
    if missing and not detected:
        raise UserError(f"a run over several processes also needs {' and '.join(missing)}: {GIVE}")
    if not missing:
        _check(**given)
    # Processes agree to stop by `vote`; this service would intercept SIGTERM.
    jax.config.update("jax_enable_preemption_service", False)
    method = None if missing else "deactivate"  # no cluster detection where all is given
    _join(timeout, launcher, **given, cluster_detection_method=method)
    if _one_task_per_node() and "JAX_LOCAL_DEVICE_IDS" not in os.environ:
        # JAX assumes one GPU per SLURM task, which here would leave the other GPUs idle.
        jax.config.update("jax_cuda_visible_devices", "all")


def _resolve(hosts: Hosts) -> dict[str, Any]:
    """The three settings; those not given are read from the environment."""

    given = dataclasses.asdict(hosts)
    found = {
        "coordinator_address": os.environ.get("JAX_COORDINATOR_ADDRESS"),
        "num_processes": _number("JAX_NUM_PROCESSES"),
        "process_id": _number("JAX_PROCESS_ID"),
    }
    return {name: found[name] if value is None else value for name, value in given.items()}


def _check(coordinator_address: str, num_processes: int, process_id: int) -> None:
    host, _, port = coordinator_address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"coordinator_address is {coordinator_address!r}; expected HOST:PORT")
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"process_id is {process_id} of num_processes={num_processes}; processes are "
            "numbered from 0"
        )


def _number(name: str) -> int | None:
    text = os.environ.get(name)
    if text is not None and not (text.isascii() and text.isdigit() and len(text) < 10):
        raise UserError(f"{name} is {text!r} in the environment; expected a number")
    return None if text is None else int(text)


def _launcher() -> str:
    """The launcher that started this process as one of several, if JAX can find the others from its
    variables; '' for a process by itself.

    Raises UserError where variables say that there are others and JAX cannot find them: each
    process would do the work alone, into the same files.
    """
    started = [launcher for launcher in LAUNCHERS if launcher.several()]
    for launcher in started:
        if launcher.needs and not launcher.missing():
            launcher.check()
            return launcher.name
    for launcher in started:
        lacks = " and ".join(launcher.missing()) or "what JAX finds the others by"
        raise UserError(
            f"{launcher.name} started several processes ({launcher.seen()}), but {lacks} is "
            f"missing; {GIVE}; to run alone: --hosts.num-processes 1"
        )
    return ""


def _one_task_per_node() -> bool:
    tasks, nodes = (os.environ.get(f"SLURM_STEP_NUM_{name}") for name in ("TASKS", "NODES"))
    return tasks is not None and tasks == nodes


def _join(timeout: int, launcher: str, coordinator_address: str | None, **options: Any) -> None:
    """`jax.distributed.initialize` in another thread: JAX terminates the process at its own
    timeout, so ours must come first."""
    errors: list[Exception] = []

    def join() -> None:
        try:
            jax.distributed.initialize(
                coordinator_address,
                initialization_timeout=2 * timeout + 60,
                # All processes end together: one that waits longer waits for one that failed.
                shutdown_timeout_seconds=60,
                **options,
            )
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=join, daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        raise UserError(
            f"not all processes connected to {coordinator_address or 'process 0'} within {timeout} "
            "seconds; check that all of them are started and can reach that address"
        )
    if errors and isinstance(errors[0], ValueError) and not (coordinator_address or launcher):
        return  # a single TPU host, in no cluster
    if errors:
        reason = str(errors[0]).splitlines()[0]
        raise UserError(f"cannot connect to the other processes ({reason})") from errors[0]


# --- agreement of all processes ------------------------------------------------------------------


def several() -> bool:
    return jax.process_count() > 1


def is_first() -> bool:
    """Whether this is process 0, which alone writes logs and results."""
    return jax.process_index() == 0


def from_first(tree: Any) -> Any:
    """The numbers of process 0, broadcast to all processes."""
    return multihost_utils.broadcast_one_to_all(tree) if several() else tree


def on_first(task: Callable[[], None]) -> None:
    """Runs `task` in process 0 while the others wait.

    Raises UserError, in all processes, if it raises UserError, OSError or a store's own error.
    """
    if not several():
        return task()
    text = b""
    if is_first():
        try:
            task()
        except Exception as error:
            reason = store_error(error)
            if reason is None and not isinstance(error, UserError | OSError):
                raise
            text = (reason or str(error)).encode()[:1000] or b"failed"
    message = np.zeros(1000, np.uint8)
    message[: len(text)] = list(text)
    text = bytes(from_first(message)).rstrip(b"\0")
    if text:
        raise UserError(text.decode(errors="replace"))


def each(number: int) -> list[int]:
    """The `number` of every process, in process order."""
    if not several():
        return [number]
    return multihost_utils.process_allgather(np.uint32(number)).tolist()


def gather(tree: Any) -> Any:
    """Arrays sharded over several processes, as full numpy arrays in each; others unchanged."""

    def gather_leaf(x: Any) -> Any:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return multihost_utils.process_allgather(x, tiled=True)
        return x

    return jax.tree.map(gather_leaf, tree)


def vote(number: int, mesh: Mesh) -> Any:
    """The largest `number` of all processes; `int(...)` of it waits for the others.

    Dispatched before a step and read after it, it adds no time on the devices, and all processes
    agree on the step after which they stop.
    """
    if not several():
        return number
    over_all = NamedSharding(mesh, P(mesh.axis_names))
    own = jax.make_array_from_callback(
        (mesh.size,), over_all, lambda index: np.array([number], np.int32)
    )
    return _largest(own, mesh)


@partial(jax.jit, static_argnames="mesh")
def _largest(numbers: jax.Array, mesh: Mesh) -> jax.Array:
    return jax.lax.with_sharding_constraint(numbers.max(), NamedSharding(mesh, P()))
