"""The report's numbers are those of the scores, and its answerers are asked what they should be."""

import dataclasses
import json

import numpy as np
import pytest

from lorax_gen.data.config import WorldConfig
from lorax_gen.data.tasks import behind_prompt
from lorax_gen.data.world import FAMILIES
from lorax_gen.errors import UserError
from lorax_gen.evaluation import world as worlds
from lorax_gen.evaluation.answerers import Answerer, System
from lorax_gen.evaluation.world import NAMES, WorldQuiz, evaluate_world
from lorax_gen.method import take_example
from tests.tiny import make_generator

DATA = WorldConfig(families=FAMILIES[1:3])
COSTS = {"latency_ms": {"median": 2.0}, "memory_bytes": 1}


@pytest.fixture(scope="module")
def system(tiny_world_system):
    generator = make_generator(tiny_world_system)
    pool = {name: generator.params["pool"][name] for name in ("gate", "up", "down")}
    lora = take_example(pool, 0)  # any LoRA of the edge's shape: that of the first expert
    return System(tiny_world_system.edge, tiny_world_system.cloud, generator, lora)


@pytest.fixture
def calls(monkeypatch):
    """Scores are drawn instead of computed; yields what was asked, in order."""
    asked, rng = [], np.random.default_rng(0)

    def draw(answerer, cases, answers, *, mesh=None):
        prompts = None if answerer.name not in ("lora_gen", "shuffled") else cases.prompts()
        if answerer.name == "shuffled":
            prompts = cases.other_prompts()
        asked.append(
            {
                "answerer": answerer,
                "cases": cases,
                "contexts": [text for (text,) in answerer.contexts(cases)],
                "answers": answers,
                "prompts": prompts,
                "correct": rng.random(len(answers)) < 0.5,
            }
        )
        return asked[-1]["correct"]

    monkeypatch.setattr(worlds, "correct_answers", draw)
    monkeypatch.setattr(worlds, "serving_cost", lambda answerer, texts: COSTS)
    return asked


def evaluate(system, **options):
    return evaluate_world(system, DATA, questions=3, timed=4, **options)


def test_it_holds_what_it_promises(system, calls):
    report = evaluate(system, seed=5)
    assert report["settings"] == {"split": "unseen", "questions": 3, "seed": 5}
    assert list(report["columns"]) == list(DATA.families)
    assert list(report["rows"]) == list(NAMES)
    for family, column in report["columns"].items():
        tasks = DATA.world().select("unseen", family)
        assert column["tasks"] == len(tasks) and column["n"] == 3 * len(tasks)
        assert column["chance"] == DATA.world().chance(family)
        for row in report["rows"].values():
            assert row["cells"][family]["n"] == column["n"]
            assert row["latency_ms"] == COSTS["latency_ms"]
    assert json.loads(json.dumps(report)) == report


def test_shares_are_means_over_questions_and_means_are_over_families(system, calls):
    report = evaluate(system)
    drawn = iter(call["correct"] for call in calls)
    for family in DATA.families:
        for name in NAMES:
            correct, cell = next(drawn), report["rows"][name]["cells"][family]
            assert cell["score"] == correct.mean()
            assert cell["stderr"] == pytest.approx(correct.std(ddof=1) / len(correct) ** 0.5)
    for row in report["rows"].values():
        assert row["average"] == np.mean([cell["score"] for cell in row["cells"].values()])


def test_every_answerer_is_asked_the_same_and_sees_what_it_should(system, calls):
    evaluate(system)
    for start in (0, 6):
        plain, icl, lora, cloud_icl, lora_gen, shuffled = calls[start : start + 6]
        questions = plain["contexts"]
        for call in (lora, lora_gen, shuffled):
            assert call["contexts"] == questions
        for call in calls[start : start + 6]:
            assert call["answers"] == plain["answers"]
        prompted = [
            f"{prompt} {behind_prompt(question)}"
            for prompt, question in zip(lora_gen["prompts"], questions, strict=True)
        ]
        assert icl["contexts"] == cloud_icl["contexts"] == prompted
        assert plain["answerer"].model is icl["answerer"].model is system.edge
        assert lora["answerer"].model.fingerprint == system.edge.merged(system.lora).fingerprint
        assert cloud_icl["answerer"].model is system.cloud
        assert lora_gen["answerer"].generator is system.generator


@pytest.mark.parametrize("seed", range(3))
def test_the_shuffled_control_gives_every_task_the_prompt_of_another(system, calls, seed):
    evaluate(system, seed=seed)
    for own, shuffled in ((calls[4], calls[5]), (calls[10], calls[11])):
        assert sorted(own["cases"].texts) == sorted(shuffled["cases"].others)
        assert all(a != b for a, b in zip(own["prompts"], shuffled["prompts"], strict=True))


def test_context_tokens_count_the_prompt_where_it_is_read(system, calls):
    rows = evaluate(system)["rows"]
    tokenizer = system.edge.tokenizer

    def mean(key, *indices):
        texts = [text for i in indices for text in calls[i][key]]
        return np.mean([len(tokenizer(text)["input_ids"]) for text in texts])

    for name in ("plain", "lora", "lora_gen", "shuffled"):
        assert rows[name]["context_tokens"] == mean("contexts", 0, 6)
    icl = rows["icl"]["context_tokens"]
    assert icl == rows["cloud_icl"]["context_tokens"] == mean("contexts", 1, 7)
    assert icl > mean("contexts", 0, 6) + 8
    assert rows["lora_gen"]["prompt_tokens"] == mean("prompts", 4, 10)
    assert rows["icl"]["prompt_tokens"] == 0 == rows["icl"]["cloud_flops"]


def test_a_seed_fixes_the_questions_and_the_split_the_tasks(system, calls):
    for options in ({}, {}, {"seed": 1}, {"split": "seen"}):
        evaluate(system, **options)
    first, again, other, seen = (calls[i]["contexts"] for i in (1, 13, 25, 37))
    assert first == again != other
    assert not set(first) & set(seen) and len(seen) > 3 * len(first)


def test_without_a_baseline_there_is_no_row_for_it(system, calls):
    report = evaluate(dataclasses.replace(system, lora=None))
    assert list(report["rows"]) == [name for name in NAMES if name != "lora"]


def test_models_that_the_generator_does_not_know_are_refused(system):
    with pytest.raises(UserError, match="pass the cloud model that it was trained with"):
        evaluate_world(dataclasses.replace(system, cloud=system.edge), DATA)


def test_a_report_of_untrained_models(system):
    """Nothing stubbed: a model that has learned nothing is correct about nothing."""
    data = WorldConfig(families=FAMILIES[2:3])
    rows = evaluate_world(system, data, questions=1, timed=2)["rows"]
    assert list(rows) == list(NAMES)
    assert max(row["average"] for row in rows.values()) < 0.1
    assert min(row["latency_ms"]["median"] for row in rows.values()) > 0


def test_a_quiz_asks_every_task_and_counts_by_split_and_family(tiny_world_system):
    world, families = tiny_world_system.world, ("grade", "clock")
    quiz = WorldQuiz(world, families, per_task=3)
    asked = [
        task for split in ("seen", "unseen") for f in families for task in world.select(split, f)
    ]
    cases = quiz.cases
    assert len(cases.texts) == len(asked) and len(cases.questions) == 3 * len(asked)
    for (i, (question, answer)), (bare,), (prompted,), prompt, told in zip(
        cases.questions,
        cases.bare(),
        cases.prompted(),
        cases.prompts(),
        cases.answers,
        strict=True,
    ):
        assert (question, answer) in asked[i].questions
        assert (bare, prompt, told) == (question, cases.texts[i], answer)
        assert prompted == f"{prompt} {behind_prompt(question)}"
    found = quiz.shares(np.array([asked[i].family == "clock" for i, _ in cases.questions]))
    assert found["accuracy/seen/clock"] == found["accuracy/unseen/clock"] == 1.0
    assert found["accuracy/seen/grade"] == 0.0 and found["accuracy/unseen"] == 0.5


def test_who_is_fitted_is_fitted_to_each_task_and_asked_its_questions_alone(system, calls):
    """To solved examples of the task that are not asked."""
    fits = []

    @dataclasses.dataclass(frozen=True, eq=False)
    class Fitted(Answerer):
        is_fitted = True
        task: str = ""

        def fit(self, task, shots):
            fits.append((task, shots))
            return dataclasses.replace(self, task=task)

    own = Fitted("fitted", "fitted", system.edge)
    world = dataclasses.replace(system, others={"fitted": own})
    report = evaluate(world, names=["plain", "fitted"])
    calls = [call for call in calls if call["answerer"].name == "fitted"]
    tasks = [task for family in DATA.families for task in DATA.world().select("unseen", family)]
    assert len(calls) == len(fits) == len(tasks)
    for call, (text, shots), task in zip(calls, fits, tasks, strict=True):
        assert call["answerer"].task == text == call["cases"].texts[0]
        known = {(question, f" {answer}") for question, answer in task.questions}
        asked = {(question, f" {answer}") for _, (question, answer) in call["cases"].questions}
        assert len(asked) == 3 and asked <= known and 1 <= len(shots) <= 5
        assert set(shots) <= known - asked
    correct = np.concatenate([call["correct"] for call in calls])
    cells = report["rows"]["fitted"]["cells"]
    assert sum(cell["score"] * cell["n"] for cell in cells.values()) == pytest.approx(correct.sum())
