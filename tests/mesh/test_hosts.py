"""Two processes with four devices each train as one process with eight does."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from lorax_gen import cli
from lorax_gen.data.world import FAMILIES
from lorax_gen.errors import UserError
from lorax_gen.mesh import hosts
from lorax_gen.mesh.hosts import Hosts, initialize
from lorax_gen.tensors import read_tensors
from lorax_gen.training.loop import fit
from lorax_gen.training.run import RunConfig
from tests.tiny import TINY_RUN, linear_experiment, write_system

ROOT = Path(__file__).resolve().parents[2]
CONFIG = (
    TINY_RUN
    + """
run: {{steps: 3, log_every: 1, checkpoint_every: 2, best: accuracy/unseen}}
optimizer: {{learning_rate: 0.01, warmup_steps: 0}}
# Each weight over both processes: of the four parts along fsdp, two lie in each.
mesh: {{data: 1, fsdp: 4, tensor: 2}}
"""
)
LINEAR = RunConfig(steps=6, log_every=1, evaluate_every=4, checkpoint_every=2)

# One of two processes. What it finds is printed as one line of JSON.
PROCESS = """
import contextlib, dataclasses, io, json, os, signal, sys
from pathlib import Path
import jax
jax.config.update("jax_platforms", "cpu")
import tests.conftest
jax.config.update("jax_num_cpu_devices", 4)
import numpy as np
from lorax_gen import cli
from lorax_gen.errors import UserError
from lorax_gen.mesh import hosts, sharding
from lorax_gen.training.loop import Interrupted, fit
from tests.tiny import linear_experiment
from tests.mesh.test_hosts import LINEAR

folder, found = Path(sys.argv[1]), {}
hosts.initialize()
me = jax.process_index()
found["devices"] = [jax.process_count(), len(jax.devices()), len(jax.local_devices())]

# Arrays on meshes that split them within and across processes.
batch = {"x": np.arange(48.0, dtype=np.float32).reshape(8, 6)}
for sizes in ((8, 1, 1), (2, 2, 2), (1, 4, 2), (1, 1, 8)):
    mesh = sharding.make_mesh(sharding.MeshConfig(*sizes))
    whole = hosts.gather(sharding.put_batch(batch, mesh))
    np.testing.assert_array_equal(whole["x"], batch["x"])
    weights = {"up": np.arange(64.0).reshape(8, 8).astype(np.float32)}
    placed = sharding.place(weights, sharding.tree_shardings(weights, mesh))
    assert sharding.place(placed, sharding.tree_shardings(weights, mesh))["up"] is not None
    np.testing.assert_array_equal(hosts.gather(placed)["up"], weights["up"])
found["vote"] = int(hosts.vote(15 * me, mesh))
found["each"] = hosts.each(me + 7)
found["from_first"] = float(hosts.from_first(0.5 + me))

ran = []
hosts.on_first(lambda: ran.append(me))
found["ran"] = ran
def fail():
    raise UserError("told by the first one")
try:
    hosts.on_first(fail)
except UserError as error:
    found["told"] = str(error)

# A signal that reaches one of them stops both behind the same step.
made = linear_experiment(LINEAR)
def batch(step):
    if step == 2 and me == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return made.batch(step)
try:
    fit(dataclasses.replace(made, batch=batch), folder / "linear", {})
except Interrupted as stop:
    found["stopped"] = [str(stop), stop.signal]

def command(*words):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main(["train", str(folder / "tiny.yaml"), "--run-dir", *words])
        except SystemExit as stop:
            return [stop.code, out.getvalue(), err.getvalue()]
found["train"] = command(str(folder / "run"))
found["refused"] = command(str(folder))
found["different"] = command(str(folder / "other"), "--run.seed", str(me))
found["pmap"] = command(str(folder / "other"), "--mesh.mode", "pmap")
print("FOUND", json.dumps(found), flush=True)
"""


@pytest.fixture(scope="module")
def port():
    try:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            return free.getsockname()[1]
    except OSError as error:
        pytest.skip(f"processes cannot talk to each other here: no socket on localhost ({error})")


@pytest.fixture(scope="module")
def folder(tiny_world_system, tmp_path_factory):
    folder = write_system(tmp_path_factory.mktemp("hosts"), tiny_world_system)
    (folder / "tiny.yaml").write_text(CONFIG.format(system=folder, family=FAMILIES[1]))
    return folder


@pytest.fixture(scope="module")
def found(folder, port):
    """What the two processes found, in their order."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": "2",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(folder)],
            cwd=ROOT, env=environment | {"JAX_PROCESS_ID": str(i)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    try:
        ends = [process.communicate(timeout=500) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], ends
    lines = [line for out, _ in ends for line in out.splitlines() if line.startswith("FOUND ")]
    return [json.loads(line.removeprefix("FOUND ")) for line in lines]


def rows_of(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def assert_same_rows(run_dir, expected_dir, rtol):
    rates = ("step_time", "examples_per_second", "tokens_per_second")
    rows, expected = rows_of(run_dir), rows_of(expected_dir)
    for row, other in zip(rows, expected, strict=True):
        assert set(row) == set(other)
        for name in set(row) - set(rates):
            np.testing.assert_allclose(row[name], other[name], rtol=rtol, atol=1e-6, err_msg=name)


# --- two processes -------------------------------------------------------------------------------


def test_all_devices_are_one_mesh(found):
    assert [each["devices"] for each in found] == [[2, 8, 4]] * 2


def test_processes_agree(found):
    assert [each["vote"] for each in found] == [15, 15]
    assert [each["each"] for each in found] == [[7, 8], [7, 8]]
    assert [each["from_first"] for each in found] == [0.5, 0.5]
    assert [each["ran"] for each in found] == [[0], []]
    assert [each["told"] for each in found] == ["told by the first one"] * 2


def test_they_train_the_generator_that_one_process_trains(found, folder, capsys):
    """Losses, metrics and what is released, after three steps with Adam and dropout."""
    with pytest.raises(SystemExit):
        cli.main(["train", str(folder / "tiny.yaml"), "--run-dir", str(folder / "alone")])
    capsys.readouterr()
    assert len(rows_of(folder / "alone")) == 4  # three steps and an evaluation
    assert_same_rows(folder / "run", folder / "alone", rtol=1e-4)
    ours, alone = (
        read_tensors(folder / name / "released" / "generator.safetensors")
        for name in ("run", "alone")
    )
    assert set(ours) == set(alone)
    for name, expected in alone.items():
        if name.endswith(("router.b2", "stats.mean")):
            continue  # BatchNorm cancels b2: its gradient is rounding, which Adam makes large
        np.testing.assert_allclose(ours[name], expected, rtol=1e-4, atol=1e-5, err_msg=name)
    moved = max(np.abs(value).max() for name, value in alone.items() if name.endswith(".b"))
    assert moved > 1e-2  # the second factors began at zero
    ours, alone = (
        json.loads((folder / name / "released" / "config.json").read_text())["models"]
        for name in ("run", "alone")
    )
    assert ours == alone and ours["cloud"]["fingerprint"]  # of arrays that span both processes


def test_only_the_first_one_speaks(found, folder):
    (code, out, err), other = [each["train"] for each in found]
    assert (code, out) == (0, f"released: {folder}/run/released\n")
    assert all(
        line.startswith(("lorax-gen: training", "lorax-gen: step")) for line in err.splitlines()
    )
    assert err.count("lorax-gen: training") == 1 and other == [0, "", ""]


def test_both_write_into_one_checkpoint(found, folder):
    kept = {path.name for path in (folder / "run" / "checkpoints").iterdir()}
    assert {"2", "3"} <= kept
    parts = (folder / "run" / "checkpoints" / "3" / "state").glob("ocdbt.process_*")
    assert {path.name for path in parts} == {"ocdbt.process_0", "ocdbt.process_1"}


def test_a_signal_to_one_stops_both_and_one_process_goes_on_with_the_run(found, folder, tmp_path):
    assert [each["stopped"] for each in found] == [["stopped at step 3 of 6, state saved", 15]] * 2
    assert [row["step"] for row in rows_of(folder / "linear")] == [1, 2, 3]
    asked, made = [], linear_experiment(LINEAR)
    resumed = linear_experiment(LINEAR, lambda step: asked.append(step) or made.batch(step))
    for experiment, run_dir in ((resumed, folder / "linear"), (made, tmp_path / "run")):
        fit(experiment, run_dir, {})
    assert asked == [3, 4, 5]
    assert_same_rows(folder / "linear", tmp_path / "run", rtol=1e-5)


def test_what_is_wrong_is_told_by_both(found, folder):
    for name, message in {
        "refused": f"lorax-gen: error: {folder} exists and is not a run directory",
        "different": "lorax-gen: error: the processes have different configs",
        "pmap": "lorax-gen: error: mesh.mode=pmap is for one process",
    }.items():
        for code, out, err in (each[name] for each in found):
            assert (code, out) == (2, "") and err.startswith(message) and err.count("\n") == 1
    assert not (folder / "other").exists()


# --- joining -------------------------------------------------------------------------------------

ADDRESS, COUNT, INDEX = "coordinator_address", "num_processes", "process_id"


@pytest.fixture
def environment(monkeypatch):
    """Nothing is said of other processes."""
    for name in list(os.environ):
        several = ("SLURM_", "OMPI_", "PMI_", "JAX_COORDINATOR", "JAX_NUM_P", "JAX_PROCESS")
        if name.startswith(several) or name in ("WORLD_SIZE", "RANK"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(hosts, "_join", lambda *given, **named: joined.append((given, named)))
    joined = []
    monkeypatch.joined = joined
    return monkeypatch


def test_a_process_by_itself_joins_nothing(environment):
    initialize()
    initialize(Hosts("localhost:1", 1, 0))
    environment.setenv("SLURM_STEP_NUM_TASKS", "1")
    initialize()
    assert not environment.joined
    assert (hosts.several(), hosts.is_first(), hosts.each(3)) == (False, True, [3])


def test_options_stand_above_the_environment(environment):
    environment.setenv("JAX_COORDINATOR_ADDRESS", "one:1")
    environment.setenv("JAX_NUM_PROCESSES", "2")
    environment.setenv("JAX_PROCESS_ID", "1")
    initialize(timeout=5)
    initialize(Hosts(process_id=0), timeout=5)
    common = {ADDRESS: "one:1", COUNT: 2, "cluster_detection_method": "deactivate"}
    assert environment.joined == [((5, ""), common | {INDEX: i}) for i in (1, 0)]


SLURM = {
    "SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "node1", "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2", "SLURM_LOCALID": "2", "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "1",
}  # fmt: skip
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}


@pytest.mark.parametrize("seen", [SLURM, OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://a:1"}])
def test_where_jax_finds_the_others_they_are_joined(environment, seen):
    for name, value in seen.items():
        environment.setenv(name, value)
    initialize(Hosts("one:1"), timeout=5)
    [((timeout, launcher), given)] = environment.joined
    assert (timeout, launcher in ("SLURM", "Open MPI")) == (5, True)
    assert given == {ADDRESS: "one:1", COUNT: None, INDEX: None, "cluster_detection_method": None}


@pytest.mark.parametrize("name", sorted(set(SLURM) - {"SLURM_STEP_NUM_NODES"}))
def test_a_slurm_task_that_sees_a_part_of_its_step_is_refused(environment, name):
    """All but SLURM_STEP_NUM_TASKS: JAX needs the others, and they say that there are several."""
    for each in set(SLURM) - {name}:
        environment.setenv(each, SLURM[each])
    if name == "SLURM_STEP_NUM_TASKS":
        initialize()
        assert len(environment.joined) == 1
        return
    with pytest.raises(UserError, match=f"SLURM started several .* {name} is missing"):
        initialize()
    assert not environment.joined
    initialize(Hosts(num_processes=1))  # the way out: alone, and said so
    initialize(Hosts("one:1", 4, 2))
    assert len(environment.joined) == 1


@pytest.mark.parametrize(
    "seen, message",
    [
        (OPEN_MPI, "Open MPI started .* OMPI_MCA_orte_hnp_uri is missing"),
        ({"PMI_SIZE": "2", "PMI_RANK": "0"}, "MPICH started several processes"),
        ({"WORLD_SIZE": "8", "RANK": "0"}, "torchrun started .*WORLD_SIZE=8, RANK=0"),
        ({"RANK": "3"}, "torchrun started"),
        ({"OMPI_COMM_WORLD_SIZE": ""}, "OMPI_COMM_WORLD_SIZE is '' in the environment"),
        ({"SLURM_STEP_NUM_TASKS": "4(x2)"}, r"SLURM_STEP_NUM_TASKS is '4\(x2\)'"),
        (SLURM | {"SLURM_NTASKS": "8"}, "SLURM_NTASKS is 8, but SLURM_STEP_NUM_TASKS=4"),
    ],
)
def test_several_processes_that_cannot_find_each_other_are_refused(environment, seen, message):
    for name, value in seen.items():
        environment.setenv(name, value)
    with pytest.raises(UserError, match=message):
        initialize()
    assert not environment.joined


def test_an_allocation_without_a_step_is_one_process(environment):
    """salloc, or ssh into a node: SLURM_NTASKS is what may be started, not what was."""
    for name in ("SLURM_JOB_ID", "SLURM_NTASKS"):
        environment.setenv(name, SLURM[name])
    initialize()
    assert not environment.joined


@pytest.mark.parametrize(
    "given, message",
    [
        (Hosts("one:1"), "also needs num_processes and process_id: give"),
        (Hosts(None, 2, 1), "also needs coordinator_address: give"),
        (Hosts("one", 2, 1), "coordinator_address is 'one'; expected HOST:PORT"),
        (Hosts("one:port", 2, 1), "expected HOST:PORT"),
        (Hosts("one:1", 2, 2), "process_id is 2 of num_processes=2"),
        (Hosts("one:1", 2, -1), "process_id is -1"),
    ],
)
def test_half_an_address_is_refused(environment, given, message):
    with pytest.raises(UserError, match=message):
        initialize(given)
    assert not environment.joined


def test_an_environment_that_cannot_be_read_is_refused(environment):
    environment.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES is 'two' in the environment"):
        initialize()


ALONE = """
import sys, jax
jax.config.update("jax_platforms", "cpu")
from lorax_gen.errors import UserError
from lorax_gen.mesh.hosts import Hosts, initialize
try:
    initialize(Hosts(sys.argv[1], 2, int(sys.argv[2])), timeout=2)
except UserError as error:
    print(error, flush=True)
    sys.exit(2)
"""


@pytest.mark.parametrize("process", [0, 1])
def test_a_process_whose_others_do_not_come_says_so(port, process):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    ended = subprocess.run(
        [sys.executable, "-c", ALONE, address, str(process)],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ended.returncode == 2
    assert ended.stdout.startswith(f"not all processes connected to {address} within 2 seconds")


def test_gathering_leaves_what_lies_in_one_process_alone():
    tree = {"a": jax.numpy.ones(3), "b": np.ones(2)}
    assert hosts.gather(tree)["a"] is tree["a"]
    assert int(hosts.vote(15, None)) == 15
    assert hosts.from_first({"a": 0.5}) == {"a": 0.5}
