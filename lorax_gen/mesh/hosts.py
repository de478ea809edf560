"""Several processes that train one model, each with its own devices: one per host, or per GPU.

JAX's runtime joins them (`initialize`). From then on every process runs the same program over the
mesh of all devices; what only one may do, and what all must do alike, is said here.
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
    """The processes of a run over several hosts. Cloud TPUs, SLURM and Open MPI tell by themselves;
    elsewhere give all three, here or in the environment."""

    coordinator_address: str | None = None
    """HOST:PORT at which process 0 can be reached; else JAX_COORDINATOR_ADDRESS."""
    num_processes: int | None = None
    """How many processes there are; else JAX_NUM_PROCESSES."""
    process_id: int | None = None
    """Which one this is, from 0; else JAX_PROCESS_ID."""


# --- joining -------------------------------------------------------------------------------------


def initialize(hosts: Hosts | None = None, timeout: int = 300) -> None:
    """Joins the other processes, if there are any to be. Call it before jax sees a device.

    Args:
      timeout: seconds to wait for the others.

    Raises:
      UserError: something is missing of how to find the others, or not all of them came.
    """
    given = _resolve(hosts or Hosts())
    missing = [name for name, value in given.items() if value is None]
    launched = _launched()
    if jax.distributed.is_initialized() or (len(missing) == 3 and not launched):
        return
    if missing and not launched:
        raise UserError(
            f"a run over several processes also needs {' and '.join(missing)}: as options "
            "(--hosts.coordinator-address HOST:PORT --hosts.num-processes N --hosts.process-id I) "
            "or in the environment (JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID)"
        )
    if not missing:
        _check(**given)
        if given["num_processes"] == 1:
            return
    # Signals to stop are agreed on by `vote`; this service would swallow SIGTERM.
    jax.config.update("jax_enable_preemption_service", False)
    method = None if missing else "deactivate"  # no search for a cluster where all is said
    _join(timeout, **given, cluster_detection_method=method)
    if _one_task_per_node() and "JAX_LOCAL_DEVICE_IDS" not in os.environ:
        # jax takes a SLURM task to be one of a single GPU, which here would idle the others.
        jax.config.update("jax_cuda_visible_devices", "all")


def _resolve(hosts: Hosts) -> dict[str, Any]:
    """The three settings, those not given taken from the environment."""

    def number(name: str) -> int | None:
        text = os.environ.get(name)
        if text is not None and not text.isdigit():
            raise UserError(f"{name} is {text!r} in the environment; expected a number")
        return None if text is None else int(text)

    given = dataclasses.asdict(hosts)
    found = {
        "coordinator_address": os.environ.get("JAX_COORDINATOR_ADDRESS"),
        "num_processes": number("JAX_NUM_PROCESSES"),
        "process_id": number("JAX_PROCESS_ID"),
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


def _launched() -> bool:
    """Whether a launcher that jax knows started this process, perhaps as one of several."""
    tasks = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    on_tpu = "tpu" in (jax.config.jax_platforms or "")  # jax puts it there where there are TPUs
    return on_tpu or any(int(os.environ.get(name, 1)) > 1 for name in tasks)


def _one_task_per_node() -> bool:
    tasks, nodes = (os.environ.get(f"SLURM_STEP_NUM_{name}") for name in ("TASKS", "NODES"))
    return tasks is not None and tasks == nodes


def _join(timeout: int, coordinator_address: str | None, **options: Any) -> None:
    """`jax.distributed.initialize`, beside this thread: jax ends the process when it has waited in
    vain, and so must not be the first to give up."""
    errors: list[Exception] = []

    def join() -> None:
        try:
            jax.distributed.initialize(
                coordinator_address,
                initialization_timeout=2 * timeout + 60,
                # All end together, so whoever then waits longer waits for one that failed.
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
            f"not all processes met at {coordinator_address or 'the address of process 0'} within "
            f"{timeout} seconds; are all of them started, and can they reach that address?"
        )
    if errors and isinstance(errors[0], ValueError) and coordinator_address is None:
        return  # a TPU of its own, in no cluster
    if errors:
        reason = str(errors[0]).splitlines()[0]
        raise UserError(f"cannot join the other processes ({reason})") from errors[0]


# --- one for all ---------------------------------------------------------------------------------


def several() -> bool:
    return jax.process_count() > 1


def is_first() -> bool:
    """Whether this is process 0, which alone writes logs and results."""
    return jax.process_index() == 0


def from_first(tree: Any) -> Any:
    """Numbers as process 0 has them."""
    return multihost_utils.broadcast_one_to_all(tree) if several() else tree


def on_first(task: Callable[[], None]) -> None:
    """Runs `task` in process 0 while the others wait.

    Raises UserError, in all processes, where it raises that, OSError or a store's own error.
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
    message = bytes(from_first(message)).rstrip(b"\0")
    if message:
        raise UserError(message.decode(errors="replace"))


def each(number: int) -> list[int]:
    """The number of every process, in their order."""
    if not several():
        return [number]
    return multihost_utils.process_allgather(np.uint32(number)).tolist()


def gather(tree: Any) -> Any:
    """Arrays that lie over several processes as numpy arrays, whole, in each; others unchanged."""

    def whole(x: Any) -> Any:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return multihost_utils.process_allgather(x, tiled=True)
        return x

    return jax.tree.map(whole, tree)


def vote(number: int, mesh: Mesh) -> Any:
    """The largest number of any process, the same in all; `int(...)` of it waits for the others.

    Dispatched in front of a step and read behind it, it costs the devices nothing and keeps all
    processes in one mind about the step after which they stop.
    """
    if not several():
        return number
    everywhere = NamedSharding(mesh, P(mesh.axis_names))
    own = jax.make_array_from_callback(
        (mesh.size,), everywhere, lambda index: np.array([number], np.int32)
    )
    return _largest(own, mesh)


@partial(jax.jit, static_argnames="mesh")
def _largest(numbers: jax.Array, mesh: Mesh) -> jax.Array:
    return jax.lax.with_sharding_constraint(numbers.max(), NamedSharding(mesh, P()))
