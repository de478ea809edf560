"""The report's numbers are those of the scores, and its methods are asked what they should be."""

import dataclasses
import json

import numpy as np
import pytest

from lorax_gen.data.config import WorldConfig
from lorax_gen.data.tasks import behind_prompt
from lorax_gen.data.world import FAMILIES
from lorax_gen.errors import UserError
from lorax_gen.evaluation import world as reports
from lorax_gen.evaluation.system import System
from lorax_gen.evaluation.world import METHODS, evaluate_world
from lorax_gen.method import take_example
from tests.tiny import make_generator

DATA = WorldConfig(families=FAMILIES[1:3])


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

    def plain(model, questions, *, lora=None):
        asked.append({"model": model, "questions": questions, "lora": lora})
        asked[-1]["right"] = rng.random(len(questions)) < 0.5
        return asked[-1]["right"]

    def specialised(system, prompts, questions):
        asked.append({"prompts": prompts, "questions": questions})
        asked[-1]["right"] = rng.random(len(questions)) < 0.5
        return asked[-1]["right"]

    monkeypatch.setattr(reports, "right_answers", plain)
    monkeypatch.setattr(reports, "right_specialised", specialised)
    monkeypatch.setattr(reports, "latency_ms", lambda model, texts, runs, rng: float(runs))
    return asked


def evaluate(system, **options):
    return evaluate_world(system, DATA, questions=3, latency_runs=4, **options)


def test_it_holds_what_it_promises(system, calls):
    report = evaluate(system, seed=5)
    assert set(report) == {
        "accuracy", "mean", "chance", "questions", "tasks", "context_tokens", "latency_ms",
        "seed", "split",
    }  # fmt: skip
    assert (report["seed"], report["split"]) == (5, "unseen")
    assert list(report["accuracy"]) == list(DATA.families)
    assert report["latency_ms"] == dict.fromkeys(METHODS, 4.0)
    for family, shares in report["accuracy"].items():
        tasks = DATA.world().select("unseen", family)
        assert set(shares) == set(METHODS)
        assert report["tasks"][family] == len(tasks)
        assert report["questions"][family] == 3 * len(tasks)
        assert report["chance"][family] == DATA.world().chance(family)
    assert json.loads(json.dumps(report)) == report


def test_shares_are_means_over_questions_and_means_are_over_families(system, calls):
    report = evaluate(system)
    shares = iter(float(call["right"].mean()) for call in calls)
    for family in DATA.families:
        for method in METHODS:
            assert report["accuracy"][family][method] == next(shares)
    for method in METHODS:
        of_families = [report["accuracy"][family][method] for family in DATA.families]
        assert report["mean"][method] == np.mean(of_families)


def test_every_method_is_asked_the_same_and_sees_what_it_should(system, calls):
    evaluate(system)
    for start in (0, 6):
        edge, edge_icl, edge_lora, cloud_icl, lora_gen, shuffled = calls[start : start + 6]
        bare = [pair for _, pair in lora_gen["questions"]]
        assert edge["questions"] == edge_lora["questions"] == bare
        assert lora_gen["questions"] == shuffled["questions"]
        prompts = [lora_gen["prompts"][task] for task, _ in lora_gen["questions"]]
        prompted = [(f"{p} {behind_prompt(q)}", a) for p, (q, a) in zip(prompts, bare, strict=True)]
        assert edge_icl["questions"] == cloud_icl["questions"] == prompted
        assert edge_lora["lora"] is system.lora and edge["lora"] is None
        assert edge["model"] is edge_icl["model"] is edge_lora["model"] is system.edge
        assert cloud_icl["model"] is system.cloud


@pytest.mark.parametrize("seed", range(3))
def test_the_shuffled_control_gives_every_task_the_prompt_of_another(system, calls, seed):
    evaluate(system, seed=seed)
    for own, shuffled in ((calls[4], calls[5]), (calls[10], calls[11])):
        assert sorted(own["prompts"]) == sorted(shuffled["prompts"])
        assert all(a != b for a, b in zip(own["prompts"], shuffled["prompts"], strict=True))


def test_context_tokens_count_the_prompt_where_it_is_read(system, calls):
    tokens = evaluate(system)["context_tokens"]
    tokenizer = system.edge.tokenizer

    def mean(*indices):
        texts = [text for i in indices for text, _ in calls[i]["questions"]]
        return np.mean([len(tokenizer(text)["input_ids"]) for text in texts])

    for method in ("edge", "edge_lora", "lora_gen", "lora_gen_shuffled"):
        assert tokens[method] == mean(0, 6)
    assert tokens["edge_icl"] == tokens["cloud_icl"] == mean(1, 7) > mean(0, 6) + 8


def test_a_seed_fixes_the_questions_and_the_split_the_tasks(system, calls):
    for options in ({}, {}, {"seed": 1}, {"split": "seen"}):
        evaluate(system, **options)
    first, again, other, seen = (calls[i]["questions"] for i in (1, 13, 25, 37))
    assert first == again != other
    assert not set(first) & set(seen) and len(seen) > 3 * len(first)


def test_without_a_baseline_there_is_no_row_for_it(system, calls):
    report = evaluate(dataclasses.replace(system, lora=None))
    for row in (report["mean"], report["accuracy"][FAMILIES[1]], report["context_tokens"]):
        assert set(row) == set(METHODS) - {"edge_lora"}


def test_models_that_the_generator_does_not_know_are_refused(system):
    with pytest.raises(UserError, match="pass the cloud model that it was trained with"):
        evaluate_world(dataclasses.replace(system, cloud=system.edge), DATA)


def test_a_whole_report_of_untrained_models(system):
    """Nothing stubbed: a model that has learned nothing is right about nothing."""
    data = WorldConfig(families=FAMILIES[2:3])
    report = evaluate_world(system, data, questions=1, latency_runs=2)
    assert set(report["accuracy"][FAMILIES[2]]) == set(METHODS)
    assert max(report["mean"].values()) < 0.1
    assert min(report["latency_ms"].values()) > 0
    served = reports.served(system, "edge_lora")
    assert served.fingerprint != system.edge.fingerprint
    assert reports.served(system, "lora_gen") is system.edge
    assert reports.served(system, "cloud_icl") is system.cloud
