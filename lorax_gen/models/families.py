"""Foreign names: what Hugging Face calls things, one record for each family, in both directions.

A `Family` holds a name table (ours -> theirs, `{i}` is the layer) and says how its `config.json`
reads as a `DecoderConfig` (`models.config_json`). Supporting one more family is one more record.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lorax_gen.documents import convert
from lorax_gen.errors import UserError
from lorax_gen.models.decoder import DecoderConfig, abstract_params, kernel_shapes

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
      rules: fields of its config.json that `read` reads.
      ignored: fields that conversions write and transformers, for this family, does not read.
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
    rules: frozenset[str] = frozenset()
    ignored: frozenset[str] = frozenset()
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

QWEN2_RULES = frozenset({"use_sliding_window", "max_window_layers"})


def _read_qwen2(raw: Raw, fields: Fields) -> Fields:
    """Windows only where `use_sliding_window`, in the layers above `max_window_layers`.

    As in transformers, `layer_types` has precedence over `max_window_layers`.
    """
    layers, lowest = raw["num_hidden_layers"], raw.get("max_window_layers", 28)
    use = raw.get("use_sliding_window", False)
    if type(lowest) is not int or lowest < 0:
        raise UserError(f"has max_window_layers={lowest!r}; expected an integer from 0")
    if type(use) is not bool:
        raise UserError(f"has use_sliding_window={use!r}; expected true or false")
    if use and fields["sliding_window"] is not None:
        return fields | {"layer_types": _layer_types(raw, [i >= lowest for i in range(layers)])}
    types = _layer_types(raw, [False] * layers)
    if types != ("full_attention",) * layers:
        raise UserError(
            f"has layer_types={list(types)}, but use_sliding_window={use} and "
            f"sliding_window={fields['sliding_window']}"
        )
    return fields | {"layer_types": ()}


def _write_qwen2(config: DecoderConfig, raw: Fields) -> Fields:
    windows = config.windows
    return _write_layer_types(config, raw) | {
        "use_sliding_window": any(windows),
        "max_window_layers": windows.index(config.sliding_window),
    }


def _layer_types(raw: Raw, sliding: Sequence[bool]) -> tuple[str, ...]:
    """As listed, or by the rule of a family where the list is newer than the file."""
    rule = tuple("sliding_attention" if yes else "full_attention" for yes in sliding)
    listed = raw.get("layer_types")
    if listed is None:
        return rule
    types = convert(listed, tuple[str, ...], f"has layer_types={listed!r}")
    if len(types) != len(rule):
        raise UserError(f"has {len(types)} layer_types, but num_hidden_layers={len(rule)}")
    return types


def _write_layer_types(config: DecoderConfig, raw: Fields) -> Fields:
    listed = list(config.layer_types) or ["full_attention"] * config.num_hidden_layers
    return raw | {"layer_types": listed}


QWEN2 = Family(
    "Qwen2ForCausalLM",
    "qwen2",
    LLAMA_NAMES,
    switches={"biases": ("q", "k", "v")},
    fields=COMMON | {"max_position_embeddings": 32768, "sliding_window": 4096, "layer_types": ()},
    rules=QWEN2_RULES,
    ignored=frozenset({"attention_bias"}),  # it always has those of q, k and v
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
    fields={**QWEN2.fields, "head_dim": 128},
    biases=ATTENTION_BIAS,
    rules=QWEN2_RULES,
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


def _read_gemma(raw: Raw, fields: Fields, name: str = "hidden_act") -> Fields:
    """The activation has two names, of which transformers reads `name`; they must agree.

    `gelu` has always meant its tanh form.
    """
    default = GEMMA_FIELDS["hidden_act"]
    own = default if raw.get(name) is None else raw[name]
    for other in ("hidden_act", "hidden_activation"):
        found = own if raw.get(other) is None else raw[other]
        if found != own and [own, found] not in (["gelu", default], [default, "gelu"]):
            raise UserError(f"has {name}={own!r}, but {other}={found!r}; they must agree")
    return fields | {"hidden_act": default if own == "gelu" else own}


def _write_gemma(config: DecoderConfig, raw: Fields) -> Fields:
    return raw | {"hidden_activation": config.hidden_act}


def _read_gemma2(raw: Raw, fields: Fields) -> Fields:
    """Every other layer has a window, the first one among them, or those in `layer_types`."""
    sliding = [i % 2 == 0 for i in range(raw["num_hidden_layers"])]
    types, pattern = _layer_types(raw, sliding), raw.get("sliding_window_pattern")
    every_other = types == tuple(_layer_types({}, sliding))
    if pattern not in (None, 2) or (pattern == 2 and not every_other):
        raise UserError(f"has sliding_window_pattern={pattern!r}, but layer_types={list(types)}")
    return _read_gemma(raw, fields, "hidden_activation") | {"layer_types": types}


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
    rules=frozenset({"hidden_activation"}),
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
    rules=frozenset({"hidden_activation", "sliding_window_pattern"}),
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


# --- tensors -------------------------------------------------------------------------------------


def is_transposed(ours: str) -> bool:
    """Whether they store a tensor the other way round: kernels, theirs being `[out, in]`."""
    return not ours.endswith(("embed", "positions", "norm", "bias"))


def leaf_at(tree: Mapping, path: str) -> Any:
    for name in path.split("/"):
        tree = tree[name]
    return tree


def tensor_names(
    config: DecoderConfig, table: Mapping[str, str] | None = None
) -> dict[str, list[str]]:
    """Our path of each leaf -> their names of its tensors: one, or one for each layer.

    Args:
      table: of other names than Hugging Face's, for the same tensors.
    """
    absent = {f"layers/{name}_bias" for name in set(kernel_shapes(config)) - set(config.biases)}
    if config.tie_word_embeddings:
        absent.add("lm_head")
    theirs = family_of(config).names
    names = {ours: (table or theirs)[ours] for ours in theirs if ours not in absent}
    layers = range(config.num_hidden_layers)
    return {
        ours: [theirs.format(i=i) for i in layers] if ours.startswith("layers/") else [theirs]
        for ours, theirs in names.items()
    }


def tensor_shapes(
    config: DecoderConfig, names: Mapping[str, list[str]] | None = None
) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor of a checkpoint of this config, by `tensor_names`."""
    params, shapes = abstract_params(config), dict[str, tuple[int, ...]]()
    for ours, keys in (names or tensor_names(config)).items():
        shape = leaf_at(params, ours).shape
        shape = shape[1:] if ours.startswith("layers/") else shape
        shapes |= dict.fromkeys(keys, shape[::-1] if is_transposed(ours) else shape)
    return shapes
