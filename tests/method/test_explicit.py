"""Over meshes of either kind, explicit and automatic, the method computes what it does without."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lorax_gen import method
from lorax_gen.method.balance import gate_distance

B, T, L, D, F, R, N, H, K = 8, 6, 4, 8, 12, 2, 6, 10, 2
RNG = np.random.default_rng(0)
LENGTHS = np.array([0, 1, 2, 3, 4, 5, 6, 3], np.int32)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


STATES, X, EMBEDDINGS, META = normal(B, L, D), normal(B, T, D), normal(B, T, D), normal(L, D)
PER_EXAMPLE = {"up": {"a": normal(L, B, D, R), "b": normal(L, B, R, F)}}
SHARED = {"up": {"a": normal(L, D, R), "b": normal(L, R, F)}}
POOL = {"up": {"a": normal(L, N, D, R), "b": normal(L, N, R, F)}}
ONE_POOL = {"up": {"a": normal(N, D, R), "b": normal(N, R, F)}}
LOGITS = normal(B, L, N)
GATES = np.asarray(method.keep_top_k(LOGITS, K))
ROUTER, STATS = jax.device_get(method.init_router(jax.random.key(0), D, H, N, L))
SPLIT_LORA = {"up": {"a": P(None, "data", "model"), "b": P(None, "data", None, "model")}}
SPLIT_SHARED = {"up": {"a": P(None, "model"), "b": P(None, None, "model")}}
SPLIT_POOL = {"up": {"a": P(None, None, "model"), "b": P(None, None, None, "model")}}
SPLIT_ROUTER = {"w1": P(None, None, "model"), "b1": P(None, "model"), "w2": P(None, "model")}
ROWS, BY_EXPERT = P("data"), P("data", None, "model")


def replicated(tree):
    return jax.tree.map(lambda leaf: P(), tree)


def insert(embeddings, lengths, meta):
    return method.insert_meta_tokens(embeddings, lengths, meta, L)


# Function, its arguments, how they are split, and how its results are where that is explicit.
CASES = {
    "insert_meta_tokens": (
        insert, (EMBEDDINGS, LENGTHS, META), (ROWS, ROWS, P(None, "model")),
        P("data", None, None),
    ),
    "insert, the rows' axis in the meta tokens": (
        insert, (EMBEDDINGS, LENGTHS, META), (BY_EXPERT, P(), P("data")),
        P("data", None, "model"),
    ),
    "read_meta_states": (
        lambda hidden, lengths: method.read_meta_states(hidden, lengths, 2),
        (EMBEDDINGS, np.minimum(LENGTHS, T - 2)), (BY_EXPERT, P()), P("data", None, "model"),
    ),
    "take_example": (
        lambda tree: method.take_example(tree, -3), (PER_EXAMPLE,), (SPLIT_LORA,),
        {"up": {"a": P(None, "model", None), "b": P(None, None, "model")}},
    ),
    "take_example, its index in an array": (
        method.take_example, (PER_EXAMPLE, np.int32(5)), (SPLIT_LORA, P()),
        {"up": {"a": P(None, "model", None), "b": P(None, None, "model")}},
    ),
    "scaled": (
        lambda tree: method.scaled(tree, 0.5), (PER_EXAMPLE,), (SPLIT_LORA,),
        {"up": {"a": P(None, "data", "model", None), "b": P(None, "data", None, "model")}},
    ),
    "merge": (
        method.merge, ({"up": normal(L, D, F)}, SHARED), ({"up": P(None, "model")}, SPLIT_SHARED),
        {"up": P(None, "model", None)},
    ),
    "apply_lora, of two rows each": (
        method.apply_lora, (X, {"a": normal(B // 2, D, R), "b": normal(B // 2, R, F)}),
        (BY_EXPERT, {"a": P("data", "model"), "b": P("data", None, "model")}),
        P("data", None, "model"),
    ),
    "router_logits, in training": (
        lambda *a: method.router_logits(*a, train=True), (ROUTER, STATS, STATES),
        (replicated(ROUTER) | SPLIT_ROUTER, replicated(STATS), BY_EXPERT),
        (P("data", None, None), {"mean": P(None, None), "var": P(None, None)}),
    ),
    "keep_top_k": (
        lambda logits: method.keep_top_k(logits, K), (LOGITS,), (BY_EXPERT,),
        P("data", None, "model"),
    ),
    "compose": (
        method.compose, (POOL, GATES), (SPLIT_POOL, BY_EXPERT),
        {"up": {"a": P(None, "data", "model", None), "b": P(None, "data", None, "model")}},
    ),
    "compose, the products of a shared pool": (
        lambda pool, gates: method.compose(pool, gates, "products", K), (ONE_POOL, GATES),
        ({"up": {"a": P("model"), "b": P("model")}}, BY_EXPERT),
        {"up": {"a": P(None, "data", None, None), "b": P(None, "data", None, None)}},
    ),
    "compose, the rows' axis in the pool": (
        lambda pool, gates: method.compose(pool, gates, "products", K), (POOL, GATES),
        ({"up": {"a": P(None, None, "data"), "b": P(None, None, None, "data")}}, ROWS),
        {"up": {"a": P(None, "data", None, None), "b": P(None, "data", None, None)}},
    ),
    "apply_experts": (
        method.apply_experts, (X, ONE_POOL["up"], GATES[:, 0]),
        (ROWS, {"a": P("model"), "b": P("model")}, P("data", "model")), P("data", None, None),
    ),
    "balance_loss": (method.balance_loss, (GATES,), (BY_EXPERT,), P()),
    "gate_distance": (gate_distance, (GATES,), (BY_EXPERT,), P()),
}  # fmt: skip


def mesh_of(kind):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)


def put(tree, specs, mesh):
    return jax.tree.map(
        lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), tree, specs
    )


def assert_close(found, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), found, expected
    )


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_split_arrays_give_the_values_of_arrays_on_one_device(name, kind):
    function, arrays, specs, split = CASES[name]
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        given = put(arrays, specs, mesh)
        found = jax.jit(function)(*given)
        eager = function(*given) if kind == AxisType.Explicit else found
    expected = jax.jit(function)(*arrays)
    for values in (found, eager):
        assert_close(values, expected)
        if kind == AxisType.Explicit:
            assert jax.tree.map(lambda leaf: jax.typeof(leaf).sharding.spec, values) == split


def loss(params, embeddings, lengths, x):
    """All of the method: meta tokens in, a LoRA for each row out, and applied."""
    inserted = insert(embeddings, lengths, params["meta"])
    states = method.read_meta_states(jnp.cumsum(inserted, axis=1), lengths, L)
    logits, _ = method.router_logits(params["router"], STATS, states, train=True)
    gates = method.keep_top_k(logits, K)
    tree = method.scaled(method.compose(params["pool"], gates, "products", K), 0.5)
    y = sum(
        method.apply_lora(x, jax.tree.map(lambda leaf, i=i: leaf[i], tree["up"])) for i in range(L)
    )
    merged = method.merge({"up": params["kernel"]}, method.take_example(tree, 3))["up"]
    return jnp.square(y).mean() + jnp.square(merged).mean() + method.balance_loss(gates)


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=str)
def test_gradients_are_those_of_one_device_and_split_like_their_arrays(kind):
    params = {"meta": META, "router": ROUTER, "pool": POOL, "kernel": normal(L, D, F)}
    specs = {
        "meta": P(None, "model"),
        "router": replicated(ROUTER) | SPLIT_ROUTER,
        "pool": SPLIT_POOL,
        "kernel": P(None, None, "model"),
    }
    rows, mesh, gradient = (EMBEDDINGS, LENGTHS, X), mesh_of(kind), jax.jit(jax.grad(loss))
    with jax.set_mesh(mesh):
        given = put(params, specs, mesh)
        found = gradient(given, *put(rows, (ROWS,) * 3, mesh))
    assert_close(found, gradient(params, *rows))
    if kind == AxisType.Explicit:
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(given), strict=True):
            assert jax.typeof(one) == jax.typeof(other)


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=str)
def test_vmap_over_split_rows_and_over_examples(kind):
    def of_row(embeddings, length, gates, meta, pool):
        one = insert(embeddings[None], length[None], meta)[0]
        return one, method.compose(pool, gates)

    def examples(tree, indices):
        return jax.vmap(lambda index: method.take_example(tree, index))(indices)

    rows = jax.vmap(of_row, in_axes=(0, 0, 0, None, None))
    arrays = (EMBEDDINGS, LENGTHS, GATES, META, POOL)
    specs = (ROWS, ROWS, ROWS, P(None, "model"), SPLIT_POOL)
    indices = np.array([5, 0, 5, 7], np.int32)
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        found = jax.jit(rows)(*put(arrays, specs, mesh))
        taken = jax.jit(examples)(*put((PER_EXAMPLE, indices), (SPLIT_LORA, P("data")), mesh))
    assert_close(found, rows(*arrays))
    assert_close(taken, jax.tree.map(lambda leaf: leaf[:, indices].swapaxes(0, 1), PER_EXAMPLE))


def test_arrays_of_an_explicit_mesh_need_no_context():
    tree = put(PER_EXAMPLE, SPLIT_LORA, mesh_of(AxisType.Explicit))
    assert_close(method.take_example(tree, 2), jax.tree.map(lambda leaf: leaf[:, 2], PER_EXAMPLE))


@pytest.mark.parametrize("name", ["insert_meta_tokens", "take_example", "merge", "compose"])
def test_without_an_explicit_mesh_the_program_is_that_of_the_bare_function(name):
    function = getattr(method, name)
    arrays = {
        "insert_meta_tokens": (EMBEDDINGS, LENGTHS, META),
        "take_example": (PER_EXAMPLE,),
        "merge": ({"up": normal(L, D, F)}, SHARED),
        "compose": (POOL, GATES),
    }[name]
    more = {"insert_meta_tokens": (L,), "take_example": (1,)}.get(name, ())
    with_rule, bare = (
        str(jax.make_jaxpr(lambda *arrays, f=f: f(*arrays, *more))(*arrays))
        for f in (function, function.__wrapped__)
    )
    assert with_rule == bare and "reshard" not in with_rule
