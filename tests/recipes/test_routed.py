"""Runs of the token-routed baselines and of prompts in context: trained, stopped, resumed,
released, loaded and evaluated; the same on any mesh."""

import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pytest

from lorax_gen import config as configs
from lorax_gen.artifacts.baseline import load_baseline
from lorax_gen.artifacts.export import lora_of
from lorax_gen.baselines.loramoe import LoraMoeConfig
from lorax_gen.baselines.mixlora import MixLoraConfig
from lorax_gen.data.config import WorldConfig
from lorax_gen.data.world import FAMILIES
from lorax_gen.errors import UserError
from lorax_gen.evaluation.answerers import System
from lorax_gen.mesh import sharding
from lorax_gen.mesh.sharding import MeshConfig
from lorax_gen.models.huggingface import load_model
from lorax_gen.recipes.lora import LoraConfig
from lorax_gen.recipes.loramoe import LoraMoeTraining
from lorax_gen.recipes.mixlora import MixLoraTraining
from lorax_gen.recipes.registry import RECIPES, answerer_of
from lorax_gen.training.loop import Interrupted, fit
from lorax_gen.training.optimizer import OptimizerConfig
from lorax_gen.training.run import RunConfig
from tests.tiny import write_system


@pytest.fixture(scope="module")
def edge_directory(tiny_world_system, tmp_path_factory):
    return write_system(tmp_path_factory.mktemp("system"), tiny_world_system) / "edge"


@pytest.fixture(scope="module")
def make(edge_directory):
    """`make(method, **changes)`: a tiny config in the world."""

    def make(method, **changes):
        own = {
            "lora": (LoraConfig, {"rank": 2}),
            "loramoe": (
                LoraMoeTraining,
                {"adapter": LoraMoeConfig(n_experts=3, rank=2), "balance": 0.1,
                 "balance_tasks": FAMILIES[:1]},
            ),
            "mixlora": (MixLoraTraining, {"adapter": MixLoraConfig(n_experts=3, rank=2)}),
        }  # fmt: skip
        cls, options = own[method]
        options |= {
            "edge": str(edge_directory),
            "batch_size": 8,
            "data": WorldConfig(families=FAMILIES[:2]),
            "run": RunConfig(steps=4, log_every=1, checkpoint_every=2, evaluate_every=4),
            "optimizer": OptimizerConfig(learning_rate=0.01, warmup_steps=0),
        }
        return cls(**options | changes)

    return make


def train(method, config, run_dir, batch=lambda step: None):
    """`batch(step)` is called before each step."""
    made = RECIPES[method].experiment(config)

    def watched(step):
        batch(step)
        return made.batch(step)

    resolved = {"method": method, **configs.to_dict(config)}
    return fit(dataclasses.replace(made, batch=watched), run_dir, resolved)


@pytest.mark.parametrize("method", ["loramoe", "mixlora"])
def test_a_run_is_released_loaded_and_resumes_with_the_same_bytes(
    make, method, edge_directory, tmp_path
):
    config = make(method, in_context=method == "loramoe")
    released = train(method, config, tmp_path / "run")
    rows = [json.loads(line) for line in (released / "metrics.jsonl").read_text().splitlines()]
    for row in (row for row in rows if "loss" in row):
        np.testing.assert_allclose(row["loss"], row["loss_lm"] + row["loss_balance"], rtol=1e-5)
        assert row["loss_balance"] > 0

    baseline, edge = load_baseline(released), load_model(edge_directory)
    assert baseline.method == method and baseline.in_context == config.in_context
    made = answerer_of(baseline, edge)
    assert (made.name, made.in_context) == (method, config.in_context)
    quiz = (
        RECIPES[method]
        .experiment(config)
        .evaluate({"params": baseline.params, "stats": {}, "step": 4})
    )
    assert {k: rows[-1][k] for k in quiz} == pytest.approx(quiz, abs=1e-6)
    assert made.macs(10).lora > 0

    def stop(step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        train(method, config, tmp_path / "stopped", stop)
    again = train(method, config, tmp_path / "stopped")
    for name in ("baseline.json", "baseline.safetensors"):
        if name.endswith("json"):  # provenance has rates
            ours, theirs = (json.loads((own / name).read_text()) for own in (again, released))
            assert ours["digest"] == theirs["digest"]
        else:
            assert (again / name).read_bytes() == (released / name).read_bytes()

    other = dataclasses.replace(edge, params=edge.params | {"embed": edge.params["embed"] + 1})
    with pytest.raises(UserError, match="was trained with the edge model"):
        answerer_of(baseline, other)
    wider = dataclasses.replace(baseline, config=baseline.config | {"rank": 5})
    with pytest.raises(UserError, match="its config makes it"):
        answerer_of(wider, edge)


@pytest.mark.parametrize("method", ["loramoe", "mixlora"])
def test_a_step_is_the_same_on_any_mesh(make, method):
    """Balance losses included, which are not means over rows. Without dropout, whose noise pmap
    draws for each device."""
    found = {}
    for name, mesh, devices in (
        ("jit-1", MeshConfig(), 1),
        ("jit-8", MeshConfig(data=2, fsdp=2, tensor=2), 8),
        ("pmap-8", MeshConfig(mode="pmap"), 8),
    ):
        config = make(method, mesh=mesh, dropout=0.0)
        made = RECIPES[method].experiment(config, devices=jax.devices()[:devices])
        with jax.set_mesh(made.mesh):
            state = sharding.init_sharded(made.fresh_state, made.mesh)
            step = sharding.parallelize(made.train_step(), state, made.mesh, made.mode)
            metrics = []
            for number in range(2):
                state, own = step(state, made.frozen, made.batch(number))
                metrics.append({k: float(own[k]) for k in ("loss", "loss_balance", "grad_norm")})
        found[name] = metrics
    for name in ("jit-8", "pmap-8"):
        for ours, theirs in zip(found[name], found["jit-1"], strict=True):
            for key in theirs:
                assert ours[key] == pytest.approx(theirs[key], rel=2e-4), (name, key)


# --- prompts in context --------------------------------------------------------------------------


def test_in_context_a_row_is_the_text_that_evaluation_reads(make, tiny_world_system):
    config = make("lora", in_context=True)
    made = RECIPES["lora"].experiment(config)
    batch, tokenizer = made.batch(0), tiny_world_system.edge.tokenizer
    assert batch["tokens"].shape == (8, config.data.prompt_length + config.data.question_length)
    assert batch["tokens"].shape == made.shapes["tokens"].shape
    seen = {
        task.name: task for task in tiny_world_system.world.select("seen")
        if task.family in FAMILIES[:2]
    }  # fmt: skip
    answers = {answer for task in seen.values() for _, answer in task.questions}
    for tokens, answer in zip(batch["tokens"], batch["answer"], strict=True):
        first = int(np.flatnonzero(answer)[0])
        context = tokenizer.decode(tokens[:first], skip_special_tokens=True)
        said = tokenizer.decode(tokens[answer], skip_special_tokens=True)
        assert first > 8 and said in answers and not context.endswith(":")
    bare = RECIPES["lora"].experiment(make("lora")).batch(0)
    assert bare["tokens"].shape == (8, config.data.question_length)


def test_in_context_is_kept_in_the_adapter_and_read_in_evaluation(make, edge_directory, tmp_path):
    edge = load_model(edge_directory)
    for in_context in (True, False):
        config = make("lora", in_context=in_context)
        made = RECIPES["lora"].experiment(config)
        params, _ = made.init()
        made.release({"params": params}, tmp_path / str(in_context), {})
        tree, provenance, _ = lora_of(tmp_path / str(in_context), edge)
        assert provenance.get("in_context", False) is in_context
        system = System(edge, lora=tree, in_context=("lora",) if in_context else ())
        assert system.answerer("lora").in_context is in_context
        assert system.reads_prompts("lora") is in_context


def test_prompts_and_questions_must_fit_the_edge_together(make):
    data = WorldConfig(prompt_length=2047, question_length=5)
    with pytest.raises(UserError, match=r"data.prompt_length \+ data.question_length is 2052"):
        RECIPES["lora"].experiment(make("lora", in_context=True, data=data))


def test_a_group_that_is_no_family_is_refused(make):
    with pytest.raises(UserError, match="no family, source or task is called 'nosuch'; there are"):
        RECIPES["loramoe"].experiment(make("loramoe", balance_tasks=("nosuch",)))


def test_rows_of_the_named_tasks_are_marked(make):
    made = RECIPES["loramoe"].experiment(make("loramoe"))
    group = made.batch(0)["group"]
    assert group.sum() == 4 and made.shapes["group"].shape == (
        8,
    )  # of two families, in equal parts


def test_routing_sends_no_rows_between_devices(make):
    made = RECIPES["mixlora"].experiment(make("mixlora"))
    with jax.set_mesh(made.mesh):
        state = sharding.init_sharded(made.fresh_state, made.mesh)
        step = sharding.jit_step(made.train_step(), state, made.mesh)
        batch = sharding.put_batch(made.batch(0), made.mesh)
        program = step.lower(state, made.frozen, batch).compile().as_text()
    assert "all-reduce" in program and "all-gather" not in program
