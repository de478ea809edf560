"""A tiny config of each family, no field of it at a default where there is a choice."""

import dataclasses

from lorax_gen.models.decoder import DecoderConfig
from lorax_gen.models.rope import RopeScaling

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
    "qwen3-biases": dataclasses.replace(LLAMA, qk_norm=True, biases=("q", "k", "v", "o")),
}
