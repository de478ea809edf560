"""Foreign names: what Hugging Face calls things, one record for each family, in both directions.

A `Family` holds a name table (ours -> theirs, `{i}` is the layer) and says how its `config.json`
reads as a `DecoderConfig`. What a config asks for and no field of the family holds is an error that
names it. Supporting one more family is one more record.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorax_gen import documents
from lorax_gen.config import from_dict
from lorax_gen.errors import UserError
from lorax_gen.models.decoder import DecoderConfig, abstract_params, kernel_shapes
from lorax_gen.models.rope import RopeScaling

BASE_NAMES = {
    "embed": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "lm_head": "lm_head.weight",
    "layers/attn_norm": "model.layers.{i}.input_layernorm.weight",
    "layers/q": "model.layers.{i}.self_attn.q_proj.weight",
    "layers/k": "model.layers.{i}.self_attn.k_proj.weight",
    "layers/v": "model.layers.{i}.self_attn.v_proj.weight",
    "layers/o": "model.layers.{i}.self_attn.o_proj.weight",
    "layers/mlp_norm": "model.layers.{i}.post_attention_layernorm.weight",
    "layers/gate": "model.layers.{i}.mlp.gate_proj.weight",
    "layers/up": "model.layers.{i}.mlp.up_proj.weight",
    "layers/down": "model.layers.{i}.mlp.down_proj.weight",
}
# Biases are named like their kernels; a model has those that its config asks for.
LLAMA_NAMES = BASE_NAMES | {
    f"{ours}_bias": theirs.replace(".weight", ".bias")
    for ours, theirs in BASE_NAMES.items()
    if theirs.endswith("_proj.weight")
}
QWEN3_NAMES = LLAMA_NAMES | {
    "layers/q_norm": "model.layers.{i}.self_attn.q_norm.weight",
    "layers/k_norm": "model.layers.{i}.self_attn.k_norm.weight",
}
GEMMA2_NAMES = LLAMA_NAMES | {
    "layers/attn_post_norm": "model.layers.{i}.post_attention_layernorm.weight",
    "layers/mlp_norm": "model.layers.{i}.pre_feedforward_layernorm.weight",
    "layers/mlp_post_norm": "model.layers.{i}.post_feedforward_layernorm.weight",
}

REQUIRED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
)  # fmt: skip
# Fields that every family has, and what transformers takes where a config.json leaves them out.
COMMON = {
    "num_key_value_heads": None,  # as many as attention heads
    "head_dim": None,  # hidden_size / num_attention_heads
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}

Raw = Mapping[str, Any]
Fields = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture of Hugging Face's: all that is particular to it, and nowhere else.

    Attributes:
      names: our path of a tensor -> their name.
      switches: fields of `DecoderConfig` that every model of the family has at another value than
        the default.
      fields: fields of its config.json that `DecoderConfig` has too, and their defaults.
      biases: fields of its config.json that, where true, add biases -> the kernels that get one.
      constants: written into config.json for its readers, not read by us.
      read: `(raw config.json, fields) -> fields`, where it says something in a way of its own. Its
        UserError is the rest of a sentence that begins with the file's name.
      write: `(config, raw) -> raw`, the same in the other direction.
      neighbours: whether llama.cpp, in its architecture of the name `model_type`, rotates pairs of
        neighbouring features, as Meta's LLaMA did, not halves; None: it has no such architecture.
    """

    architecture: str
    model_type: str
    names: Mapping[str, str]
    switches: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fields: Mapping[str, Any] = dataclasses.field(default_factory=lambda: COMMON)
    biases: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    read: Callable[[Raw, Fields], Fields] = lambda raw, fields: fields
    write: Callable[[DecoderConfig, Fields], Fields] = lambda config, raw: raw
    neighbours: bool | None = None

    def expresses(self, config: DecoderConfig) -> bool:
        """Whether all that a config asks for can be written down in the family's config.json."""
        free = {*REQUIRED, *self.fields, "rope_scaling", "biases"}
        on = [name for name, kernels in self.biases.items() if set(kernels) <= set(config.biases)]
        return set(config.biases) == set(self.kernels_with_bias(on)) and all(
            getattr(config, field.name) == self.switches.get(field.name, field.default)
            for field in dataclasses.fields(config)
            if field.name not in free
        )

    def kernels_with_bias(self, on: Iterable[str]) -> tuple[str, ...]:
        """Where those fields of `biases` are true."""
        always = self.switches.get("biases", ())
        return sum((self.biases[name] for name in on), always)


ATTENTION_BIAS = {"attention_bias": ("q", "k", "v", "o")}
NO_DROPOUT = {"attention_dropout": 0.0}

# --- LLaMA ---------------------------------------------------------------------------------------

LLAMA = Family(
    "LlamaForCausalLM",
    "llama",
    LLAMA_NAMES,
    biases=ATTENTION_BIAS | {"mlp_bias": ("gate", "up", "down")},
    constants=NO_DROPOUT,
    neighbours=True,
)

# --- Qwen2, Qwen3 --------------------------------------------------------------------------------


def _read_qwen2(raw: Raw, fields: Fields) -> Fields:
    """Windows only where `use_sliding_window`, in the layers above `max_window_layers`."""
    layers, lowest = raw["num_hidden_layers"], raw.get("max_window_layers", 28)
    if not isinstance(lowest, int):
        raise UserError(f"has max_window_layers={lowest!r}; expected an integer")
    if not raw.get("use_sliding_window") or raw.get("sliding_window", 0) is None:
        return fields | {"layer_types": ()}
    return fields | {"layer_types": _layer_types(raw, [i >= lowest for i in range(layers)])}


def _write_qwen2(config: DecoderConfig, raw: Fields) -> Fields:
    windows = config.windows
    return _write_layer_types(config, raw) | {
        "use_sliding_window": any(windows),
        "max_window_layers": windows.index(config.sliding_window),
    }


def _layer_types(raw: Raw, sliding: Sequence[bool]) -> Any:
    """As listed, or by the rule of a family where the list is newer than the file."""
    rule = tuple("sliding_attention" if yes else "full_attention" for yes in sliding)
    return raw.get("layer_types") or rule


def _write_layer_types(config: DecoderConfig, raw: Fields) -> Fields:
    listed = list(config.layer_types) or ["full_attention"] * config.num_hidden_layers
    return raw | {"layer_types": listed}


QWEN2 = Family(
    "Qwen2ForCausalLM",
    "qwen2",
    LLAMA_NAMES,
    switches={"biases": ("q", "k", "v")},
    fields=COMMON | {"max_position_embeddings": 32768, "sliding_window": 4096, "layer_types": ()},
    constants=NO_DROPOUT,
    read=_read_qwen2,
    write=_write_qwen2,
    neighbours=False,
)
QWEN3 = Family(
    "Qwen3ForCausalLM",
    "qwen3",
    QWEN3_NAMES,
    switches={"qk_norm": True},
    fields=QWEN2.fields | {"head_dim": 128},
    biases=ATTENTION_BIAS,
    constants=NO_DROPOUT,
    read=_read_qwen2,
    write=_write_qwen2,
    neighbours=False,
)

# --- Gemma, Gemma 2 ------------------------------------------------------------------------------

GEMMA_FIELDS = COMMON | {
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "hidden_act": "gelu_pytorch_tanh",
}


def _read_gemma(raw: Raw, fields: Fields) -> Fields:
    """`hidden_activation` is the newer name, and `gelu` has always meant its tanh form."""
    name = raw.get("hidden_activation") or fields["hidden_act"]
    return fields | {"hidden_act": "gelu_pytorch_tanh" if name == "gelu" else name}


def _write_gemma(config: DecoderConfig, raw: Fields) -> Fields:
    return raw | {"hidden_activation": config.hidden_act}


def _read_gemma2(raw: Raw, fields: Fields) -> Fields:
    """Every other layer has a window, the first one among them."""
    sliding = [i % 2 == 0 for i in range(raw["num_hidden_layers"])]
    return _read_gemma(raw, fields) | {"layer_types": _layer_types(raw, sliding)}


def _write_gemma2(config: DecoderConfig, raw: Fields) -> Fields:
    scalar = config.query_pre_attn_scalar or config.head_dim  # transformers insists on an integer
    scalar = int(scalar) if scalar == int(scalar) else scalar
    raw = _write_layer_types(config, _write_gemma(config, raw))
    return raw | {"query_pre_attn_scalar": scalar}


GEMMA = Family(
    "GemmaForCausalLM",
    "gemma",
    LLAMA_NAMES,
    switches={"rms_norm_offset": True, "embedding_scale": True},
    fields=GEMMA_FIELDS,
    biases=ATTENTION_BIAS,
    constants=NO_DROPOUT,
    read=_read_gemma,
    write=_write_gemma,
    neighbours=False,
)
GEMMA2 = Family(
    "Gemma2ForCausalLM",
    "gemma2",
    GEMMA2_NAMES,
    switches={"rms_norm_offset": True, "embedding_scale": True, "post_norms": True},
    fields=GEMMA_FIELDS
    | {
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 4096,
        "layer_types": (),
    },
    biases=ATTENTION_BIAS,
    constants=NO_DROPOUT,
    read=_read_gemma2,
    write=_write_gemma2,
    neighbours=False,
)

FAMILIES = (LLAMA, QWEN2, QWEN3, GEMMA, GEMMA2)


def family_of(config: DecoderConfig) -> Family:
    """The family that can express a config; UserError where none can."""
    for family in FAMILIES:
        if family.expresses(config):
            return family
    defaults = {f.name: f.default for f in dataclasses.fields(DecoderConfig)}
    used = {name for name, default in defaults.items() if getattr(config, name) != default}
    raise UserError(
        f"no Hugging Face family has {', '.join(sorted(used - {*REQUIRED, *COMMON}))} together; "
        f"known are {', '.join(family.architecture for family in FAMILIES)}"
    )


# --- config.json ---------------------------------------------------------------------------------

# What a config.json may ask for that the decoder does not do, and the values that ask for nothing.
UNSUPPORTED = {
    "mlp_bias": (None, False),
    "attention_bias": (None, False),
    "use_bidirectional_attention": (None, False),
    "quantization_config": (None,),
    "partial_rotary_factor": (None, 1, 1.0),
}


def read_config(path: Path) -> DecoderConfig:
    """The config of a `config.json`, as old and new versions of transformers write it.

    Raises UserError that names an unknown architecture or `rope_type`, and whatever the file lacks
    or asks for beyond the decoder.
    """
    raw = documents.read_json(path)
    named = raw.get("architectures") or "none"
    architecture = named[0] if isinstance(named, list) else named
    family = next((family for family in FAMILIES if family.architecture == architecture), None)
    if family is None:
        raise UserError(
            f"{path} is of architecture {architecture}; supported are "
            f"{', '.join(family.architecture for family in FAMILIES)}"
        )
    missing = [name for name in REQUIRED if raw.get(name) is None]
    if missing:
        raise UserError(f"{path} is incomplete: it lacks {', '.join(missing)}")
    for name in REQUIRED:
        if not isinstance(raw[name], int):
            raise UserError(f"{path} has {name}={raw[name]!r}; expected an integer")
    name = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    rope = raw.get(name) or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise UserError(f"{path} has {name}={rope!r}; expected one rope for all layers")
    for name in family.biases:
        if raw.get(name) not in (None, False, True):
            raise UserError(f"{path} has {name}={raw[name]!r}; expected true or false")
    for name, harmless in UNSUPPORTED.items():
        if name in family.biases:
            continue
        for section in (raw, rope):
            if section.get(name) not in harmless:
                raise UserError(f"{path} has {name}={section[name]!r}, which is not supported")

    fields = {name: raw[name] for name in REQUIRED}
    for name, default in family.fields.items():
        null_says_none = name.endswith(("softcapping", "window")) and name in raw
        fields[name] = default if raw.get(name) is None and not null_says_none else raw[name]
    heads = raw["num_attention_heads"]
    if fields["num_key_value_heads"] is None:
        fields["num_key_value_heads"] = heads
    if fields["head_dim"] is None:
        fields["head_dim"] = raw["hidden_size"] // max(heads, 1)
    fields["rope_theta"] = rope.get("rope_theta", fields["rope_theta"])
    fields["rope_scaling"] = read_rope_scaling(rope, path)
    try:
        fields = family.read(raw, fields) | family.switches
    except UserError as error:
        raise UserError(f"{path} {error}") from None
    fields["biases"] = family.kernels_with_bias(name for name in family.biases if raw.get(name))
    config = from_dict(DecoderConfig, fields, str(path))
    if "sliding_attention" not in config.layer_types:
        config = dataclasses.replace(config, layer_types=(), sliding_window=None)
    return config


def read_rope_scaling(rope: Mapping[str, Any], path: Path) -> dict[str, Any] | None:
    """The fields of a `RopeScaling`, unchecked."""
    kind = rope.get("rope_type", rope.get("type", "default"))  # older ones: `type`
    if kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        raise UserError(
            f"{path} has rope_type {kind!r}; supported are 'default', 'linear' and 'llama3'"
        )
    names = [field.name for field in dataclasses.fields(RopeScaling)]
    names = names[:1] if kind == "linear" else names
    missing = [name for name in names if rope.get(name) is None]
    if missing:
        raise UserError(f"{path} has rope_type {kind!r} without {', '.join(missing)}")
    return {name: rope[name] for name in names}


def write_rope_scaling(scaling: RopeScaling) -> dict[str, Any]:
    """The fields that its `rope_type` has."""
    fields = {name: value for name, value in dataclasses.asdict(scaling).items() if value}
    return {"rope_type": scaling.rope_type, **fields}


def write_config(config: DecoderConfig) -> dict[str, Any]:
    """The `config.json` of a config, in the names that transformers 4 and 5 both read."""
    family = family_of(config)
    raw = {"architectures": [family.architecture], "model_type": family.model_type}
    raw |= {name: getattr(config, name) for name in (*REQUIRED, *family.fields)}
    biases = {name: set(kernels) <= set(config.biases) for name, kernels in family.biases.items()}
    raw |= dict(sorted((biases | family.constants).items()))
    if config.rope_scaling is not None:
        raw["rope_scaling"] = write_rope_scaling(config.rope_scaling)
    return family.write(config, raw)


# --- tensors -------------------------------------------------------------------------------------


def is_transposed(ours: str) -> bool:
    """Whether they store a tensor the other way round: kernels, theirs being `[out, in]`."""
    return not ours.endswith(("embed", "positions", "norm", "bias"))


def leaf_at(tree: Mapping, path: str) -> Any:
    for name in path.split("/"):
        tree = tree[name]
    return tree


def tensor_names(config: DecoderConfig) -> dict[str, list[str]]:
    """Our path of each leaf -> their names of its tensors: one, or one for each layer."""
    absent = {f"layers/{name}_bias" for name in set(kernel_shapes(config)) - set(config.biases)}
    if config.tie_word_embeddings:
        absent.add("lm_head")
    names = {ours: name for ours, name in family_of(config).names.items() if ours not in absent}
    layers = range(config.num_hidden_layers)
    return {
        ours: [theirs.format(i=i) for i in layers] if ours.startswith("layers/") else [theirs]
        for ours, theirs in names.items()
    }


def tensor_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor of a checkpoint of this config."""
    params, shapes = abstract_params(config), {}
    for ours, names in tensor_names(config).items():
        shape = leaf_at(params, ours).shape
        shape = shape[1:] if ours.startswith("layers/") else shape
        shapes |= dict.fromkeys(names, shape[::-1] if is_transposed(ours) else shape)
    return shapes
