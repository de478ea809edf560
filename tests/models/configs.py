"""A tiny config of each family, no field of it at a default where there is a choice, and how
transformers reads a config.json."""

import dataclasses

from lorax_gen.models.decoder import DecoderConfig
from lorax_gen.models.rope import Rope, RopeScaling

LLAMA = DecoderConfig(
    vocab_size=30,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,  # heads x head_dim is not hidden_size
    max_position_embeddings=77,
    rope_theta=123.0,
    rms_norm_eps=3e-4,
)
GEMMA = dataclasses.replace(
    LLAMA,
    num_key_value_heads=1,
    tie_word_embeddings=True,
    hidden_act="gelu_pytorch_tanh",
    rms_norm_offset=True,
    embedding_scale=True,
)
QWEN2 = dataclasses.replace(LLAMA, biases=("q", "k", "v"), tie_word_embeddings=True)
OPT = DecoderConfig(
    vocab_size=30,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=4,
    max_position_embeddings=77,
    tie_word_embeddings=True,
    hidden_act="relu",
    biases=("q", "k", "v", "o", "up", "down"),
    mlp="plain",
    norm="layer",
    positions="learned",
    position_offset=2,
)
CONFIGS = {
    "llama": LLAMA,
    "llama-tied": dataclasses.replace(LLAMA, num_key_value_heads=4, tie_word_embeddings=True),
    "llama3": dataclasses.replace(LLAMA, rope_scaling=RopeScaling(8.0, 1.5, 4.5, 40)),
    "gemma": GEMMA,
    "gemma2": dataclasses.replace(
        GEMMA,
        post_norms=True,
        query_pre_attn_scalar=24,
        attn_logit_softcapping=20.0,
        final_logit_softcapping=10.0,
        sliding_window=5,
        layer_types=("sliding_attention", "full_attention", "sliding_attention"),
    ),
    "llama-biases": dataclasses.replace(LLAMA, biases=("q", "k", "v", "o", "gate", "up", "down")),
    "linear": dataclasses.replace(LLAMA, rope_scaling=RopeScaling(8.0)),
    "qwen2": QWEN2,
    "qwen2-window": dataclasses.replace(
        QWEN2,
        tie_word_embeddings=False,
        sliding_window=5,
        layer_types=("full_attention", "sliding_attention", "sliding_attention"),
    ),
    "qwen3": dataclasses.replace(LLAMA, qk_norm=True),
    "gemma3": dataclasses.replace(
        GEMMA,
        num_key_value_heads=2,
        qk_norm=True,
        post_norms=True,
        query_pre_attn_scalar=24,
        rope_scaling=RopeScaling(8.0),
        sliding_rope=Rope(45.0),
        sliding_window=5,
        layer_types=("sliding_attention", "full_attention", "sliding_attention"),
    ),
    "smollm3": dataclasses.replace(LLAMA, rope_layers=(True, False, True)),
    "smollm3-window": dataclasses.replace(
        LLAMA,
        tie_word_embeddings=True,
        rope_layers=(True, False, False),
        sliding_window=5,
        layer_types=("full_attention", "sliding_attention", "full_attention"),
    ),
    "opt": OPT,
    "opt-untied": dataclasses.replace(OPT, tie_word_embeddings=False),
    "opt-350m": dataclasses.replace(OPT, word_embed_proj_dim=10, do_layer_norm_before=False),
    "qwen3-biases": dataclasses.replace(LLAMA, qk_norm=True, biases=("q", "k", "v", "o")),
}


def as_transformers_reads(path) -> DecoderConfig:
    """What the config of `transformers` says, field by field, without this project's reader."""
    from transformers import AutoConfig

    theirs = AutoConfig.from_pretrained(path.parent)
    kind = theirs.model_type
    if kind == "opt":
        return _opt(theirs)
    gemma, late_gemma = kind.startswith("gemma"), kind in ("gemma2", "gemma3_text")
    types = tuple(getattr(theirs, "layer_types", None) or ())
    types = types if "sliding_attention" in types else ()
    rope = theirs.rope_parameters
    sliding = None
    if kind == "gemma3_text":
        rope, sliding = (rope[each] for each in ("full_attention", "sliding_attention"))
        sliding = Rope(*_rope(sliding)) if types and _rope(sliding) != _rope(rope) else None
    theta, scaling = _rope(rope)
    biases = ("q", "k", "v") if kind == "qwen2" else ()  # Qwen2 has no attention_bias
    biases += ("q", "k", "v", "o") if kind != "qwen2" and theirs.attention_bias else ()
    biases += ("gate", "up", "down") if kind in ("llama", "smollm3") and theirs.mlp_bias else ()
    heads = theirs.num_attention_heads
    rotates = tuple(map(bool, theirs.no_rope_layers)) if kind == "smollm3" else ()
    rotates = rotates[: theirs.num_hidden_layers]
    return DecoderConfig(
        vocab_size=theirs.vocab_size,
        hidden_size=theirs.hidden_size,
        intermediate_size=theirs.intermediate_size,
        num_hidden_layers=theirs.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=theirs.num_key_value_heads,
        head_dim=getattr(theirs, "head_dim", None) or theirs.hidden_size // heads,
        max_position_embeddings=theirs.max_position_embeddings,
        rope_theta=theta,
        rope_scaling=scaling,
        rms_norm_eps=theirs.rms_norm_eps,
        tie_word_embeddings=theirs.tie_word_embeddings,
        hidden_act=theirs.hidden_activation if late_gemma else theirs.hidden_act,
        biases=biases,
        qk_norm=kind in ("qwen3", "gemma3_text"),
        rms_norm_offset=gemma,
        embedding_scale=gemma,
        post_norms=late_gemma,
        query_pre_attn_scalar=theirs.query_pre_attn_scalar if late_gemma else None,
        attn_logit_softcapping=theirs.attn_logit_softcapping if late_gemma else None,
        final_logit_softcapping=theirs.final_logit_softcapping if late_gemma else None,
        sliding_window=theirs.sliding_window if types else None,
        layer_types=types,
        sliding_rope=sliding,
        rope_layers=() if all(rotates) else rotates,
    )


def _rope(rope) -> tuple[float, RopeScaling | None]:
    scaling = None
    if rope["rope_type"] == "linear":
        scaling = RopeScaling(rope["factor"])
    if rope["rope_type"] == "llama3":
        scaling = RopeScaling(**{f.name: rope[f.name] for f in dataclasses.fields(RopeScaling)})
    return float(rope["rope_theta"]), scaling


def _opt(theirs) -> DecoderConfig:
    assert theirs.enable_bias
    assert theirs.layer_norm_elementwise_affine and not theirs._remove_final_layer_norm
    width = theirs.word_embed_proj_dim
    return dataclasses.replace(
        OPT,
        vocab_size=theirs.vocab_size,
        hidden_size=theirs.hidden_size,
        intermediate_size=theirs.ffn_dim,
        num_hidden_layers=theirs.num_hidden_layers,
        num_attention_heads=theirs.num_attention_heads,
        num_key_value_heads=theirs.num_attention_heads,
        head_dim=theirs.hidden_size // theirs.num_attention_heads,
        max_position_embeddings=theirs.max_position_embeddings,
        tie_word_embeddings=theirs.tie_word_embeddings,
        hidden_act=theirs.activation_function,
        word_embed_proj_dim=None if width == theirs.hidden_size else width,
        do_layer_norm_before=theirs.do_layer_norm_before,
    )
