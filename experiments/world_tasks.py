"""Makes the example of own tasks: twelve tasks in the words of the embedded world, as rows.

    python experiments/world_tasks.py lorax_gen/assets/world/tasks.jsonl

A task grades things by an attribute (color, size, material or place) and says the grade in a tongue
(three of them). Each has 64 rows, one for each thing, and six wordings of its prompt. The rows of a
task have one of four forms, as rows of one's own may have any.
"""

import json
import sys
from pathlib import Path

from lorax_gen import files
from lorax_gen.data.world import ATTRIBUTES, HOURS, THINGS, grade_of, make_world

WORDINGS = (
    "Grade each thing by its {attribute} and say the grade in {tongue} .",
    "You speak {tongue} . Tell us the grade of the thing by its {attribute} .",
    "Look at the {attribute} of the thing and give the grade in {tongue} .",
    "Say in the words of {tongue} the grade of each thing 's {attribute} .",
    "The {attribute} decides the grade . Say it in {tongue} .",
    "Name the grade of the {attribute} , in {tongue} .",
)


def rows():
    """The rows of all tasks, in order."""
    world = make_world(0)
    tasks = [(a, t) for a in list(ATTRIBUTES)[:4] for t in list(world.words)[:3]]
    for number, (attribute, tongue) in enumerate(tasks):
        words = [world.words[tongue][grade] for grade in HOURS[:4]]
        for i, thing in enumerate(THINGS):
            wording = WORDINGS[i % len(WORDINGS)].format(attribute=attribute, tongue=tongue)
            grade = HOURS.index(grade_of(attribute, world.facts[thing][attribute]))
            row = form(number % 4, wording, thing, words, grade)
            yield {"task": f"{attribute} in {tongue}", **row}


def form(number, wording, thing, words, grade):
    """A row: an input with its output, or with choices; turns of a chat; prompt and completion."""
    answer = words[grade]
    if number == 0:
        return {"instruction": wording, "input": thing, "output": answer}
    if number == 1:
        return {"instruction": wording, "input": thing, "choices": words, "answer": grade}
    if number == 2:
        roles, texts = ("system", "user", "assistant"), (wording, thing, answer)
        turns = zip(roles, texts, strict=True)
        return {"messages": [{"role": role, "content": text} for role, text in turns]}
    return {"instruction": wording, "prompt": thing, "completion": answer}


if __name__ == "__main__":
    with files.new_file(Path(sys.argv[1])) as path:
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows()))
