"""An artifact says the same in all its forms, and where one does not, that is told."""

import dataclasses
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from lorax_gen import (
    UserError,
    export,
    load_model,
    save_card,
    save_model,
    specialize,
    verify,
)
from lorax_gen.artifacts.export import CARD
from lorax_gen.artifacts.verify import Comparison
from lorax_gen.tensors import read_tensors, write_tensors
from tests.tiny import PROMPTS, make_generator

COMPOSITIONS = ["factors", "products"]
SMALL = {"rows": 2, "length": 8}


def no_generator():
    raise AssertionError("an adapter needs no generator")


@pytest.fixture
def compare(made):
    """`compare(artifact, composition)`: `{form: Comparison}`, of the small `made`."""

    def compare(artifact, composition="factors", edge=made.edge):
        generator = made.generators[composition]
        found = verify(made.folder / artifact, edge, generator, **SMALL)
        assert all(isinstance(row, Comparison) for row in found)
        return {row.form: row for row in found}

    return compare


@pytest.fixture
def merge(made, tmp_path):
    """`merge(composition, dtype)`: a directory that `export` merged from a card."""

    def merge(composition="factors", dtype=None):
        generator, path = made.generators[composition], tmp_path / "merged"
        card = made.folder / f"{composition}.card"
        export(card, path, "merged", made.edge, generator, dtype=dtype)
        return path

    return merge


def names_of_those_that_differ(comparisons):
    return [form for form, row in comparisons.items() if not row.holds]


# --- what holds ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_a_card_says_the_same_in_all_its_forms(composition, dtype, compare, made):
    edge = load_model(made.folder / "edge", jnp.dtype(dtype))
    found = compare(f"{composition}.card", composition, edge)
    assert list(found) == [
        "edge without it",
        "gates, one row each",
        "merged",
        "merged, written and read",
        "adapter, written and read",
    ]
    assert not names_of_those_that_differ(found)
    assert found["adapter, written and read"].difference == 0  # not a bit is lost on the way
    assert found["merged, written and read"].difference == found["merged"].difference
    if dtype == "float32":
        assert all(row.agreement == 1 for form, row in found.items() if form != "edge without it")


def test_a_card_of_the_last_layer_says_the_same_in_all_its_forms(tiny_world_system):
    system, generator = tiny_world_system, make_generator(tiny_world_system, last_layers=1)
    card = specialize(PROMPTS[0], system.cloud, system.edge, generator)
    found = verify(card, system.edge, generator, **SMALL)
    assert len(found) == 5 and not names_of_those_that_differ({row.form: row for row in found})
    assert found[-1].difference == 0


def test_the_first_line_says_how_much_there_is_to_get_wrong(compare):
    row = compare("factors.card")["edge without it"]
    assert row.tolerance is None and row.holds
    assert row.difference > 1 and row.agreement < 0.5


def test_an_adapter_says_the_same_in_all_its_forms(made):
    found = verify(made.folder / "adapter", made.edge, no_generator, **SMALL)
    assert [row.form for row in found] == [
        "edge without it",
        "merged",
        "merged, written and read",
        "adapter, written and read",
    ]
    assert all(row.holds for row in found)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_a_merged_directory_says_what_its_card_says(composition, dtype, compare, merge):
    found = compare(merge(composition, jnp.dtype(dtype)), composition)
    assert list(found) == ["edge without it", "gates, one row each", "merged", "the directory"]
    assert not names_of_those_that_differ(found)
    assert (found["the directory"].difference > found["merged"].difference) == (dtype != "float32")
    assert found["the directory"].tolerance >= found["merged"].tolerance


def test_verifying_writes_nothing_beside_the_artifact(compare, merge):
    path = merge()
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    compare(path)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


# --- what does not -------------------------------------------------------------------------------


def tamper(path, key, change):
    tensors = read_tensors(path)
    tensors[key] = change(tensors[key])
    path.unlink()
    write_tensors(path, tensors, {"format": "pt"})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_kernel_that_was_changed_is_told(dtype, compare, merge):
    path = merge(dtype=jnp.dtype(dtype))
    tamper(path / "model.safetensors", "model.layers.1.mlp.down_proj.weight", lambda x: 2 * x)
    assert names_of_those_that_differ(compare(path)) == ["the directory"]


def test_a_single_number_that_was_changed_is_told(compare, merge):
    path = merge()

    def change(kernel):
        kernel = kernel.copy()
        kernel[3, 5] += 0.5
        return kernel

    tamper(path / "model.safetensors", "model.layers.0.mlp.gate_proj.weight", change)
    assert names_of_those_that_differ(compare(path)) == ["the directory"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_directory_with_another_card_inside_is_told(dtype, compare, made, merge):
    path, card = merge(dtype=jnp.dtype(dtype)), made.cards["factors"]
    (path / CARD).unlink()
    other = dataclasses.replace(card, indices=np.array([[0, 2], [3, 1]], np.uint8))
    save_card(path / CARD, other)
    assert names_of_those_that_differ(compare(path)) == ["the directory"]


def test_numbers_that_are_none_are_refused(compare, merge):
    path = merge()
    nan = np.float32("nan")
    tamper(path / "model.safetensors", "model.norm.weight", lambda x: x * nan)
    with pytest.raises(UserError, match=r"model\.norm\.weight holds NaN"):
        compare(path)


@pytest.mark.parametrize("artifact", ["factors.card", "adapter"])
def test_an_adapter_that_changes_on_its_way_is_told(artifact, compare, monkeypatch):
    """As a wrong scale would: the copy that verify writes is not what was to be written."""

    def wrong(artifact, output, format, *models):
        export(artifact, output, format, *models)
        if format == "peft":
            key = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
            tamper(output / "adapter_model.safetensors", key, lambda b: 2 * b)

    monkeypatch.setattr("lorax_gen.artifacts.verify.export", wrong)
    assert names_of_those_that_differ(compare(artifact)) == ["adapter, written and read"]


# --- what is refused -----------------------------------------------------------------------------


def test_another_edge_or_generator_is_refused(compare, made, merge):
    params = {**made.edge.params, "final_norm": made.edge.params["final_norm"] * 2}
    other = dataclasses.replace(made.edge, params=params)
    for artifact in ("factors.card", merge()):
        with pytest.raises(UserError, match="this card was made for the edge model"):
            compare(artifact, edge=other)
        with pytest.raises(UserError, match="this card was made with the pool"):
            compare(artifact, "products")


def test_an_adapter_of_another_model_is_refused(compare, tiny_world_system):
    with pytest.raises(UserError, match="is the adapter for another model"):
        compare("adapter", edge=tiny_world_system.cloud)


def test_an_adapter_that_is_no_lora_any_more_is_refused(compare, made, tmp_path):
    path = shutil.copytree(made.folder / "adapter", tmp_path / "adapter")
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
    tamper(path / "adapter_model.safetensors", key, lambda b: b[:, :1])
    with pytest.raises(UserError, match="which do not fit its kernel"):
        compare(path)


def test_a_card_in_the_directory_of_another_model_is_refused(made, compare, tmp_path):
    """Of a model with three words less, say, so that no logits can be compared."""
    vocab = made.edge.config.vocab_size - 3
    other = dataclasses.replace(
        made.edge,
        config=dataclasses.replace(made.edge.config, vocab_size=vocab),
        params={**made.edge.params, "embed": made.edge.params["embed"][:vocab]},
    )
    card = made.folder / "factors.card"
    save_model(tmp_path / "other", other, extra=lambda folder: shutil.copy(card, folder / CARD))
    with pytest.raises(UserError) as error:
        compare(tmp_path / "other")
    assert "other" in str(error.value) and "\n" not in str(error.value)


def test_what_is_no_artifact_is_refused(compare, made, tmp_path):
    with pytest.raises(UserError, match=f"edge holds no {CARD} to compare it with"):
        compare("edge")
    with pytest.raises(UserError, match="no such file"):
        compare(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is not a task card"):
        compare("edge/model.safetensors")
