"""Choices scored together get what each gets alone, whatever they are packed and batched with."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_gen.errors import UserError
from lorax_gen.inference import choices
from lorax_gen.inference.choices import (
    ChoiceItem,
    encode_item,
    encode_items,
    encode_pair,
    score_items,
)
from lorax_gen.mesh.sharding import MeshConfig, make_mesh
from lorax_gen.method.generator import lora_from_gates
from lorax_gen.models import decoder
from lorax_gen.models.adapter import Adapter
from lorax_gen.models.model import Model
from lorax_gen.system import gated_pool
from lorax_gen.tokenizers import load_tokenizer, word_level
from tests.models.configs import CONFIGS
from tests.real.real_tokenizers import build_gemma_like
from tests.tiny import make_generator

LLAMA = CONFIGS["llama"]
V = LLAMA.vocab_size
LONGEST = 40  # of what the tests read in one piece


@pytest.fixture(scope="module")
def model_of(random_params):
    tokenizer = word_level(["a", "b"])
    return lambda config: Model(config, random_params(config), tokenizer)


@pytest.fixture(scope="module")
def model(model_of):
    return model_of(LLAMA)


def make_items(count, seed=0):
    """Items of several makes: one context for all choices, or one for each; long choices or short
    ones, some of them equal; one choice alone."""
    rng, items = np.random.default_rng(seed), []
    for i in range(count):
        context = rng.integers(0, V, rng.integers(1, 24)).tolist()
        pairs = []
        for _ in range(rng.integers(1, 5)):
            own = [*context, int(rng.integers(0, V))] if i % 4 == 0 else context
            pairs.append((own, rng.integers(0, 3, rng.integers(1, 12)).tolist()))
        items.append(ChoiceItem(tuple(pairs), f"item {i}"))
    return items


@partial(jax.jit, static_argnames="config")
def log_probabilities(params, config, tokens):
    return jax.nn.log_softmax(
        decoder.logits(params, config, decoder.hidden_states(params, config, tokens))
    )


def alone(model, context, continuation):
    """Log-likelihood and greediness of one choice, read in one piece by the plain decoder."""
    ids = [*context, *continuation]
    tokens = np.zeros((1, LONGEST), np.int32)
    tokens[0, : len(ids)] = ids
    scores = np.asarray(log_probabilities(model.params, model.config, tokens))[0]
    scores = scores[len(context) - 1 : len(ids) - 1]
    found = scores[np.arange(len(continuation)), continuation].sum()
    return found, (scores.argmax(-1) == continuation).all()


def assert_as_alone(model, items, scores, atol=1e-4):
    for item, found in zip(items, scores, strict=True):
        expected = [alone(model, *choice) for choice in item.choices]
        np.testing.assert_allclose(found.loglikelihoods, [ll for ll, _ in expected], atol=atol)
        np.testing.assert_array_equal(found.greedy, [greedy for _, greedy in expected])


def loglikelihoods(scores):
    return np.concatenate([score.loglikelihoods for score in scores])


# --- scores --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_choices_score_as_each_alone(name, model_of):
    model, items = model_of(CONFIGS[name]), make_items(12)
    scores = score_items(model, items, tokens_per_batch=256)
    assert_as_alone(model, items, scores)
    for item, found in zip(items, scores, strict=True):
        assert found.truncated == 0
        assert found.context_tokens == max(len(context) for context, _ in item.choices)


def test_a_greedy_choice_is_what_the_model_would_write(model):
    context = [3, 1, 4]
    written = list(context)
    for _ in range(4):
        tokens = np.zeros((1, LONGEST), np.int32)
        tokens[0, : len(written)] = written
        scores = log_probabilities(model.params, model.config, tokens)
        written.append(int(scores[0, len(written) - 1].argmax()))
    right = written[len(context) :]
    wrong = [*right[:-1], (right[-1] + 1) % V]
    item = ChoiceItem(tuple((context, choice) for choice in (right, wrong, right[:1])))
    (scores,) = score_items(model, [item])
    assert scores.greedy.tolist() == [True, False, True]


def test_batch_mates_padding_and_order_change_nothing(model):
    items = make_items(12)
    expected = loglikelihoods(score_items(model, items, tokens_per_batch=256))
    reverse = score_items(model, items[::-1], tokens_per_batch=64)[::-1]
    np.testing.assert_allclose(loglikelihoods(reverse), expected, atol=1e-5)
    alone = [score_items(model, [item], tokens_per_batch=256)[0] for item in items[:3]]
    part = expected[: sum(len(item.choices) for item in items[:3])]
    np.testing.assert_allclose(loglikelihoods(alone), part, atol=1e-5)


def test_choices_that_do_not_fit_into_a_row_together_score_the_same(model):
    items = make_items(12)
    expected = loglikelihoods(score_items(model, items, tokens_per_batch=256))
    seen = []
    found = score_items(
        model,
        items,
        tokens_per_batch=256,
        longest_row=24,
        on_batch=lambda indices, scores: seen.extend(zip(indices, scores, strict=True)),
    )
    np.testing.assert_allclose(loglikelihoods(found), expected, atol=1e-5)
    # An item whose choices lie in several batches is handed on once, when it is whole.
    assert sorted(i for i, _ in seen) == list(range(12))
    for i, scores in seen:
        np.testing.assert_array_equal(scores.loglikelihoods, found[i].loglikelihoods)


def test_more_predictions_than_a_chunk_of_the_head(model, monkeypatch):
    items = make_items(8)
    expected = loglikelihoods(score_items(model, items, tokens_per_batch=512))
    monkeypatch.setattr(choices, "HEAD_CHUNK", 7)
    choices.score_rows.clear_cache()
    found = loglikelihoods(score_items(model, items, tokens_per_batch=512))
    choices.score_rows.clear_cache()
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_many_items_need_few_programs(model):
    choices.score_rows.clear_cache()
    items = make_items(400)
    done = []
    scores = score_items(model, items, tokens_per_batch=512, progress=done.append)
    assert choices.score_rows._cache_size() <= 6
    assert len(done) > 10 and sum(done) == len(scores) == 400
    assert_as_alone(model, items[:40], scores[:40])


def test_no_items_are_no_scores(model):
    assert score_items(model, []) == []


# --- LoRA and meshes -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def specialised(tiny_world_system):
    """Edge, generator, items, and gates of each item's own."""
    edge = tiny_world_system.edge
    generator = make_generator(tiny_world_system)
    rng = np.random.default_rng(0)
    shape = (6, edge.config.num_hidden_layers, generator.config.n_experts)
    gates = np.zeros(shape, np.float32)
    gates[..., :2] = 0.5
    return edge, generator, make_items(6), rng.permuted(gates, axis=-1)


def test_gates_of_an_item_score_it_as_the_merged_model_does(specialised):
    edge, generator, items, gates = specialised
    gated = gated_pool(generator.params["pool"], gates, generator.config)
    found = score_items(edge, items, adapter=gated, tokens_per_batch=256)
    make_lora = jax.jit(
        lambda row: lora_from_gates(generator.params["pool"], row, generator.config)
    )
    for i in (0, 3):
        merged = edge.merged(make_lora(gates[i]))
        assert_as_alone(merged, [items[i]], [found[i]], atol=1e-3)
    plain = loglikelihoods(score_items(edge, items, tokens_per_batch=256))
    assert np.abs(loglikelihoods(found) - plain).max() > 0.1


def test_a_lora_for_all_items_scores_as_the_merged_model_does(specialised):
    edge, generator, items, gates = specialised
    lora = lora_from_gates(generator.params["pool"], jnp.asarray(gates[0]), generator.config)
    found = score_items(edge, items, adapter=Adapter(lora), tokens_per_batch=256)
    expected = score_items(edge.merged(lora), items, tokens_per_batch=256)
    np.testing.assert_allclose(loglikelihoods(found), loglikelihoods(expected), atol=1e-3)


@pytest.mark.parametrize("sizes", [None, (8, 1, 1), (2, 2, 2)])
def test_a_prefix_of_an_item_scores_it_as_its_tokens_would(model, sizes):
    """The embeddings of some tokens, before each item, and the tokens themselves."""
    items, mesh = make_items(12), sizes and make_mesh(MeshConfig(*sizes), jax.devices()[:8])
    before = np.random.default_rng(1).integers(0, V, (12, 5))
    adapter = Adapter(prefix=np.asarray(decoder.embed(model.params, model.config, before)))
    found = score_items(model, items, adapter=adapter, tokens_per_batch=256, mesh=mesh)
    written = [
        ChoiceItem(tuple(([*own.tolist(), *context], choice) for context, choice in item.choices))
        for own, item in zip(before, items, strict=True)
    ]
    assert_as_alone(model, written, found)
    assert found[0].context_tokens == max(len(context) for context, _ in items[0].choices)


def test_a_prefix_takes_positions_of_the_model(model):
    most = model.config.max_position_embeddings - 5
    item = ChoiceItem((([1] * (most + 4), [2, 3]),))
    adapter = Adapter(prefix=np.zeros((1, 5, model.config.hidden_size), np.float32))
    (scores,) = score_items(model, [item], adapter=adapter)
    assert scores.truncated == 5  # most are read, the one after them is predicted
    with pytest.raises(UserError, match=f"choose from 1 to the model's {most} positions after a"):
        score_items(model, [item], adapter=adapter, max_length=most + 1)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)])
def test_a_mesh_changes_no_score(specialised, sizes):
    edge, generator, items, gates = specialised
    items, gates = items * 4, np.concatenate([gates] * 4)
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[:8])
    adapter = gated_pool(generator.params["pool"], gates, generator.config)
    options = {"adapter": adapter, "tokens_per_batch": 512}
    expected = score_items(edge, items, **options)
    found = score_items(edge, items, mesh=mesh, **options)
    np.testing.assert_allclose(loglikelihoods(found), loglikelihoods(expected), atol=2e-5)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a.greedy, b.greedy)


# --- truncation ----------------------------------------------------------------------------------


def test_what_is_longer_than_the_model_is_cut_on_the_left_and_counted(model):
    context, short, long = list(range(20)), [1, 2], [3, 4, 5, 6]
    item = ChoiceItem(((context, short), (context, long)))
    (scores,) = score_items(model, [item], max_length=16)
    assert scores.truncated == 24 - 17  # 16 are read, the one behind them is predicted
    assert scores.context_tokens == 15
    cut = ChoiceItem(((context[5:], short), (context[7:], long)))
    assert_as_alone(model, [cut], [scores])
    (whole,) = score_items(model, [item], max_length=23)
    assert whole.truncated == 0
    assert_as_alone(model, [item], [whole])


def test_a_continuation_longer_than_the_model_is_refused(model):
    item = ChoiceItem((([1], [2] * 9),), "boolq-test-3")
    with pytest.raises(UserError, match="boolq-test-3: choice 0 has 9 tokens, more than the 8"):
        score_items(model, [item], max_length=8)


# --- text to tokens ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gemma(tmp_path_factory, random_params):
    """A tokenizer whose pieces hold the space in front of a word, as real ones do."""
    tokenizer = load_tokenizer(build_gemma_like(tmp_path_factory.mktemp("gemma")))
    config = dataclasses.replace(CONFIGS["gemma"], vocab_size=len(tokenizer))
    return Model(config, random_params(config), tokenizer)


def test_both_parts_are_encoded_together_and_split_at_the_contexts_count(gemma):
    ids = lambda text: gemma.tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    the = ids(" the")
    assert len(the) == 1  # the space belongs to the word
    assert encode_pair(gemma.tokenizer, "hello", " the", bos=False) == (ids("hello"), the)
    # So it moves there from the context, as the word is one token in whatever way it is given.
    assert encode_pair(gemma.tokenizer, "hello ", "the", bos=False) == (ids("hello"), the)
    # Inside a word the context stays as it is encoded alone: "that" is one token, "th" another.
    context, continuation = encode_pair(gemma.tokenizer, "hello th", "at the", bos=False)
    assert (context, continuation) == (ids("hello th"), the)
    assert ids("hello that the") != [*context, *continuation]


def test_bos_stands_once_in_front_where_it_is_asked_for(gemma):
    bos = gemma.tokenizer.bos_token_id
    context, continuation = encode_pair(gemma.tokenizer, "hello", " the", bos=False)
    assert bos not in context
    expected = [bos, *context], continuation
    assert encode_pair(gemma.tokenizer, "hello", " the", bos=True) == expected
    assert encode_pair(gemma.tokenizer, "<bos>hello", " the", bos=True) == expected
    item = (["hello"], [" the"])
    assert encode_item(gemma, *item).choices == (expected,)  # as its tokenizer does it
    (without,) = encode_items(dataclasses.replace(gemma, bos=False), [item])
    assert without.choices == ((context, continuation),)


def test_an_empty_context_is_the_token_that_begins_or_else_ends_texts(gemma):
    tokenizer = word_level(["a", "b"])
    a, b = tokenizer.convert_tokens_to_ids(["a", "b"])
    begin = [tokenizer.bos_token_id]
    assert encode_pair(tokenizer, "", "a b", bos=False) == (begin, [a, b])
    assert encode_pair(tokenizer, "", "<bos> a b", bos=False) == (begin, [a, b])
    tokenizer.bos_token = None
    assert encode_pair(tokenizer, "", "a b", bos=False) == ([tokenizer.eos_token_id], [a, b])


def test_a_context_serves_all_choices_or_each_has_its_own(gemma):
    one, own = encode_items(
        gemma, [(["hello"], [" the", " that"]), (["hello the", "hello that"], [" the"] * 2)]
    )
    pair = partial(encode_pair, gemma.tokenizer, bos=True)
    assert one.choices == (pair("hello", " the"), pair("hello", " that"))
    assert own.choices == (pair("hello the", " the"), pair("hello that", " the"))


def test_a_choice_without_tokens_is_named(gemma):
    with pytest.raises(UserError, match=r"piqa-test-1: choice 2 \(''\) has no tokens"):
        encode_items(
            gemma, [(["the"], ["a"]), (["the"], ["a", "b", ""])], ["piqa-test-0", "piqa-test-1"]
        )
    with pytest.raises(UserError, match="item 5: choice 0 has a context without tokens"):
        score_items(gemma, [ChoiceItem((([], [1]),), "item 5")])
    with pytest.raises(UserError, match="has no choices"):
        score_items(gemma, [ChoiceItem(())])


@pytest.mark.parametrize("pair", [([V, 1], [2]), ([1], [2, -1]), ([1], [V + 5])], ids=str)
def test_tokens_beyond_the_vocabulary_are_refused(model, pair):
    with pytest.raises(UserError, match=rf"the model's vocabulary has {V} ids"):
        score_items(model, [ChoiceItem((pair,))])


def test_a_context_of_nothing_needs_a_token_to_stand_for_it():
    tokenizer = word_level(["a"])
    tokenizer.bos_token = tokenizer.eos_token = None
    assert encode_pair(tokenizer, "a", " a", bos=False) == ([4], [4])
    with pytest.raises(UserError, match="no BOS or end of text"):
        encode_pair(tokenizer, "", "a", bos=False)


def test_a_choice_that_is_not_unicode_is_refused(model):
    with pytest.raises(UserError, match="the text is not UTF-8"):
        encode_item(model, ["a"], [" caf\udce9"])
