"""What saves memory changes no result: parts, chunks, answered logits, recomputation."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from lorax_gen.data.config import WorldConfig
from lorax_gen.data.tokens import question_batch
from lorax_gen.data.world_batches import generator_batch
from lorax_gen.errors import UserError
from lorax_gen.mesh.sharding import MeshConfig, make_mesh, put_batch
from lorax_gen.models.decoder import REMAT_POLICIES, Execution
from lorax_gen.training.step import answer_nll, generator_loss, in_parts

PROMPTS, QUERIES = 8, 2


@pytest.fixture(scope="module")
def system(tiny_world_system):
    still = dataclasses.replace(tiny_world_system.spec.generator, cloud_dropout=0.0)
    spec = dataclasses.replace(tiny_world_system.spec, generator=still)
    return tiny_world_system._replace(spec=spec)


@pytest.fixture(scope="module")
def batch(system):
    shape, encoder = WorldConfig(), system.encoder
    return generator_batch(
        system.world.select("seen"),
        encoder,
        encoder,
        seed=0,
        step=0,
        prompts=PROMPTS,
        queries=QUERIES,
        prompt_length=shape.prompt_length,
        question_length=shape.question_length,
    )


@pytest.fixture(scope="module")
def gradients(system, batch):
    """`gradients(**options)` of `generator_loss`: value, statistics and metrics, gradients."""

    def compute(frozen=None, rows=None, spec=system.spec, **options):
        loss = jax.value_and_grad(generator_loss(spec, **options), has_aux=True)
        (value, aux), grads = jax.jit(loss, static_argnums=5)(
            system.params,
            system.stats,
            frozen or system.frozen,
            rows or batch,
            jax.random.key(0),
            None,
        )
        return value, aux, grads

    return compute


@pytest.fixture(scope="module")
def whole(gradients):
    return gradients()


def assert_same(found, expected):
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("microbatches", [2, 8])
def test_parts_of_a_batch_give_the_gradients_of_the_whole(gradients, whole, microbatches):
    """BatchNorm's statistics and the balance loss are among what is compared."""
    assert_same(gradients(microbatches=microbatches), whole)
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(whole[2])) > 1e-2


def test_parts_share_every_device(gradients, whole, batch):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2), jax.devices()[:4])
    with jax.set_mesh(mesh):
        assert_same(gradients(rows=put_batch(batch, mesh), microbatches=2), whole)


def test_batches_that_do_not_split_are_refused(gradients):
    with pytest.raises(UserError, match="8 prompts cannot be split into 3 microbatches"):
        gradients(microbatches=3)


def test_rows_come_back_in_their_places():
    rows = {"a": jnp.arange(12).reshape(12, 1), "b": jnp.arange(6)}
    found = in_parts(lambda part, key: (part["a"], part["b"]), rows, 3, jax.random.key(0))
    chex.assert_trees_all_equal(found, (rows["a"], rows["b"]))


@pytest.mark.parametrize("remat", [name for name in REMAT_POLICIES if name != "none"])
def test_what_is_computed_again_is_the_same(gradients, whole, remat):
    assert_same(gradients(execution=Execution(remat=remat)), whole)


def test_logits_of_answers_alone_give_the_same_loss(gradients, whole, batch):
    longest = int(batch["answer"][:, 1:].sum(1).max())
    assert longest < batch["tokens"].shape[1] - 1
    assert_same(gradients(answer_length=longest), whole)


def test_an_answer_longer_than_promised_is_refused(system):
    with pytest.raises(UserError, match="an answer of 4 tokens is longer than answer_length=3"):
        question_batch(system.encoder, [("apple :", "red red red")], 12, answer_length=3)


@pytest.mark.parametrize("chunk", [1, 3, 4])
def test_chunks_of_logits_give_the_same_likelihood(system, batch, chunk):
    edge = system.edge

    @functools.partial(jax.jit, static_argnums=1)
    def score(params, chunk):
        def total(params):
            nll, right = answer_nll(params, edge.config, batch, chunk=chunk)
            return nll.sum(), (nll, right)

        return jax.value_and_grad(total, has_aux=True)(params)

    assert_same(score(edge.params, chunk), score(edge.params, 128))


def shapes_in(jaxpr) -> set[tuple[int, ...]]:
    """Shapes of all values of a program, those inside its loops included."""
    found = set()
    for equation in jaxpr.eqns:
        found |= {tuple(var.aval.shape) for var in equation.outvars}
        for inner in jaxprs_in_params(equation.params):
            found |= shapes_in(inner)
    return found


def test_logits_of_the_whole_batch_never_exist(system, batch):
    def program(**options):
        loss = generator_loss(system.spec, **options)
        arguments = system.params, system.stats, system.frozen, batch, jax.random.key(0)
        return shapes_in(jax.make_jaxpr(jax.grad(lambda *a: loss(*a, None)[0]))(*arguments).jaxpr)

    vocabulary, length = system.edge.config.vocab_size, batch["tokens"].shape[1] - 1
    all_logits = (PROMPTS * QUERIES, length, vocabulary)
    assert all_logits in program()  # the world's are short: there they do
    assert all_logits not in program(answer_length=3)
    assert (PROMPTS * QUERIES, 3, vocabulary) in program(answer_length=3)


def test_the_head_of_the_cloud_is_never_computed(gradients, whole, system):
    """Not even read: it may hold anything."""
    config = dataclasses.replace(system.cloud.config, tie_word_embeddings=False)
    spec = dataclasses.replace(system.spec, cloud=config)
    head = jnp.full((config.hidden_size, config.vocab_size), jnp.nan)
    frozen = {**system.frozen, "cloud": {**system.cloud.params, "lm_head": head}}
    assert_same(gradients(frozen=frozen, spec=spec), whole)


def test_bf16_models_keep_what_is_trained_in_fp32(gradients, whole, system):
    frozen = jax.tree.map(lambda x: x.astype(jnp.bfloat16), system.frozen)
    value, (stats, _), grads = gradients(frozen=frozen)
    assert {leaf.dtype for leaf in jax.tree.leaves((grads, stats))} == {np.dtype(np.float32)}
    np.testing.assert_allclose(value, whole[0], rtol=0.05)
