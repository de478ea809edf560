"""Small models as GGUF files, written as llama.cpp's converter writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorax_gen.models.config import DecoderConfig
from lorax_gen.models.families import family_of

gguf = pytest.importorskip("gguf", reason="needs the extra: pip install 'lorax-gen[gguf]'")

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
KERNELS = {
    "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output",
    "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
}  # fmt: skip
NORMS = {
    "attn_norm": "attn_norm", "attn_post_norm": "post_attention_norm", "mlp_norm": "ffn_norm",
    "mlp_post_norm": "post_ffw_norm", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm",
}  # fmt: skip
TOP = {"embed": "token_embd.weight", "final_norm": "output_norm.weight"}


def permute(kernel: np.ndarray, heads: int) -> np.ndarray:
    """As `LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py; `kernel: [out, in]`."""
    halves = kernel.reshape(heads, 2, kernel.shape[0] // heads // 2, *kernel.shape[1:])
    return halves.swapaxes(1, 2).reshape(kernel.shape)


def architecture_of(config: DecoderConfig) -> str:
    """llama.cpp's name of it."""
    return family_of(config).model_type.removesuffix("_text")


def tensors_of(config: DecoderConfig, params: dict[str, Any]) -> dict[str, np.ndarray]:
    """The tensors of a file by name, each as numpy has its shape."""
    permuted = family_of(config).neighbours
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    added = np.float32(1 if config.rms_norm_offset else 0)
    found = {TOP["embed"]: np.asarray(params["embed"])}
    found[TOP["final_norm"]] = np.asarray(params["final_norm"]) + added
    if not config.tie_word_embeddings:
        found["output.weight"] = np.asarray(params["lm_head"]).T
    for ours, stacked in params["layers"].items():
        for i, leaf in enumerate(np.asarray(stacked)):
            kernel = ours.removesuffix("_bias")
            if ours in NORMS:
                found[f"blk.{i}.{NORMS[ours]}.weight"] = leaf + added
                continue
            value = permute(leaf.T, heads[kernel]) if permuted and kernel in heads else leaf.T
            name = KERNELS[kernel] + (".bias" if ours.endswith("_bias") else ".weight")
            found[f"blk.{i}.{name}"] = value
    return found


def metadata_of(config: DecoderConfig) -> dict[str, Any]:
    """The keys of an architecture and a vocabulary of words."""
    arch = architecture_of(config)
    keys: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope_theta),
        "rope.dimension_count": config.head_dim,
        "vocab_size": config.vocab_size,
    }
    if arch == "gemma2":
        keys |= {
            "attn_logit_softcapping": config.attn_logit_softcapping,
            "final_logit_softcapping": config.final_logit_softcapping,
        }
    if arch in ("gemma2", "gemma3") and config.sliding_window is not None:
        keys["attention.sliding_window"] = config.sliding_window
        pattern = [kind == "sliding_attention" for kind in config.layer_types]
        default = [(i + 1) % {"gemma2": 2, "gemma3": 6}[arch] != 0 for i in range(len(pattern))]
        keys |= {} if pattern == default else {"attention.sliding_window_pattern": pattern}
    if config.sliding_rope is not None:
        keys["rope.freq_base_swa"] = config.sliding_rope.theta
    if config.rope_scaling is not None and config.rope_scaling.rope_type == "linear":
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": config.rope_scaling.factor}
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(4)), "▁"]
    tokens += [chr(ord("a") + i) for i in range(config.vocab_size - len(tokens))]
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 4
    return {
        "general.type": "model",
        **{f"{arch}.{key}": value for key, value in keys.items()},
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(i) for i in range(len(tokens))],
        "tokenizer.ggml.token_type": types + [NORMAL] * (len(tokens) - len(types)),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def write_gguf(
    path: Path,
    architecture: str,
    metadata: dict[str, Any],
    tensors: dict[str, np.ndarray],
    kind: str = "F32",
) -> Path:
    """Writes a file; tensors of two axes are quantised to `kind`."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        add_value(writer, key, value)
    quantised = gguf.GGMLQuantizationType[kind]
    for name, value in tensors.items():
        value = np.ascontiguousarray(value, np.float32)
        if kind == "F32" or value.ndim == 1:
            writer.add_tensor(name, value)
        else:
            raw = gguf.quants.quantize(value, quantised)
            writer.add_tensor(name, raw, raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_value(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value is not None:  # None: the key is left out
        writer.add_array(key, value)


def write_model(
    path: Path,
    config: DecoderConfig,
    params: dict[str, Any],
    kind: str = "F32",
    *,
    keys: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray | None] | None = None,
    architecture: str | None = None,
) -> Path:
    """Writes a model; `keys` and `tensors` replace its own, None removes one."""
    every = tensors_of(config, params) | (tensors or {})
    kept = {name: value for name, value in every.items() if value is not None}
    architecture = architecture or architecture_of(config)
    return write_gguf(path, architecture, metadata_of(config) | (keys or {}), kept, kind)
