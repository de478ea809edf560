"""`config.json`: what it says is used as it says, or refused in a line that names it.

A key is one that the family reads, one that transformers does not read for this family either
(`Family.ignored`, `HARMLESS`), or one that asks for what the decoder does not do (`BEYOND`). One
that none of them knows is warned about: files on the hub hold keys of many programs, and few of
them change what a model computes.

Statements that contradict each other are refused with both names. Only where a newer key of
transformers replaces an older one does the newer have precedence: see `Family.read`.
"""

from __future__ import annotations

import dataclasses
import typing
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorax_gen.config import from_dict
from lorax_gen.documents import convert, read_json
from lorax_gen.errors import UserError
from lorax_gen.models.config import DecoderConfig
from lorax_gen.models.families import FAMILIES, REQUIRED, Family, family_of
from lorax_gen.models.rope import Base, Rope, RopeScaling

Raw = Mapping[str, Any]
Ropes = tuple[Raw, ...]
"""The rope of all layers; or that of full layers, then that of sliding ones."""

# Of transformers' own configs: they name the file, its programs and its labels, or set defaults of
# training and generation.
HARMLESS = frozenset(
    """
    attention_dropout attn_implementation _attn_implementation _attn_implementation_autoset
    attn_pdrop bad_words_ids begin_suppress_tokens bos_token_id cache_implementation
    chunk_size_feed_forward classifier_dropout _commit_hash decoder_start_token_id diversity_penalty
    do_sample dropout early_stopping embd_pdrop encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task _flash_attn_2_enabled forced_bos_token_id
    forced_eos_token_id gradient_checkpointing hidden_dropout hidden_dropout_prob id2label
    initializer_range is_decoder is_llama_config label2id length_penalty max_length
    max_sequence_length max_window_layers min_length model_max_length _model_name_or_path
    name_or_path _name_or_path no_repeat_ngram_size num_beam_groups num_beams num_labels
    num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix
    pretraining_tp problem_type remove_invalid_values repetition_penalty resid_pdrop return_dict
    return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature
    tf_legacy_loss tokenizer_class top_k top_p torchscript transformers.js_config
    transformers_version typical_p unk_token_id unsloth_fixed unsloth_version use_bfloat16 use_cache
    """.split()
)
NO = (None, False)
# What a model may do and the decoder does not, and the values that ask for nothing. Some of these
# transformers would pass over for a family, but not the program that wrote them.
BEYOND: dict[str, tuple[Any, ...]] = {
    "add_bias_linear": NO,
    "add_cross_attention": NO,
    "alibi": NO,
    "attention_bias": NO,
    "attention_multiplier": (None,),
    "attn_logit_softcapping": (None,),
    "clip_qkv": (None,),
    "cross_attention_hidden_size": (None,),
    "embedding_multiplier": (None, 1),
    "final_logit_softcapping": (None,),
    "is_encoder_decoder": NO,
    "logit_scale": (None, 1),
    "logits_scaling": (None, 1),
    "lm_head_bias": NO,
    "mlp_bias": NO,
    "no_rope_layer_interval": (None,),
    "no_rope_layers": (None,),
    "num_experts": (None, 0),
    "num_experts_per_tok": (None, 0),
    "num_local_experts": (None, 0),
    "n_routed_experts": (None, 0),
    "parallel_attn": NO,
    "partial_rotary_factor": (None, 1),
    "per_layer_config": (None, {}),
    "pruned_heads": (None, {}),
    "qk_layernorm": NO,
    "qk_norm": NO,
    "qkv_bias": NO,
    "quantization_config": (None,),
    "query_pre_attn_scalar": (None,),
    "residual_multiplier": (None, 1),
    "rope_interleave": NO,
    "rope_interleaved": NO,
    "rotary_pct": (None, 1),
    "scale_depth": (None,),
    "scale_emb": (None, 1),
    "sliding_window": (None,),
    "sliding_window_pattern": (None,),
    "text_config": (None,),
    "tie_encoder_decoder": NO,
    "use_bidirectional_attention": NO,
    "use_mrope": NO,
    "use_parallel_residual": NO,
    "use_qk_norm": NO,
    "use_sliding_window": NO,
}
DTYPES = ("float16", "bfloat16", "float32", "float64")
HINTS = typing.get_type_hints(DecoderConfig, include_extras=True)
# Read or compared below: for every family, for those that rotate, for those with two ropes.
KEYS = {
    "architectures", "model_type", "dtype", "torch_dtype", "layer_types", "hidden_activation",
}  # fmt: skip
ROPE_KEYS = {"rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings"}
SLIDING_ROPE_KEYS = {"rope_local_base_freq"}
ROPE_FIELDS = {"default": (), "linear": ("factor",)} | {
    "llama3": tuple(field.name for field in dataclasses.fields(RopeScaling))
}


def read_config(path: Path) -> DecoderConfig:
    """The config of a `config.json`, as old and new versions of transformers write it.

    `dtype` and `torch_dtype` are not used: parameters have the dtype that `load_model` is asked
    for, or the checkpoint's. Warns of keys that nobody knows.

    Raises UserError that names an unknown architecture or `rope_type`, and whatever the file lacks,
    asks for beyond the decoder, says in two ways, or has out of range.
    """
    return config_of(read_json(path), str(path))


def config_of(raw: Raw, path: str) -> DecoderConfig:
    """The config of a parsed `config.json`; see `read_config`. `path` is for messages."""
    try:
        family = _find_family(raw)
        ropes = _read_ropes(raw, family)
        _check_statements(raw, ropes, family)
        fields = _read_fields(raw, ropes, family)
    except UserError as error:
        raise UserError(f"{path} {error}") from None
    config = from_dict(DecoderConfig, fields, path)
    if "sliding_attention" not in config.layer_types:
        config = dataclasses.replace(config, layer_types=(), sliding_window=None, sliding_rope=None)
    if unknown := _unknown_keys(raw, ropes, family):
        message = f"{path} has keys that are unknown, and not used: {', '.join(unknown)}"
        warnings.warn(" ".join(message.splitlines()), stacklevel=3)
    return config


def _find_family(raw: Raw) -> Family:
    named, kind = raw.get("architectures") or "none", raw.get("model_type")
    if isinstance(named, list) and len(named) > 1:
        raise UserError(f"has architectures={named}; expected one")
    architecture = named[0] if isinstance(named, list) else named
    family = next((family for family in FAMILIES if family.architecture == architecture), None)
    if family is None:
        within = ", a model with a text model within it (text_config)"
        raise UserError(
            f"is of architecture {architecture}{within if raw.get('text_config') else ''}; "
            "supported are "
            f"{', '.join(family.architecture for family in FAMILIES)}"
        )
    if kind not in (None, family.model_type):
        raise UserError(
            f"has architectures={named}, but model_type={kind!r}; expected {family.model_type!r}"
        )
    return family


def _read_ropes(raw: Raw, family: Family) -> Ropes:
    """What the file says of each rope that the family has.

    Two of them are in rope_parameters by layer type (transformers 5), or the sliding one is
    rope_local_base_freq, and the rest is of the full one (transformers 4).
    """
    if not family.rotates:
        return ()
    if family.sliding_theta is None:
        return (_read_rope(raw),)
    each, types = raw.get("rope_parameters"), ("full_attention", "sliding_attention")
    each = {} if each is None else each
    if not isinstance(each, dict) or not each.keys() <= set(types):
        raise UserError(f"has rope_parameters={each!r}; expected one rope each for {list(types)}")
    local = raw.get("rope_local_base_freq")
    full = {**raw, "rope_parameters": each.get("full_attention")}
    sliding = {"rope_parameters": each.get("sliding_attention")}
    sliding |= {} if local is None else {"rope_theta": local}
    return _read_rope(full), _read_rope(sliding, theta="rope_local_base_freq")


def _read_rope(raw: Raw, theta: str = "rope_theta") -> dict[str, Any]:
    """A rope: its `rope_type`, and what else the file says of it.

    transformers 4 writes rope_theta and rope_scaling (which once had `type` for `rope_type`),
    transformers 5 writes rope_parameters. What is there twice must be the same. Messages call a
    base that is not in these `theta`.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in ("rope_scaling", "rope_parameters"):
        given = {} if raw.get(name) is None else raw[name]
        if not isinstance(given, dict) or any(isinstance(each, dict) for each in given.values()):
            raise UserError(f"has {name}={given!r}; expected one rope for all layers")
        rope = dict(given)
        kind = rope.pop("type", None)
        rope.setdefault("rope_type", "default" if kind is None else kind)
        if kind not in (None, rope["rope_type"]):
            raise UserError(f"has {name} of type {kind!r} and rope_type {rope['rope_type']!r}")
        for key in ("rope_theta", "original_max_position_embeddings"):
            if key in raw and rope.setdefault(key, raw[key]) != raw[key]:
                beside = theta if key == "rope_theta" else key
                raise UserError(f"has {beside}={raw[key]!r}, but {name} has {key}={rope[key]!r}")
        if given:
            found[name] = rope
    if len(found) == 2 and found["rope_scaling"] != found["rope_parameters"]:
        raise UserError("has both rope_scaling and rope_parameters, and they differ; remove one")
    return next(iter(found.values()), rope)


def _check_statements(raw: Raw, ropes: Ropes, family: Family) -> None:
    """Raises UserError for what the decoder does not do, and for a contradiction."""
    read = _keys_read(family)
    for name in family.biases:
        if type(raw.get(name)) not in (type(None), bool):
            raise UserError(f"has {name}={raw[name]!r}; expected true or false")
    for name, nothing in {**BEYOND, **family.beyond}.items():
        unused = name == "sliding_window" and raw.get("use_sliding_window") is False
        for section in (raw, *ropes):
            if name not in read and section.get(name) not in nothing and not unused:
                raise UserError(f"has {name}={section[name]!r}, which is not supported")
    types, act = raw.get("layer_types"), raw.get("hidden_activation")
    full = isinstance(types, list) and all(each == "full_attention" for each in types)
    if "layer_types" not in read and types is not None and not full:
        raise UserError(f"has layer_types={types!r}, which is not supported")
    if "hidden_activation" not in read and act not in (None, raw.get("hidden_act")):
        raise UserError(f"has hidden_activation={act!r}, but hidden_act={raw.get('hidden_act')!r}")
    names = {name: raw[name] for name in ("dtype", "torch_dtype") if raw.get(name) is not None}
    for name, dtype in names.items():
        if dtype not in DTYPES:
            raise UserError(f"has {name}={dtype!r}; expected one of {', '.join(DTYPES)}")
    if len(set(names.values())) > 1:
        raise UserError(f"has dtype={raw['dtype']!r}, but torch_dtype={raw['torch_dtype']!r}")


def _read_fields(raw: Raw, ropes: Ropes, family: Family) -> dict[str, Any]:
    """The fields of a `DecoderConfig`; those in `REQUIRED` are checked."""
    theirs = {name: family.renamed.get(name, name) for name in (*REQUIRED, *family.fields)}
    missing = [theirs[name] for name in REQUIRED if raw.get(theirs[name]) is None]
    if missing:
        raise UserError(f"is incomplete: it lacks {', '.join(missing)}")
    fields = {name: raw[theirs[name]] for name in REQUIRED}
    for name, value in fields.items():
        convert(value, HINTS[name], f"has {theirs[name]}={value!r}")
    for name, default in family.fields.items():
        fields[name] = raw.get(theirs[name], default)
        if fields[name] is None and default in (None, ()):  # null is as if it were not there
            fields[name] = default
        elif fields[name] is None and not name.endswith(("softcapping", "window")):
            raise UserError(f"has {theirs[name]}=null; expected a value, or no such key")
        if name in family.renamed:  # others are checked under their own name
            convert(fields[name], HINTS[name], f"has {theirs[name]}={fields[name]!r}")
    width, heads = raw["hidden_size"], raw["num_attention_heads"]
    if fields.get("num_key_value_heads") is None:
        fields["num_key_value_heads"] = heads
    if fields.get("head_dim") is None:
        if width % heads:
            raise UserError(
                f"has no head_dim, and hidden_size={width} is not a multiple of "
                f"num_attention_heads={heads}"
            )
        fields["head_dim"] = width // heads
    if ropes:
        fields["rope_theta"] = ropes[0].get("rope_theta", fields["rope_theta"])
        fields["rope_scaling"] = _read_rope_scaling(ropes[0])
    if len(ropes) > 1:
        theta = ropes[1].get("rope_theta", family.sliding_theta)
        local = raw.get("rope_local_base_freq") is not None
        name = "rope_local_base_freq" if local else "rope_theta of sliding_attention"
        convert(theta, Base, f"has {name}={theta!r}")
        own = {"theta": theta, "scaling": _read_rope_scaling(ropes[1])}
        same = {"theta": fields["rope_theta"], "scaling": fields["rope_scaling"]}
        fields["sliding_rope"] = None if own == same else own
    fields = {**family.read(raw, fields), **family.switches}
    fields["biases"] = family.kernels_with_bias(name for name in family.biases if raw.get(name))
    return fields


def _read_rope_scaling(rope: Raw) -> dict[str, Any] | None:
    """The fields of a `RopeScaling`, unchecked."""
    kind = rope["rope_type"]
    if kind not in list(ROPE_FIELDS):  # a list, as the file may give an unhashable value
        raise UserError(
            f"has rope_type {kind!r}; supported are {', '.join(map(repr, ROPE_FIELDS))}"
        )
    missing = [name for name in ROPE_FIELDS[kind] if rope.get(name) is None]
    if missing:
        raise UserError(f"has rope_type {kind!r} without {', '.join(missing)}")
    return {name: rope[name] for name in ROPE_FIELDS[kind]} or None


def _keys_read(family: Family) -> set[str]:
    fields = (family.renamed.get(name, name) for name in (*REQUIRED, *family.fields))
    return {*fields, *family.biases, *family.rules, *family.ignored}


def _unknown_keys(raw: Raw, ropes: Ropes, family: Family) -> list[str]:
    known = _keys_read(family) | KEYS | HARMLESS | BEYOND.keys() | family.beyond.keys()
    known |= ROPE_KEYS if family.rotates else set()
    known |= SLIDING_ROPE_KEYS if family.sliding_theta else set()
    unknown = [key for key, value in raw.items() if key not in known and value is not None]
    for rope in ropes:
        in_rope = {"rope_type", "rope_theta", *ROPE_FIELDS[rope["rope_type"]], *BEYOND}
        unknown += [f"{key} (of the rope)" for key in rope if key not in in_rope]
    return unknown


def write_config(config: DecoderConfig) -> dict[str, Any]:
    """The `config.json` of a config, in the names that transformers 4 and 5 both read."""
    family = family_of(config)
    raw: dict[str, Any]
    raw = {"architectures": [family.architecture], "model_type": family.model_type}
    raw |= {
        family.renamed.get(name, name): getattr(config, name)
        for name in (*REQUIRED, *family.fields)
    }
    biases = {name: set(kernels) <= set(config.biases) for name, kernels in family.biases.items()}
    raw |= dict(sorted({**biases, **family.constants}.items()))
    if config.rope_scaling is not None:
        raw["rope_scaling"] = write_rope_scaling(config.rope_scaling)
    if family.sliding_theta is not None:
        raw |= _write_sliding_rope(config)
    return family.write(config, raw)


def _write_sliding_rope(config: DecoderConfig) -> dict[str, Any]:
    full = Rope(config.rope_theta, config.rope_scaling)
    sliding = config.sliding_rope or full
    if sliding.scaling is None:
        return {"rope_local_base_freq": sliding.theta}
    ropes = {"full_attention": full, "sliding_attention": sliding}  # in transformers 5 alone
    return {"rope_parameters": {name: _write_rope(rope) for name, rope in ropes.items()}}


def _write_rope(rope: Rope) -> dict[str, Any]:
    scaling = {"rope_type": "default"} if rope.scaling is None else write_rope_scaling(rope.scaling)
    return {"rope_theta": rope.theta, **scaling}


def write_rope_scaling(scaling: RopeScaling) -> dict[str, Any]:
    """The fields that its `rope_type` has."""
    fields = {name: value for name, value in dataclasses.asdict(scaling).items() if value}
    return {"rope_type": scaling.rope_type, **fields}
