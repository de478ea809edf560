"""The process that renders chat templates for `chat`; it imports nothing of this package.

It reads requests from standard input and writes answers to standard output, both JSON, one a line.
The first line that it writes is empty: from then on its memory is limited.
"""

import json
import resource
import sys

from transformers.utils.chat_template_utils import render_jinja_template

MEMORY = 1 << 30  # bytes that rendering may allocate
LONGEST = 1 << 20  # characters of a rendered chat, beyond four times its request


def answer(request: str) -> dict[str, str]:
    """`{'text': ...}`, or `{'error': ...}` with the reason why there is none."""
    try:
        # transformers annotates the pair of lists as a string
        (text,), _ = render_jinja_template(**json.loads(request))  # type: ignore[str-unpack]
    except MemoryError:
        return {"error": f"it needs more than {MEMORY >> 20:,} MiB"}
    except RecursionError:
        return {"error": "it calls itself too often"}
    except Exception as error:  # a template may raise anything
        return {"error": str(error) or type(error).__name__}
    most = LONGEST + 4 * len(request)
    if len(text) > most:
        return {"error": f"it writes {len(text):,} characters; the most are {most:,}"}
    return {"text": text}


def limit_memory() -> None:
    try:
        with open("/proc/self/status") as file:
            used = next(int(line.split()[1]) << 10 for line in file if line.startswith("VmData"))
    except OSError:  # not Linux, where alone the limit holds
        return
    resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY,) * 2)


if __name__ == "__main__":
    limit_memory()
    print(flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(line)), flush=True)
