"""Models that were really trained, through the evaluator: they know what they should."""

import json
import lzma

import numpy as np
import pytest

from lorax_gen import cli, load_generator, load_model
from lorax_gen.data.benchmarks import BENCHMARKS, Benchmark
from lorax_gen.data.config import WorldConfig
from lorax_gen.data.questions import Question
from lorax_gen.evaluation.answerers import System
from lorax_gen.evaluation.benchmark import evaluate_benchmark
from lorax_gen.inference.cards import gates_of_prompts
from lorax_gen.inference.choices import encode_items, score_items
from lorax_gen.system import gated_pool

STORIES = Benchmark(  # a ninth benchmark is a record
    name="stories",
    title="Story",
    description="Go on with the story.",
    template="{question}",
    hub=BENCHMARKS["piqa"].hub,
    columns=BENCHMARKS["piqa"].columns,
)


def endings(path, count=60):
    """How a story goes on behind its first sentences, among the next ones of three others."""
    stories = [
        [sentence.strip() + "." for sentence in story.replace("\n", " ").split(".")]
        for story in lzma.decompress(path.read_bytes()).decode().split("\n\n")
    ]
    stories = [s for s in stories if len(s) > 4 and all(20 < len(x) < 120 for x in s[:4])]
    rng, questions = np.random.default_rng(0), []
    for i, story in enumerate(stories[:count]):
        others = [stories[j][3] for j in rng.permutation(len(stories))[:4].tolist() if j != i][:3]
        answer = int(rng.integers(4))
        choices = others[:answer] + [story[3]] + others[answer:]
        questions.append(Question(str(i), " ".join(story[:3]), tuple(choices), answer))
    return questions


def test_a_model_of_stories_knows_how_a_story_goes_on(stories260k, shared_data):
    questions = endings(shared_data / "corpora" / "tinystories_cased_0.9MB.txt.xz")
    edge = load_model(stories260k)
    found = evaluate_benchmark(STORIES, questions, System(edge).answerer("plain"))
    assert found.n == 60
    assert max(found.acc, found.acc_norm) > 0.25 + 4 * found.acc_stderr


def test_the_command_evaluates_the_shipped_models(shared_data, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([
            "evaluate", "arc_easy", "--data-dir", str(shared_data), "--limit", "4", "--shots", "1",
            "--modes", "plain", "icl", "lora_gen", "empty", "--run-dir", str(tmp_path / "run"),
        ])  # fmt: skip
    assert stop.value.code == 0 and "edge + LoRA-Gen" in capsys.readouterr().out
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert set(report["rows"]) == {"plain", "icl", "lora_gen", "empty"}


def test_tasks_of_the_world_are_choices_too():
    """The shipped generator, by the evaluator of the benchmarks: right far beyond chance."""
    rng, world = np.random.default_rng(0), WorldConfig().world()
    cloud, edge = load_model("world/cloud"), load_model("world/edge")
    generator = load_generator("world/generator")
    prompts, questions, right = [], [], []
    for task in world.select("unseen", "grade")[:8]:
        prompt, answers = task.prompt(rng), sorted({answer for _, answer in task.questions})
        for question, answer in task.sample(rng, 4):
            prompts.append(cloud.tokenizer(prompt)["input_ids"])
            questions.append(([f"<bos> {question}"], [f" {choice}" for choice in answers]))
            right.append(answers.index(answer))
    items = encode_items(edge, questions)
    gates = gates_of_prompts(prompts, cloud, edge, generator)
    scores = score_items(
        edge, items, adapter=gated_pool(generator.params["pool"], gates, generator.config)
    )
    bare = score_items(edge, items)
    chosen, guessed = (
        np.mean([np.argmax(s.loglikelihoods) == r for s, r in zip(found, right, strict=True)])
        for found in (scores, bare)
    )
    assert chosen > 0.9 and guessed < 0.6
