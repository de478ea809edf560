"""The config of a GGUF file: its metadata in the words of config.json, read as one.

So each family's defaults, and what `config_json` refuses, hold for both. What a file of an
architecture does not say, llama.cpp has in its code: such things are said here.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any

import numpy as np

from lorax_gen.documents import convert
from lorax_gen.errors import UserError
from lorax_gen.models.config import DecoderConfig
from lorax_gen.models.config_json import config_of
from lorax_gen.models.families import FAMILIES, Family
from lorax_gen.models.gguf_files import KERNELS, NAMES, ROPE_FACTORS, GGUFFile, dequantised
from lorax_gen.models.rope import Rope, RopeScaling, rope_frequencies

# Keys of an architecture -> keys of config.json.
INTEGERS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "context_length": "max_position_embeddings",
    "attention.sliding_window": "sliding_window",
    "expert_count": "num_local_experts",
}
FLOATS = {
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "logit_scale": "logit_scale",
    "residual_scale": "residual_multiplier",
    "embedding_scale": "embedding_multiplier",
}
REQUIRED = tuple(INTEGERS)[:4] + ("context_length", "attention.layer_norm_rms_epsilon")
# Read below, or without a meaning for what a model computes.
OTHERS = {
    "vocab_size", "attention.value_length", "attention.scale", "expert_used_count",
    "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear",
    "rope.scaling.original_context_length", "rope.scaling.finetuned", "rope.scaling.attn_factor",
    "tensor_data_layout",
}  # fmt: skip
# LLaMA 3.1's and later ones': the file has the factors that follow from them.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_CONTEXT = 8192
# Layers of the 27B ones: by them llama.cpp knows that scores have the scale of hidden_size / heads.
LARGEST = {"gemma2": 46, "gemma3": 62}


def read_gguf_config(file: GGUFFile) -> DecoderConfig:
    """The config of a file. Warns of keys of the architecture that nobody knows.

    Raises UserError that names an architecture or a scaling of rope that is unknown, and whatever
    the metadata lacks, asks for beyond the decoder, contradicts, or has out of range.
    """
    kind = file.get("general.type", str, "model")
    if kind != "model":
        raise UserError(f"{file.source} is a GGUF file of general.type {kind!r}; expected a model")
    architecture = file.get("general.architecture", str)
    family = _family(file, architecture)
    raw = _fields(file, architecture)
    config = config_of(raw | _switches(file, architecture, family, raw), file.source)
    config = dataclasses.replace(config, rope_scaling=_rope_scaling(file, architecture, config))
    _check(file, architecture, config)
    return config


def _family(file: GGUFFile, architecture: str) -> Family:
    known = {
        family.model_type.removesuffix("_text"): family
        for family in FAMILIES
        if family.neighbours is not None
    }
    if architecture not in known:
        raise UserError(
            f"{file.source} is of architecture {architecture!r}; supported are {', '.join(known)}"
        )
    return known[architecture]


def _fields(file: GGUFFile, architecture: str) -> dict[str, Any]:
    """What the metadata says, in the words of config.json."""
    raw: dict[str, Any] = {}
    for key in REQUIRED:
        file.get(f"{architecture}.{key}", object)
    for table, kind in ((INTEGERS, int), (FLOATS, float)):
        for key, name in table.items():
            value = file.metadata.get(f"{architecture}.{key}")
            if value is not None:
                convert(value, kind, f"{file.source}: {architecture}.{key}")
                # The decimals that were stored as fp32: 1e-5, not 9.99999974e-06.
                raw[name] = value if kind is int else float(str(np.float32(value)))
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        raise UserError(f"{file.source} has no tokenizer.ggml.tokens; a model needs its tokenizer")
    known = {f"{architecture}.{key}" for key in {*INTEGERS, *FLOATS, *OTHERS}}
    own = (key for key in file.metadata if key.startswith(f"{architecture}."))
    if unknown := [key for key in own if key not in known]:
        message = f"{file.source} has keys that are unknown, and not used: {', '.join(unknown)}"
        warnings.warn(" ".join(message.splitlines()), stacklevel=5)
    return raw | {"vocab_size": len(tokens)}


def _switches(
    file: GGUFFile, architecture: str, family: Family, raw: dict[str, Any]
) -> dict[str, Any]:
    """What tensors say, and llama.cpp's code for an architecture."""
    here: dict[str, Any]
    here = {"architectures": [family.architecture], "model_type": family.model_type}
    here["tie_word_embeddings"] = NAMES["lm_head"] not in file.tensors
    for name, kernels in family.biases.items():
        stored = (f"blk.0.{KERNELS[kernel]}.bias" in file.tensors for kernel in kernels)
        here[name] = any(stored)
    heads = raw["num_attention_heads"]
    if "head_dim" not in raw and heads > 0:
        if raw["hidden_size"] % heads:
            raise UserError(
                f"{file.source} has no {architecture}.attention.key_length, and embedding_length "
                f"{raw['hidden_size']} is not a multiple of the {heads} heads"
            )
        here["head_dim"] = raw["hidden_size"] // heads
    if architecture in LARGEST:
        large = raw["num_hidden_layers"] == LARGEST[architecture] and heads > 0
        scalar = raw["hidden_size"] / heads if large else raw.get("head_dim", here.get("head_dim"))
        here["query_pre_attn_scalar"] = scalar
    return here


def _rope_scaling(file: GGUFFile, architecture: str, config: DecoderConfig) -> RopeScaling | None:
    kind = file.get(f"{architecture}.rope.scaling.type", str, "none")
    factor = file.get(f"{architecture}.rope.scaling.factor", float, 0.0)
    linear = file.get(f"{architecture}.rope.scale_linear", float, 0.0)  # its name in old files
    if kind not in ("none", "linear"):
        raise UserError(
            f"{file.source}: {architecture}.rope.scaling.type is {kind!r}; expected 'none' or "
            "'linear', others are not supported"
        )
    if (kind == "linear" and not factor) or (linear and factor not in (0.0, linear)):
        raise UserError(
            f"{file.source}: {architecture}.rope.scaling is by {factor:g}, and "
            f"{architecture}.rope.scale_linear is {linear:g}; expected one factor"
        )
    mscale = file.get(f"{architecture}.rope.scaling.attn_factor", float, 1.0)
    if mscale != 1:
        raise UserError(
            f"{file.source}: {architecture}.rope.scaling.attn_factor is {mscale:g}; expected 1"
        )
    factor = linear or (factor if kind == "linear" else 1.0)
    scaling = None if factor == 1.0 else RopeScaling(factor)
    if ROPE_FACTORS not in file.tensors:
        return scaling
    if scaling is not None:
        raise UserError(f"{file.source} has both linear scaling of rope and {ROPE_FACTORS}")
    return _llama3(file, architecture, config)


def _llama3(file: GGUFFile, architecture: str, config: DecoderConfig) -> RopeScaling | None:
    """The scaling that the factors of a file follow from."""
    tensor = file.tensors[ROPE_FACTORS]
    half = config.head_dim // 2
    if tensor.kind.name != "F32" or tensor.shape != (half,):
        raise UserError(
            f"{file.source}: {ROPE_FACTORS} is {tensor.kind.name} of shape {tensor.shape}; "
            f"expected F32 of shape {(half,)}"
        )
    factors = dequantised(tensor)
    if not (np.isfinite(factors) & (factors > 0)).all():
        raise UserError(f"{file.source}: {ROPE_FACTORS} holds a number that divides nothing")
    if (factors == 1).all():
        return None
    key = f"{architecture}.rope.scaling.original_context_length"
    context = file.get(key, int, LLAMA3_CONTEXT)
    largest = float(factors.max())
    scaling = RopeScaling(factor=largest, original_max_position_embeddings=context, **LLAMA3)
    plain = rope_frequencies(Rope(config.rope_theta), config.head_dim)
    scaled = rope_frequencies(Rope(config.rope_theta, scaling), config.head_dim)
    if not np.allclose(plain / factors, scaled, rtol=1e-5, atol=0):
        raise UserError(
            f"{file.source}: {ROPE_FACTORS} is not that of rope_type llama3 with factor "
            f"{largest:g} and {context} original positions, the only one that is supported"
        )
    return scaling


def _check(file: GGUFFile, architecture: str, config: DecoderConfig) -> None:
    """Raises UserError where the metadata says the same thing in two ways, or the tensors do."""
    for key in ("attention.value_length", "rope.dimension_count"):
        length = file.get(f"{architecture}.{key}", int, config.head_dim)
        if length != config.head_dim:
            raise UserError(
                f"{file.source}: {architecture}.{key} is {length}, but heads have "
                f"{config.head_dim} features; nothing else is supported"
            )
    scale, ours = file.get(f"{architecture}.attention.scale", float, 0.0), config.head_dim
    expected = (config.query_pre_attn_scalar or ours) ** -0.5
    if scale and not math.isclose(scale, expected, rel_tol=1e-5):
        raise UserError(
            f"{file.source}: {architecture}.attention.scale is {scale:g}; expected {expected:g}"
        )
    stated = file.get(f"{architecture}.vocab_size", int, config.vocab_size)
    table = file.tensors.get(NAMES["embed"])
    rows = config.vocab_size if table is None else table.shape[0]
    if not stated == rows == config.vocab_size:
        raise UserError(
            f"{file.source}: tokenizer.ggml.tokens has {config.vocab_size} tokens, "
            f"{NAMES['embed']} {rows} rows, and {architecture}.vocab_size is {stated}; expected "
            "the same"
        )
