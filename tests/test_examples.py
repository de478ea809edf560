"""The scripts of examples/, with stand-ins for the commands of a cluster."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture
def stand_ins(tmp_path):
    """Writes a command, and returns an environment that has it first."""

    def write(**commands):
        for name, text in commands.items():
            path = tmp_path / name
            path.write_text(f"#!/bin/bash\n{text}\n")
            path.chmod(0o755)
        return {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": f"{tmp_path}/log"}

    return write


def start(script, *words, env):
    return subprocess.Popen(
        ["bash", EXAMPLES / script, *words],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for(path):
    until = time.monotonic() + 60
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert path.exists()


TRAIN = "lorax-gen train world --run-dir /shared/run --run.steps 9"


@pytest.mark.parametrize("saved, queued", [(0, True), (1, False)])
def test_a_preempted_slurm_job_waits_for_its_state_and_is_queued_again(
    stand_ins, tmp_path, saved, queued
):
    env = stand_ins(
        srun=f"trap 'sleep 0.5; echo saved >> $LOG; exit {saved}' TERM\n"
        'echo "$@" >> $LOG\nwhile true; do sleep 0.05; done',
        scontrol='echo scontrol "$@" >> $LOG',
    )
    job = start(
        "slurm.sbatch", "world", "/shared/run", "--run.steps", "9",
        env={**env, "SLURM_JOB_ID": "12"},
    )  # fmt: skip
    wait_for(tmp_path / "log")
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=60)
    assert job.returncode == saved
    after = ["scontrol requeue 12"] if queued else []
    assert (tmp_path / "log").read_text().splitlines() == [TRAIN, "saved", *after]


@pytest.mark.parametrize("code", [0, 2])
def test_a_slurm_job_that_ends_by_itself_is_not_queued_again(stand_ins, tmp_path, code):
    env = stand_ins(srun=f'echo "$@" >> $LOG; exit {code}', scontrol="echo scontrol >> $LOG")
    job = start("slurm.sbatch", "world", "/shared/run", "--run.steps", "9", env=env)
    job.communicate(timeout=60)
    assert job.returncode == code
    assert (tmp_path / "log").read_text().splitlines() == [TRAIN]


def test_a_pod_runs_the_same_command_on_all_workers(stand_ins, tmp_path):
    env = stand_ins(gcloud='printf "%s\\n" "$@" >> $LOG') | {"TPU": "pod", "ZONE": "z"}
    job = start("tpu_pod.sh", "world", "gs://b/run", "--data.families", "two words", env=env)
    job.communicate(timeout=60)
    assert job.returncode == 0
    words = (tmp_path / "log").read_text().splitlines()
    assert words[:8] == "compute tpus tpu-vm ssh pod --zone z --worker=all".split()
    folder, command = words[9].split(" && ")
    assert folder == "cd lorax-gen" and command.startswith(".venv/bin/lorax-gen train world ")
    quoted = subprocess.run(
        ["bash", "-c", f"printf '%s|' {command}"], capture_output=True, text=True, check=True
    ).stdout
    assert quoted.endswith("|train|world|--run-dir|gs://b/run|--data.families|two words|")


def test_a_pod_needs_a_bucket(stand_ins, tmp_path):
    env = stand_ins(gcloud="echo called >> $LOG") | {"TPU": "pod", "ZONE": "z"}
    job = start("tpu_pod.sh", "world", "/home/run", env=env)
    _, said = job.communicate(timeout=60)
    assert job.returncode == 2 and "gs://BUCKET" in said and not (tmp_path / "log").exists()
