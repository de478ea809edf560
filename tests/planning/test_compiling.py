"""A compiler that takes minutes says so, and is interrupted without a crash."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from lorax_gen.planning.compiling import compile_aloud


@pytest.fixture(autouse=True)
def interruptible():
    """SIGINT as in a terminal, here and in what is started: a job in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_it_returns_what_is_compiled_and_says_how_long_it_took(capsys):
    assert compile_aloud(lambda: 7, "a step") == 7
    before, after = capsys.readouterr().err.splitlines()
    assert before.startswith("compiling a step; ") and after == "compiled in 0 s"


def test_it_raises_what_the_compiler_raises(capsys):
    with pytest.raises(ZeroDivisionError):
        compile_aloud(lambda: 1 // 0, "a step")
    assert "compiled" not in capsys.readouterr().err


def test_a_signal_gets_through_while_the_compiler_runs():
    end = threading.Event()
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        compile_aloud(lambda: end.wait(60), "a step")
    end.set()
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_plan_for_a_tpu_stops_without_a_stack_trace(number):
    pytest.importorskip("libtpu", reason="needs the compiler of TPUs: make parity")
    command = [sys.executable, "-m", "lorax_gen", "plan", "paper", "--topology", "v5e:4x4"]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    said = running.stderr.readline()
    assert said.startswith("compiling the train step of llama3_8b and tinyllama_1b for 16 x TPU v5")
    time.sleep(2)
    running.send_signal(number)
    out, rest = running.communicate(timeout=60)
    interrupted = number == signal.SIGINT
    assert (running.returncode, out) == (130 if interrupted else -number, "")
    assert rest == ("stopped\n" if interrupted else "")
