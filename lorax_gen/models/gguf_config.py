"""The config of a GGUF file: its metadata in the words of config.json, read as one.

So each family's defaults, and what `config_json` refuses, hold for both. What a file of an
architecture does not say, llama.cpp has in its code: such things are said here.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np

from lorax_gen.config import Count
from lorax_gen.documents import convert
from lorax_gen.errors import UserError
from lorax_gen.models.config import DecoderConfig, Depth
from lorax_gen.models.config_json import config_of, write_rope_scaling
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
    "vocab_size", "attention.value_length", "attention.scale", "attention.causal",
    "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear",
    "rope.scaling.original_context_length", "rope.scaling.finetuned", "rope.scaling.attn_factor",
    "tensor_data_layout",
}  # fmt: skip
# Architectures with windows: of n layers all but the last have one, n being this unless the file
# says otherwise.
WINDOWS = {"gemma2": 2, "gemma3": 6}
WINDOW_KEYS = {
    "attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base_swa",
    "attention.key_length_swa", "attention.value_length_swa", "rope.dimension_count_swa",
}  # fmt: skip
# Where a file does not say it, whatever the architecture.
THETA = 10000.0
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
    raw |= _switches(file, architecture, family, raw)
    config = config_of(raw, file.source)
    scaling = _rope_scaling(file, architecture, config)
    if scaling is not None:  # read with the rest: which layers it is for, the family knows
        config = config_of(raw | {"rope_scaling": write_rope_scaling(scaling)}, file.source)
    _check(file, architecture, config)
    return config


def _family(file: GGUFFile, architecture: str) -> Family:
    known = {
        family.gguf or family.model_type: family
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
    raw: dict[str, Any] = {"rope_theta": THETA}
    for key in REQUIRED:
        file.get(f"{architecture}.{key}", object)
    for table, kind in ((INTEGERS, int), (FLOATS, float)):
        for key, name in table.items():
            value = file.metadata.get(f"{architecture}.{key}")
            if value is not None:
                convert(value, kind, f"{file.source}: {architecture}.{key}")
                raw[name] = value if kind is int else _decimal(value)
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        raise UserError(f"{file.source} has no tokenizer.ggml.tokens; a model needs its tokenizer")
    raw.setdefault("num_key_value_heads", raw["num_attention_heads"])
    _check_keys(file, architecture)
    return raw | {"vocab_size": len(tokens)}


def _decimal(value: float) -> float:
    """The decimals that were stored as fp32: 1e-5, not 9.99999974e-06."""
    return float(str(np.float32(value)))


def _check_keys(file: GGUFFile, architecture: str) -> None:
    """Refuses a key that is not read and may change what is computed: one that llama.cpp knows, or
    of attention and rope. Warns of others."""
    read = {*INTEGERS, *FLOATS, *OTHERS} | (WINDOW_KEYS if architecture in WINDOWS else set())
    others = {
        key.removeprefix(f"{architecture}."): value
        for key, value in file.metadata.items()
        if key.startswith(f"{architecture}.")
    }
    others = {key: value for key, value in others.items() if key not in read}
    known = _known_keys()
    for key, value in others.items():
        if (key in known or key.startswith(("attention.", "rope."))) and value not in NOTHING:
            raise UserError(
                f"{file.source} has {architecture}.{key}={_short(value)}, which is not supported"
            )
    if unknown := [f"{architecture}.{key}" for key in others if key not in known]:
        message = f"{file.source} has keys that are unknown, and not used: {', '.join(unknown)}"
        warnings.warn(" ".join(message.splitlines()), stacklevel=6)


# Values of a key that ask for nothing.
NOTHING: tuple[Any, ...] = (0, False, "", [])


def _known_keys() -> set[str]:
    """The keys of architectures that the gguf package names."""
    from gguf.constants import Keys

    found = set[str]()
    groups: list[type] = [Keys]
    while groups:
        values = vars(groups.pop()).values()
        found |= {each for each in values if isinstance(each, str) and each[:7] == "{arch}."}
        groups += [each for each in values if isinstance(each, type)]
    return {key.removeprefix("{arch}.") for key in found}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:50]}..."


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
    if architecture in WINDOWS:
        here |= _windows(file, architecture, raw)
    return here


def _windows(file: GGUFFile, architecture: str, raw: dict[str, Any]) -> dict[str, Any]:
    """Which layers have a window, and their rope."""
    layers = convert(raw["num_hidden_layers"], Depth, f"{file.source}: {architecture}.block_count")
    key = f"{architecture}.attention.sliding_window"
    window = file.get(key, int, 4096 if architecture == "gemma2" else 0)
    pattern = file.metadata.get(f"{key}_pattern", WINDOWS[architecture])
    if isinstance(pattern, list):
        sliding = [each not in (0, False) for each in pattern]
        if len(sliding) != layers:
            raise UserError(
                f"{file.source}: {key}_pattern has {len(sliding)} values for {layers} layers; "
                "expected one each"
            )
    else:
        n = convert(pattern, Count, f"{file.source}: {key}_pattern")
        sliding = [n == 0 or i % n < n - 1 for i in range(layers)]
    if not window:
        sliding = [False] * len(sliding)
    here: dict[str, Any] = {"sliding_window": window or None}
    here["layer_types"] = ["sliding_attention" if each else "full_attention" for each in sliding]
    theta = file.metadata.get(f"{architecture}.rope.freq_base_swa")
    if theta is not None:
        convert(theta, float, f"{file.source}: {architecture}.rope.freq_base_swa")
    if architecture == "gemma3":
        here["rope_local_base_freq"] = THETA if theta is None else _decimal(theta)
    elif theta is not None and _decimal(theta) != raw["rope_theta"]:
        raise UserError(
            f"{file.source}: {architecture}.rope.freq_base_swa is {theta:g}, but rope.freq_base "
            f"{raw['rope_theta']:g}; expected the same"
        )
    return here


def _rope_scaling(file: GGUFFile, architecture: str, config: DecoderConfig) -> RopeScaling | None:
    kind = file.get(f"{architecture}.rope.scaling.type", str, "linear")
    factor = file.get(f"{architecture}.rope.scaling.factor", float, 0.0)
    linear = file.get(f"{architecture}.rope.scale_linear", float, 0.0)  # its name in old files
    if kind not in ("none", "linear"):
        raise UserError(
            f"{file.source}: {architecture}.rope.scaling.type is {kind!r}; expected 'none' or "
            "'linear', others are not supported"
        )
    stated = f"{architecture}.rope.scaling.type" in file.metadata and kind == "linear"
    if (stated and not (factor or linear)) or (factor and linear and factor != linear):
        raise UserError(
            f"{file.source}: {architecture}.rope.scaling is by {factor:g}, and "
            f"{architecture}.rope.scale_linear is {linear:g}; expected one factor"
        )
    mscale = file.get(f"{architecture}.rope.scaling.attn_factor", float, 1.0)
    if mscale != 1:
        raise UserError(
            f"{file.source}: {architecture}.rope.scaling.attn_factor is {mscale:g}; expected 1"
        )
    factor = (factor or linear or 1.0) if kind == "linear" else 1.0
    scaling = None if factor == 1.0 else RopeScaling(_decimal(factor))
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
    lengths: tuple[str, ...] = ("attention.value_length", "rope.dimension_count")
    if architecture in WINDOWS:
        lengths += ("attention.key_length_swa", "attention.value_length_swa")
        lengths += ("rope.dimension_count_swa",)
    for key in lengths:
        length = file.get(f"{architecture}.{key}", int, config.head_dim)
        if length != config.head_dim:
            raise UserError(
                f"{file.source}: {architecture}.{key} is {length}, but heads have "
                f"{config.head_dim} features; nothing else is supported"
            )
    if not file.get(f"{architecture}.attention.causal", bool, True):
        raise UserError(
            f"{file.source} has {architecture}.attention.causal=False, which is not supported"
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
