"""GPT4Tools: a user's request that tools can fulfil, and a prompt that describes the tools.

A record's instruction is split into what the cloud reads (the assistant's role, the tools, the
format of its answers, the rules for file names) and what the edge reads (the previous conversation,
the new input, and the text after it). After the new input every record has the same reminder to
use tools and to think step by step, and some have calls already made. The reminder stays with the
edge: it belongs between the input and those calls, so that joining both parts gives the record
again. Its tokens count as read by the edge in every compression ratio.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from lorax_gen.data.readers import FORMATS, Row, name_of, parse_row, read_rows, text_of
from lorax_gen.data.sources import Episode
from lorax_gen.errors import UserError
from lorax_gen.files import AnyPath, find, to_path

CUT = "\n\n"
CONVERSATION = "Previous conversation:"
# Names of the published files; the first that exists is read.
FILES = {
    "train": ("gpt4tools_71k", "gpt4_tools_71k"),
    "validation": ("gpt4tools_val_seen",),
    "test": ("gpt4tools_test_unseen_tools", "gpt4tools_test_unseen"),
}
_TOOLS = re.compile(r"should be one of \[(.*)\]")


@dataclasses.dataclass(frozen=True)
class AgentItem:
    """One record: what the cloud reads, what the edge reads, and the correct answer.

    In training records the answer ends at `Observation:`, where generation stops.
    """

    id: str
    prompt: str
    request: str
    output: str

    @property
    def tools(self) -> str:
        """The names of the tools, as the prompt lists them."""
        found = _TOOLS.search(self.prompt)
        return found[1] if found else self.prompt


def split_instruction(text: str) -> tuple[str, str]:
    """The prompt for the cloud and the request for the edge; joined with `CUT` they give `text`.

    Raises UserError where no conversation follows the prompt.
    """
    prompt, cut, request = text.partition(CUT + CONVERSATION)
    if not cut or not prompt.strip():
        raise UserError(
            f"the instruction has no blank line and {CONVERSATION!r} between the tools and the "
            "request"
        )
    return prompt, CONVERSATION + request


def full_prompt(item: AgentItem) -> str:
    """The full instruction, as a model without a specialised LoRA reads it."""
    return f"{item.prompt}{CUT}{item.request}"


def load_agent(split: str, directory: AnyPath) -> list[AgentItem]:
    """The records of `train`, `validation` or `test`, in the file's order.

    Read from the published file of that name in or below `directory`, `.json` or `.json.gz`;
    any other `split` is the name of a file without its extension.

    Raises UserError where there is no such file, and for a malformed record, with its index.
    """
    path = _find_file(FILES.get(split, (split,)), to_path(directory))
    return [
        parse_row(location, row, partial(_item, number=number))
        for number, (location, row) in enumerate(read_rows(path))
    ]


def _item(row: Row, number: int) -> AgentItem:
    instruction, output = text_of(row, "instruction"), text_of(row, "output")
    if text_of(row, "input", ""):
        raise UserError("input should be empty: the request is part of the instruction")
    if not output.strip():
        raise UserError("the output is empty")
    return AgentItem(name_of(row, "id", str(number)), *split_instruction(instruction), output)


def _find_file(names: Sequence[str], directory: AnyPath) -> AnyPath:
    if not directory.is_dir():
        raise UserError(f"no such data directory: {directory}")
    for name in names:
        found = [p for p in find(directory, f"{name}.*") if p.name[len(name) :] in FORMATS]
        if len(found) > 1:
            raise UserError(f"several files are called {name}: {', '.join(map(str, found))}")
        if found:
            return found[0]
    raise UserError(
        f"no file {' or '.join(f'{name}.json' for name in names)} in or below {directory}; "
        "download it from the GPT4Tools release"
    )


class AgentSource:
    """Samples of GPT4Tools: the tools for the cloud, the request and its answer for the edge.

    The prompt has no shots. Further questions of a sample are other requests under the same prompt.
    """

    name = "gpt4tools"

    def __init__(self, items: Sequence[AgentItem]):
        self.items = list(items)
        self.under: dict[str, list[int]] = {}
        for i, item in enumerate(self.items):
            self.under.setdefault(item.prompt, []).append(i)
        self.tasks = len({item.tools for item in self.items})

    def __len__(self) -> int:
        return len(self.items)

    def episode(self, index: int, rng: np.random.Generator, shots: int, queries: int) -> Episode:
        item = self.items[index]
        others = [i for i in rng.permutation(self.under[item.prompt]).tolist() if i != index]
        asked = [self.items[i] for i in [index, *others][:queries]]
        return Episode(
            task=f"{self.name}: {item.tools}",
            instruction=item.prompt,
            shots=(),
            questions=tuple((other.request, other.output) for other in asked),
            join=lambda episode, request: f"{episode.prompt}{CUT}{request}",
        )

    def texts(self) -> Iterator[str]:
        return (f"{item.request} {item.output}" for item in self.items)
