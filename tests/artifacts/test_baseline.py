"""A released baseline comes back as it was, and anything else is refused in a line."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_gen.artifacts.baseline import Baseline, is_baseline, load_baseline, save_baseline
from lorax_gen.artifacts.identity import identify
from lorax_gen.errors import UserError
from lorax_gen.frames import IO
from lorax_gen.recipes.registry import answerer_of
from lorax_gen.tensors import read_tensors, write_tensors


@pytest.fixture
def baseline(tiny_world_system):
    params = {"q": {"a": jnp.ones((2, 3)), "b": jnp.arange(4.0)}, "router": jnp.zeros((2, 2))}
    edge = identify(tiny_world_system.edge, reads=False)
    return Baseline("loramoe", {"rank": 3, "targets": ["q"]}, params, edge, frame=IO)


@pytest.fixture
def saved(baseline, tmp_path):
    save_baseline(tmp_path / "saved", baseline, {"config": {"method": "loramoe"}})
    return tmp_path / "saved"


def rewrite(saved, **changes):
    path = saved / "baseline.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_it_comes_back_as_it_was(baseline, saved):
    loaded = load_baseline(saved)
    chex.assert_trees_all_equal(loaded.params, baseline.params)
    for name in ("method", "config", "edge", "cloud", "frame", "in_context", "fingerprint"):
        assert getattr(loaded, name) == getattr(baseline, name)
    assert is_baseline(saved) and sorted(p.name for p in saved.iterdir()) == [
        "baseline.json",
        "baseline.safetensors",
    ]
    stored = json.loads((saved / "baseline.json").read_text())
    assert stored["provenance"] == {"config": {"method": "loramoe"}}


def test_a_baseline_replaces_nothing_and_leaves_nothing_half_written(baseline, saved):
    with pytest.raises(UserError, match="exists"):
        save_baseline(saved, baseline)
    broken = dataclasses.replace(baseline, params={"w": jnp.array([1.0, np.inf])})
    with pytest.raises(UserError, match="w holds inf"):
        save_baseline(saved.parent / "other", broken)
    assert [p.name for p in saved.parent.iterdir()] == ["saved"]


def test_another_version_is_refused(saved):
    rewrite(saved, format="lorax-gen baseline 99")
    with pytest.raises(UserError, match="format 'lorax-gen baseline 99', expected"):
        load_baseline(saved)


@pytest.mark.parametrize("changes", [{"config": {"rank": 4}}, {"in_context": True}, {"frame": {}}])
def test_a_changed_document_is_refused(saved, changes):
    rewrite(saved, **changes)
    with pytest.raises(UserError, match="was changed after it was written"):
        load_baseline(saved)


def test_truncated_tensors_are_refused(saved):
    path = saved / "baseline.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match="not a complete safetensors file"):
        load_baseline(saved)


def test_missing_and_other_tensors_are_refused(saved):
    path = saved / "baseline.safetensors"
    tensors = read_tensors(path)
    path.unlink()
    write_tensors(path, {k: v for k, v in tensors.items() if k != "router"})
    with pytest.raises(UserError, match=r"has router None, but baseline.json says \(2, 2\)"):
        load_baseline(saved)
    path.unlink()
    write_tensors(path, tensors | {"router": tensors["router"] + 1})
    with pytest.raises(UserError, match="is damaged: its content has the fingerprint"):
        load_baseline(saved)


def test_another_edge_or_no_cloud_is_refused(baseline, tiny_world_system):
    system = tiny_world_system
    baseline.check_models(system.edge)
    other = dataclasses.replace(
        system.edge, params=jax.tree.map(lambda x: x + 1, system.edge.params)
    )
    with pytest.raises(UserError, match="the loramoe baseline was trained with the edge model"):
        baseline.check_models(other)
    reading = dataclasses.replace(baseline, cloud=identify(system.cloud, reads=True))
    reading.check_models(system.edge, system.cloud)
    with pytest.raises(UserError, match="reads prompts with the cloud model"):
        reading.check_models(system.edge)


def test_parameters_of_another_config_are_refused(baseline):
    baseline.check_params(baseline.params)
    with pytest.raises(UserError, match=r"has router \(2, 2\), but its config makes it \(2, 8\)"):
        baseline.check_params(baseline.params | {"router": jnp.zeros((2, 8))})


def test_a_method_that_this_version_lacks_is_refused(baseline, tiny_world_system):
    unknown = dataclasses.replace(baseline, method="nomoe")
    with pytest.raises(UserError, match="is of method 'nomoe'; this version of lorax-gen knows"):
        answerer_of(unknown, tiny_world_system.edge)
