"""AutoCompressors: the soft prompt, where its gradient goes, and the same in torch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_gen.baselines.autocompressor import (
    CompressorConfig,
    compress,
    init_compressor,
    split,
    starts_substep,
)
from lorax_gen.method import init_lora
from lorax_gen.models.decoder import DecoderConfig, kernel_shapes
from lorax_gen.recipes.autocompressor import AutoCompressorConfig, autocompressor_loss

EDGE = DecoderConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    tie_word_embeddings=True,
)
K, D = 3, EDGE.hidden_size
COMPRESSOR = CompressorConfig(vectors=K, segments=3, rank=2, alpha=4.0)
LENGTHS = np.array([11, 7, 2], np.int32)
PROMPT = np.random.default_rng(0).integers(4, 40, (3, 11)).astype(np.int32)


@pytest.fixture(scope="module")
def params(random_params):
    return random_params(EDGE)


@pytest.fixture(scope="module")
def summary():
    return jnp.asarray(np.random.default_rng(1).normal(size=(K, D)), jnp.float32)


def read(params, summary, segments, prompt=PROMPT, lengths=LENGTHS, **options):
    run = jax.jit(
        lambda *arrays: compress(params, EDGE, *arrays, segments=segments, **options).soft_prompt
    )
    return run(summary, prompt, lengths)


def test_summary_tokens_begin_as_the_end_of_text_and_the_lora_as_nothing():
    embedding = jnp.arange(D, dtype=jnp.bfloat16)
    made = init_compressor(jax.random.key(0), COMPRESSOR, EDGE, embedding)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(made))
    np.testing.assert_array_equal(made["summary"], np.tile(np.arange(D), (K, 1)))
    assert set(made["lora"]) == set(COMPRESSOR.targets)
    assert all(not pair["b"].any() and pair["a"].any() for pair in made["lora"].values())


@pytest.mark.parametrize("segments", [1, 2, 3, 4])
def test_segments_hold_each_token_once_in_order(segments):
    parts = list(split(jnp.asarray(PROMPT), jnp.asarray(LENGTHS), segments))
    assert len(parts) == segments
    for row, length in enumerate(LENGTHS):
        pieces = [np.asarray(p.tokens[row, : p.lengths[row]]) for p in parts]
        sizes = list(map(len, pieces))
        np.testing.assert_array_equal(np.concatenate(pieces), PROMPT[row, :length])
        assert max(sizes) - min(sizes) <= 1
        # Each token but the first is the target of exactly one position.
        targets = [np.asarray(p.targets[row])[np.asarray(p.followed[row])] for p in parts]
        np.testing.assert_array_equal(np.concatenate(targets), PROMPT[row, 1:length])


def test_the_soft_prompt_grows_by_k_vectors_a_segment_and_keeps_those_before(params, summary):
    found = {s: read(params, summary, s) for s in (1, 2, 3)}
    assert [found[s].shape for s in found] == [(3, s * K, D) for s in found]
    # The first segment of four tokens alone gives the first vectors of two segments of four.
    prompt, four, eight = PROMPT[:, :8], np.full(3, 4, np.int32), np.full(3, 8, np.int32)
    alone = read(params, summary, 1, prompt, four)
    both = read(params, summary, 2, prompt, eight)
    np.testing.assert_allclose(both[:, :K], alone, atol=1e-5)
    assert np.abs(both[:, K:] - alone).max() > 0.1


def test_padding_and_other_prompts_do_not_matter(params, summary):
    found = read(params, summary, 2)
    padded = np.where(np.arange(11) < LENGTHS[:, None], PROMPT, 1).astype(np.int32)
    np.testing.assert_allclose(read(params, summary, 2, padded), found, atol=1e-5)
    one = read(params, summary, 2, PROMPT[1:2, :7], LENGTHS[1:2])
    np.testing.assert_allclose(one[0], found[1], atol=1e-5)


@pytest.mark.parametrize(
    "segments, starts",  # with the question at the end: | between sub-steps
    [
        (1, []),  # 0 Q
        (2, [1]),  # 0 | 1 Q
        (3, [2]),  # 0 1 | 2 Q
        (4, [1, 3]),  # 0 | 1 2 | 3 Q
        (5, [2, 4]),  # 0 1 | 2 3 | 4 Q
    ],
)
def test_substeps_of_two_are_counted_from_the_question(segments, starts):
    assert [i for i in range(1, segments + 1) if starts_substep(i, segments, 2)] == starts


def test_the_gradient_of_a_later_substep_stops_at_an_earlier_one(params, summary):
    """Four segments, then the question: 0 | 1 2 | 3 Q. Only the embedding of a token that stands in
    one segment can carry a gradient to that segment."""
    prompt = (8 + np.arange(8)).reshape(1, 8).astype(np.int32)  # two different tokens a segment

    def gradients(substep, vectors):
        def of_embeddings(table):
            changed = {**params, "embed": table}
            made = compress(
                changed, EDGE, summary, prompt, np.array([8]), segments=4, substep=substep
            )
            return jnp.sum(made.soft_prompt[:, vectors] ** 2 * jnp.arange(D))

        found = jax.jit(jax.grad(of_embeddings))(params["embed"])[8:16]
        return np.abs(found).sum(1).reshape(4, 2).max(1) > 1e-6  # by segment

    last = slice(3 * K, 4 * K)
    assert gradients(None, last).tolist() == [True] * 4
    assert gradients(2, last).tolist() == [False, False, False, True]
    # Within a sub-step it passes from a segment to the one before it.
    third = slice(2 * K, 3 * K)
    assert gradients(None, third).tolist() == [True, True, True, False]
    made = {s: read(params, summary, 4, substep=s) for s in (None, 2)}
    np.testing.assert_array_equal(made[None], made[2])  # the values are the same


def batch_of(rng, prompts=3, queries=2):
    tokens = rng.integers(4, EDGE.vocab_size, (prompts * queries, 6)).astype(np.int32)
    answer = np.zeros(tokens.shape, bool)
    for row in range(len(tokens)):
        answer[row, 3 : 5 + row % 2] = True
    return {"prompt": PROMPT, "prompt_lengths": LENGTHS, "tokens": tokens, "answer": answer}


def trainables(config, summary, seed=2):
    shapes = {name: kernel_shapes(EDGE)[name] for name in config.compressor.targets}
    lora = init_lora(jax.random.key(0), shapes, config.compressor.rank, EDGE.num_hidden_layers)
    rng = np.random.default_rng(seed)
    for pair in lora.values():
        pair["b"] = jnp.asarray(rng.normal(0, 0.3, pair["b"].shape), jnp.float32)
    return {"summary": summary, "lora": lora}


CONFIG = AutoCompressorConfig(compressor=COMPRESSOR, dropout=0.0, prompts=3, queries_per_prompt=2)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_the_loss_of_answers_reaches_the_summary_and_the_lora(params, summary, weight):
    config = dataclasses.replace(CONFIG, prompt_loss=weight)
    loss, batch = autocompressor_loss(config, EDGE), batch_of(np.random.default_rng(3))
    own = trainables(config, summary)
    compute = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=5)
    (value, (_, metrics)), grads = compute(
        own, {}, {"edge": params}, batch, jax.random.key(0), None
    )
    assert all(np.abs(leaf).max() > 1e-6 for leaf in jax.tree.leaves(grads))
    parts = metrics["loss_lm"] + (weight * metrics["loss_prompt"] if weight else 0)
    np.testing.assert_allclose(value, parts, rtol=1e-6)
    assert ("loss_prompt" in metrics) == (weight > 0)


def test_loss_and_gradients_equal_those_computed_in_torch(params, summary, tmp_path):
    """Segment by segment as princeton-nlp/AutoCompressors reads them, on a LLaMA of transformers
    with unpadded rows and a LoRA that is merged into its weights."""
    torch = pytest.importorskip("torch", reason="needs torch: pip install -e '.[parity]'")
    from transformers import LlamaForCausalLM

    from lorax_gen.models.huggingface import save_model
    from lorax_gen.models.model import Model
    from lorax_gen.tokenizers import word_level

    words = word_level([f"w{i}" for i in range(EDGE.vocab_size - 4)])
    save_model(tmp_path / "edge", Model(EDGE, params, words))
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "edge", attn_implementation="eager")
    theirs.requires_grad_(False)

    config, batch = CONFIG, batch_of(np.random.default_rng(3))
    own = trainables(config, summary)
    tensors = jax.tree.map(lambda x: torch.tensor(np.asarray(x), requires_grad=True), own)
    modules = {n: "self_attn" if n in "qkvo" else "mlp" for n in config.compressor.targets}
    merged = {}
    for i in range(EDGE.num_hidden_layers):
        for name, module in modules.items():
            key = f"model.layers.{i}.{module}.{name}_proj.weight"
            pair = tensors["lora"][name]
            delta = config.compressor.scale * (pair["a"][i] @ pair["b"][i]).T
            merged[key] = theirs.get_parameter(key) + delta

    def hidden(embeddings):
        def call(*args):
            return theirs.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state

        original, theirs.forward = theirs.forward, call
        try:
            return torch.func.functional_call(theirs, merged, (embeddings,))[0]
        finally:
            theirs.forward = original

    def nll(states, targets):
        scores = theirs.lm_head(states).log_softmax(-1)
        return -scores.gather(-1, torch.tensor(targets.astype(np.int64))[:, None]).sum()

    def embed(ids):
        return theirs.model.embed_tokens(torch.tensor(ids.astype(np.int64)))

    answers, prompts, answer_count, prompt_count = 0, 0, 0, 0
    for p, length in enumerate(LENGTHS):
        soft = torch.zeros(0, D)
        ends = [length * s // 3 for s in range(4)]
        for s in range(3):
            if s == 2:  # sub-steps 0 1 | 2 Q
                soft = soft.detach()
            ids = PROMPT[p, ends[s] : ends[s + 1]]
            states = hidden(torch.cat([soft, embed(ids), tensors["summary"]])[None])
            read = states[len(soft) : len(soft) + len(ids)]
            targets = PROMPT[p, ends[s] + 1 : min(ends[s + 1] + 1, length)]
            if len(targets):
                prompts = prompts + nll(read[: len(targets)], targets)
                prompt_count += len(targets)
            soft = torch.cat([soft, states[len(soft) + len(ids) :]])
        for q in (2 * p, 2 * p + 1):
            tokens, marked = batch["tokens"][q], np.flatnonzero(batch["answer"][q])
            states = hidden(torch.cat([soft, embed(tokens)])[None])[len(soft) :]
            answers = answers + nll(states[marked - 1], tokens[marked])
            answer_count += len(marked)
    expected = answers / answer_count + prompts / prompt_count
    expected.backward()

    loss = jax.jit(
        jax.value_and_grad(autocompressor_loss(config, EDGE), has_aux=True), static_argnums=5
    )
    (value, (_, metrics)), grads = loss(own, {}, {"edge": params}, batch, jax.random.key(0), None)
    np.testing.assert_allclose(value, expected.item(), atol=1e-4)
    np.testing.assert_allclose(metrics["loss_lm"], (answers / answer_count).item(), atol=1e-4)
    for ours, tensor in zip(jax.tree.leaves(grads), jax.tree.leaves(tensors), strict=True):
        np.testing.assert_allclose(ours, tensor.grad.numpy(), atol=1e-4)
