"""What a run says of itself: rows, speed, memory, a collapsed router, a profile."""

import dataclasses
import json
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_gen.errors import UserError
from lorax_gen.mesh.chips import peak_flops
from lorax_gen.training import loop, metrics
from lorax_gen.training.loop import fit
from lorax_gen.training.metrics import Clock, MetricsLog, RouterWatch, device_memory
from lorax_gen.training.run import RunConfig
from tests.tiny import linear_experiment


def rows_of(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


# --- the log -------------------------------------------------------------------------------------


def test_a_log_drops_rows_behind_the_checkpoint_and_a_line_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "loss": 1.0 / step} for step in (1, 2, 2, 3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 2, "lo')
    with MetricsLog(path, 2) as log:
        assert log.last == {"step": 2, "loss": 0.5}
        log.write(3, {"loss": np.float32(1 / 3), "load": np.ones((1, 2), np.float32)})
    assert rows_of(tmp_path) == [*rows[:3], {"step": 3, "loss": 0.333333, "load": [[1.0, 1.0]]}]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
def test_a_log_on_a_full_disk_says_what_to_do(tmp_path):
    with (
        pytest.raises(UserError, match=r"metrics\.jsonl \(No space left on device\); what was"),
        MetricsLog(tmp_path / "metrics.jsonl", 0) as log,
    ):
        log.file.path = Path("/dev/full")
        log.write(1, {"loss": 0.5})


@pytest.mark.parametrize("line", ["garbage", "[1]", '{"loss": 0.5}', "\x00\x00"])
def test_a_line_that_is_no_row_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    text = f'{{"step": 1}}\n{line}\n{{"step": 3}}\n'
    path.write_text(text)
    with pytest.raises(UserError, match=r"line 2 of .*metrics\.jsonl is not a row"):
        MetricsLog(path, 3)
    assert path.read_text() == text


def test_a_log_that_another_process_writes_is_left_alone(tmp_path):
    with MetricsLog(tmp_path / "metrics.jsonl", 0, write=False) as log:
        assert log.write(1, {"loss": jnp.float32(0.25)}) == {"step": 1, "loss": 0.25}
    assert not list(tmp_path.iterdir())


def events(directory):
    """`[(step, tag, value)]` of TensorBoard's files, read as they are laid out: length, checksum,
    event, checksum."""
    proto = pytest.importorskip("tensorboardX.proto.event_pb2")
    found = []
    for path in sorted(directory.iterdir()):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            event = proto.Event.FromString(data[12 : 12 + size])
            found += [(event.step, each.tag, each.simple_value) for each in event.summary.value]
            data = data[16 + size :]
    return found


def test_tensorboard_gets_every_number(tmp_path):
    pytest.importorskip("tensorboardX")
    run = RunConfig(steps=3, log_every=1, evaluate_every=2, tensorboard=True)
    fit(linear_experiment(run), tmp_path / "run", {})
    rows = rows_of(tmp_path / "run")
    expected = [(row["step"], name, row[name]) for row in rows for name in row if name != "step"]
    found = events(tmp_path / "run" / "tensorboard")
    assert [each[:2] for each in found] == [each[:2] for each in expected]
    np.testing.assert_allclose([e[2] for e in found], [e[2] for e in expected], rtol=1e-6)


def test_tensorboard_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    asked = []
    experiment = linear_experiment(RunConfig(steps=3, tensorboard=True), asked.append)
    with pytest.raises(UserError, match=r"pip install 'lorax-gen\[tensorboard\]'"):
        fit(experiment, tmp_path / "run", {})
    assert not asked


# --- speed and memory ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA A10G", None),
        ("cpu", None),
    ],
)
def test_the_peak_of_a_device_is_known_by_its_kind(kind, peak):
    assert peak_flops(kind) == peak


def test_rates_are_of_the_steps_since_they_were_read(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    clock = Clock(lambda batch: batch, [SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3")] * 4)
    clock.restart(10)
    for tokens in (500, 1500, 1000, 1000, 1000):
        clock.count({"examples": 16, "tokens": tokens, "flops": 989e12})
    now[0] += 2.0
    assert clock.read(15) == pytest.approx({
        "step_time": 0.4, "examples_per_second": 40, "tokens_per_second": 2500, "mfu": 0.625,
    })  # fmt: skip
    now[0] += 1.0  # an evaluation
    clock.restart(15)
    now[0] += 1.0
    assert clock.read(16)["step_time"] == 1.0


def test_rates_are_read_when_the_devices_are_through(tmp_path, monkeypatch):
    """Behind an evaluation too, when the host has not waited for any step yet."""
    made = linear_experiment(RunConfig(steps=8, log_every=2, evaluate_every=4))
    metrics, counted, read = [], [], []

    def slow(params, stats, frozen, batch, key, axis_name):
        value, rest = made.loss(params, stats, frozen, batch, key, axis_name)
        waves = jax.lax.fori_loop(0, 200, lambda _, x: jnp.sin(x), jnp.ones((8, 4096)) * value)
        return value + 0.0 * waves.sum(), rest

    def watched(*arguments):
        step = parallelize(*arguments)

        def take(*arguments):
            state, found = step(*arguments)
            metrics.append(found)
            return state, found

        return take

    class Observed(Clock):
        def count(self, batch):
            counted.append(batch)

        def read(self, step):
            read.append((step, len(counted), metrics[step - 1]["loss"].is_ready()))
            return {}

    parallelize = loop.sharding.parallelize
    monkeypatch.setattr(loop.sharding, "parallelize", watched)
    monkeypatch.setattr(loop, "Clock", Observed)
    fit(dataclasses.replace(made, loss=slow), tmp_path / "run", {})
    assert read == [(step, step, True) for step in (2, 4, 6, 8)]


def test_what_is_not_known_is_not_reported():
    clock = Clock(lambda batch: {"examples": 8, "flops": 1e9}, jax.devices("cpu"))
    clock.restart(0)
    clock.count({})
    assert set(clock.read(1)) == {"step_time", "examples_per_second"}


def test_memory_is_that_of_the_fullest_device(monkeypatch):
    stats = [{"peak_bytes_in_use": 2**30}, {"peak_bytes_in_use": 3 * 2**30}, {}, None]
    devices = [SimpleNamespace(memory_stats=lambda each=each: each) for each in stats]
    monkeypatch.setattr(metrics.jax, "local_devices", lambda: devices)
    assert device_memory() == {"memory_gib": 3.0}
    monkeypatch.setattr(metrics.jax, "local_devices", lambda: devices[2:])
    assert device_memory() == {}


def test_tokens_are_counted_where_an_experiment_says_how_many(tmp_path):
    made = linear_experiment(RunConfig(steps=2, log_every=1))
    work = lambda batch: {"examples": 8, "tokens": 80}  # noqa: E731
    fit(dataclasses.replace(made, work=work), tmp_path / "run", {})
    for row in (row for row in rows_of(tmp_path / "run") if "loss" in row):
        rates = row["tokens_per_second"], row["examples_per_second"]
        assert rates[0] == pytest.approx(10 * rates[1], rel=1e-4)
        assert row["step_time"] == pytest.approx(8 / rates[1], rel=1e-4)
        assert "router_collapsed" not in row and "memory_gib" not in row and "mfu" not in row


# --- the router ----------------------------------------------------------------------------------

EVEN, ONE = np.full((2, 4), 0.25), np.eye(4)[:2]


@pytest.mark.parametrize(
    "row, collapsed",
    [
        ({"gate_distance": 0.6, "expert_load": EVEN}, False),
        ({"gate_distance": 0.01, "expert_load": EVEN}, True),
        ({"expert_load": EVEN}, False),
        ({"expert_load": ONE}, True),
        ({"expert_load": np.stack([ONE[0], EVEN[0]])}, False),  # one layer of two
    ],
)
def test_a_collapse_is_named_once_and_after_three_rows(row, collapsed, capsys):
    router = RouterWatch()
    for i in range(5):
        assert router(row) == {"router_collapsed": float(collapsed)}
        said = capsys.readouterr().err
        assert ("the router has collapsed" in said) == (collapsed and i == 2)
        assert said.count("\n") == (collapsed and i == 2)


def test_rows_that_do_not_follow_each_other_are_no_collapse(capsys):
    router = RouterWatch()
    for distance in (0.01, 0.01, 0.5, 0.01, 0.01):
        router({"gate_distance": distance})
    assert capsys.readouterr().err == ""


def test_runs_without_a_choice_of_experts_are_not_watched():
    assert RouterWatch()({"loss": 1.0}) == {}
    assert RouterWatch()({"gate_distance": 0.0, "expert_load": np.ones((3, 1))}) == {}


def test_a_run_writes_and_tells_that_its_router_collapsed(tmp_path, capsys):
    made = linear_experiment(RunConfig(steps=4, log_every=1))

    def loss(*arguments):
        value, (stats, metrics) = made.loss(*arguments)
        return value, (stats, {**metrics, "gate_distance": jnp.zeros(())})

    fit(dataclasses.replace(made, loss=loss), tmp_path / "run", {})
    rows = [row for row in rows_of(tmp_path / "run") if "loss" in row]
    assert [row["router_collapsed"] for row in rows] == [1, 1, 1, 1]
    assert capsys.readouterr().err.count("lorax-gen: warning: the router has collapsed") == 1


# --- on request ----------------------------------------------------------------------------------


def test_a_window_of_steps_is_profiled(tmp_path, monkeypatch):
    calls, taken = [], []
    monkeypatch.setattr(
        jax.profiler, "start_trace", lambda where: calls.append((where, len(taken)))
    )
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append(len(taken)))
    run = RunConfig(steps=5, profile_steps="2-4")
    made = linear_experiment(run)
    fit(
        linear_experiment(run, lambda step: taken.append(step) or made.batch(step)),
        tmp_path / "run",
        {},
    )
    # The batch of step 2 has been made, that of step 5 not yet.
    assert calls == [(str(tmp_path / "run" / "profile"), 2), 4]


def test_a_profile_is_written(tmp_path):
    fit(linear_experiment(RunConfig(steps=3, profile_steps="2-9")), tmp_path / "run", {})
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize("window", ["3", "3-", "0-2", "4-3", "a-b", "1-2-3"])
def test_a_window_that_is_none_is_refused(window):
    with pytest.raises(UserError, match=r"run\.profile_steps is .*such as 100-102"):
        RunConfig(profile_steps=window)


def test_a_window_behind_the_end_is_refused():
    with pytest.raises(UserError, match=r"run\.profile_steps is '4-5', .* ends at step 3"):
        RunConfig(steps=3, profile_steps="4-5")


@pytest.mark.parametrize(
    "name", ["steps", "log_every", "evaluate_every", "checkpoint_every", "keep"]
)
def test_a_run_of_no_steps_is_refused(name):
    with pytest.raises(UserError, match=rf"run\.{name} is 0; expected int >= 1"):
        RunConfig(**{name: 0})


def test_compiled_programs_are_kept(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    try:
        run = RunConfig(steps=1, compilation_cache=str(tmp_path / "cache"))
        fit(linear_experiment(run), tmp_path / "run", {})
        assert any("train_step" in path.name for path in (tmp_path / "cache").iterdir())
    finally:
        metrics.use_compilation_cache(before)
