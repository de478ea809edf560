"""The shapes of published checkpoints, for planning, benchmarks and abstract evaluation.

A preset needs no download: with `jax.eval_shape` it gives every shape of a model without allocating
it. Each equals what `read_config` returns for the checkpoint's `config.json`.
"""

from __future__ import annotations

import dataclasses

from lorax_gen.models.decoder import DecoderConfig
from lorax_gen.models.rope import Rope, RopeScaling


def llama3_8b() -> DecoderConfig:
    """`meta-llama/Meta-Llama-3-8B`: 8,030,261,248 parameters."""
    return DecoderConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=8192,
        rope_theta=500000.0,
        rms_norm_eps=1e-5,
    )


def llama3_2_1b() -> DecoderConfig:
    """`meta-llama/Llama-3.2-1B`: 1,235,814,400 parameters."""
    return DecoderConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        rope_theta=500000.0,
        rope_scaling=RopeScaling(
            factor=32.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )


def tinyllama_1b() -> DecoderConfig:
    """`TinyLlama/TinyLlama-1.1B-Chat-v1.0` and its base models: 1,100,048,384 parameters."""
    return DecoderConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=2048,
        rope_theta=10000.0,
        rms_norm_eps=1e-5,
    )


def gemma_2b() -> DecoderConfig:
    """`google/gemma-2b`: 2,506,172,416 parameters."""
    return DecoderConfig(
        vocab_size=256000,
        hidden_size=2048,
        intermediate_size=16384,
        num_hidden_layers=18,
        num_attention_heads=8,
        num_key_value_heads=1,
        head_dim=256,
        max_position_embeddings=8192,
        rope_theta=10000.0,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        # Its config.json says "gelu", but it was trained with the tanh approximation.
        hidden_act="gelu_pytorch_tanh",
        rms_norm_offset=True,
        embedding_scale=True,
    )


def gemma2_2b() -> DecoderConfig:
    """`google/gemma-2-2b`: 2,614,341,888 parameters."""
    return DecoderConfig(
        vocab_size=256000,
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        max_position_embeddings=8192,
        rope_theta=10000.0,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        hidden_act="gelu_pytorch_tanh",
        rms_norm_offset=True,
        embedding_scale=True,
        post_norms=True,
        query_pre_attn_scalar=256.0,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        sliding_window=4096,
        layer_types=("sliding_attention", "full_attention") * 13,
    )


def qwen2_1_5b() -> DecoderConfig:
    """`Qwen/Qwen2-1.5B`: 1,543,714,304 parameters."""
    return DecoderConfig(
        vocab_size=151936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        head_dim=128,
        max_position_embeddings=131072,
        rope_theta=1000000.0,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        biases=("q", "k", "v"),
    )


def qwen3_0_6b() -> DecoderConfig:
    """`Qwen/Qwen3-0.6B`: 596,049,920 parameters."""
    return DecoderConfig(
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        rope_theta=1000000.0,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        qk_norm=True,
    )


def qwen3_1_7b() -> DecoderConfig:
    """`Qwen/Qwen3-1.7B`: 1,720,574,976 parameters."""
    return dataclasses.replace(qwen3_0_6b(), hidden_size=2048, intermediate_size=6144)


def gemma3_270m() -> DecoderConfig:
    """`google/gemma-3-270m`: 268,098,176 parameters."""
    layers = 18
    return DecoderConfig(
        vocab_size=262144,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        max_position_embeddings=32768,
        rope_theta=1000000.0,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        hidden_act="gelu_pytorch_tanh",
        sliding_rope=Rope(10000.0),
        qk_norm=True,
        rms_norm_offset=True,
        embedding_scale=True,
        post_norms=True,
        query_pre_attn_scalar=256.0,
        sliding_window=512,
        layer_types=_five_of_six(layers),
    )


def gemma3_1b() -> DecoderConfig:
    """`google/gemma-3-1b-pt` and `-it`: 999,885,952 parameters."""
    layers = 26
    return dataclasses.replace(
        gemma3_270m(),
        hidden_size=1152,
        intermediate_size=6912,
        num_hidden_layers=layers,
        layer_types=_five_of_six(layers),
    )


def _five_of_six(layers: int) -> tuple[str, ...]:
    return (("sliding_attention",) * 5 + ("full_attention",)) * (layers // 6) + (
        "sliding_attention",
    ) * (layers % 6)


def smollm2_135m() -> DecoderConfig:
    """`HuggingFaceTB/SmolLM2-135M`: 134,515,008 parameters."""
    return DecoderConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        rope_theta=100000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )


def smollm2_360m() -> DecoderConfig:
    """`HuggingFaceTB/SmolLM2-360M`: 361,821,120 parameters."""
    return dataclasses.replace(
        smollm2_135m(),
        hidden_size=960,
        intermediate_size=2560,
        num_hidden_layers=32,
        num_attention_heads=15,
        num_key_value_heads=5,
    )


def opt_2_7b() -> DecoderConfig:
    """`facebook/opt-2.7b`: 2,651,596,800 parameters."""
    return DecoderConfig(
        vocab_size=50272,
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=80,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        hidden_act="relu",
        biases=("q", "k", "v", "o", "up", "down"),
        mlp="plain",
        norm="layer",
        positions="learned",
        position_offset=2,
    )


def opt_350m() -> DecoderConfig:
    """`facebook/opt-350m`: 331,196,416 parameters."""
    return dataclasses.replace(
        opt_2_7b(),
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=64,
        word_embed_proj_dim=512,
        do_layer_norm_before=False,
    )
