"""One sentence, many orders: real texts whose correct answer only the prompt tells.

    python experiments/orders/make.py TEXTS OUTPUT --orders 150

An order is an attribute (is the headline about sports), the words to answer with (red, blue) and
its wordings. The same headlines are asked in many orders, so that the bare input has a different
answer in each, and its classes are balanced. TEXTS holds `agnews`, `sst2` and `dbpedia`, each as
NAME.train.jsonl.gz and NAME.test.jsonl.gz with `text` and `label` (dbpedia: test alone). OUTPUT
gets files of rows, as in docs/tasks.md:

    train.jsonl       orders to train on; those of fewer `--orders` are among those of more
    texts.jsonl       seen orders in seen wordings, on new texts, as are all that follow
    wordings.jsonl    seen orders in templates that were never trained on
    orders.jsonl      new combinations of a seen attribute with seen words
    words.jsonl       seen attributes, two pairs of words that were never trained on
    attribute.jsonl   an attribute that was never trained on
    probe.jsonl       a few of texts.jsonl, to be asked often

All depends on the texts and the seed alone. `--check OUTPUT` reads such files and refuses what
would make a score mean something else.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import tyro
from wordings import (
    ATTRIBUTES,
    FILM,
    FOUR_WAY,
    FOURS,
    HELD,
    NEWS,
    PAIRS,
    THING,
    TOPIC,
    TOPICS,
    TWO_WAY,
    UNSEEN_ATTRIBUTE,
    UNSEEN_PAIRS,
)

from lorax_gen import files
from lorax_gen.config import Seed, Size
from lorax_gen.data.own_tasks import COLUMNS, parse_item
from lorax_gen.data.readers import parse_row, read_rows
from lorax_gen.errors import UserError

LONGEST = {NEWS: 9, FILM: 10, THING: 13}  # words of a text; longer ones are not asked
SHORTEST = 3
CHARACTERS = 75  # most of a text: a few long names would make every row of their batch long
SHARES = {NEWS: 0.35, TOPIC: 0.15, FILM: 0.19, THING: 0.31}  # of the training orders
HELD_ORDERS = 0.2  # of the combinations of seen attributes and seen words
PROBE = {NEWS: 5, TOPIC: 2, FILM: 2, THING: 3}  # orders of the probe
PROBE_TEXTS = 10
TRAIN = "train.jsonl"
NAMES = {field: field for field in COLUMNS}

Texts = Mapping[str, Mapping[str, Sequence[str]]]
"""Source -> label -> texts."""


@dataclasses.dataclass(frozen=True)
class Order:
    """An attribute and the words that answer it: yes, no; or one for each of `TOPICS`."""

    attribute: str
    words: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.attribute}: {', '.join(self.words)}"

    @property
    def source(self) -> str:
        return NEWS if self.attribute == TOPIC else ATTRIBUTES[self.attribute][0]

    @property
    def stratum(self) -> str:
        return TOPIC if self.attribute == TOPIC else self.source

    def answer(self, label: str) -> int:
        """Index of the word that answers a text of this label."""
        if self.attribute == TOPIC:
            return list(TOPICS).index(label)
        return int(label != ATTRIBUTES[self.attribute][1])

    def wordings(self) -> list[str]:
        """One for each template, with one of the attribute's conditions."""
        templates = FOUR_WAY if self.attribute == TOPIC else TWO_WAY
        found = []
        for i, template in enumerate(templates):
            pick = draw(self.name, i)
            if self.attribute == TOPIC:
                topics = list(zip(self.words, TOPICS.values(), strict=True))
                some = pick % 3
                entries = [f'"{word}" for {names[some]}' for word, names in topics]
                entries = entries[pick // 3 % 4 :] + entries[: pick // 3 % 4]
                text = template.format(list=f"{', '.join(entries[:-1])} and {entries[-1]}")
            else:
                conditions = ATTRIBUTES[self.attribute][2]
                that, whether, what = conditions[pick % len(conditions)]
                yes, no = (f'"{word}"' for word in self.words)
                text = template.format(yes=yes, no=no, that=that, whether=whether, what=what)
            found.append(text[0].upper() + text[1:])
        return found


def draw(*key: object) -> int:
    """A number that depends on the key alone."""
    text = "\0".join(map(str, key))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def shuffled(values: Sequence, *key: object) -> list:
    return [values[i] for i in np.random.default_rng(draw(*key)).permutation(len(values))]


# --- texts ---------------------------------------------------------------------------------------


def clean(text: str, source: str) -> str:
    """The text with its character codes decoded; of an abstract, the first sentence."""
    text = re.sub(r" ?#(\d+);", lambda code: chr(int(code[1])), text)
    if source == THING:
        text = re.split(r"(?<=[a-z)])\. ", text)[0].rstrip(".")
    return " ".join(text.split())


def load_texts(directory: Path, source: str, split: str) -> dict[str, list[str]]:
    """The texts of each label that are short enough.

    Raises UserError where the file is missing or a row has no text and label."""
    own = "test" if source == THING else split  # it has no other: a fifth of it is kept back
    path, found = directory / f"{source}.{own}.jsonl.gz", defaultdict(dict)
    for location, row in read_rows(path):
        text, label = parse_row(location, row, lambda row: (row["text"], row["label"]))
        text = clean(text, source)
        held = draw("thing", text) % 5 == 0
        if source == THING and held != (split == "test"):
            continue
        short = SHORTEST <= len(text.split()) <= LONGEST[source] and len(text) <= CHARACTERS
        if short and text.isascii():  # other scripts take several tokens a letter
            found[label][text] = None
    return {label: list(texts) for label, texts in sorted(found.items())}


def load(directory: Path) -> tuple[Texts, Texts]:
    """The texts to train on and those to evaluate on, none in both."""
    train, test = (
        {source: load_texts(directory, source, split) for source in (NEWS, FILM, THING)}
        for split in ("train", "test")
    )
    seen = {text for source in train.values() for texts in source.values() for text in texts}
    test = {
        source: {label: [t for t in texts if t not in seen] for label, texts in labels.items()}
        for source, labels in test.items()
    }
    return train, test


# --- orders --------------------------------------------------------------------------------------


def combinations(attributes: Sequence[str], pairs: Sequence[tuple[str, str]]) -> list[Order]:
    """Every attribute with every pair, both ways around."""
    both = [words for pair in pairs for words in (pair, pair[::-1])]
    return [Order(attribute, words) for attribute in attributes for words in both]


@dataclasses.dataclass(frozen=True)
class Split:
    """Orders to train on and to evaluate on, each list in an order that the seed fixes."""

    train: list[Order]
    orders: list[Order]
    words: list[Order]
    attribute: list[Order]


def split_orders(count: int, seed: int) -> Split:
    """`count` training orders, the same share of each stratum whatever the count.

    Raises UserError where there are not as many."""
    seen = [attribute for attribute in ATTRIBUTES if attribute != UNSEEN_ATTRIBUTE]
    pairs = [pair for pair in PAIRS if pair not in UNSEEN_PAIRS]
    known = combinations(seen, pairs)
    known += [Order(TOPIC, words) for four in FOURS for words in itertools.permutations(four)]
    strata: dict[str, list[Order]] = defaultdict(list)
    for order in shuffled(known, seed, "orders"):
        strata[order.stratum].append(order)
    held, train = [], []
    for stratum, orders in strata.items():
        kept = round(HELD_ORDERS * len(orders))
        wanted = round(SHARES[stratum] * count)
        if wanted > len(orders) - kept:
            most = min(int((len(o) * (1 - HELD_ORDERS)) / SHARES[s]) for s, o in strata.items())
            raise UserError(f"--orders is {count}; there are at most about {most} to train on")
        held.append(orders[:kept])
        train += orders[kept : kept + wanted]
    mixed = [order for row in itertools.zip_longest(*held) for order in row if order]
    return Split(
        train=train,
        orders=mixed,
        words=shuffled(combinations(seen, UNSEEN_PAIRS), seed, "words"),
        attribute=shuffled(combinations([UNSEEN_ATTRIBUTE], pairs), seed, "attribute"),
    )


def rows_of(
    order: Order, texts: Texts, count: int, wordings: Sequence[str], seed: int
) -> Iterator[dict]:
    """At most `count` rows, as many of each answer; other labels have equal shares of a "no".

    Raises UserError where an answer has no text."""
    answers = sorted({order.answer(label) for label in texts[order.source]})
    rings = []
    for answer in answers:
        labels = [label for label in texts[order.source] if order.answer(label) == answer]
        pools = [shuffled(texts[order.source][label], seed, order.name, label) for label in labels]
        rings.append([text for row in itertools.zip_longest(*pools) for text in row if text])
    own = min(count // len(answers), *map(len, rings))
    if not own:
        raise UserError(f"{order.name}: an answer has no text; give more texts or raise --rows")
    for n, (answer, ring) in enumerate(zip(answers, rings, strict=True)):
        for i, text in enumerate(ring[:own]):
            yield {
                "task": order.name,
                "instruction": wordings[(i + n) % len(wordings)],
                "input": text,
                "choices": list(order.words),
                "answer": answer,
            }


# --- files ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Options:
    """What is made."""

    texts: Path
    """Directory of the labelled texts."""
    output: Path
    """New directory of the rows."""
    orders: Size = 150
    """Orders to train on."""
    rows: Size = 120
    """Texts of each of them."""
    held_orders: Size = 40
    """Most orders of each file to evaluate on."""
    held_rows: Size = 20
    """Texts of each of them."""
    only: str = ""
    """One order instead, such as "sports: red, blue", for a LoRA of its own."""
    seed: Seed = 0


def parse(name: str) -> Order:
    """The order of a name. Raises UserError where there is none."""
    attribute, _, words = name.partition(": ")
    order = Order(attribute, tuple(words.split(", ")))
    if attribute not in (*ATTRIBUTES, TOPIC) or len(order.words) != (
        4 if attribute == TOPIC else 2
    ):
        raise UserError(
            f"no order {name!r}; expected ATTRIBUTE: WORD, WORD with one of {', '.join(ATTRIBUTES)}"
            f" or {TOPIC}, which has four words"
        )
    return order


def make(options: Options) -> dict[str, list[dict]]:
    """The rows of each file."""
    train, test = load(options.texts)
    if options.only:
        order = parse(options.only)
        own = (order.wordings(), options.seed)
        return {
            TRAIN: list(rows_of(order, train, options.rows, *own)),
            "texts.jsonl": list(rows_of(order, test, options.held_rows, *own)),
        }
    split, most = split_orders(options.orders, options.seed), options.held_orders
    seen: dict[str, list[Order]] = defaultdict(list)
    for order in split.train:
        seen[order.stratum].append(order)
    mixed = [order for row in itertools.zip_longest(*seen.values()) for order in row if order]
    probe = [order for stratum, n in PROBE.items() for order in seen[stratum][:n]]

    def held(orders: Sequence[Order], which: slice, texts: int = options.held_rows) -> list[dict]:
        return [
            row
            for order in orders
            for row in rows_of(order, test, texts, order.wordings()[which], options.seed)
        ]

    trained, kept = slice(-HELD), slice(-HELD, None)
    return {
        TRAIN: [
            row
            for order in split.train
            for row in rows_of(order, train, options.rows, order.wordings()[trained], options.seed)
        ],
        "texts.jsonl": held(mixed[:most], trained),
        "wordings.jsonl": held(mixed[:most], kept),
        "orders.jsonl": held(split.orders[:most], trained),
        "words.jsonl": held(split.words[:most], trained),
        "attribute.jsonl": held(split.attribute[:most], trained),
        "probe.jsonl": held(probe, trained, PROBE_TEXTS),
    }


def write(output: Path, made: Mapping[str, Sequence[dict]]) -> None:
    """Writes the files, checked, into a new directory."""
    with files.new_directory(output) as partial:
        for name, rows in made.items():
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (partial / name).write_text("".join(lines))
        check(partial)


# --- the check -----------------------------------------------------------------------------------


@dataclasses.dataclass
class Seen:
    """What a file holds, each with the location where it is first."""

    tasks: dict[str, str] = dataclasses.field(default_factory=dict)
    wordings: dict[str, str] = dataclasses.field(default_factory=dict)
    inputs: dict[str, str] = dataclasses.field(default_factory=dict)


def check(directory: Path) -> None:
    """Raises UserError, with file and line, where a row is malformed (`data.own_tasks`), has no
    task, wording or choices; where a task's rows have different choices, a single answer, or
    unequal numbers of answers; and where training has an input of another file, a wording of
    wordings.jsonl or a task of orders.jsonl, words.jsonl or attribute.jsonl."""
    train = read(directory / TRAIN)
    for path in sorted(directory.glob("*.jsonl")):
        if path.name == TRAIN:
            continue
        held, both = read(path), [("input", "inputs")]
        if path.name == "wordings.jsonl":
            both.append(("wording", "wordings"))
        if path.name in ("orders.jsonl", "words.jsonl", "attribute.jsonl"):
            both.append(("task", "tasks"))
        for what, kind in both:
            trained = getattr(train, kind)
            for text, location in getattr(held, kind).items():
                if text in trained:
                    raise UserError(
                        f"{location}: the {what} {text[:60]!r} is trained on too "
                        f"({trained[text].rpartition('/')[2]}); leave it out of one of the two"
                    )


def read(path: Path) -> Seen:
    """The tasks, wordings and inputs of a file; see `check`."""
    seen, choices, answers, first = Seen(), {}, defaultdict(Counter), {}
    for location, row in read_rows(path):
        parsed = parse_row(location, row, lambda row: parse_item(row, NAMES, path.stem))
        if parsed is None or not row.get("task"):
            raise UserError(f"{location}: expected a task, an instruction and an answer")
        task, wordings, item = parsed
        if not item.choices:
            raise UserError(f"{location}: no column 'choices'; every row of an order has them")
        if choices.setdefault(task, item.choices) != item.choices:
            raise UserError(
                f"{location}: the choices {', '.join(item.choices)} are not those of {task!r} in "
                f"{first[task].rpartition('/')[2]}"
            )
        first.setdefault(task, location)
        answers[task][item.answer] += 1
        seen.tasks.setdefault(task, location)
        seen.inputs.setdefault(item.input, location)
        for wording in wordings:
            seen.wordings.setdefault(wording, location)
    for task, counts in answers.items():
        if len(counts) < len(choices[task]) or len(set(counts.values())) > 1:
            found = ", ".join(f"{choices[task][i]} {n}" for i, n in sorted(counts.items()))
            raise UserError(
                f"{first[task]}: the answers of {task!r} are not balanced ({found}); give as many "
                "rows of each"
            )
    return seen


def main(options: Options) -> None:
    made = make(options)
    write(options.output, made)
    for name, rows in made.items():
        tasks, wordings = ({row[key] for row in rows} for key in ("task", "instruction"))
        print(f"{name:16} {len(tasks):4} orders {len(wordings):6,} wordings {len(rows):7,} rows")


if __name__ == "__main__":
    try:
        if sys.argv[1:2] == ["--check"] and len(sys.argv) == 3:
            check(Path(sys.argv[2]))
        else:
            main(tyro.cli(Options, config=(tyro.conf.PositionalRequiredArgs,)))
    except UserError as error:
        sys.exit(f"orders: error: {error}")
