"""The embedded world: a small synthetic domain of words, things and tasks for the full method.

64 things have eight attributes of four values each, graded from one to four; twelve tongues have
their own words for numbers. Four families of tasks are described by an English system prompt:

    sort    put a thing into one of four boxes by an attribute     8 attributes x 24 assignments
    grade   grade a thing by an attribute, in a tongue             8 attributes x 12 tongues
    clock   add hours to an hour and say the result in a tongue    12 shifts x 12 tongues
    check   say one word if a thing has a value, else another      32 values x 12 ordered pairs

In each family one combination in five is **unseen**: no language model and no generator is trained
on its prompt. Every factor of an unseen task occurs in seen ones.

The correct answer to an input such as `apple :` or `five :` depends on the task, so a model cannot
know it without the task. `World.chance` is the accuracy of the best guess without it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from lorax_gen.data.tasks import Task, behind_prompt

T = TypeVar("T")
Table = dict[str, dict[str, str]]

FAMILIES = ("sort", "grade", "clock", "check")
ATTRIBUTES = {
    "color": ("red", "blue", "green", "white"),
    "size": ("tiny", "small", "big", "huge"),
    "material": ("wood", "stone", "metal", "glass"),
    "place": ("kitchen", "garden", "forest", "harbor"),
    "shape": ("round", "square", "flat", "long"),
    "owner": ("king", "baker", "sailor", "miller"),
    "season": ("spring", "summer", "autumn", "winter"),
    "age": ("new", "young", "old", "ancient"),
}
THINGS = tuple(
    "apple anchor arrow barrel basket bell blanket boat bottle bowl box brick bridge broom bucket "
    "button candle carpet cart chain chair clock coin comb cradle crown cup curtain desk dish doll "
    "door drum fan feather fence fiddle flag flute fork gate globe glove hammer hat helmet hook "
    "kettle key kite knife ladder lamp lantern lock mirror needle pillow rope saddle scarf shovel "
    "table wheel".split()
)
HOURS = tuple("one two three four five six seven eight nine ten eleven twelve".split())
BOXES = ("alpha", "beta", "gamma", "delta")
TONGUES = 12
HELD_OUT = 5  # one task in about five is unseen

# Each family's task descriptions in three wordings; tasks fill in the parts in braces.
TEMPLATES = {
    "sort": (
        "Put each thing into a box by its {attribute} : {pairs} .",
        "Sort the things . Look at the {attribute} of the thing , then {pairs} .",
        "You are a porter . The {attribute} decides the box : {pairs} .",
    ),
    "grade": (
        "Grade each thing by its {attribute} and say the grade in {tongue} .",
        "You speak {tongue} . Tell us the grade of the thing by its {attribute} .",
        "Give the grade of each thing 's {attribute} , and use the words of {tongue} .",
    ),
    "clock": (
        "Add {hour} to the hour and say it in {tongue} .",
        "You speak {tongue} . Turn the clock on by {hour} and tell us the hour .",
        "The clock is slow by {hour} . Name the right hour in the words of {tongue} .",
    ),
    "check": (
        "Look at the {attribute} of each thing : {value}={yes} , else={no} .",
        "You are a guard . Judge things by their {attribute} : {value}={yes} , else={no} .",
        "The {attribute} of the thing decides what you say : {value}={yes} , else={no} .",
    ),
}


@dataclasses.dataclass(frozen=True, eq=False)
class World:
    """Facts, `facts[thing][attribute]`, words, `words[tongue][english word]`, and tasks."""

    facts: Table
    words: Table
    tasks: tuple[Task, ...]

    @functools.cache  # noqa: B019 (worlds live as long as the process)
    def select(self, split: str, family: str | None = None) -> list[Task]:
        """The tasks of a split (`seen` or `unseen`), of one family or of all."""
        return [t for t in self.tasks if t.split == split and family in (None, t.family)]

    def chance(self, family: str) -> float:
        """Accuracy on unseen questions of the best guess without the task.

        For each input the guess is the most frequent answer over all tasks of the family, drawn
        uniformly where several tie.
        """
        answers: dict[str, Counter] = {}
        for task in self.tasks:
            for question, answer in task.questions:
                if task.family == family:
                    answers.setdefault(question, Counter())[answer] += 1
        correct = []
        for task in self.select("unseen", family):
            for question, answer in task.questions:
                counts = answers[question]
                top = [a for a, count in counts.items() if count == max(counts.values())]
                correct.append((answer in top) / len(top))
        return float(np.mean(correct))


def _pseudo_words(rng: np.random.Generator, count: int, syllables: int) -> list[str]:
    """Distinct made-up words of consonant-vowel syllables."""
    parts = ["".join(p) for p in itertools.product("bdfgklmnprstvz", "aeiou")]
    made: dict[str, None] = {}
    while len(made) < count:
        made["".join(rng.choice(parts, syllables))] = None
    return list(made)


def _held_out(rng: np.random.Generator, count: int) -> set[int]:
    return set(rng.permutation(count)[: count // HELD_OUT].tolist())


@functools.cache
def make_world(seed: int = 0) -> World:
    """Builds the world of a seed; the shipped models are trained on the world of seed 0."""
    rng = np.random.default_rng(seed)
    # Each value belongs to exactly a quarter of the things, so no value is a better guess.
    columns = {
        attribute: rng.permutation(np.repeat(values, len(THINGS) // len(values)))
        for attribute, values in ATTRIBUTES.items()
    }
    facts = {t: {a: str(columns[a][i]) for a in ATTRIBUTES} for i, t in enumerate(THINGS)}
    tongues = [stem + "ish" for stem in _pseudo_words(rng, TONGUES, 2)]
    spoken = _pseudo_words(rng, TONGUES * len(HOURS), 3)
    words = {
        tongue: dict(zip(HOURS, spoken[i::TONGUES], strict=True))
        for i, tongue in enumerate(tongues)
    }

    families = {
        "sort": [
            _sort_task(facts, attribute, boxes)
            for attribute in ATTRIBUTES
            for boxes in itertools.permutations(BOXES)
        ],
        "grade": [
            _grade_task(facts, words, attribute, tongue)
            for attribute in ATTRIBUTES
            for tongue in tongues
        ],
        "clock": [_clock_task(words, shift, tongue) for shift in HOURS for tongue in tongues],
        "check": [
            _check_task(facts, rng, attribute, value, yes, no)
            for attribute, group in ATTRIBUTES.items()
            for value in group
            for yes, no in itertools.permutations(BOXES, 2)
        ],
    }
    tasks: list[Task] = []
    for family in FAMILIES:
        unseen = _held_out(rng, len(families[family]))
        for i, task in enumerate(families[family]):
            tasks.append(dataclasses.replace(task, split="unseen" if i in unseen else "seen"))
    return World(facts, words, tuple(tasks))


def _sort_task(facts: Table, attribute: str, boxes: Sequence[str]) -> Task:
    box = dict(zip(ATTRIBUTES[attribute], boxes, strict=True))
    return Task(
        family="sort",
        name=f"sort-{attribute}-{'-'.join(boxes)}",
        templates=TEMPLATES["sort"],
        slots={"attribute": attribute},
        pairs=tuple(f"{value}={name}" for value, name in box.items()),
        questions=tuple((f"{thing} :", box[facts[thing][attribute]]) for thing in facts),
        drills=tuple((value, name) for value, name in box.items()),
    )


def grade_of(attribute: str, value: str) -> str:
    """The position of a value among those of its attribute, from one, as a word of `HOURS`."""
    return HOURS[ATTRIBUTES[attribute].index(value)]


def _grade_task(facts: Table, words: Table, attribute: str, tongue: str) -> Task:
    return Task(
        family="grade",
        name=f"grade-{attribute}-{tongue}",
        templates=TEMPLATES["grade"],
        slots={"attribute": attribute, "tongue": tongue},
        questions=tuple(
            (f"{thing} :", words[tongue][grade_of(attribute, facts[thing][attribute])])
            for thing in facts
        ),
    )


def _clock_task(words: Table, shift: str, tongue: str) -> Task:
    turn = HOURS.index(shift) + 1
    return Task(
        family="clock",
        name=f"clock-{shift}-{tongue}",
        templates=TEMPLATES["clock"],
        slots={"hour": shift, "tongue": tongue},
        questions=tuple(
            (f"{hour} :", words[tongue][HOURS[(i + turn) % 12]]) for i, hour in enumerate(HOURS)
        ),
    )


def _check_task(
    facts: Table, rng: np.random.Generator, attribute: str, value: str, yes: str, no: str
) -> Task:
    """Half of the questions are about things that have the value, so neither word is favoured."""
    having = [t for t in facts if facts[t][attribute] == value]
    others = rng.choice([t for t in facts if facts[t][attribute] != value], len(having), False)
    return Task(
        family="check",
        name=f"check-{value}-{yes}-{no}",
        templates=TEMPLATES["check"],
        slots={"attribute": attribute, "value": value, "yes": yes, "no": no},
        questions=(
            *((f"{thing} :", yes) for thing in having),
            *((f"{thing} :", no) for thing in others.tolist()),
        ),
        drills=tuple((v, yes if v == value else no) for v in ATTRIBUTES[attribute]),
    )


# --- text for language models --------------------------------------------------------------------

Piece = tuple[str, bool]  # text, and whether its tokens are in the loss


def lesson(world: World, rng: np.random.Generator) -> list[Piece]:
    """A short document that teaches one fact or skill, after a cue of a few words.

    What the edge model needs to know before any task: attributes of things, words of tongues,
    arithmetic of the clock, each alone and chained. One in five has no cue, and the answer of a
    random seen task: a bare question belongs to no task in particular.
    """
    if rng.random() < 0.2:
        tasks = world.select("seen", FAMILIES[rng.integers(len(FAMILIES))])
        question, answer = _pick(rng, _pick(rng, tasks).questions)
        return [(question, False), (answer, True)]
    thing, attribute = _pick(rng, THINGS), _pick(rng, tuple(ATTRIBUTES))
    value = world.facts[thing][attribute]
    grade = grade_of(attribute, value)
    tongue, kind = _pick(rng, tuple(world.words)), rng.integers(6)
    start, shift = rng.integers(12), rng.integers(12)
    hour = HOURS[(start + shift + 1) % 12]
    question, answer = (
        (f"{attribute} {thing} :", value),
        (f"grade {value} :", grade),
        (f"{tongue} {attribute} {thing} :", world.words[tongue][grade]),
        (f"{tongue} {HOURS[start]} :", world.words[tongue][HOURS[start]]),
        (f"{tongue} {HOURS[shift]} {HOURS[start]} :", world.words[tongue][hour]),
        (f"{HOURS[shift]} {HOURS[start]} :", hour),
    )[kind]
    return [(question, False), (answer, True)]


def exercise(world: World, rng: np.random.Generator, questions: int) -> list[Piece]:
    """A document with a seen task's system prompt and several of its questions, answered.

    Three in four are of the families whose prompts must be read closely, and half of those ask
    drills: reading the prompt is learned before combining it with facts about things.
    """
    family = str(rng.choice(FAMILIES, p=(3 / 8, 1 / 8, 1 / 8, 3 / 8)))
    task = _pick(rng, world.select("seen", family))
    source = task.drills if task.drills and rng.random() < 1 / 2 else task.questions
    pieces: list[Piece] = [(task.prompt(rng), False)]
    for i in rng.integers(0, len(source), questions):
        question, answer = source[i]
        pieces += [(behind_prompt(question), False), (answer, True), (".", False)]
    return pieces[:-1]  # the end of the text follows the last answer


def vocabulary(world: World) -> list[str]:
    """Every word of the world, in a fixed order."""
    values = [value for group in ATTRIBUTES.values() for value in group]
    templates = " ".join(template for group in TEMPLATES.values() for template in group)
    plain = [word.lower() for word in templates.split() if "{" not in word]
    spoken = [word for tongue, words in world.words.items() for word in (tongue, *words.values())]
    pairs = [f"{key}={box}" for key in (*values, "else") for box in BOXES]
    words = [*plain, ":", ",", *THINGS, *HOURS, *BOXES, *ATTRIBUTES, *values, *spoken, *pairs]
    return list(dict.fromkeys(words))


def _pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    return items[int(rng.integers(len(items)))]
