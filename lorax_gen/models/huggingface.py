"""Model directories as Hugging Face writes them: the only file that knows foreign names.

    config.json           the fields of `DecoderConfig`
    model.safetensors     one tensor per layer and kernel, `[out, in]`
    tokenizer.json        and tokenizer_config.json, read by `transformers`

A family is a name table: ours -> theirs, and whether a kernel is transposed. Layers are stacked
on the way in and unstacked on the way out.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_gen import assets, files
from lorax_gen.errors import UserError
from lorax_gen.models import decoder
from lorax_gen.models.decoder import DecoderConfig, Params
from lorax_gen.tensors import open_safetensors, tree_hash, write_tensors
from lorax_gen.tokenizers import load_tokenizer

# Ours -> theirs; `{i}` is the layer. Two-dimensional kernels are transposed, `embed` is not.
LLAMA_NAMES = {
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
FAMILIES = {"LlamaForCausalLM": LLAMA_NAMES}


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A language model: its shape, its parameters and its tokenizer."""

    config: DecoderConfig
    params: Params
    tokenizer: Any

    @functools.cached_property
    def fingerprint(self) -> str:
        """Identifies the parameters, whatever directory they lie in."""
        return tree_hash(self.params)

    def __call__(self, tokens: jax.Array, lora: Mapping | None = None) -> jax.Array:
        """Next-token logits `[B, T, V]` (fp32) of token ids `[B, T]`."""
        hidden = decoder.hidden_states(self.params, self.config, jnp.asarray(tokens), lora=lora)
        return decoder.logits(self.params, self.config, hidden)


def load_model(directory: str | Path, dtype: Any = jnp.float32) -> Model:
    """Loads a model directory.

    Raises UserError where the directory, a file or a tensor is missing, foreign or misshapen.
    """
    directory = assets.resolve(directory)
    if not directory.is_dir():
        raise UserError(f"no model directory at {directory}; give one that holds config.json")
    raw = files.read_json(directory / "config.json")
    config, names = read_config(raw, directory / "config.json")
    params = read_params(directory / "model.safetensors", config, names, dtype)
    return Model(config, params, load_tokenizer(directory))


def save_model(
    directory: str | Path, model: Model, provenance: dict[str, Any] | None = None
) -> None:
    """Writes a model directory that `transformers` and `load_model` read; replaces nothing.

    Tensors keep the dtype that they have. `provenance`, where given, goes into `provenance.json`.

    Raises UserError where something is at `directory`, or LLaMA has no place for what the config
    asks for.
    """
    for field in ("attention_bias", "rms_norm_offset", "embedding_scale"):
        if getattr(model.config, field):
            raise UserError(f"cannot write a model with {field}: a LLaMA directory has none")
    with files.new_directory(Path(directory)) as partial:
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "bos_token_id": model.tokenizer.bos_token_id,
            "eos_token_id": model.tokenizer.eos_token_id,
            "pad_token_id": model.tokenizer.pad_token_id,
            "dtype": str(model.params["embed"].dtype),
            **{name: getattr(model.config, name) for name in CONFIG_FIELDS},
        }
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        tensors = {}
        for ours, theirs in names_of(model.config, LLAMA_NAMES).items():
            value = np.asarray(leaf_at(model.params, ours))
            rows = enumerate(value) if ours.startswith("layers/") else [(0, value)]
            for i, row in rows:
                row = row.T if is_kernel(ours) else row
                tensors[theirs.format(i=i)] = row
        write_tensors(partial / "model.safetensors", tensors, {"format": "pt"})
        model.tokenizer.save_pretrained(partial)
        if provenance is not None:
            files.write_json(partial / "provenance.json", provenance)


# --- config.json ---------------------------------------------------------------------------------

CONFIG_FIELDS = [
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "rope_theta", "rms_norm_eps",
    "tie_word_embeddings", "hidden_act", "attention_bias",
]  # fmt: skip


def read_config(raw: dict, path: Path) -> tuple[DecoderConfig, dict[str, str]]:
    """`DecoderConfig` and name table of a parsed `config.json`."""
    architecture = (raw.get("architectures") or ["none"])[0]
    if architecture not in FAMILIES:
        raise UserError(
            f"{path} is of architecture {architecture}; supported are {', '.join(FAMILIES)}"
        )
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))  # older ones: `type`
    if kind != "default":
        raise UserError(f"{path} has rope_type {kind!r}; supported is 'default'")
    for bias in ("mlp_bias", "attention_bias"):
        if raw.get(bias):
            raise UserError(f"{path} has {bias}; supported are kernels without biases")
    fields = {name: raw[name] for name in CONFIG_FIELDS if raw.get(name) is not None}
    fields.setdefault("num_key_value_heads", raw.get("num_attention_heads"))
    if "rope_theta" in rope:
        fields["rope_theta"] = rope["rope_theta"]
    try:
        if "head_dim" not in fields:
            fields["head_dim"] = raw["hidden_size"] // raw["num_attention_heads"]
        return DecoderConfig(**fields), FAMILIES[architecture]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is incomplete: {error}; expected the fields of LLaMA") from error


# --- tensors -------------------------------------------------------------------------------------


def names_of(config: DecoderConfig, table: Mapping[str, str]) -> dict[str, str]:
    """The name table without the head where it is tied to the embeddings."""
    return {k: v for k, v in table.items() if k != "lm_head" or not config.tie_word_embeddings}


def is_kernel(ours: str) -> bool:
    """Whether a tensor is a matrix that they store transposed."""
    return ours != "embed" and not ours.endswith("norm")


def leaf_at(tree: Mapping, path: str) -> Any:
    for name in path.split("/"):
        tree = tree[name]
    return tree


def read_params(path: Path, config: DecoderConfig, table: Mapping[str, str], dtype: Any) -> Params:
    """Parameters from a safetensors file; every tensor is checked against the config's shapes."""
    shapes = jax.eval_shape(lambda: decoder.init_params(jax.random.key(0), config))
    names = names_of(config, table)
    expected = {
        theirs.format(i=i): ours
        for ours, theirs in names.items()
        for i in range(config.num_hidden_layers if ours.startswith("layers/") else 1)
    }
    with open_safetensors(path) as file:
        present = set(file.keys())
        for key in expected:
            if key not in present:
                raise UserError(f"{path} lacks the tensor {key}, which its config.json asks for")
        foreign = sorted(present - set(expected) - {"lm_head.weight"})
        if foreign:
            raise UserError(f"{path} holds an unknown tensor {foreign[0]}; is it another family?")
        params: Params = {"layers": {}}
        for ours, theirs in names.items():
            shape = leaf_at(shapes, ours).shape
            stacked = ours.startswith("layers/")
            keys = [theirs.format(i=i) for i in range(config.num_hidden_layers if stacked else 1)]
            wanted = shape[1:] if stacked else shape
            wanted = wanted[::-1] if is_kernel(ours) else wanted
            rows = [file.get_tensor(key) for key in keys]
            for key, row in zip(keys, rows, strict=True):
                if row.shape != wanted:
                    raise UserError(
                        f"{path}: {key} has shape {row.shape}, but its config.json asks for "
                        f"{wanted}"
                    )
            rows = [row.T if is_kernel(ours) else row for row in rows]
            value = jnp.asarray(np.stack(rows) if stacked else rows[0], dtype)
            (params["layers"] if stacked else params)[ours.split("/")[-1]] = value
    return params
