"""Counts beside the paper's, the published ones, XLA's, and beside each other."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import pytest

from lorax_gen.baselines.loramoe import LoraMoeConfig, init_loramoe, loramoe_adapter
from lorax_gen.baselines.mixlora import MixLoraConfig, init_mixlora, mixlora_adapter
from lorax_gen.cost import (
    RECOMPUTED,
    Macs,
    decode_macs,
    generated_ranks,
    generator_macs,
    lora_macs,
    loramoe_macs,
    merge_macs,
    mixlora_macs,
    parameters,
    prefill_macs,
    question_macs,
    train_step_macs,
    tuning_step_macs,
)
from lorax_gen.method import GeneratorConfig, generate, init_generator, init_lora, merge
from lorax_gen.models import presets
from lorax_gen.models.decoder import (
    REMAT_POLICIES,
    Execution,
    hidden_states,
    init_params,
    kernel_shapes,
    logits,
)
from lorax_gen.models.decoding import forward_with_cache, init_cache
from lorax_gen.system import GeneratorSpec, meta_states
from lorax_gen.training.step import answer_loss, generator_loss
from tests.tiny import adapter_of

PUBLISHED = {
    "llama3_8b": 8_030_261_248,
    "llama3_2_1b": 1_235_814_400,
    "tinyllama_1b": 1_100_048_384,
    "gemma_2b": 2_506_172_416,
    "gemma2_2b": 2_614_341_888,
    "qwen2_1_5b": 1_543_714_304,
    "gemma3_1b": 999_885_952,
    "opt_2_7b": 2_651_596_800,
    "opt_350m": 331_196_416,
}
RANKS = {"q": 64, "down": 128}  # large, so that a LoRA is no rounding error


@pytest.fixture(params=PUBLISHED)
def config(request):
    return getattr(presets, request.param)()


@pytest.fixture
def make_spec():
    """A system of published widths; one layer each, for XLA counts the body of a scan once.

    Router, pool and LoRAs are large, so that none of them is a rounding error.
    """

    def make(cloud, edge, layers=1, **switches):
        sizes = {"n_experts": 1024, "router_width": 4096, "rank": 4, "cloud_rank": 64}
        generator = GeneratorConfig(**sizes, cloud_dropout=0.0, **switches)
        return GeneratorSpec(generator, shallow(cloud, layers), shallow(edge, layers))

    return make


def shallow(config, layers):
    types = config.layer_types[:layers]
    return dataclasses.replace(config, num_hidden_layers=layers, layer_types=types)


def ints(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def params_of(config):
    return jax.eval_shape(lambda: init_params(jax.random.key(0), config))


def lora_of(config, ranks):
    """Shapes of a LoRA with a rank for each kernel."""
    shapes, layers = kernel_shapes(config), config.num_hidden_layers
    key = jax.random.key(0)
    return jax.eval_shape(
        lambda: {
            name: init_lora(key, {name: shapes[name]}, rank, layers)[name]
            for name, rank in ranks.items()
        }
    )


def generator_of(spec):
    """Shapes of a generator's trainables and statistics."""
    return jax.eval_shape(
        lambda: init_generator(
            jax.random.key(0),
            spec.generator,
            edge_layers=spec.edge.num_hidden_layers,
            edge_shapes=kernel_shapes(spec.edge),
            cloud_layers=spec.cloud.num_hidden_layers,
            cloud_shapes=kernel_shapes(spec.cloud),
            cloud_embedding=jnp.zeros(spec.cloud.hidden_size),
        )
    )


def xla_flops(function, *shapes):
    """XLA's count for a traced program. It includes what is done element by element.

    Not compiled: a loop of one layer would be unrolled, and then lacks the gradient of what goes
    into the first layer, which a longer loop has.
    """
    return jax.jit(function).lower(*shapes).cost_analysis()["flops"]


def agrees(macs, flops, tolerance=0.003):
    return abs(flops / macs.flops - 1) < tolerance


# --- beside printed numbers ----------------------------------------------------------------------


def test_the_flops_of_table_13_are_multiply_accumulates():
    question = prefill_macs(presets.qwen2_1_5b(), 100).total
    behind_instruction = prefill_macs(presets.qwen2_1_5b(), 300).total
    instruction = prefill_macs(presets.llama3_8b(), 200).total
    assert (question, behind_instruction) == (155_217_100_800, 470_812_262_400)
    assert instruction == 1_511_417_446_400
    assert f"{question:.3E}" == "1.552E+11"
    assert f"{behind_instruction:.3E}" == "4.708E+11"
    assert f"{question + instruction:.3E}" == "1.667E+12"  # its training step: forward passes only


def test_the_baselines_of_table_13_are_forward_passes_over_300_tokens():
    """Printed for LoRA, LoRAMoE and MixLoRA: 4.708, 4.742, 5.048 E11 in inference and 4.736, 4.742,
    5.061 E11 in training. What is merged in inference is not in training."""
    config, tokens = presets.qwen2_1_5b(), 300
    base, shapes = prefill_macs(config, tokens).total, kernel_shapes(config)

    def shown(*added):
        return f"{base + sum(macs.total for macs in added):.3E}"

    assert shown() == "4.708E+11"  # LoRA, merged
    assert shown(lora_macs(config, tokens, dict.fromkeys(shapes, 8))) == "4.736E+11"
    # MixLoRA: every token through the LoRAs of all 8 experts, and the frozen network once.
    mixed = mixlora_macs(config, tokens, MixLoraConfig(top_k=1)).total
    attention = lora_macs(config, tokens, dict.fromkeys("qkvo", 16)).total
    assert f"{base + mixed - attention:.3E}" == "5.048E+11"
    assert f"{base + mixed:.3E}" == "5.061E+11"
    # With the K = 2 hidden vectors of a token each through one wide product of all experts.
    assert shown(mixlora_macs(config, tokens, MixLoraConfig())) == "5.350E+11"
    # LoRAMoE with the 8 experts of rank 4 of its authors is not what was counted: that could have
    # been 2 of rank 6, or 4 of rank 2 at all seven kernels.
    assert shown(loramoe_macs(config, tokens, LoraMoeConfig())) == "4.801E+11"
    assert shown(loramoe_macs(config, tokens, LoraMoeConfig(n_experts=2, rank=6))) == "4.742E+11"
    seven = sum(4 * d_in + 8 * (d_in + d_out) for d_in, d_out in shapes.values())
    assert f"{base + tokens * config.num_hidden_layers * seven:.3E}" == "4.742E+11"


ROUTED = {  # large, so that neither is a rounding error
    "loramoe": (LoraMoeConfig(n_experts=32, rank=32), init_loramoe, loramoe_adapter, loramoe_macs),
    "mixlora": (MixLoraConfig(n_experts=32, rank=32), init_mixlora, mixlora_adapter, mixlora_macs),
}


@pytest.mark.parametrize("method", ROUTED)
@pytest.mark.parametrize("family", ["qwen2_1_5b", "opt_2_7b"])
def test_a_token_routed_adapter_costs_what_xla_counts(method, family):
    own, init, adapter, macs = ROUTED[method]
    config, (batch, tokens) = shallow(getattr(presets, family)(), 1), (2, 100)
    shapes = jax.eval_shape(lambda: init(jax.random.key(0), own, config))

    def forward(params, tokens, trained):
        made = adapter(trained, own)
        return logits(params, config, hidden_states(params, config, tokens, adapter=made))

    flops = xla_flops(forward, params_of(config), ints(batch, tokens), shapes)
    expected = prefill_macs(config, tokens, batch) + batch * macs(config, tokens, own)
    assert agrees(expected, flops, 0.02)  # masks and gates are counted by XLA alone


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_parameters_are_the_published_ones(name, count):
    assert parameters(getattr(presets, name)()) == count


def test_learned_positions_biases_and_norms_are_parameters():
    config, d, f, layers = presets.opt_2_7b(), 2560, 10240, 32
    kernels, biases, norms = 4 * d * d + 2 * d * f, 4 * d + f + d, 4 * d
    assert parameters(config) == (50272 + 2050) * d + layers * (kernels + biases + norms) + 2 * d
    heads = dataclasses.replace(config, norm="rms", qk_norm=True)
    fewer = (2 * layers + 1) * d - 2 * layers * 80
    assert parameters(heads) == parameters(config) - fewer


# --- beside XLA, at the published widths ---------------------------------------------------------


@pytest.mark.parametrize("ranks", [{}, RANKS], ids=["plain", "lora"])
def test_a_prefill_costs_what_xla_counts(config, ranks):
    config, (batch, tokens) = shallow(config, 2), (2, 100)

    def forward(params, tokens, lora):
        cache = init_cache(config, *tokens.shape, jnp.float32)
        hidden, _ = forward_with_cache(params, config, tokens, cache, adapter_of(lora))
        return logits(params, config, hidden)

    flops = xla_flops(forward, params_of(config), ints(batch, tokens), lora_of(config, ranks))
    assert agrees(prefill_macs(config, tokens, batch, lora=ranks), flops)


def test_a_decoded_token_costs_what_xla_counts(config):
    config, (batch, context) = shallow(config, 2), (3, 200)

    def forward(params, token, position, cache):
        hidden, _ = forward_with_cache(params, config, token, cache, None, position)
        return logits(params, config, hidden)

    cache = jax.eval_shape(lambda: init_cache(config, batch, context, jnp.float32))
    flops = xla_flops(forward, params_of(config), ints(batch, 1), ints(batch, 1), cache)
    assert agrees(decode_macs(config, context, batch), flops)


SYSTEMS = {
    "factors": (presets.llama3_8b(), presets.qwen2_1_5b(), {}),
    "products": (presets.gemma2_2b(), presets.tinyllama_1b(), {"composition": "products"}),
    "shared": (presets.tinyllama_1b(), presets.gemma2_2b(), {"pool": "shared", "router": "shared"}),
    "gumbel": (
        presets.qwen2_1_5b(),
        presets.gemma_2b(),
        {"composition": "products", "strategy": "gumbel"},
    ),
    "no gate": (presets.gemma3_1b(), presets.opt_2_7b(), {"edge_targets": ("up", "down")}),
}


@pytest.mark.parametrize("system", SYSTEMS)
def test_making_loras_costs_what_xla_counts(make_spec, system):
    cloud, edge, switches = SYSTEMS[system]
    spec = make_spec(cloud, edge, **switches)

    def forward(params, stats, cloud, prompt, lengths):
        states = meta_states(params, cloud, spec, prompt, lengths)
        return generate(params, stats, states, spec.generator).lora

    prompt = ints(2, 10), ints(2)
    flops = xla_flops(forward, *generator_of(spec), params_of(spec.cloud), *prompt)
    assert agrees(generator_macs(spec, 10, prompts=2), flops)


def test_merging_costs_what_xla_counts(config):
    config = shallow(config, 2)
    flops = xla_flops(merge, params_of(config)["layers"], lora_of(config, RANKS))
    additions = sum(2 * a * b for name, (a, b) in kernel_shapes(config).items() if name in RANKS)
    assert flops == merge_macs(config, RANKS).flops + additions


@pytest.mark.parametrize("remat", REMAT_POLICIES)
@pytest.mark.parametrize("ranks", [None, RANKS], ids=["weights", "lora"])
@pytest.mark.parametrize("name", ["tinyllama_1b", "gemma2_2b"])
def test_a_tuning_step_costs_what_xla_counts(name, ranks, remat):
    config = shallow(getattr(presets, name)(), 1)
    rows, length = 2, 101

    def loss(trained, frozen, batch):
        params, lora = (frozen, trained) if ranks else (trained, None)
        adapter, execution = adapter_of(lora), Execution(remat=remat)
        return answer_loss(params, config, batch, adapter=adapter, execution=execution)[0]

    trees = (params_of(config), None)
    if ranks:
        trees = (lora_of(config, ranks), params_of(config))
    batch = {
        "tokens": ints(rows, length),
        "answer": jax.ShapeDtypeStruct((rows, length), bool),
    }
    flops = xla_flops(jax.value_and_grad(loss), *trees, batch)
    macs = tuning_step_macs(config, rows, length, ranks, remat=remat)
    if remat == "full" and not config.post_norms:  # `down` is not computed again
        d, f = config.hidden_size, config.intermediate_size
        macs += Macs(kernels=-rows * (length - 1) * d * f)
    assert agrees(macs, flops)


@pytest.mark.parametrize("remat", ["none", "dots"])
@pytest.mark.parametrize("name", ["tinyllama_1b", "gemma2_2b"])
def test_layers_below_those_with_a_lora_have_a_forward_pass_alone(name, remat):
    """One layer of each kind, since XLA counts the body of a scan once."""
    config = shallow(getattr(presets, name)(), 2)
    rows, length = 2, 101

    def loss(lora, params, batch):
        adapter, execution = adapter_of(lora), Execution(remat=remat)
        return answer_loss(params, config, batch, adapter=adapter, execution=execution)[0]

    batch = {"tokens": ints(rows, length), "answer": jax.ShapeDtypeStruct((rows, length), bool)}
    trees = (lora_of(shallow(config, 1), RANKS), params_of(config))
    flops = xla_flops(jax.value_and_grad(loss), *trees, batch)
    assert agrees(tuning_step_macs(config, rows, length, RANKS, layers=1, remat=remat), flops)


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_step_of_lora_gen_costs_what_xla_counts(make_spec, system):
    cloud, edge, switches = SYSTEMS[system]
    spec = make_spec(cloud, edge, **switches)
    prompts, queries, prompt_length, length = 2, 2, 10, 9
    rows = prompts * queries
    batch = {
        "prompt": ints(prompts, prompt_length),
        "prompt_lengths": ints(prompts),
        "tokens": ints(rows, length),
        "answer": jax.ShapeDtypeStruct((rows, length), bool),
    }
    frozen = {"cloud": params_of(spec.cloud), "edge": params_of(spec.edge)}
    loss = generator_loss(spec)
    step = jax.value_and_grad(lambda *inputs: loss(*inputs, None), has_aux=True)
    key = jax.eval_shape(lambda: jax.random.key(0))
    flops = xla_flops(step, *generator_of(spec), frozen, batch, key)
    macs = train_step_macs(
        spec, prompts=prompts, queries=queries, prompt_length=prompt_length, length=length
    )
    assert agrees(macs, flops, tolerance=0.005)


# --- beside each other ---------------------------------------------------------------------------


def test_counts_are_integers_that_add_and_multiply():
    macs = Macs(1, 2, 3, 4, 5)
    assert macs + macs == 2 * macs == sum([macs, macs], Macs())
    assert (macs.total, macs.flops) == (15, 30)
    assert all(type(part) is int for part in dataclasses.astuple(macs.training(frozen=True)))


@pytest.mark.parametrize("causal", [False, True])
def test_a_batch_costs_its_rows_and_a_model_its_layers(config, causal):
    def cost(config, *sizes):
        return prefill_macs(config, *sizes, causal=causal, lora=RANKS, logits=0)

    assert cost(config, 5000, 7) == 7 * cost(config, 5000)
    projected, layers = config.word_embed_proj_dim or 0, range(config.num_hidden_layers)
    types = [config.layer_types[i : i + 1] for i in layers]
    each = (dataclasses.replace(config, num_hidden_layers=1, layer_types=kind) for kind in types)
    once = Macs(kernels=5000 * projected * config.hidden_size)  # where tokens come in
    other_layers = (len(layers) - 1) * once
    assert sum((cost(layer, 5000) for layer in each), Macs()) == cost(config, 5000) + other_layers


def test_a_text_costs_its_tokens_one_by_one(config):
    """Under the causal mask: whatever is cached, every pair is counted once."""
    for tokens in (4, 4100):  # within the windows of Gemma 2 and beyond
        prompt = prefill_macs(config, tokens, logits=0, causal=True)
        first = prefill_macs(config, tokens - 3, logits=0, causal=True)
        rest = prefill_macs(config, 3, cached=tokens - 3, causal=True)
        back = (config.word_embed_proj_dim or 0) * config.hidden_size
        head = config.embedding_size * config.vocab_size + back
        assert first + rest == prompt + Macs(head=3 * head)
        contexts = range(tokens - 2, tokens + 1)
        decoded = (decode_macs(config, context, causal=True) for context in contexts)
        assert sum(decoded, Macs()) == rest


def test_the_causal_mask_halves_attention_and_nothing_else(config):
    config = dataclasses.replace(config, layer_types=())
    full, causal = prefill_macs(config, 99), prefill_macs(config, 99, causal=True)
    assert causal.attention * 2 * 99 == full.attention * 100
    assert dataclasses.replace(causal, attention=full.attention) == full


def test_a_window_saves_causal_attention_beyond_it_alone():
    windows = presets.gemma2_2b()
    none = dataclasses.replace(windows, layer_types=())
    for tokens in (1, 4095, 4096):
        assert prefill_macs(windows, tokens, causal=True) == prefill_macs(none, tokens, causal=True)
        assert decode_macs(windows, tokens, causal=True) == decode_macs(none, tokens, causal=True)
    assert prefill_macs(windows, 9000) == prefill_macs(none, 9000)  # computed and masked
    per_pair = 2 * 8 * 256 * 13  # in 13 of its 26 layers
    saved = (
        decode_macs(none, 4100, causal=True).total - decode_macs(windows, 4100, causal=True).total
    )
    assert saved == 4 * per_pair
    saved = (
        prefill_macs(none, 4100, causal=True).total - prefill_macs(windows, 4100, causal=True).total
    )
    assert saved == (1 + 2 + 3 + 4) * per_pair


def test_more_of_anything_costs_more(config):
    def grows(costs):
        return all(less.total < more.total for less, more in itertools.pairwise(costs))

    assert grows(prefill_macs(config, tokens, causal=True) for tokens in range(1, 9))
    assert grows(prefill_macs(config, 8, logits=kept) for kept in (0, 1, None))
    assert grows(decode_macs(config, context) for context in range(1, 9))
    assert grows(question_macs(config, 8, written) for written in range(1, 5))
    assert grows(prefill_macs(config, 8, lora={"q": rank}) for rank in range(5))
    assert grows(merge_macs(config, {"q": rank}) for rank in range(5))


def test_a_question_is_read_once_and_answered_token_by_token(config):
    bare = question_macs(config, 20, 3)
    decoded = decode_macs(config, 21) + decode_macs(config, 22)
    assert bare == prefill_macs(config, 20, logits=1) + decoded
    cached, in_context = question_macs(config, 20, 3, cached=80), question_macs(config, 100, 3)
    assert bare.total < cached.total < in_context.total
    assert cached.kernels == bare.kernels


def test_a_generated_lora_has_the_rank_of_its_composition():
    assert generated_ranks(GeneratorConfig()) == {"gate": 16, "up": 16, "down": 16}
    products = GeneratorConfig(composition="products", top_k=3, edge_targets=("q",))
    assert generated_ranks(products) == {"q": 48}
    assert generated_ranks(dataclasses.replace(products, strategy="gumbel")) == {"q": 128}


def test_fewer_layers_with_experts_cost_less_in_cloud_generator_and_backward_pass(make_spec):
    sizes = {"prompts": 2, "queries": 2, "prompt_length": 10, "length": 9}
    spec = make_spec(presets.llama3_2_1b(), presets.tinyllama_1b(), layers=4)
    edge = spec.edge
    half = dataclasses.replace(spec, generator=dataclasses.replace(spec.generator, last_layers=2))
    every = dataclasses.replace(spec, generator=dataclasses.replace(spec.generator, last_layers=4))
    assert train_step_macs(every, **sizes) == train_step_macs(spec, **sizes)
    saved = train_step_macs(spec, **sizes) - train_step_macs(half, **sizes)
    reading = generator_macs(spec, 10, 2) - generator_macs(half, 10, 2)
    assert generator_macs(half, 10, 2).generator * 2 == generator_macs(spec, 10, 2).generator
    lower = prefill_macs(shallow(edge, 2), 8, 4, logits=0)
    lower += Macs(attention=lower.attention)  # two products in the backward pass, of both factors
    lora = 3 * 4 * lora_macs(edge, 8, generated_ranks(spec.generator), 2).lora
    expected = reading.training(frozen=True) + lower + Macs(lora=lora)
    assert saved == expected


def test_a_step_costs_two_passes_of_what_is_frozen_and_three_of_what_learns(make_spec):
    spec = make_spec(presets.llama3_8b(), presets.qwen2_1_5b(), layers=4)
    sizes = {"prompts": 3, "queries": 5, "prompt_length": 200, "length": 101}
    reading = generator_macs(spec, 200, prompts=3)
    asking = prefill_macs(spec.edge, 100, 15, lora=generated_ranks(spec.generator))
    forward, step = reading + asking, train_step_macs(spec, **sizes)
    for name, times in {"kernels": 2, "head": 2, "attention": 3, "lora": 3, "generator": 3}.items():
        assert getattr(step, name) == times * getattr(forward, name) > 0
    for remat, again in RECOMPUTED.items():
        more = train_step_macs(spec, **sizes, remat=remat).total - step.total
        assert more == sum(getattr(forward, name) for name in again)
    few = train_step_macs(spec, **sizes, answered=4)
    assert few.head * 100 == step.head * 4
    assert dataclasses.replace(few, head=step.head) == step


def test_every_remat_policy_is_known():
    assert set(RECOMPUTED) == set(REMAT_POLICIES)
