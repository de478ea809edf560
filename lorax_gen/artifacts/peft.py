"""LoRA trees as PEFT adapters, and PEFT adapters as LoRA trees.

    adapter_config.json          peft_type LORA, r, lora_alpha, target_modules, ...
    adapter_model.safetensors    base_model.model.{module}.lora_A.weight  [R, D]
                                 base_model.model.{module}.lora_B.weight  [F, R]

PEFT computes W x + (alpha / r) B A x. A tree's scale is folded into its b, so alpha = r is written
and the values are unchanged, whatever alpha and composition the tree was made with.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lorax_gen import documents, files
from lorax_gen.errors import UserError
from lorax_gen.files import AnyPath
from lorax_gen.hub import find_directory
from lorax_gen.method.lora import Tree, check_fits
from lorax_gen.models.decoder import DecoderConfig, kernel_shapes
from lorax_gen.models.families import tensor_names
from lorax_gen.tensors import read_tensors, write_tensors

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"

# PEFT's options beyond W x + (alpha / r) B A x, and the values that disable them.
UNSUPPORTED = {
    # Others, such as pissa and olora, change the base model's kernels too.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", "mica"),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "lora_bias": (False,),
    "modules_to_save": ([],),
    "layer_replication": ([],),
    "target_parameters": ([],),
    "trainable_token_indices": ([], {}),
    "alora_invocation_tokens": ([],),
    **{f"use_{kind}": (False,) for kind in ("dora", "qalora", "bdlora")},
}


def modules(config: DecoderConfig) -> dict[str, list[str]]:
    """Kernel -> the names of its modules in transformers, one for each layer."""
    names = tensor_names(config)
    return {
        kernel: [name.removesuffix(".weight") for name in names[f"layers/{kernel}"]]
        for kernel in kernel_shapes(config)
    }


def save_adapter(
    directory: str | AnyPath,
    tree: Tree,
    config: DecoderConfig,
    *,
    base_model: str = "",
    provenance: dict[str, Any] | None = None,
) -> None:
    """Writes an adapter to a new directory, for `peft`, vLLM and others.

    Args:
      tree: `{name: {'a': [L, D, R], 'b': [L, R, F]}}`, its scale folded in.
      config: of the model that the tree is for.
      base_model: its name, for `AutoPeftModel`.
      provenance: if given, written to `provenance.json`.

    Raises UserError if `directory` exists or the tree does not fit the model.
    """
    check_fits(tree, kernel_shapes(config), config.num_hidden_layers)
    tensors, ranks = {}, {}
    for kernel, pair in tree.items():
        for layer, module in enumerate(modules(config)[kernel]):
            for factor, letter in (("a", "A"), ("b", "B")):
                value = np.asarray(pair[factor][layer]).T
                tensors[f"base_model.model.{module}.lora_{letter}.weight"] = value
            ranks[module.rsplit(".", 1)[-1]] = pair["a"].shape[-1]
    rank = max(ranks.values(), default=1)
    others = {module: r for module, r in ranks.items() if r != rank}
    with files.new_directory(directory) as partial:
        write_tensors(partial / TENSORS, tensors, {"format": "pt"})
        files.write_json(
            partial / CONFIG,
            {
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "base_model_name_or_path": base_model,
                "inference_mode": True,
                "r": rank,
                "lora_alpha": rank,
                "rank_pattern": others,
                "alpha_pattern": others,
                "target_modules": sorted(ranks),
                "lora_dropout": 0.0,
                "bias": "none",
                "fan_in_fan_out": False,
                "use_rslora": False,
                "use_dora": False,
                "modules_to_save": None,
            },
        )
        if provenance is not None:
            files.write_json(partial / "provenance.json", provenance)


def load_adapter(name_or_dir: str | AnyPath, config: DecoderConfig) -> Tree:
    """The LoRA tree of a PEFT adapter, its scale folded in; fp32.

    Layers that the adapter omits get zeros; ranks that differ between layers are padded with zeros.

    Raises UserError if the adapter is not a plain LoRA of this model's kernels.
    """
    directory = find_directory(name_or_dir, "adapter")
    raw = documents.read_json(directory / CONFIG)
    if raw.get("peft_type") != "LORA":
        raise UserError(f"{directory} is a {raw.get('peft_type')} adapter; expected LORA")
    for name, harmless in UNSUPPORTED.items():
        if raw.get(name) is not None and raw[name] not in harmless:
            raise UserError(
                f"{directory / CONFIG} has {name}={raw[name]!r}, which is not a plain LoRA"
            )
    tensors = {
        key.removeprefix("base_model.model.").replace(".default.weight", ".weight"): value
        for key, value in read_tensors(directory / TENSORS).items()
    }
    shapes, pairs = kernel_shapes(config), {}
    for kernel, names in modules(config).items():
        found = {}
        for layer, module in enumerate(names):
            keys = [f"{module}.lora_{letter}.weight" for letter in "AB"]
            if not tensors.keys().isdisjoint(keys):
                a, b = (take(tensors, key, directory) for key in keys)
                check_pair(a, b, shapes[kernel], module, directory)
                found[layer] = a.T, b.T * np.float32(scale(raw, module, len(a), directory))
        if found:
            pairs[kernel] = stack(found, len(names), *shapes[kernel])
    if tensors:
        raise UserError(
            f"{directory / TENSORS} holds {min(tensors)}, which is not a LoRA of this model's "
            "kernels"
        )
    return pairs


def take(tensors: dict[str, np.ndarray], key: str, directory: Path) -> np.ndarray:
    if key not in tensors:
        raise UserError(f"{directory / TENSORS} lacks the tensor {key}; get it again")
    return tensors.pop(key).astype(np.float32)


def check_pair(a: np.ndarray, b: np.ndarray, shape, module: str, directory: Path) -> None:
    d_in, d_out = shape
    rank = a.shape[0] if a.ndim == 2 else 0
    if not rank or a.shape != (rank, d_in) or b.shape != (d_out, rank):
        raise UserError(
            f"{directory / TENSORS}: {module} has factors {a.shape} and {b.shape}, which do not "
            f"fit its kernel {(d_out, d_in)}; is the adapter for another model?"
        )


def scale(raw: Mapping[str, Any], module: str, rank: int, directory: Path) -> float:
    """PEFT's scale of one module: alpha / r, or alpha / sqrt(r) with `use_rslora`."""
    patterns = raw.get("alpha_pattern") or {}
    try:
        fitting = (v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
        alpha = float(next(fitting, raw.get("lora_alpha", 8)))
    except (AttributeError, TypeError, ValueError, re.error):
        raise UserError(
            f"{directory / CONFIG} has lora_alpha={raw.get('lora_alpha')!r} and "
            f"alpha_pattern={patterns!r}; expected a number and patterns of numbers"
        ) from None
    return alpha / (rank**0.5 if raw.get("use_rslora") else rank)


def stack(found: dict[int, tuple], layers: int, d_in: int, d_out: int) -> dict[str, jnp.ndarray]:
    """Layer -> (a, b) as one pair `[L, D, R]`, `[L, R, F]`; zeros for missing layers."""
    rank = max(a.shape[1] for a, _ in found.values())
    a, b = np.zeros((layers, d_in, rank), np.float32), np.zeros((layers, rank, d_out), np.float32)
    for layer, (own_a, own_b) in found.items():
        a[layer, :, : own_a.shape[1]] = own_a
        b[layer, : own_b.shape[0]] = own_b
    return {"a": jnp.asarray(a), "b": jnp.asarray(b)}
