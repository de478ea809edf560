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


def _bias_names(names: Mapping[str, str], of: Iterable[str]) -> dict[str, str]:
    """Biases are named like their kernels or norms."""
    return {f"{ours}_bias": names[ours].replace(".weight", ".bias") for ours in of}


# A model has those biases of kernels that its config asks for.
KERNELS = [f"layers/{kernel}" for kernel in ("q", "k", "v", "o", "gate", "up", "down")]
LLAMA_NAMES = BASE_NAMES | _bias_names(BASE_NAMES, KERNELS)
QK_NORM_NAMES = {
    "layers/q_norm": "model.layers.{i}.self_attn.q_norm.weight",
    "layers/k_norm": "model.layers.{i}.self_attn.k_norm.weight",
}
QWEN3_NAMES = LLAMA_NAMES | QK_NORM_NAMES
GEMMA2_NAMES = LLAMA_NAMES | {
    "layers/attn_post_norm": "model.layers.{i}.post_attention_layernorm.weight",
    "layers/mlp_norm": "model.layers.{i}.pre_feedforward_layernorm.weight",
    "layers/mlp_post_norm": "model.layers.{i}.post_feedforward_layernorm.weight",
}
GEMMA3_NAMES = GEMMA2_NAMES | QK_NORM_NAMES
OPT_NAMES = {
    "embed": "model.decoder.embed_tokens.weight",
    "positions": "model.decoder.embed_positions.weight",
    "project_in": "model.decoder.project_in.weight",
    "project_out": "model.decoder.project_out.weight",
    "final_norm": "model.decoder.final_layer_norm.weight",
    "lm_head": "lm_head.weight",
    "layers/attn_norm": "model.decoder.layers.{i}.self_attn_layer_norm.weight",
    "layers/q": "model.decoder.layers.{i}.self_attn.q_proj.weight",
    "layers/k": "model.decoder.layers.{i}.self_attn.k_proj.weight",
    "layers/v": "model.decoder.layers.{i}.self_attn.v_proj.weight",
    "layers/o": "model.decoder.layers.{i}.self_attn.out_proj.weight",
    "layers/mlp_norm": "model.decoder.layers.{i}.final_layer_norm.weight",
    "layers/up": "model.decoder.layers.{i}.fc1.weight",
    "layers/down": "model.decoder.layers.{i}.fc2.weight",
}
OPT_NAMES |= _bias_names(
    OPT_NAMES, OPT_NAMES.keys() - {"embed", "positions", "project_in", "project_out", "lm_head"}
)

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
      fields: fields of its config.json that `DecoderConfig` has too, and their defaults; with
        `rope_theta` it has ropes, else its config.json has nothing of them.
      renamed: those that its config.json has under other names -> these names.
      sliding_theta: default base of the rope that its `sliding_attention` layers have for
        themselves; None: all layers have the same rope.
      biases: fields of its config.json that, where true, add biases -> the kernels that get one.
      rules: fields of its config.json that `read` reads.
      own: fields of `DecoderConfig` that its config.json has in a way of its own.
      fits: whether the family can have the sizes of a config.
      beyond: fields of its config.json -> the values with which they ask for nothing; see
        `config_json.BEYOND`.
      ignored: fields that conversions write and transformers, for this family, does not read.
      constants: written into config.json for its readers, not read by us.
      read: `(raw config.json, fields) -> fields`, where it says something in a way of its own. Its
        UserError is the rest of a sentence that begins with the file's name.
      write: `(config, raw) -> raw`, the same in the other direction.
      gguf: llama.cpp's name of the architecture, where it is not `model_type`.
      neighbours: whether llama.cpp, in that architecture, rotates pairs of neighbouring features,
        as Meta's LLaMA did, not halves; None: it has no such architecture.
    """

    architecture: str
    model_type: str
    names: Mapping[str, str]
    switches: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fields: Mapping[str, Any] = dataclasses.field(default_factory=lambda: COMMON)
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    sliding_theta: float | None = None
    biases: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    rules: frozenset[str] = frozenset()
    own: frozenset[str] = frozenset()
    fits: Callable[[DecoderConfig], bool] = lambda config: True
    beyond: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    read: Callable[[Raw, Fields], Fields] = lambda raw, fields: fields
    write: Callable[[DecoderConfig, Fields], Fields] = lambda config, raw: raw
    gguf: str = ""
    neighbours: bool | None = None

    @property
    def rotates(self) -> bool:
        return "rope_theta" in self.fields

    def expresses(self, config: DecoderConfig) -> bool:
        """Whether all that a config asks for can be written down in the family's config.json."""
        free = {*REQUIRED, *self.fields, *self.own, "num_key_value_heads", "head_dim", "biases"}
        free |= {"rope_scaling"} if self.rotates else set()
        on = [name for name, kernels in self.biases.items() if set(kernels) <= set(config.biases)]
        if not self.fits(config) or set(config.biases) != set(self.kernels_with_bias(on)):
            return False
        return all(
            getattr(config, field.name) == self.switches.get(field.name, field.default)
            for field in dataclasses.fields(config)
            if field.name not in free
        )

    def kernels_with_bias(self, on: Iterable[str]) -> tuple[str, ...]:
        """Where those fields of `biases` are true."""
        always = self.switches.get("biases", ())
        return sum((self.biases[name] for name in on), always)


Biases = dict[str, tuple[str, ...]]
ATTENTION_BIAS: Biases = {"attention_bias": ("q", "k", "v", "o")}
MLP_BIAS: Biases = {"mlp_bias": ("gate", "up", "down")}
NO_DROPOUT = {"attention_dropout": 0.0}

# --- LLaMA ---------------------------------------------------------------------------------------

LLAMA = Family(
    "LlamaForCausalLM",
    "llama",
    LLAMA_NAMES,
    biases=ATTENTION_BIAS | MLP_BIAS,
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
    if type(lowest) is not int or lowest < 0:
        raise UserError(f"has max_window_layers={lowest!r}; expected an integer from 0")
    return _windows_if_used(raw, fields, [i >= lowest for i in range(layers)])


def _windows_if_used(raw: Raw, fields: Fields, sliding: Sequence[bool]) -> Fields:
    """The layers with a window are those listed, or by `sliding`; none without
    `use_sliding_window`."""
    use = raw.get("use_sliding_window", False)
    if type(use) is not bool:
        raise UserError(f"has use_sliding_window={use!r}; expected true or false")
    if use and fields["sliding_window"] is not None:
        return fields | {"layer_types": _layer_types(raw, sliding)}
    types = _layer_types(raw, [False] * len(sliding))
    if "sliding_attention" in types:
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

# --- Gemma, Gemma 2, Gemma 3 ---------------------------------------------------------------------

GEMMA_FIELDS = COMMON | {
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "hidden_act": "gelu_pytorch_tanh",
}
PATTERN = "sliding_window_pattern"


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
    types = _windows_by_pattern(raw, 2)
    return _read_gemma(raw, fields, "hidden_activation") | {"layer_types": types}


def _windows_by_pattern(raw: Raw, pattern: int) -> tuple[str, ...]:
    """All layers but every n-th have a window, n being `pattern`, or those in `layer_types`.

    Where the file states a pattern too, it must be that of the layers.
    """
    stated, layers = _count(raw, PATTERN, pattern), range(raw["num_hidden_layers"])
    types = _layer_types(raw, [(i + 1) % pattern != 0 for i in layers])
    if raw.get(PATTERN) is not None and types != _layer_types(
        {}, [(i + 1) % stated != 0 for i in layers]
    ):
        raise UserError(f"has {PATTERN}={stated}, but layer_types={list(types)}")
    return types


def _count(raw: Raw, name: str, default: int) -> int:
    """A field that is an integer from 1, or UserError; null is as if it were not there."""
    value = default if raw.get(name) is None else raw[name]
    if type(value) is not int or value < 1:
        raise UserError(f"has {name}={value!r}; expected an integer from 1")
    return value


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
    rules=frozenset({"hidden_activation", PATTERN}),
    constants=NO_DROPOUT,
    read=_read_gemma2,
    write=_write_gemma2,
    neighbours=False,
)


def _read_gemma3(raw: Raw, fields: Fields) -> Fields:
    """Windows in five of six layers, or by a pattern of the file's, or as in `layer_types`."""
    types = _windows_by_pattern(raw, _count(raw, PATTERN, 6))
    return _read_gemma(raw, fields, "hidden_activation") | {"layer_types": types}


GEMMA3 = Family(
    "Gemma3ForCausalLM",
    "gemma3_text",
    GEMMA3_NAMES,
    switches={
        "qk_norm": True,
        "rms_norm_offset": True,
        "embedding_scale": True,
        "post_norms": True,
    },
    fields=GEMMA_FIELDS
    | {
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
        "rope_theta": 1e6,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "layer_types": (),
    },
    sliding_theta=1e4,
    own=frozenset({"sliding_rope"}),
    ignored=frozenset({"_sliding_window_pattern"}),  # written beside layer_types, whatever they are
    fits=lambda config: config.sliding_rope is None or config.sliding_rope.theta is not None,
    biases=ATTENTION_BIAS,
    rules=frozenset({"hidden_activation", PATTERN}),
    constants=NO_DROPOUT,
    read=_read_gemma3,
    write=_write_gemma2,
    gguf="gemma3",
    neighbours=False,
)

# --- SmolLM3 -------------------------------------------------------------------------------------


def _read_smollm3(raw: Raw, fields: Fields) -> Fields:
    """Layers that rotate nothing: those of `no_rope_layers` at 0, or every n-th, n being
    `no_rope_layer_interval`. As in transformers, the list has precedence; windows, if used, are
    theirs.
    """
    layers, interval = raw["num_hidden_layers"], _count(raw, "no_rope_layer_interval", 4)
    rotates = [(i + 1) % interval != 0 for i in range(layers)]
    if (listed := raw.get("no_rope_layers")) is not None:
        if not isinstance(listed, list) or any(each not in (0, 1) for each in listed):
            raise UserError(f"has no_rope_layers={listed!r}; expected a list of 0 and 1")
        if len(listed) < layers:
            raise UserError(f"has {len(listed)} no_rope_layers, but num_hidden_layers={layers}")
        rotates = [each == 1 for each in listed[:layers]]
    fields = _windows_if_used(raw, fields, [not each for each in rotates])
    return fields | {"rope_layers": () if all(rotates) else tuple(rotates)}


def _write_smollm3(config: DecoderConfig, raw: Fields) -> Fields:
    return _write_layer_types(config, raw) | {
        "no_rope_layers": [int(each) for each in config.rope_layers],
        "use_sliding_window": any(config.windows),
    }


SMOLLM3 = Family(
    "SmolLM3ForCausalLM",
    "smollm3",
    LLAMA_NAMES,
    fields=COMMON
    | {
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rope_theta": 2e6,
        "tie_word_embeddings": True,
        "sliding_window": None,
        "layer_types": (),
    },
    biases=ATTENTION_BIAS | MLP_BIAS,
    rules=frozenset({"no_rope_layers", "no_rope_layer_interval", "use_sliding_window"}),
    own=frozenset({"rope_layers"}),
    fits=lambda config: not all(config.rope_layers),
    constants=NO_DROPOUT,
    read=_read_smollm3,
    write=_write_smollm3,
    neighbours=True,
)

# --- OPT -----------------------------------------------------------------------------------------


def _read_opt(raw: Raw, fields: Fields) -> Fields:
    width = fields["word_embed_proj_dim"]
    return fields | {"word_embed_proj_dim": None if width == raw["hidden_size"] else width}


def _write_opt(config: DecoderConfig, raw: Fields) -> Fields:
    return raw | {"word_embed_proj_dim": config.embedding_size}


OPT = Family(
    "OPTForCausalLM",
    "opt",
    OPT_NAMES,
    switches={
        "biases": ("q", "k", "v", "o", "up", "down"),
        "mlp": "plain",
        "norm": "layer",
        "positions": "learned",
        "position_offset": 2,
    },
    fields={
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "hidden_act": "relu",
        "word_embed_proj_dim": None,
        "do_layer_norm_before": True,
    },
    renamed={"intermediate_size": "ffn_dim", "hidden_act": "activation_function"},
    fits=lambda config: (
        config.word_embed_proj_dim != config.hidden_size  # which is written, and read, as None
        and config.num_key_value_heads == config.num_attention_heads
        and config.num_attention_heads * config.head_dim == config.hidden_size
    ),
    beyond={
        "_remove_final_layer_norm": (None, False),
        "enable_bias": (None, True),
        "layer_norm_elementwise_affine": (None, True),
    },
    ignored=frozenset({"activation_dropout", "init_std", "layerdrop"}),
    constants=NO_DROPOUT | {"enable_bias": True},
    read=_read_opt,
    write=_write_opt,
)

FAMILIES = (LLAMA, QWEN2, QWEN3, GEMMA, GEMMA2, GEMMA3, SMOLLM3, OPT)


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
    absent |= {"lm_head"} if config.tie_word_embeddings else set()
    absent |= set() if config.word_embed_proj_dim else {"project_in", "project_out"}
    absent |= set() if config.do_layer_norm_before else {"final_norm", "final_norm_bias"}
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
