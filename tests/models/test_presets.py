"""Presets are the published checkpoints: each field, each tensor, each parameter, and no memory."""

import json
import math
from typing import NamedTuple

import jax
import pytest

from lorax_gen.models import presets
from lorax_gen.models.config_json import read_config
from lorax_gen.models.decoder import init_params
from lorax_gen.models.families import family_of, tensor_shapes


class Published(NamedTuple):
    """What a checkpoint is, written down from the checkpoint and not from this project's code."""

    parameters: int
    layers: int
    config: dict  # config.json, with the fields that only training or sampling read
    tensors: dict  # the safetensors header: `[out, in]`, `{}` for each layer


PUBLISHED = {
    "llama3_8b": Published(
        parameters=8_030_261_248,
        layers=32,
        config={
            "architectures": ["LlamaForCausalLM"], "attention_bias": False,
            "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": 128001,
            "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
            "intermediate_size": 14336, "max_position_embeddings": 8192, "model_type": "llama",
            "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
            "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
            "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
            "transformers_version": "4.40.0.dev0", "use_cache": True, "vocab_size": 128256,
        },
        tensors={
            "model.embed_tokens.weight": (128256, 4096),
            "model.layers.{}.input_layernorm.weight": (4096,),
            "model.layers.{}.self_attn.q_proj.weight": (4096, 4096),
            "model.layers.{}.self_attn.k_proj.weight": (1024, 4096),
            "model.layers.{}.self_attn.v_proj.weight": (1024, 4096),
            "model.layers.{}.self_attn.o_proj.weight": (4096, 4096),
            "model.layers.{}.post_attention_layernorm.weight": (4096,),
            "model.layers.{}.mlp.gate_proj.weight": (14336, 4096),
            "model.layers.{}.mlp.up_proj.weight": (14336, 4096),
            "model.layers.{}.mlp.down_proj.weight": (4096, 14336),
            "model.norm.weight": (4096,),
            "lm_head.weight": (128256, 4096),
        },
    ),
    "llama3_2_1b": Published(
        parameters=1_235_814_400,
        layers=16,
        config={
            "architectures": ["LlamaForCausalLM"], "attention_bias": False,
            "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": 128001,
            "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
            "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False,
            "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16,
            "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3",
            },
            "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
            "transformers_version": "4.45.0.dev0", "use_cache": True, "vocab_size": 128256,
        },
        tensors={
            "model.embed_tokens.weight": (128256, 2048),
            "model.layers.{}.input_layernorm.weight": (2048,),
            "model.layers.{}.self_attn.q_proj.weight": (2048, 2048),
            "model.layers.{}.self_attn.k_proj.weight": (512, 2048),
            "model.layers.{}.self_attn.v_proj.weight": (512, 2048),
            "model.layers.{}.self_attn.o_proj.weight": (2048, 2048),
            "model.layers.{}.post_attention_layernorm.weight": (2048,),
            "model.layers.{}.mlp.gate_proj.weight": (8192, 2048),
            "model.layers.{}.mlp.up_proj.weight": (8192, 2048),
            "model.layers.{}.mlp.down_proj.weight": (2048, 8192),
            "model.norm.weight": (2048,),
        },
    ),
    "tinyllama_1b": Published(
        parameters=1_100_048_384,
        layers=22,
        config={
            "architectures": ["LlamaForCausalLM"], "attention_bias": False, "bos_token_id": 1,
            "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 2048,
            "initializer_range": 0.02, "intermediate_size": 5632,
            "max_position_embeddings": 2048, "model_type": "llama", "num_attention_heads": 32,
            "num_hidden_layers": 22, "num_key_value_heads": 4, "pretraining_tp": 1,
            "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0,
            "tie_word_embeddings": False, "torch_dtype": "bfloat16",
            "transformers_version": "4.35.0", "use_cache": True, "vocab_size": 32000,
        },
        tensors={
            "model.embed_tokens.weight": (32000, 2048),
            "model.layers.{}.input_layernorm.weight": (2048,),
            "model.layers.{}.self_attn.q_proj.weight": (2048, 2048),
            "model.layers.{}.self_attn.k_proj.weight": (256, 2048),
            "model.layers.{}.self_attn.v_proj.weight": (256, 2048),
            "model.layers.{}.self_attn.o_proj.weight": (2048, 2048),
            "model.layers.{}.post_attention_layernorm.weight": (2048,),
            "model.layers.{}.mlp.gate_proj.weight": (5632, 2048),
            "model.layers.{}.mlp.up_proj.weight": (5632, 2048),
            "model.layers.{}.mlp.down_proj.weight": (2048, 5632),
            "model.norm.weight": (2048,),
            "lm_head.weight": (32000, 2048),
        },
    ),
    "gemma_2b": Published(
        parameters=2_506_172_416,
        layers=18,
        config={
            "architectures": ["GemmaForCausalLM"], "attention_bias": False,
            "attention_dropout": 0.0, "bos_token_id": 2, "eos_token_id": 1, "head_dim": 256,
            "hidden_act": "gelu", "hidden_size": 2048, "initializer_range": 0.02,
            "intermediate_size": 16384, "max_position_embeddings": 8192, "model_type": "gemma",
            "num_attention_heads": 8, "num_hidden_layers": 18, "num_key_value_heads": 1,
            "pad_token_id": 0, "rms_norm_eps": 1e-06, "rope_scaling": None,
            "rope_theta": 10000.0, "torch_dtype": "bfloat16",
            "transformers_version": "4.38.0.dev0", "use_cache": True, "vocab_size": 256000,
        },
        tensors={
            "model.embed_tokens.weight": (256000, 2048),
            "model.layers.{}.input_layernorm.weight": (2048,),
            "model.layers.{}.self_attn.q_proj.weight": (2048, 2048),
            "model.layers.{}.self_attn.k_proj.weight": (256, 2048),
            "model.layers.{}.self_attn.v_proj.weight": (256, 2048),
            "model.layers.{}.self_attn.o_proj.weight": (2048, 2048),
            "model.layers.{}.post_attention_layernorm.weight": (2048,),
            "model.layers.{}.mlp.gate_proj.weight": (16384, 2048),
            "model.layers.{}.mlp.up_proj.weight": (16384, 2048),
            "model.layers.{}.mlp.down_proj.weight": (2048, 16384),
            "model.norm.weight": (2048,),
        },
    ),
    "gemma2_2b": Published(
        parameters=2_614_341_888,
        layers=26,
        config={
            "architectures": ["Gemma2ForCausalLM"], "attention_bias": False,
            "attention_dropout": 0.0, "attn_logit_softcapping": 50.0, "bos_token_id": 2,
            "cache_implementation": "hybrid", "eos_token_id": 1,
            "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304,
            "initializer_range": 0.02, "intermediate_size": 9216,
            "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 8,
            "num_hidden_layers": 26, "num_key_value_heads": 4, "pad_token_id": 0,
            "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0,
            "sliding_window": 4096, "torch_dtype": "float32", "transformers_version": "4.42.4",
            "use_cache": True, "vocab_size": 256000,
        },
        tensors={
            "model.embed_tokens.weight": (256000, 2304),
            "model.layers.{}.input_layernorm.weight": (2304,),
            "model.layers.{}.self_attn.q_proj.weight": (2048, 2304),
            "model.layers.{}.self_attn.k_proj.weight": (1024, 2304),
            "model.layers.{}.self_attn.v_proj.weight": (1024, 2304),
            "model.layers.{}.self_attn.o_proj.weight": (2304, 2048),
            "model.layers.{}.post_attention_layernorm.weight": (2304,),
            "model.layers.{}.pre_feedforward_layernorm.weight": (2304,),
            "model.layers.{}.mlp.gate_proj.weight": (9216, 2304),
            "model.layers.{}.mlp.up_proj.weight": (9216, 2304),
            "model.layers.{}.mlp.down_proj.weight": (2304, 9216),
            "model.layers.{}.post_feedforward_layernorm.weight": (2304,),
            "model.norm.weight": (2304,),
        },
    ),
    "qwen2_1_5b": Published(
        parameters=1_543_714_304,
        layers=28,
        config={
            "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0,
            "bos_token_id": 151643, "eos_token_id": 151643, "hidden_act": "silu",
            "hidden_size": 1536, "initializer_range": 0.02, "intermediate_size": 8960,
            "max_position_embeddings": 131072, "max_window_layers": 28, "model_type": "qwen2",
            "num_attention_heads": 12, "num_hidden_layers": 28, "num_key_value_heads": 2,
            "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 131072,
            "tie_word_embeddings": True, "torch_dtype": "bfloat16",
            "transformers_version": "4.40.1", "use_cache": True, "use_sliding_window": False,
            "vocab_size": 151936,
        },
        tensors={
            "model.embed_tokens.weight": (151936, 1536),
            "model.layers.{}.input_layernorm.weight": (1536,),
            "model.layers.{}.self_attn.q_proj.weight": (1536, 1536),
            "model.layers.{}.self_attn.q_proj.bias": (1536,),
            "model.layers.{}.self_attn.k_proj.weight": (256, 1536),
            "model.layers.{}.self_attn.k_proj.bias": (256,),
            "model.layers.{}.self_attn.v_proj.weight": (256, 1536),
            "model.layers.{}.self_attn.v_proj.bias": (256,),
            "model.layers.{}.self_attn.o_proj.weight": (1536, 1536),
            "model.layers.{}.post_attention_layernorm.weight": (1536,),
            "model.layers.{}.mlp.gate_proj.weight": (8960, 1536),
            "model.layers.{}.mlp.up_proj.weight": (8960, 1536),
            "model.layers.{}.mlp.down_proj.weight": (1536, 8960),
            "model.norm.weight": (1536,),
        },
    ),
    "qwen3_0_6b": Published(
        parameters=596_049_920,
        layers=28,
        config={
            "architectures": ["Qwen3ForCausalLM"], "attention_bias": False,
            "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
            "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "initializer_range": 0.02,
            "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28,
            "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28,
            "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None,
            "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
            "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True,
            "use_sliding_window": False, "vocab_size": 151936,
        },
        tensors={
            "model.embed_tokens.weight": (151936, 1024),
            "model.layers.{}.input_layernorm.weight": (1024,),
            "model.layers.{}.self_attn.q_proj.weight": (2048, 1024),
            "model.layers.{}.self_attn.k_proj.weight": (1024, 1024),
            "model.layers.{}.self_attn.v_proj.weight": (1024, 1024),
            "model.layers.{}.self_attn.o_proj.weight": (1024, 2048),
            "model.layers.{}.self_attn.q_norm.weight": (128,),
            "model.layers.{}.self_attn.k_norm.weight": (128,),
            "model.layers.{}.post_attention_layernorm.weight": (1024,),
            "model.layers.{}.mlp.gate_proj.weight": (3072, 1024),
            "model.layers.{}.mlp.up_proj.weight": (3072, 1024),
            "model.layers.{}.mlp.down_proj.weight": (1024, 3072),
            "model.norm.weight": (1024,),
        },
    ),
    "qwen3_1_7b": Published(
        parameters=1_720_574_976,
        layers=28,
        config={
            "architectures": ["Qwen3ForCausalLM"], "attention_bias": False,
            "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
            "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
            "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 28,
            "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28,
            "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None,
            "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
            "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True,
            "use_sliding_window": False, "vocab_size": 151936,
        },
        tensors={
            "model.embed_tokens.weight": (151936, 2048),
            "model.layers.{}.input_layernorm.weight": (2048,),
            "model.layers.{}.self_attn.q_proj.weight": (2048, 2048),
            "model.layers.{}.self_attn.k_proj.weight": (1024, 2048),
            "model.layers.{}.self_attn.v_proj.weight": (1024, 2048),
            "model.layers.{}.self_attn.o_proj.weight": (2048, 2048),
            "model.layers.{}.self_attn.q_norm.weight": (128,),
            "model.layers.{}.self_attn.k_norm.weight": (128,),
            "model.layers.{}.post_attention_layernorm.weight": (2048,),
            "model.layers.{}.mlp.gate_proj.weight": (6144, 2048),
            "model.layers.{}.mlp.up_proj.weight": (6144, 2048),
            "model.layers.{}.mlp.down_proj.weight": (2048, 6144),
            "model.norm.weight": (2048,),
        },
    ),
    "gemma3_270m": Published(
        parameters=268_098_176,
        layers=18,
        config={
            "_sliding_window_pattern": 6, "architectures": ["Gemma3ForCausalLM"],
            "attention_bias": False, "attention_dropout": 0.0, "attn_logit_softcapping": None,
            "bos_token_id": 2, "eos_token_id": 1, "final_logit_softcapping": None, "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 640, "initializer_range": 0.02,
            "intermediate_size": 2048,
            "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
            "max_position_embeddings": 32768,
            "model_type": "gemma3_text", "num_attention_heads": 4, "num_hidden_layers": 18,
            "num_key_value_heads": 1, "pad_token_id": 0, "query_pre_attn_scalar": 256,
            "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000.0, "rope_scaling": None,
            "rope_theta": 1000000.0, "sliding_window": 512, "torch_dtype": "bfloat16",
            "transformers_version": "4.55.0.dev0", "use_bidirectional_attention": False,
            "use_cache": True, "vocab_size": 262144,
        },
        tensors={
            "model.embed_tokens.weight": (262144, 640),
            "model.layers.{}.input_layernorm.weight": (640,),
            "model.layers.{}.self_attn.q_proj.weight": (1024, 640),
            "model.layers.{}.self_attn.k_proj.weight": (256, 640),
            "model.layers.{}.self_attn.v_proj.weight": (256, 640),
            "model.layers.{}.self_attn.o_proj.weight": (640, 1024),
            "model.layers.{}.self_attn.q_norm.weight": (256,),
            "model.layers.{}.self_attn.k_norm.weight": (256,),
            "model.layers.{}.pre_feedforward_layernorm.weight": (640,),
            "model.layers.{}.post_feedforward_layernorm.weight": (640,),
            "model.layers.{}.post_attention_layernorm.weight": (640,),
            "model.layers.{}.mlp.gate_proj.weight": (2048, 640),
            "model.layers.{}.mlp.up_proj.weight": (2048, 640),
            "model.layers.{}.mlp.down_proj.weight": (640, 2048),
            "model.norm.weight": (640,),
        },
    ),
    "gemma3_1b": Published(
        parameters=999_885_952,
        layers=26,
        config={
            "architectures": ["Gemma3ForCausalLM"], "attention_bias": False,
            "attention_dropout": 0.0, "attn_logit_softcapping": None, "bos_token_id": 2,
            "cache_implementation": "hybrid", "eos_token_id": [1, 106],
            "final_logit_softcapping": None, "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152,
            "initializer_range": 0.02, "intermediate_size": 6912, "max_position_embeddings": 32768,
            "model_type": "gemma3_text", "num_attention_heads": 4, "num_hidden_layers": 26,
            "num_key_value_heads": 1, "pad_token_id": 0, "query_pre_attn_scalar": 256,
            "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000, "rope_scaling": None,
            "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6,
            "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0", "use_cache": True,
            "vocab_size": 262144,
        },
        tensors={
            "model.embed_tokens.weight": (262144, 1152),
            "model.layers.{}.input_layernorm.weight": (1152,),
            "model.layers.{}.self_attn.q_proj.weight": (1024, 1152),
            "model.layers.{}.self_attn.k_proj.weight": (256, 1152),
            "model.layers.{}.self_attn.v_proj.weight": (256, 1152),
            "model.layers.{}.self_attn.o_proj.weight": (1152, 1024),
            "model.layers.{}.self_attn.q_norm.weight": (256,),
            "model.layers.{}.self_attn.k_norm.weight": (256,),
            "model.layers.{}.pre_feedforward_layernorm.weight": (1152,),
            "model.layers.{}.post_feedforward_layernorm.weight": (1152,),
            "model.layers.{}.post_attention_layernorm.weight": (1152,),
            "model.layers.{}.mlp.gate_proj.weight": (6912, 1152),
            "model.layers.{}.mlp.up_proj.weight": (6912, 1152),
            "model.layers.{}.mlp.down_proj.weight": (1152, 6912),
            "model.norm.weight": (1152,),
        },
    ),
    "smollm2_135m": Published(
        parameters=134_515_008,
        layers=30,
        config={
            "architectures": ["LlamaForCausalLM"], "attention_bias": False,
            "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "silu",
            "hidden_size": 576, "initializer_range": 0.041666666666666664,
            "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192,
            "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30,
            "num_key_value_heads": 3, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
            "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000,
            "tie_word_embeddings": True, "torch_dtype": "bfloat16",
            "transformers_version": "4.40.1", "use_cache": True, "vocab_size": 49152,
        },
        tensors={
            "model.embed_tokens.weight": (49152, 576),
            "model.layers.{}.input_layernorm.weight": (576,),
            "model.layers.{}.self_attn.q_proj.weight": (576, 576),
            "model.layers.{}.self_attn.k_proj.weight": (192, 576),
            "model.layers.{}.self_attn.v_proj.weight": (192, 576),
            "model.layers.{}.self_attn.o_proj.weight": (576, 576),
            "model.layers.{}.post_attention_layernorm.weight": (576,),
            "model.layers.{}.mlp.gate_proj.weight": (1536, 576),
            "model.layers.{}.mlp.up_proj.weight": (1536, 576),
            "model.layers.{}.mlp.down_proj.weight": (576, 1536),
            "model.norm.weight": (576,),
        },
    ),
    "smollm2_360m": Published(
        parameters=361_821_120,
        layers=32,
        config={
            "architectures": ["LlamaForCausalLM"], "attention_bias": False,
            "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "silu",
            "hidden_size": 960, "initializer_range": 0.02, "intermediate_size": 2560,
            "is_llama_config": True, "max_position_embeddings": 8192, "model_type": "llama",
            "num_attention_heads": 15, "num_hidden_layers": 32, "num_key_value_heads": 5,
            "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": False,
            "rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True,
            "torch_dtype": "bfloat16", "transformers_version": "4.40.1", "use_cache": True,
            "vocab_size": 49152,
        },
        tensors={
            "model.embed_tokens.weight": (49152, 960),
            "model.layers.{}.input_layernorm.weight": (960,),
            "model.layers.{}.self_attn.q_proj.weight": (960, 960),
            "model.layers.{}.self_attn.k_proj.weight": (320, 960),
            "model.layers.{}.self_attn.v_proj.weight": (320, 960),
            "model.layers.{}.self_attn.o_proj.weight": (960, 960),
            "model.layers.{}.post_attention_layernorm.weight": (960,),
            "model.layers.{}.mlp.gate_proj.weight": (2560, 960),
            "model.layers.{}.mlp.up_proj.weight": (2560, 960),
            "model.layers.{}.mlp.down_proj.weight": (960, 2560),
            "model.norm.weight": (960,),
        },
    ),
    "opt_2_7b": Published(
        parameters=2_651_596_800,
        layers=32,
        config={
            "_remove_final_layer_norm": False, "activation_dropout": 0.0,
            "activation_function": "relu", "architectures": ["OPTForCausalLM"],
            "attention_dropout": 0.0, "bos_token_id": 2, "do_layer_norm_before": True,
            "dropout": 0.1, "eos_token_id": 2, "ffn_dim": 10240, "hidden_size": 2560,
            "init_std": 0.02, "layerdrop": 0.0, "max_position_embeddings": 2048,
            "model_type": "opt", "num_attention_heads": 32, "num_hidden_layers": 32,
            "pad_token_id": 1, "prefix": "</s>", "torch_dtype": "float16",
            "transformers_version": "4.21.0.dev0", "use_cache": True, "vocab_size": 50272,
            "word_embed_proj_dim": 2560,
        },
        tensors={
            "model.decoder.embed_tokens.weight": (50272, 2560),
            "model.decoder.embed_positions.weight": (2050, 2560),
            "model.decoder.layers.{}.self_attn.q_proj.weight": (2560, 2560),
            "model.decoder.layers.{}.self_attn.q_proj.bias": (2560,),
            "model.decoder.layers.{}.self_attn.k_proj.weight": (2560, 2560),
            "model.decoder.layers.{}.self_attn.k_proj.bias": (2560,),
            "model.decoder.layers.{}.self_attn.v_proj.weight": (2560, 2560),
            "model.decoder.layers.{}.self_attn.v_proj.bias": (2560,),
            "model.decoder.layers.{}.self_attn.out_proj.weight": (2560, 2560),
            "model.decoder.layers.{}.self_attn.out_proj.bias": (2560,),
            "model.decoder.layers.{}.fc1.weight": (10240, 2560),
            "model.decoder.layers.{}.fc1.bias": (10240,),
            "model.decoder.layers.{}.fc2.weight": (2560, 10240),
            "model.decoder.layers.{}.fc2.bias": (2560,),
            "model.decoder.layers.{}.self_attn_layer_norm.weight": (2560,),
            "model.decoder.layers.{}.self_attn_layer_norm.bias": (2560,),
            "model.decoder.layers.{}.final_layer_norm.weight": (2560,),
            "model.decoder.layers.{}.final_layer_norm.bias": (2560,),
            "model.decoder.final_layer_norm.weight": (2560,),
            "model.decoder.final_layer_norm.bias": (2560,),
        },
    ),
    "opt_350m": Published(
        parameters=331_196_416,
        layers=24,
        config={
            "_remove_final_layer_norm": False, "activation_dropout": 0.0,
            "activation_function": "relu", "architectures": ["OPTForCausalLM"],
            "attention_dropout": 0.0, "bos_token_id": 2, "do_layer_norm_before": False,
            "dropout": 0.1, "eos_token_id": 2, "ffn_dim": 4096, "hidden_size": 1024,
            "init_std": 0.02, "layerdrop": 0.0, "max_position_embeddings": 2048,
            "model_type": "opt", "num_attention_heads": 16, "num_hidden_layers": 24,
            "pad_token_id": 1, "prefix": "</s>", "torch_dtype": "float16",
            "transformers_version": "4.21.0.dev0", "use_cache": True, "vocab_size": 50272,
            "word_embed_proj_dim": 512,
        },
        tensors={
            "model.decoder.embed_tokens.weight": (50272, 512),
            "model.decoder.project_in.weight": (1024, 512),
            "model.decoder.project_out.weight": (512, 1024),
            "model.decoder.embed_positions.weight": (2050, 1024),
            "model.decoder.layers.{}.self_attn.q_proj.weight": (1024, 1024),
            "model.decoder.layers.{}.self_attn.q_proj.bias": (1024,),
            "model.decoder.layers.{}.self_attn.k_proj.weight": (1024, 1024),
            "model.decoder.layers.{}.self_attn.k_proj.bias": (1024,),
            "model.decoder.layers.{}.self_attn.v_proj.weight": (1024, 1024),
            "model.decoder.layers.{}.self_attn.v_proj.bias": (1024,),
            "model.decoder.layers.{}.self_attn.out_proj.weight": (1024, 1024),
            "model.decoder.layers.{}.self_attn.out_proj.bias": (1024,),
            "model.decoder.layers.{}.fc1.weight": (4096, 1024),
            "model.decoder.layers.{}.fc1.bias": (4096,),
            "model.decoder.layers.{}.fc2.weight": (1024, 4096),
            "model.decoder.layers.{}.fc2.bias": (1024,),
            "model.decoder.layers.{}.self_attn_layer_norm.weight": (1024,),
            "model.decoder.layers.{}.self_attn_layer_norm.bias": (1024,),
            "model.decoder.layers.{}.final_layer_norm.weight": (1024,),
            "model.decoder.layers.{}.final_layer_norm.bias": (1024,),
        },
    ),
}  # fmt: skip


@pytest.fixture(params=PUBLISHED)
def name(request):
    return request.param


@pytest.fixture
def published(name):
    return PUBLISHED[name]


@pytest.fixture
def preset(name):
    return getattr(presets, name)()


@pytest.fixture
def config_json(published, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(published.config))
    return path


def test_every_tensor_has_its_published_name_and_shape(published, preset):
    expected = {
        theirs.format(i): shape
        for theirs, shape in published.tensors.items()
        for i in range(published.layers if "{}" in theirs else 1)
    }
    assert tensor_shapes(preset) == expected
    assert family_of(preset).architecture == published.config["architectures"][0]


def test_the_parameters_add_up_to_the_published_count(name, published, preset):
    shapes = jax.eval_shape(lambda: init_params(jax.random.key(0), preset))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == published.parameters
    assert sum(map(math.prod, tensor_shapes(preset).values())) == published.parameters
    assert f"{published.parameters:,}" in getattr(presets, name).__doc__


def test_shapes_take_no_memory(preset):
    before = jax.live_arrays()
    shapes = jax.eval_shape(lambda: init_params(jax.random.key(0), preset)), tensor_shapes(preset)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(shapes[0]))
    known = {id(array) for array in before}
    assert sum(array.nbytes for array in jax.live_arrays() if id(array) not in known) < 1e6


def test_the_published_config_reads_as_the_preset(preset, config_json):
    assert read_config(config_json) == preset


def test_the_config_as_transformers_5_writes_it_reads_as_the_preset(preset, config_json, tmp_path):
    """It gathers `rope_theta` and `rope_scaling` in `rope_parameters`, and lists layer types."""
    from transformers import AutoConfig

    AutoConfig.from_pretrained(config_json.parent).save_pretrained(tmp_path / "again")
    again = tmp_path / "again" / "config.json"
    written = json.loads(again.read_text())
    ropes = written.get("rope_parameters", {})
    if preset.sliding_rope is not None:
        assert ropes["sliding_attention"]["rope_theta"] == preset.sliding_rope.theta
        ropes = ropes["full_attention"]
    assert ropes.get("rope_theta") == (preset.rope_theta if preset.positions == "rotary" else None)
    assert not {"rope_theta", "rope_scaling", "rope_local_base_freq"} & set(written)
    assert read_config(again) == preset
