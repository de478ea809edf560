"""What a run tells: lines on stderr, Weights & Biases, loggers of one's own."""

import dataclasses
import json
import sys
from types import SimpleNamespace

import pytest

from lorax_gen.errors import UserError
from lorax_gen.training.loop import fit
from lorax_gen.training.run import RunConfig
from tests.tiny import linear_experiment


class Rows:
    """A logger that keeps what it gets."""

    def __init__(self):
        self.rows, self.flushed, self.closed = [], 0, 0

    def write(self, step, row):
        self.rows.append((step, row))

    def flush(self):
        self.flushed += 1

    def close(self):
        self.closed += 1


def test_without_a_terminal_each_row_is_a_line(tmp_path, capsys):
    made = linear_experiment(RunConfig(steps=4, log_every=2, evaluate_every=4))
    scores = {"accuracy/unseen": 0.5, "accuracy/unseen/clock": 0.25}
    made = dataclasses.replace(
        made, evaluate=lambda state: scores, work=lambda batch: {"examples": 8, "tokens": 80}
    )
    fit(made, tmp_path / "run", {})
    first, *lines = capsys.readouterr().err.splitlines()
    assert first.startswith("lorax-gen: training 4 parameters on ")
    assert first.endswith(f"in {tmp_path}/run from step 0 of 4")
    trained, last, evaluated = lines
    for step, line in ((2, trained), (4, last)):
        assert line.startswith(f"lorax-gen: step {step} of 4: loss ")
        assert " s a step, " in line and line.endswith(" tokens/s")
    assert evaluated == "lorax-gen: step 4 of 4: accuracy/unseen 0.5"


def test_in_a_terminal_a_bar_stands_for_the_rows_of_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    fit(linear_experiment(RunConfig(steps=4, log_every=2)), tmp_path / "run", {})
    said = capsys.readouterr().err
    assert "4/4" in said and "loss=" in said and ": loss " not in said
    assert said.count("lorax-gen: step 4 of 4: error ") == 1


def test_a_logger_of_ones_own_gets_every_row_and_is_closed_once(tmp_path):
    mine = Rows()
    run = RunConfig(steps=4, log_every=2, evaluate_every=2)
    fit(linear_experiment(run), tmp_path / "run", {}, loggers=[mine])
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row for _, row in mine.rows] == rows
    assert [step for step, _ in mine.rows] == [2, 2, 4, 4]
    assert mine.closed == 1 and mine.flushed >= 2


def test_a_logger_is_closed_where_training_fails(tmp_path):
    mine = Rows()

    def batch(step):
        raise UserError("no such file")

    with pytest.raises(UserError, match="no such file"):
        fit(linear_experiment(RunConfig(steps=4), batch), tmp_path / "run", {}, [mine])
    assert mine.closed == 1


class FakeWandb:
    """What is used of the module wandb."""

    Settings = dict

    def __init__(self):
        self.inits, self.rows, self.finished = [], [], 0

    def init(self, **options):
        self.inits.append(options)
        return SimpleNamespace(
            log=lambda row, step: self.rows.append((step, row)), finish=self.finish
        )

    def finish(self):
        self.finished += 1


def test_wandb_gets_every_number_and_a_resumed_run_its_id(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for steps in (2, 4):
        run = RunConfig(steps=steps, log_every=1, evaluate_every=2, wandb="mine")
        fit(linear_experiment(run), tmp_path / "run", {"run": {"steps": steps}})
    assert [step for step, _ in fake.rows] == [1, 2, 2, 3, 4, 4]
    assert all(isinstance(value, float) for _, row in fake.rows for value in row.values())
    one, two = fake.inits
    assert one["project"] == "mine" and one["id"] == two["id"] and one["resume"] == "allow"
    assert fake.finished == 2
    assert one["id"].encode() not in b"".join(
        path.read_bytes() for path in (tmp_path / "run" / "released").iterdir()
    )


def test_wandb_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'lorax-gen\[wandb\]'"):
        fit(linear_experiment(RunConfig(steps=3, wandb="mine")), tmp_path / "run", {})
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_wandb_that_cannot_start_says_what_to_do(tmp_path, monkeypatch):
    fake = FakeWandb()

    def init(**options):
        raise RuntimeError("No API key configured.\nmore")

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(UserError, match=r"No API key.*WANDB_MODE=offline"):
        fit(linear_experiment(RunConfig(steps=3, wandb="mine")), tmp_path / "run", {})
