"""The world is consistent, its unseen tasks stay unseen, and guessing does not pay."""

from collections import Counter

import numpy as np
import pytest

from lorax_gen.data.config import WorldConfig
from lorax_gen.data.tasks import behind_prompt
from lorax_gen.data.tokens import Encoder
from lorax_gen.data.world import (
    ATTRIBUTES,
    BOXES,
    FAMILIES,
    HOURS,
    TEMPLATES,
    THINGS,
    exercise,
    grade_of,
    lesson,
    make_world,
    vocabulary,
)
from lorax_gen.data.world_batches import generator_batch
from lorax_gen.tokenizers import word_level

SIZES = {"sort": 8 * 24, "grade": 8 * 12, "clock": 12 * 12, "check": 32 * 12}


@pytest.fixture(scope="module")
def world():
    return make_world(0)


@pytest.fixture(scope="module")
def tokenizer(world):
    return word_level(vocabulary(world))


def wordings(task):
    """Every wording of a task's prompt, pairs in their first order."""
    return [t.format(pairs=" , ".join(task.pairs), **task.slots) for t in task.templates]


def bag(text):
    """A prompt's words without their order, which is all that the order of pairs changes."""
    return tuple(sorted(text.lower().split()))


@pytest.fixture(scope="module")
def split_of(world):
    """`bag` of a prompt without examples -> split."""
    return {bag(text): task.split for task in world.tasks for text in wordings(task)}


def words_of(question):
    """A question without the colon that ends it."""
    return tuple(word for word in question.split() if word != ":")


# --- what the world is made of -------------------------------------------------------------------


def test_a_seed_makes_one_world_and_another_seed_another(world):
    again, other = make_world.__wrapped__(0), make_world.__wrapped__(1)
    assert again is not world
    assert (again.facts, again.words, again.tasks) == (world.facts, world.words, world.tasks)
    assert vocabulary(again) == vocabulary(world)
    assert other.facts != world.facts
    assert other.words != world.words


def test_each_value_belongs_to_a_quarter_of_the_things(world):
    for attribute, values in ATTRIBUTES.items():
        counts = Counter(world.facts[thing][attribute] for thing in THINGS)
        assert counts == dict.fromkeys(values, len(THINGS) // 4)


def test_no_two_meanings_share_a_word(world):
    values = [value for group in ATTRIBUTES.values() for value in group]
    spoken = [word for words in world.words.values() for word in words.values()]
    english = [*values, *HOURS, *BOXES, *ATTRIBUTES, *THINGS]
    every = [*spoken, *world.words, *english]
    assert len(set(every)) == len(every) == 12 * 12 + 12 + len(english)


def test_families_are_whole_and_one_task_in_five_is_unseen(world):
    for family, size in SIZES.items():
        seen, unseen = world.select("seen", family), world.select("unseen", family)
        assert len(seen) + len(unseen) == size
        assert len(unseen) == size // 5
    assert len(world.select("seen")) + len(world.select("unseen")) == sum(SIZES.values())
    assert len({task.name for task in world.tasks}) == len(world.tasks)


def test_every_prompt_belongs_to_one_task(world, split_of):
    assert len(split_of) == sum(len(TEMPLATES[task.family]) for task in world.tasks)


# --- questions -----------------------------------------------------------------------------------


def later(hour, shift):
    return HOURS[(HOURS.index(hour) + HOURS.index(shift) + 1) % 12]


def right_answer(world, task, question):
    """What the prompt asks for, worked out from its slots and pairs."""
    (asked,), slots = words_of(question), task.slots
    if task.family == "clock":
        return world.words[slots["tongue"]][later(asked, slots["hour"])]
    value = world.facts[asked][slots["attribute"]]
    if task.family == "sort":
        return dict(pair.split("=") for pair in task.pairs)[value]
    if task.family == "grade":
        place = ATTRIBUTES[slots["attribute"]].index(value)
        return world.words[slots["tongue"]][("one", "two", "three", "four")[place]]
    return slots["yes"] if value == slots["value"] else slots["no"]


def test_every_question_has_the_one_answer_that_the_facts_give(world):
    for task in world.tasks:
        assert len(dict(task.questions)) == len(task.questions), task.name
        for question, answer in task.questions:
            assert answer == right_answer(world, task, question), (task.name, question)


def test_the_clock_turns_past_twelve(world):
    tongue = next(iter(world.words))
    two = next(t for t in world.tasks if t.name == f"clock-two-{tongue}")
    answers = {words_of(question)[0]: answer for question, answer in two.questions}
    assert answers["nine"] == world.words[tongue]["eleven"]
    assert answers["eleven"] == world.words[tongue]["one"]


def test_drills_name_outright_what_a_question_leaves_to_be_known(world):
    for task in world.tasks:
        assert bool(task.drills) == (task.family in ("sort", "check"))
        answers = {words_of(question)[0]: answer for question, answer in task.drills}
        for question, answer in task.questions if task.drills else ():
            value = world.facts[words_of(question)[0]][task.slots["attribute"]]
            assert answers[value] == answer


def test_tasks_favour_no_answer(world):
    for task in world.tasks:
        counts = Counter(answer for _, answer in task.questions)
        assert len(set(counts.values())) == 1, task.name
        kinds = {"sort": 4, "grade": 4, "clock": 12, "check": 2}
        assert len(counts) == kinds[task.family]


# --- chance --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family, share", [("sort", 1 / 4), ("clock", 1 / 144)])
def test_chance_is_what_counting_on_paper_says(world, family, share):
    assert world.chance(family) == pytest.approx(share)


@pytest.mark.parametrize("family", FAMILIES)
def test_chance_is_what_the_best_guesser_reaches(world, family):
    """He knows how often each answer is right for an input and draws among the best of them."""
    tasks = [(task, dict(task.questions)) for task in world.tasks if task.family == family]
    best = {}
    for question in {question for _, answers in tasks for question in answers}:
        given = [answers[question] for _, answers in tasks if question in answers]
        times = {answer: given.count(answer) for answer in set(given)}
        best[question] = [a for a in times if times[a] == max(times.values())]
    expected = [
        answer in best[question] and 1 / len(best[question])
        for task, answers in tasks
        if task.split == "unseen"
        for question, answer in answers.items()
    ]
    assert world.chance(family) == pytest.approx(np.mean(expected))
    assert world.chance(family) < 0.3


# --- unseen stays unseen -------------------------------------------------------------------------


def factors(task):
    """Attribute, tongue, shift, value, answer words, and which box stands for which value."""
    return {*task.slots.items(), *task.pairs}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_factor_of_an_unseen_task_occurs_in_seen_ones(world, family):
    seen = set().union(*(factors(task) for task in world.select("seen", family)))
    for task in world.select("unseen", family):
        assert factors(task) <= seen, task.name


def test_exercises_are_about_no_unseen_task(world, split_of):
    rng = np.random.default_rng(0)
    drawn = Counter(split_of[bag(exercise(world, rng, 1)[0][0])] for _ in range(6000))
    assert drawn == {"seen": 6000}


def test_an_exercise_answers_the_questions_of_its_task(world):
    rng = np.random.default_rng(0)
    pairs = {
        bag(text): {(behind_prompt(q), answer) for q, answer in (*task.questions, *task.drills)}
        for task in world.tasks
        for text in wordings(task)
    }
    for _ in range(200):
        prompt, *rest = exercise(world, rng, 3)
        asked, answers = rest[::3], rest[1::3]
        assert len(asked) == len(answers) == 3
        for (question, trained), (answer, marked) in zip(asked, answers, strict=True):
            assert (question, answer) in pairs[bag(prompt[0])]
            assert ":" not in question
            assert (trained, marked) == (False, True)


def test_lessons_without_a_cue_are_of_seen_tasks_and_the_others_are_true(world):
    """In `grade` and `clock` a question with its answer nearly gives the task away."""
    facts = {(a, t): world.facts[t][a] for t in THINGS for a in ATTRIBUTES}
    facts |= {("grade", value): grade_of(a, value) for a in ATTRIBUTES for value in ATTRIBUTES[a]}
    facts |= {(shift, hour): later(hour, shift) for hour in HOURS for shift in HOURS}
    seen, unseen = (
        {pair for task in world.select(split) for pair in task.questions}
        for split in ("seen", "unseen")
    )
    assert unseen - seen  # so that a lesson of an unseen task would be found out
    bare, rng = 0, np.random.default_rng(0)
    for _ in range(6000):
        (question, asked), (answer, trained) = lesson(world, rng)
        assert (asked, trained) == (False, True)
        cue = words_of(question)
        if len(cue) == 1:
            bare += 1
            assert (question, answer) in seen
        elif cue[0] in world.words:
            meaning = facts[cue[1:]] if len(cue) == 3 else cue[1]
            meaning = meaning if meaning in HOURS else facts["grade", meaning]
            assert answer == world.words[cue[0]][meaning]
        else:
            assert answer == facts[cue]
    assert 0.15 < bare / 6000 < 0.25


def test_generator_batches_hold_no_unseen_prompt(world, tokenizer, split_of):
    encoder, seen, shape = Encoder(tokenizer), world.select("seen"), WorldConfig()
    for step in range(40):
        batch = generator_batch(
            seen, encoder, encoder, seed=0, step=step, prompts=64, queries=1,
            prompt_length=shape.prompt_length, question_length=shape.question_length,
        )  # fmt: skip
        for row, length in zip(batch["prompt"], batch["prompt_lengths"], strict=True):
            words = tokenizer.convert_ids_to_tokens(row[1:length].tolist())
            assert split_of[tuple(sorted(words))] == "seen"


# --- words ---------------------------------------------------------------------------------------


def test_the_tokenizer_knows_every_word_and_an_answer_is_one_token(world, tokenizer):
    rng = np.random.default_rng(0)
    texts = {task.prompt(rng, shots=2) for task in world.tasks for _ in range(3)}
    texts |= {piece for _ in range(500) for piece, _ in lesson(world, rng)}
    pairs = {pair for task in world.tasks for pair in (*task.questions, *task.drills)}
    texts |= {question for question, _ in pairs}
    for text in texts:
        assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"], text
    for answer in {answer for _, answer in pairs}:
        begin, token = tokenizer(answer)["input_ids"]
        assert begin == tokenizer.bos_token_id
        assert token >= 4  # none of the special tokens
    assert len(tokenizer) == 4 + len(vocabulary(world))


def test_prompts_are_filled_in_and_fit_into_the_default_length(world, tokenizer):
    texts = [text for task in world.tasks for text in wordings(task)]
    assert not any(brace in text for text in texts for brace in "{}")
    assert max(len(ids) for ids in tokenizer(texts)["input_ids"]) <= WorldConfig().prompt_length
