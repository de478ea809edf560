"""`lorax-gen data CONFIG`: the options of `train`, and how much is shown."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from lorax_gen.cli.parse import parse_config
from lorax_gen.config import Count, Size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from lorax_gen.data.config import WorldConfig
    from lorax_gen.data.mixture import Mixture
    from lorax_gen.recipes.preview import Mixed, Preview, Read, Survey

OPEN, CLOSE = ">>>", "<<<"  # around what the loss is on, where there are no colors
QUESTIONS = 2  # of a prompt that are printed
NAMES = 20  # of tasks that are listed for a source


@dataclasses.dataclass(frozen=True)
class Shown:
    """How much is shown."""

    samples: Count = 3
    """Prompts with their questions that are printed: the first ones of training."""
    batches: Size | None = None
    """Batches that are drawn for the tables. None: one epoch, at most 100."""


@dataclasses.dataclass(frozen=True)
class Data:
    """Show what training on a config will read: look at it before you train.

    Prints the first samples as text: what the cloud reads (the prompt) and what the edge reads
    (the input in its frame, and the answer, on which the loss is: >>> <<< stand around it, or it
    is in color). Then tables: sources, what is held out, lengths beside their limits, and what was
    missing or left out. CONFIG and overrides are those of train. It loads tokenizers, no weights,
    and trains nothing.

    Example: lorax-gen data own-tasks --samples 1 --data.shots 2
    """

    config: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")]
    """A YAML file, or the name of a shipped config."""
    shown: Annotated[Shown, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Shown)

    def run(self) -> int:
        return run_config(self.config, [], self.shown)


def run_config(name: str, overrides: list[str], shown: Shown = Shown()) -> int:
    """Shows the data of a named config, with options that override its fields."""
    from rich.console import Console

    from lorax_gen.data.config import WorldConfig
    from lorax_gen.recipes.preview import open_preview, survey
    from lorax_gen.recipes.registry import load_config

    _, config = load_config(name)
    parsed = parse_config(
        config,
        overrides,
        f"lorax-gen data {name}",
        Data.__doc__,
        shown=(Annotated[Shown, tyro.conf.arg(name="")], shown),
    )
    preview = open_preview(parsed.config)
    console = Console(highlight=False, soft_wrap=True)
    show_samples(console, preview, parsed.shown.samples)
    if preview.mixed is not None:
        preview.mixed.mixture.counts.clear()  # samples that were shown are drawn again
        show_sources(console, preview.mixed)
        show_held(console, preview.mixed)
    elif isinstance(preview.data, WorldConfig):
        show_world(console, preview.data)
    drawn = survey(preview, parsed.shown.batches)
    show_lengths(console, preview, drawn)
    if preview.mixed is not None:
        show_counts(console, preview.mixed.mixture, drawn)
    return 0


# --- samples -------------------------------------------------------------------------------------


def show_samples(console: Console, preview: Preview, count: int) -> None:
    step, shown = 0, 0
    while shown < count:
        samples = first_samples(preview, step)[: count - shown]
        for task, read in samples:
            shown += 1
            show_sample(console, preview, f"sample {shown}" + (task and f", task {task!r}"), read)
        step += 1


def first_samples(preview: Preview, step: int) -> list[tuple[str, Read]]:
    """`(name of the task, what is read)` of a batch's prompts; the world's tasks are not named."""
    from lorax_gen.recipes.preview import read_batch

    read = list(read_batch(preview.batch(step)))
    if preview.mixed is None:
        return [("", one) for one in read]
    names = [sample.task for sample in preview.mixed.mixture.samples(step)]
    return list(zip(names, read, strict=True))


def show_sample(console: Console, preview: Preview, title: str, read: Read) -> None:
    from rich.text import Text

    console.print(Text(printable(title), style="bold"))
    if preview.cloud is not None:
        text = preview.cloud.tokenizer.decode(read.prompt, clean_up_tokenization_spaces=False)
        reader = "edge compresses" if preview.compresses else "cloud reads"
        console.print(Text(f"  the {reader} {len(read.prompt)} tokens", style="dim"))
        console.print(indented(Text(printable(text))))
    for before, after in read.questions[:QUESTIONS]:
        total = len(before) + len(after)
        line = f"  the edge reads {total} tokens, the loss is on {len(after)}"
        console.print(Text(line, style="dim"))
        console.print(indented(marked(console, preview.edge.tokenizer, before, after)))
    if (more := len(read.questions) - QUESTIONS) > 0:
        console.print(Text(f"  and {more} more questions under this prompt", style="dim"))
    console.print()


def marked(console: Console, tokenizer: Any, before: list[int], after: list[int]) -> Text:
    """A row as text, with the part marked that the loss is on."""
    from rich.text import Text

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    full, question = decode([*before, *after]), decode(before)
    # Some tokenizers drop a leading space where a text begins within a row.
    answer = full[len(question) :] if full.startswith(question) else decode(after)
    question, answer = printable(question), printable(answer)
    if console.is_terminal and not console.no_color:
        return Text.assemble(question, (answer, "bold green"))
    return Text(f"{question}{OPEN}{answer}{CLOSE}")


def indented(text: Text) -> Text:
    from rich.text import Text

    return Text("\n").join([Text("    ") + line for line in text.split("\n", allow_blank=True)])


def printable(text: str) -> str:
    """The text with control characters written out: it may come from anywhere."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text)


# --- tables --------------------------------------------------------------------------------------


def table_of(title: str, *columns: str) -> Table:
    from lorax_gen.evaluation.tables import make_table

    return make_table(title, columns)


def show_world(console: Console, data: WorldConfig) -> None:
    table = table_of("the embedded world", "tasks seen", "unseen", "questions of seen")
    world = data.world()
    for family in data.families:
        seen, unseen = (world.select(split, family) for split in ("seen", "unseen"))
        asked = sum(len(task.questions) for task in seen)
        table.add_row(family, f"{len(seen):,}", f"{len(unseen):,}", f"{asked:,}")
    console.print(table, "", sep="\n")


def show_sources(console: Console, mixed: Mixed) -> None:
    from lorax_gen.recipes.preview import source_rows

    rows = source_rows(mixed)
    table = table_of("sources", "tasks", "samples", "weight", "rows left out")
    for row in rows:
        numbers = f"{row.tasks:,}", f"{row.samples:,}", f"{row.weight:g}", f"{row.left_out:,}"
        table.add_row(printable(row.name), *numbers)
    console.print(table)
    if any(row.rows for row in rows):
        frame = printable(mixed.opened.frame.wrap("{input}"))
        console.print(f"frame of rows: {frame!r}", markup=False)
    for row in rows:
        if row.rows:
            listed = [f"{name} ({count:,})" for name, count in row.rows.items()]
            more = f", and {len(listed) - NAMES:,} more" if len(listed) > NAMES else ""
            names = printable(", ".join(listed[:NAMES]))
            console.print(f"tasks of {row.name} (rows): {names}{more}", markup=False)
    console.print()


def show_held(console: Console, mixed: Mixed) -> None:
    from lorax_gen.data.config import is_row_file
    from lorax_gen.recipes.preview import held_numbers

    held = mixed.opened.held
    if held:
        table = table_of("held out, to evaluate on", "tasks", "wordings", "rows")
        for name, tasks in held.items():
            table.add_row(printable(name), *(f"{n:,}" for n in held_numbers(tasks)))
        console.print(table)
    if "held_out_tasks" in held:
        names = printable(", ".join(task.name for task in held["held_out_tasks"][:NAMES]))
        console.print(f"held-out tasks: {names}", markup=False)
    benchmarks = [name for name in mixed.data.evaluate_on or () if not is_row_file(name)]
    if benchmarks:
        console.print(f"benchmarks to evaluate on: {', '.join(benchmarks)}", markup=False)
    if not held and not benchmarks:
        console.print("nothing is held out: set data.held_out, or data.evaluate_on")
    console.print()


def show_lengths(console: Console, preview: Preview, drawn: Survey) -> None:
    import numpy as np

    epoch = preview.batches_per_epoch
    part = f"; an epoch has {epoch:,}" if epoch else ""
    heads = "median", "90 %", "99 %", "longest", "limit"
    table = table_of(f"tokens, in {batches_of(drawn)}{part}", *heads)
    data = preview.data
    for name, lengths, limit in (
        ("prompts", drawn.prompts, data.prompt_length),
        ("questions with answers", drawn.questions, data.question_length),
    ):
        if lengths:
            found = [*np.percentile(lengths, (50, 90, 99), method="higher"), max(lengths)]
            table.add_row(name, *(f"{int(n):,}" for n in found), f"{limit:,}")
    console.print(table)
    if drawn.unknown:
        console.print(
            f"{drawn.unknown:,} prompts or questions hold a word that their tokenizer does not know"
        )
    console.print()


def batches_of(drawn: Survey) -> str:
    return f"{drawn.batches:,} batch{'es' if drawn.batches > 1 else ''}"


COUNTS = {
    "samples": "samples (a prompt with its questions)",
    "shots_missing": "shots that their tasks do not have",
    "questions_missing": "questions that their tasks do not have",
    "prompts_shortened": "prompts too long with all shots",
    "shots_left_out": "shots left out of them",
    "dropped_prompts": "dropped: prompt too long without shots",
    "dropped_questions": "dropped: question too long",
    "dropped_answers": "dropped: answer too long",
    "replaced_to_mix": "replaced, so that a batch mixes tasks",
}


def show_counts(console: Console, mixture: Mixture, drawn: Survey) -> None:
    table = table_of(f"in {batches_of(drawn)}", "count")
    for name, what in COUNTS.items():
        table.add_row(what, f"{mixture.counts[name]:,}")
    console.print(table)
