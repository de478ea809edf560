"""Texts come back in their order, each as if it had been alone."""

import jax
import numpy as np
import pytest

from lorax_gen import generate_text
from lorax_gen.errors import UserError
from lorax_gen.inference import continuations
from lorax_gen.inference.continuations import batches, continue_texts, room_for
from lorax_gen.mesh.sharding import MeshConfig, make_mesh
from lorax_gen.method import lora_from_gates
from lorax_gen.models.adapter import Adapter
from lorax_gen.models.decoder import embed


@pytest.fixture(scope="module")
def edge(tiny_world_system):
    return tiny_world_system.edge


def random_rows(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(4, 100, n).tolist() for n in lengths]


def test_batches_go_from_long_to_short_and_hold_what_fits():
    lengths = [3, 200, 30, 40, 5, 300, 20]
    found = list(batches(lengths, 16, 2 * (64 + 32)))
    assert found == [[5], [1], [3, 2], [6, 4], [0]]
    assert list(batches(lengths, 16, 10**6)) == [[5, 1, 3, 2, 6, 4, 0]]
    assert [len(each) for each in batches([8] * 11, 8, 64 * 7)] == [4, 4, 3]
    assert [len(each) for each in batches([8] * 5, 8, 64 * 7, most_rows=2)] == [2, 2, 1]
    assert list(batches([], 8, 64)) == []


def test_each_row_is_continued_as_if_alone_with_its_own_lora(tiny_world_system, edge):
    system, rows = tiny_world_system, random_rows([3, 40, 7, 20, 5])
    pool, config = system.params["pool"], system.spec.generator
    gates = np.random.default_rng(0).dirichlet(np.ones(4), (5, 2)).astype(np.float32)
    done = {}
    texts = continue_texts(
        edge,
        rows,
        max_new_tokens=4,
        tokens_per_batch=2 * (64 + 32),
        adapter=Adapter(rows=lora_from_gates(pool, gates, config)),
        on_batch=lambda indices, texts: done.update(zip(indices, texts, strict=True)),
    )
    assert [done[i] for i in range(5)] == texts
    for row, each, text in zip(rows, gates, texts, strict=True):
        lora = lora_from_gates(pool, each, config)
        assert generate_text(edge, [row], max_new_tokens=4, adapter=Adapter(lora)) == [text]


@pytest.mark.parametrize("sizes", [None, (4, 2, 1)])
def test_a_row_after_a_prefix_is_continued_as_after_its_tokens(edge, sizes):
    rows, before = random_rows([3, 40, 7, 20, 5]), random_rows([6] * 5, seed=1)
    mesh = sizes and make_mesh(MeshConfig(*sizes), jax.devices()[:8])
    options = {"max_new_tokens": 12, "tokens_per_batch": 2 * (64 + 32)}
    prefix = np.asarray(embed(edge.params, edge.config, np.array(before)))
    found = continue_texts(edge, rows, adapter=Adapter(prefix=prefix), mesh=mesh, **options)
    written = [[*own, *row] for own, row in zip(before, rows, strict=True)]
    assert found == continue_texts(edge, written, **options)
    assert found != continue_texts(edge, rows, **options)


def test_a_prefix_takes_positions_and_room_of_a_batch(edge):
    most = edge.config.max_position_embeddings
    prefix = np.zeros((1, 6, edge.config.hidden_size), np.float32)
    with pytest.raises(UserError, match=f"a prefix of 6, a text of {most - 8} tokens and 3 new"):
        generate_text(edge, [[5] * (most - 8)], max_new_tokens=3, adapter=Adapter(prefix=prefix))
    assert [len(each) for each in batches([8] * 4, 8, 4 * 64)] == [4]
    assert [len(each) for each in batches([8] * 4, 8, 4 * 64, before=64)] == [2, 2]


def test_no_two_batches_draw_the_same(edge):
    rows = random_rows([6]) * 6
    options = {"max_new_tokens": 12, "tokens_per_batch": 2 * 64, "temperature": 3.0}
    texts = continue_texts(edge, rows, **options)
    assert len(set(texts)) == 6
    assert continue_texts(edge, rows, **options) == texts
    assert continue_texts(edge, rows, **options, seed=1) != texts


def test_options_reach_every_batch(edge, monkeypatch):
    seen = []

    def write(model, rows, **options):
        seen.append(options)
        return ["word"] * len(rows)

    monkeypatch.setattr(continuations, "generate_text", write)
    continue_texts(edge, random_rows([3] * 3), max_new_tokens=8, most_rows=2, stop=["x"])
    assert [(each["stop"], each["max_new_tokens"]) for each in seen] == [(["x"], 8)] * 2


def test_new_tokens_need_room(edge):
    positions = edge.config.max_position_embeddings
    assert room_for(edge, 100) == room_for(edge, 100, 10 * positions) == positions - 100
    assert room_for(edge, 100, 130) == 30
    with pytest.raises(UserError, match=f"in the {positions} positions"):
        room_for(edge, positions)


def test_a_mesh_changes_no_text(edge):
    rows = random_rows([3, 40, 7, 20, 5])
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices("cpu")[:8])
    options = {"max_new_tokens": 6, "tokens_per_batch": 2 * (64 + 32)}
    assert continue_texts(edge, rows, mesh=mesh, **options) == continue_texts(edge, rows, **options)
