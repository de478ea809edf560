"""Chats as texts, by the template of a tokenizer, within limits of time, memory and size.

A template is a program that comes with a model. transformers runs it in Jinja's sandbox, which
keeps it from files and from Python's internals, but not from taking hours and all memory, in loops
as in a single expression (`9 ** (9 ** 9)`), which nothing in the same process can interrupt. So it
runs in a process of its own, started with the first chat and used for all.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorax_gen.errors import UserError
from lorax_gen.prompts import check_text

SECONDS = 10.0  # for one chat; templates take milliseconds
WORKER = Path(__file__).with_name("chat_worker.py")
_lock = threading.Lock()


def render_chat(
    tokenizer: Any,
    turns: Sequence[dict[str, Any]],
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
) -> str:
    """The text of a chat in the tokenizer's template.

    Args:
      turns: each with `role` and `content`.
      add_generation_prompt: it ends where the next answer begins.
      continue_final_message: it ends with the last turn, which is unfinished.

    Raises UserError if the tokenizer has no template, or its template refuses the turns (Gemma's
    has no system turn) or goes beyond the limits.
    """
    try:
        request = {
            "conversations": [list(turns)],
            "chat_template": tokenizer.get_chat_template(),
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
        }
        line = json.dumps(tokenizer.special_tokens_map | request)
    except (TypeError, ValueError) as error:  # no template among several; a turn that is no text
        raise UserError(f"the chat template cannot be used: {error}") from None
    answer = _ask(line)
    if "error" in answer:
        raise UserError(f"the chat template refuses these turns: {answer['error']}")
    return check_text(answer["text"])


def _ask(line: str) -> dict[str, str]:
    """The answer of the worker, which is ended where it takes too long."""
    with _lock:
        worker = _worker(os.getpid())
        assert worker.stdin and worker.stdout  # pipes
        timer = threading.Timer(SECONDS, worker.kill)
        timer.start()
        try:
            worker.stdin.write(line + "\n")
            worker.stdin.flush()
            answer = worker.stdout.readline()
        except BrokenPipeError:
            answer = ""
        finally:
            timer.cancel()
        if answer:
            return json.loads(answer)
        worker.kill()
        worker.wait()
        _worker.cache_clear()
        return {"error": f"it does not end within {SECONDS:g} seconds"}


@functools.cache
def _worker(process_id: int) -> subprocess.Popen:
    """The worker of this process; a forked one starts its own."""
    worker = subprocess.Popen(
        [sys.executable, "-P", os.fspath(WORKER)],  # -P: no module is taken from this folder
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        text=True,
        encoding="utf-8",
    )
    atexit.register(worker.kill)
    assert worker.stdout  # a pipe
    if not worker.stdout.readline():
        raise RuntimeError(f"{WORKER} did not start")
    return worker
