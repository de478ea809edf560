"""`lorax-gen train`: overrides, run directories, interruptions."""

import dataclasses
import os
import signal

import pytest
import yaml

from lorax_gen.recipes import registry
from lorax_gen.training.loop import fit
from tests.tiny import linear_experiment


@pytest.fixture
def linear(monkeypatch):
    """The recipe `lora` trains four weights, at once, whatever its config says of models."""

    def experiment(config):
        made = linear_experiment(config.run)
        return dataclasses.replace(made, optimizer=config.optimizer)

    recipe = registry.RECIPES["lora"]._replace(experiment=experiment)
    monkeypatch.setitem(registry.RECIPES, "lora", recipe)


@pytest.mark.parametrize(
    "text, message",
    [
        ("method: lora\nranks: 4", "unknown key ranks; did you mean rank?"),
        ("method: lora\nrank: four", "rank is 'four'; expected int"),
        ("method: loras", "method is 'loras'; expected one of"),
        ("method: [", "mine.yaml is not valid YAML"),
        ("method: lora\nedge: nowhere", "no model directory at nowhere"),
    ],
)
def test_a_wrong_config_is_refused(refused, tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    assert message in refused("train", "mine.yaml")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


def test_an_unknown_config_is_refused(refused):
    assert refused("train", "wrold") == "no config file wrold; did you mean world?\n"


@pytest.mark.parametrize(
    "option, value, message",
    [
        (
            "--optimizer.learning-rate",
            "-1",
            "optimizer.learning_rate is -1.0; expected float > 0.0",
        ),
        ("--data.families", "sorts", "unknown family 'sorts'"),
        ("--ranks", "4", "--ranks, 4; did you mean --rank?"),
        ("--run-dri", "x", "--run-dri, x; did you mean --run-dir?"),
    ],
)
def test_a_wrong_override_is_refused(refused, option, value, message):
    assert message in refused("train", "world-lora", option, value)


def test_overrides_end_in_the_run_directory(call, linear, tmp_path):
    options = ["--run.steps", 2, "--optimizer.learning-rate", "2e-2", "--targets", "gate", "up"]
    code, out, err = call("train", "world-lora", *options, "--run-dir", "here")
    assert (code, out) == (0, "released: here/released\n")
    assert all(
        line.startswith(("lorax-gen: training", "lorax-gen: step")) for line in err.splitlines()
    )
    written = yaml.safe_load((tmp_path / "here" / "config.yaml").read_text())
    assert written["method"] == "lora"
    assert written["run"]["steps"] == 2
    assert written["optimizer"]["learning_rate"] == 0.02
    assert written["optimizer"]["warmup_steps"] == 100  # the config's
    assert written["targets"] == ["gate", "up"]
    assert written["rank"] == 8  # the default


def test_a_written_config_is_one_to_train_from(call, linear, tmp_path):
    assert call("train", "world-lora", "--run.steps", 2, "--run-dir", "one")[0] == 0
    assert call("train", "one/config.yaml", "--run-dir", "two")[0] == 0
    one, two = (tmp_path / name / "config.yaml" for name in ("one", "two"))
    assert one.read_text() == two.read_text()


def test_a_run_lives_under_its_configs_name_or_where_it_is_told(call, linear, tmp_path):
    (tmp_path / "mine.yaml").write_text("method: lora\nrun: {steps: 1}\n")
    assert call("train", "mine.yaml")[1] == "released: runs/mine/released\n"
    assert call("train", "--run-dir", "there", "mine.yaml")[1] == "released: there/released\n"


def test_the_directory_of_another_run_is_refused(call, refused, linear):
    words = ["train", "world-lora", "--run-dir", "here", "--run.steps", 1, "--rank"]
    assert call(*words, 1)[0] == 0
    assert "here already holds another run" in refused(*words, 2)
    assert call(*words, 1)[:2] == (0, "released: here/released\n")


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_stopped_run_says_how_to_go_on(call, linear, monkeypatch, number, code):
    words = ["train", "world-lora", "--run.steps", 3, "--run-dir", "here"]

    def stop_first(experiment, *rest):
        def batch(step):
            if step == 1:
                os.kill(os.getpid(), number)
            return experiment.batch(step)

        return fit(dataclasses.replace(experiment, batch=batch), *rest)

    with monkeypatch.context() as patch:
        patch.setattr("lorax_gen.training.loop.fit", stop_first)
        stopped = call(*words)
    line = "lorax-gen: stopped at step 2 of 3, state saved; the same command resumes the run\n"
    assert stopped[:2] == (code, "") and stopped[2].endswith(line)
    assert call(*words)[:2] == (0, "released: here/released\n")
