"""A card stands for its prompt: it comes back, merges to the same answers, fits nothing else."""

import dataclasses
import functools
import json
import re
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_gen import load_card, save_card, specialize
from lorax_gen.artifacts.card import HASHES, TaskCard, make_card
from lorax_gen.artifacts.identity import Names
from lorax_gen.data.tokens import Encoder, prompt_batch
from lorax_gen.errors import UserError
from lorax_gen.frames import IO, PLAIN, Frame
from lorax_gen.method import lora_from_gates
from lorax_gen.models import decoder
from lorax_gen.system import prompt_gates
from lorax_gen.tensors import read_tensors, write_tensors
from tests.tiny import PROMPTS, adapter_of, make_generator

PROMPT = PROMPTS[0]
LONG = " ".join([PROMPT] * 4)  # padded to more tokens than the others


@pytest.fixture(scope="module")
def system(tiny_world_system):
    """Its cloud reads prompts of at most 62 tokens: two positions are for meta tokens."""
    cloud = tiny_world_system.cloud
    config = dataclasses.replace(cloud.config, max_position_embeddings=64)
    return tiny_world_system._replace(cloud=dataclasses.replace(cloud, config=config))


@pytest.fixture(scope="module")
def generator(system):
    return make_generator(system)


@pytest.fixture(scope="module")
def cards(system, generator):
    return specialize([*PROMPTS, LONG], system.cloud, system.edge, generator)


def card_fields(card):
    return {field.name: getattr(card, field.name) for field in dataclasses.fields(card)}


def assert_same(card, fields):
    for name, value in card_fields(card).items():
        np.testing.assert_array_equal(value, fields[name])


@functools.partial(jax.jit, static_argnums=1)
def answer(params, config, tokens, lora=None):
    return decoder.logits(
        params, config, decoder.hidden_states(params, config, tokens, adapter=adapter_of(lora))
    )


def two_experts(generator):
    """Gates `[2, N]`, other experts in each layer."""
    gates = np.zeros((2, generator.config.n_experts), np.float32)
    gates[0, [3, 1]] = gates[1, [2, 0]] = 0.7, 0.3
    return gates


def gates_of(system, generator, prompt):
    batch = prompt_batch(Encoder(system.cloud.tokenizer), [prompt], 32)
    spec = generator.spec(system.cloud, system.edge)
    return prompt_gates(
        generator.params, generator.stats, system.cloud.params, spec, *batch.values()
    )


def test_a_card_comes_back_from_its_file(cards, tmp_path):
    path = tmp_path / "cards" / "one.safetensors"
    save_card(path, cards[0])
    loaded = load_card(path)
    assert_same(loaded, card_fields(cards[0]))
    assert loaded.indices.dtype == np.uint8 and loaded.gates.dtype == np.float32


def test_a_card_is_five_bytes_for_each_expert_kept(cards, tmp_path, generator):
    save_card(tmp_path / "card", cards[0])
    layers, kept = 2, generator.config.top_k
    assert sum(array.nbytes for array in read_tensors(tmp_path / "card").values()) == (
        layers * kept * (1 + 4)
    )
    assert (tmp_path / "card").stat().st_size < 700


def test_gates_stand_in_order_and_sum_to_one(cards):
    for card in cards:
        assert (np.diff(card.gates, axis=1) <= 0).all() and (card.gates > 0).all()
        np.testing.assert_allclose(card.gates.sum(1), 1, rtol=1e-6)


def test_the_lora_of_a_card_is_that_of_the_original_gates(system, generator, cards):
    gates = gates_of(system, generator, PROMPT)[0]
    np.testing.assert_array_equal(cards[0].dense_gates(generator.config.n_experts) > 0, gates > 0)
    card = make_card(np.asarray(gates), PROMPT, system.cloud, system.edge, generator)
    original = lora_from_gates(generator.params["pool"], gates, generator.config)
    chex.assert_trees_all_equal(card.lora(generator), original)


@pytest.mark.parametrize("pool", ["per_layer", "shared"])
def test_a_card_of_the_last_layers_has_their_experts_alone(system, pool, tmp_path):
    generator = make_generator(system, pool=pool, last_layers=1)
    card = specialize(PROMPT, system.cloud, system.edge, generator)
    save_card(tmp_path / "card", card)
    card = load_card(tmp_path / "card")
    assert card.indices.shape == (1, generator.config.top_k)
    gates = gates_of(system, generator, PROMPT)
    assert gates.shape == (1, 1, generator.config.n_experts)
    np.testing.assert_allclose(card.dense_gates(4), gates[0], atol=1e-5)
    merged = card.merge(system.edge, generator).params
    for name, kernel in system.edge.params["layers"].items():
        changed = (merged["layers"][name] != kernel).any(tuple(range(1, kernel.ndim)))
        assert changed.tolist() == [False, name in generator.config.edge_targets]
    config, tokens = system.edge.config, jnp.arange(12, dtype=jnp.int32).reshape(2, 6)
    unmerged = answer(system.edge.params, config, tokens, card.lora(generator))
    np.testing.assert_allclose(answer(merged, config, tokens), unmerged, atol=1e-4)


def test_a_card_of_another_number_of_layers_is_refused(system):
    last = make_generator(system, pool="shared", last_layers=1)
    every = dataclasses.replace(last, config=dataclasses.replace(last.config, last_layers=None))
    assert every.pool_hash == last.pool_hash
    card = specialize(PROMPT, system.cloud, system.edge, last)
    with pytest.raises(UserError, match="has 1 layers of 2 experts, the given generator 2 of 2"):
        card.lora(every)


@pytest.mark.parametrize("pool", ["per_layer", "shared"])
@pytest.mark.parametrize("composition", ["factors", "products"])
def test_a_merged_edge_answers_as_the_edge_with_its_lora(system, composition, pool):
    generator = make_generator(system, composition=composition, pool=pool)
    card = make_card(two_experts(generator), PROMPT, system.cloud, system.edge, generator)
    config, tokens = system.edge.config, jnp.arange(12, dtype=jnp.int32).reshape(2, 6)
    merged = answer(card.merge(system.edge, generator).params, config, tokens)
    unmerged = answer(system.edge.params, config, tokens, card.lora(generator))
    np.testing.assert_allclose(merged, unmerged, atol=1e-4)
    assert np.abs(unmerged - answer(system.edge.params, config, tokens)).max() > 0.1


def test_merging_leaves_the_edge_and_all_other_kernels_alone(system, generator, cards):
    before = jax.tree.map(np.array, system.edge.params)
    merged = cards[0].merge(system.edge, generator)
    chex.assert_trees_all_equal(system.edge.params, before)
    for name, kernel in merged.params["layers"].items():
        same = np.array_equal(kernel, before["layers"][name])
        assert same == (name not in generator.config.edge_targets)
    assert merged.fingerprint != system.edge.fingerprint


def test_dense_gates_of_the_gumbel_strategy_are_all_kept(system):
    generator = make_generator(system, strategy="gumbel", composition="products")
    gates = np.random.default_rng(0).dirichlet(np.ones(4), 2).astype(np.float32)
    card = make_card(gates, PROMPT, system.cloud, system.edge, generator)
    assert card.gates.shape == (2, 4)
    np.testing.assert_array_equal(card.dense_gates(4), gates)
    original = lora_from_gates(generator.params["pool"], gates, generator.config)
    chex.assert_trees_all_equal(card.lora(generator), original)


def test_more_than_256_experts_still_have_their_numbers():
    config = SimpleNamespace(top_k=2, strategy="keep_top_k", n_experts=300, composition="factors")
    generator = SimpleNamespace(
        config=config, pool_hash="0" * 16, fingerprint="1" * 16, frame=PLAIN, name=""
    )
    gates = np.zeros((3, 300), np.float32)
    gates[:, [7, 299]] = 0.25, 0.75
    card = make_card(
        gates,
        "a prompt",
        SimpleNamespace(params={}, fingerprint="2" * 16, tokenizer_fingerprint="3" * 16, name=""),
        SimpleNamespace(params={}, fingerprint="4" * 16, name=""),
        generator,
    )
    np.testing.assert_array_equal(card.indices, [[299, 7]] * 3)
    np.testing.assert_array_equal(card.dense_gates(300), gates)


# --- what a card depends on ----------------------------------------------------------------------


def test_batch_mates_and_padding_change_no_card(system, generator, cards):
    for prompt, card in zip(PROMPTS, cards, strict=False):
        alone = specialize(prompt, system.cloud, system.edge, generator)
        np.testing.assert_array_equal(alone.indices, card.indices)
        np.testing.assert_allclose(alone.gates, card.gates, atol=1e-5)
        assert alone.prompt == card.prompt


def test_the_same_prompt_twice_is_the_same_file(system, generator, tmp_path):
    for name in ("one", "two"):
        save_card(tmp_path / name, specialize(PROMPT, system.cloud, system.edge, generator))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_different_prompts_are_different_cards(cards):
    assert len({card.prompt for card in cards}) == len(cards)
    assert len({card.gates.tobytes() for card in cards}) == len(cards)


@pytest.mark.parametrize(
    "prompt, message",
    [
        ("", "the prompt is empty"),
        (" \n ", "the prompt is empty"),
        (" ".join(["apple"] * 62), "a prompt of 63 tokens is longer than the 62"),
    ],
)
def test_an_empty_or_overlong_prompt_is_refused(system, generator, prompt, message):
    with pytest.raises(UserError, match=message):
        specialize(prompt, system.cloud, system.edge, generator)
    with pytest.raises(UserError, match=message):
        specialize([PROMPT, prompt], system.cloud, system.edge, generator)


def test_the_longest_prompt_is_read(system, generator):
    specialize(" ".join(["apple"] * 61), system.cloud, system.edge, generator)


# --- what a card is refused with -----------------------------------------------------------------


def test_a_card_of_another_pool_is_refused(system, generator, cards):
    other = make_generator(system, seed=1)
    for use in (cards[0].lora, functools.partial(cards[0].merge, system.edge)):
        with pytest.raises(UserError, match=f"made with the pool {generator.pool_hash}.* has"):
            use(other)


def test_a_card_of_another_composition_is_refused(system, generator, cards):
    """The same pool, but the experts would add up to another LoRA."""
    config = dataclasses.replace(generator.config, composition="products")
    with pytest.raises(UserError, match="composition"):
        cards[0].lora(dataclasses.replace(generator, config=config))


def test_a_card_of_another_edge_is_refused(system, generator, cards):
    params = {**system.edge.params, "embed": system.edge.params["embed"] + 1}
    other = dataclasses.replace(system.edge, params=params)
    with pytest.raises(UserError, match=f"made for the edge model {cards[0].edge}.* is"):
        cards[0].merge(other, generator)


def test_a_truncated_or_foreign_file_is_refused(cards, tmp_path):
    path = tmp_path / "card"
    save_card(path, cards[0])
    whole = path.read_bytes()
    for size in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="is not a complete safetensors file") as error:
            load_card(path)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no such file"):
        load_card(tmp_path / "nothing")


def gates(*rows):
    return {"gates": np.array(rows, np.float32)}


def indices(*rows, dtype=np.uint8):
    return {"indices": np.array(rows, dtype)}


TWO = [0.75, 0.25]
DAMAGE = [
    (gates(TWO, [np.nan, 0.25]), "nan|finite"),
    (gates(TWO, [1.0, 0.0]), "positive"),
    (gates(TWO, [1.25, -0.25]), "positive"),
    (gates(TWO, [0.75, 0.2501]), "sum to 1"),
    (gates(TWO, TWO[::-1]), "in order"),
    (gates(TWO), r"expected \[layers, experts\] twice"),
    (gates(*TWO), r"expected \[layers, experts\] twice"),
    ({"gates": np.ones((2, 2), np.float16)}, "gates are float16|F16"),
    ({"gates": np.ones((2, 2), np.int32)}, "gates are int32|I32"),
    (indices([3, 1], [2, 2]), "an expert twice"),
    (indices([3, 1], [2, 0], dtype=np.int64), "indices are int64|I64"),
    (indices([3, 1], [2, 0], dtype=np.float32), "indices are float32"),
    (indices(), "indices are"),
    ({"pool": "x" * 16}, "pool"),
    ({"pool": "0" * 15}, "pool"),
    ({"edge": "0" * 16 + "\n"}, "edge"),
    ({"prompt": "the prompt itself"}, "prompt"),
    ({"composition": "sum"}, "composition"),
    ({"cloud": "F" * 16}, "cloud"),
    ({"generator": 1}, "generator"),
]


def own_card(cards):
    """With gates that are exact."""
    return dataclasses.replace(cards[0], **indices([3, 1], [2, 0]), **gates(TWO, TWO))


@pytest.mark.parametrize("change, message", DAMAGE)
def test_what_is_no_card_is_refused_in_python_and_as_a_file(change, message, cards, tmp_path):
    good = card_fields(own_card(cards))
    with pytest.raises(UserError, match=message):
        TaskCard(**good | change)
    tensors = {name: (good | change).pop(name) for name in ("indices", "gates")}
    names = {key: value for key, value in (good | change).items() if key in HASHES}
    metadata = {"card": json.dumps({"format": "lorax-gen card 2", **names})}
    write_tensors(tmp_path / "card", tensors, metadata)
    with pytest.raises(UserError, match=message):
        load_card(tmp_path / "card")


def test_gates_may_miss_a_sum_of_one_by_rounding_only(cards):
    gates = np.float32([[0.75, 0.25 + 2**-23]])
    one = dataclasses.replace(own_card(cards), indices=np.uint8([[0, 1]]), gates=gates)
    assert one.gates.sum(dtype=np.float64) > 1
    with pytest.raises(UserError, match="sum to 1"):
        dataclasses.replace(one, gates=np.float32([[0.75, 0.25 + 1e-5]]))


def test_any_bit_of_the_content_that_flips_is_found(cards, tmp_path):
    path, card = tmp_path / "card", own_card(cards)
    save_card(path, card)
    whole = path.read_bytes()
    start = whole.index(b"lorax-gen card")
    for at in [*range(start, len(whole) - 1, 5), len(whole) - 1]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(UserError):
            load_card(path)
    lower = dataclasses.replace(card, gates=card.gates * np.float32(1 - 2**-23))
    assert lower.digest != card.digest != dataclasses.replace(card, cloud="0" * 16).digest


@pytest.mark.parametrize(
    "entries, changes",
    [
        ({"other": "1"}, {}),
        ({}, {"extra": 1}),
        ({}, {"pool": None}),
        ({}, {"digest": "0" * 16}),
        ({}, {"digest": None}),
        ({}, {"format": ["lorax-gen card 3"]}),
        ({}, {"format": "lorax-gen card 5"}),
        ({}, {"frame": {}}),
        ({}, {"names": {}}),
        ({"card": "[1]"}, {}),
        ({"card": "{"}, {}),
        ({"card": '{"pool": NaN}'}, {}),
        ({"card": "[" * 10_000}, {}),
    ],
)
def test_damaged_metadata_are_refused(entries, changes, cards, tmp_path):
    card = own_card(cards)
    metadata = {"format": "lorax-gen card 3", **card.metadata(), "digest": card.digest} | changes
    tensors = {"indices": card.indices, "gates": card.gates}
    write_tensors(tmp_path / "card", tensors, {"card": json.dumps(metadata)} | entries)
    with pytest.raises(UserError):
        load_card(tmp_path / "card")


def test_a_card_with_other_layers_or_experts_than_its_generator_is_refused(cards, generator):
    card = own_card(cards)
    for change in (
        indices([3, 1], [2, 4]),
        indices([3], [2]) | gates([1], [1]),
        indices([3, 1]) | gates(TWO),
        indices([3, 1], [2, 0], [2, 0]) | gates(TWO, TWO, TWO),
        indices([3, 1], [2, 0], dtype=np.uint16),
    ):
        with pytest.raises(UserError, match=r"this card has .*; (use|specialise)"):
            dataclasses.replace(card, **change).lora(generator)
    card.lora(generator)


def test_a_dense_gate_that_underflows_is_kept_as_the_smallest_number(system):
    generator = make_generator(system, strategy="gumbel", composition="products")
    gates = np.float32([[0.5, 0.5, 0, 0], [1, 0, 0, 0]])
    card = make_card(gates, PROMPT, system.cloud, system.edge, generator)
    np.testing.assert_array_equal(card.gates[1], [1, *[np.finfo(np.float32).tiny] * 3])


@pytest.mark.parametrize(
    "metadata, tensors",
    [
        (None, ["indices", "gates"]),
        ({"format": "pt"}, ["weight"]),
        ({"card": '{"format": "lorax-gen card 1"}'}, ["indices", "gates"]),
        ({"card": '{"format": "lorax-gen card 0"}'}, ["indices", "gates"]),
    ],
)
def test_safetensors_that_are_no_card_are_refused(metadata, tensors, tmp_path):
    path = tmp_path / "weights"
    write_tensors(path, {name: np.zeros((2, 2), np.float32) for name in tensors}, metadata)
    with pytest.raises(UserError, match="is not a task card"):
        load_card(path)


def test_no_file_is_overwritten(cards, tmp_path):
    path = tmp_path / "card"
    path.write_text("mine")
    with pytest.raises(UserError, match="already exists"):
        save_card(path, cards[0])
    assert path.read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["card"]


def test_a_card_is_plain_values(cards):
    assert {field.name for field in dataclasses.fields(TaskCard)} == {
        "indices", "gates", "pool", "edge", "prompt", "composition",
        "generator", "cloud", "tokenizer", "frame", "names",
    }  # fmt: skip
    assert all(isinstance(cards[0].prompt, str) and len(card.prompt) == 64 for card in cards)


@pytest.mark.parametrize(
    "version, missing", [(1, ("generator", "cloud", "tokenizer")), (2, ()), (3, ())]
)
def test_a_card_of_an_earlier_format_is_read(version, missing, cards, tmp_path):
    """The first did not say which generator, cloud and tokenizer had made it."""
    card, path = cards[0], tmp_path / "first.card.safetensors"
    metadata = {"format": f"lorax-gen card {version}"}
    metadata |= {name: text for name, text in card.metadata().items() if name not in missing}
    metadata |= {"digest": card.digest} if version == 3 else {}
    tensors = {"indices": card.indices, "gates": card.gates}
    write_tensors(path, tensors, {"card": json.dumps(metadata)})
    assert_same(load_card(path), card_fields(card) | dict.fromkeys(missing, ""))
    assert load_card(path).frame == PLAIN


def test_a_card_names_what_made_it(system, generator):
    card = specialize(PROMPT, system.cloud, system.edge, generator)
    assert card.generator == generator.fingerprint
    assert card.cloud == system.cloud.fingerprint
    assert card.tokenizer == system.cloud.tokenizer_fingerprint
    other = dataclasses.replace(generator, config=dataclasses.replace(generator.config, alpha=1.0))
    assert other.fingerprint != generator.fingerprint


# --- its frame, and the names of what made it ----------------------------------------------------


@pytest.fixture(scope="module")
def framed(cards):
    return dataclasses.replace(
        cards[0], frame=Frame("[user] {input} [bot]", "", turn=True), names=Names(edge="org/edge")
    )


def test_a_card_of_a_framed_generator_has_its_frame(system, generator):
    framed = dataclasses.replace(generator, metadata=generator.metadata | {"frame": IO.stored()})
    card = specialize(PROMPT, system.cloud, system.edge, framed)
    assert card.frame == IO
    merged = card.merge(system.edge, framed)
    assert (merged.frame, system.edge.frame) == (IO, PLAIN)
    assert merged.fingerprint == dataclasses.replace(merged, frame=PLAIN).fingerprint


def test_frame_and_names_come_back_and_are_in_the_digest(framed, cards, tmp_path):
    save_card(tmp_path / "framed", framed)
    loaded = load_card(tmp_path / "framed")
    assert_same(loaded, card_fields(framed))
    save_card(tmp_path / "again", loaded)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "framed").read_bytes()
    others = (cards[0], *(dataclasses.replace(framed, **{name: getattr(cards[0], name)})
                          for name in ("frame", "names")))  # fmt: skip
    assert len({framed.digest, *(card.digest for card in others)}) == 4


def test_a_plain_frame_and_unknown_names_take_no_room(framed, cards, tmp_path):
    assert not {"frame", "names"} & cards[0].metadata().keys()
    save_card(tmp_path / "plain", cards[0])
    save_card(tmp_path / "framed", framed)
    sizes = [(tmp_path / name).stat().st_size for name in ("plain", "framed")]
    assert sizes[1] - sizes[0] < 200


@pytest.mark.parametrize(
    "change, message",
    [
        ({"frame": {"template": "no slot"}}, "'no slot' has {input} 0 times"),
        ({"frame": {"template": 1}}, "template: expected str"),
        ({"frame": {"colour": "red"}}, "frame: unknown key colour"),
        ({"frame": "io"}, "expected"),
        (
            {"names": {"edge": "/home/me/edge"}},
            "edge is named '/home/me/edge'; expected",
        ),
        ({"names": {"cloud": "s3://mine/cloud"}}, "cloud is named 's3://mine/cloud'"),
        ({"names": {"cloud": 1}}, "cloud: expected str"),
        ({"names": {"author": "me"}}, "unknown field author"),
        ({"names": []}, "names: expected"),
        ({"frame": {"template": "Q: {input}"}}, "its content has the digest"),
        ({"names": {"edge": "org/other"}}, "its content has the digest"),
    ],
)
def test_a_damaged_frame_or_name_is_refused(change, message, framed, tmp_path):
    save_card(tmp_path / "card", framed)
    metadata = {"format": "lorax-gen card 4", **framed.metadata(), "digest": framed.digest} | change
    tensors = {"indices": framed.indices, "gates": framed.gates}
    write_tensors(tmp_path / "damaged", tensors, {"card": json.dumps(metadata)})
    with pytest.raises(UserError, match=re.escape(message)):
        load_card(tmp_path / "damaged")


def test_a_frame_or_names_of_another_type_are_refused_in_python(cards):
    for change in ({"frame": {"template": "{input}"}}, {"names": {"edge": "edge"}}):
        with pytest.raises(UserError, match=r"expected a (Frame|Names), not"):
            dataclasses.replace(cards[0], **change)


def test_messages_name_the_models_beside_their_hashes(system, generator, cards):
    card = dataclasses.replace(cards[0], names=Names("runs/a", "org/cloud", "org/edge"))
    params = {**system.edge.params, "embed": system.edge.params["embed"] + 1}
    other = dataclasses.replace(system.edge, params=params, name="/home/me/tuned")
    with pytest.raises(
        UserError, match=rf"edge model 'org/edge' \({card.edge}\), the given one is 'tuned' \("
    ):
        card.merge(other, generator)
    other = dataclasses.replace(make_generator(system, seed=1), name="runs/b")
    with pytest.raises(
        UserError, match=rf"pool 'runs/a' \({card.pool}\), the given generator has 'runs/b' \("
    ):
        card.lora(other)
