"""LoRA trees as PEFT adapters, and PEFT adapters as LoRA trees.

    adapter_config.json          peft_type LORA, r, lora_alpha, target_modules, ...
    adapter_model.safetensors    base_model.model.{module}.lora_A.weight  [R, D]
                                 base_model.model.{module}.lora_B.weight  [F, R]

PEFT computes W x + (alpha / r) B A x. A tree's scale is folded into its b, so alpha = r is written
and the values are unchanged, whatever alpha and composition the tree was made with.
"""

from __future__ import annotations

import re
from typing import Any

import jax.numpy as jnp
import numpy as np

from lorax_gen import documents, files
from lorax_gen.artifacts.checks import check_finite, read_arrays
from lorax_gen.artifacts.peft_config import adapted_modules, read_config
from lorax_gen.errors import UserError
from lorax_gen.files import AnyPath
from lorax_gen.frames import PLAIN, Frame
from lorax_gen.hub import find_directory
from lorax_gen.method.lora import Tree, check_fits
from lorax_gen.models.decoder import DecoderConfig, kernel_shapes
from lorax_gen.models.families import tensor_names
from lorax_gen.models.huggingface import write_provenance
from lorax_gen.tensors import write_tensors

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


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
    frame: Frame = PLAIN,
) -> None:
    """Writes an adapter to a new directory, for `peft`, vLLM and others.

    A tree of m < L layers is written with `layers_to_transform`, the last m of the model.

    Numbers are written as they are; `export` and `load_adapter` refuse those that are not finite.

    Args:
      tree: `{name: {'a': [L, D, R], 'b': [L, R, F]}}`, its scale folded in.
      config: of the model that the tree is for.
      base_model: its name, for `AutoPeftModel`.
      provenance: if given, written to `provenance.json`; frame: of its inputs, added to that.

    Raises UserError if `directory` exists or the tree does not fit the model.
    """
    count = config.num_hidden_layers
    first = count - check_fits(tree, kernel_shapes(config), count)
    tensors, ranks = {}, {}
    for kernel, pair in tree.items():
        for layer, module in enumerate(modules(config)[kernel][first:]):
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
                **({"layers_to_transform": list(range(first, count))} if first else {}),
                "lora_dropout": 0.0,
                "bias": "none",
                "fan_in_fan_out": False,
                "use_rslora": False,
                "use_dora": False,
                "modules_to_save": None,
            },
        )
        write_provenance(partial, provenance, frame)


def load_adapter(name_or_dir: str | AnyPath, config: DecoderConfig) -> Tree:
    """The LoRA tree of a PEFT adapter, its scale folded in; fp32.

    Where the adapter begins at a later layer than the first, the tree is one of the last m layers.
    Layers that it omits after that one get zeros; ranks that differ between layers are padded with
    zeros.

    Raises UserError if the adapter is not a plain LoRA of this model's kernels or not finite, or if
    its config and its tensors disagree about modules, layers or ranks.
    """
    directory = find_directory(name_or_dir, "adapter")
    path, where = directory / TENSORS, str(directory / CONFIG)
    settings = read_config(documents.read_json(directory / CONFIG), where)
    names, shapes = modules(config), kernel_shapes(config)
    flat = [name for kernel in names.values() for name in kernel]
    adapted = adapted_modules(settings, flat, config.num_hidden_layers, where)
    first = next(
        i for i, own in enumerate(zip(*names.values(), strict=True)) if adapted.keys() & own
    )
    tensors, pairs = by_module(path), {}
    for kernel, own in names.items():
        found = {}
        for layer, module in enumerate(own[first:]):
            if module in adapted:
                keys = [f"{module}.lora_{letter}.weight" for letter in "AB"]
                a, b = (take(tensors, key, path) for key in keys)
                check_pair(a, b, shapes[kernel], module, adapted[module].rank, path)
                found[layer] = a.T, fold(b, adapted[module].scale, f"{path}: {keys[1]}").T
        if found:
            pairs[kernel] = stack(found, len(own) - first, *shapes[kernel])
    if tensors:
        raise UserError(
            f"{path} holds {min(tensors)}, which is not a LoRA of this model's kernels that "
            f"{CONFIG} names (target_modules, layers_to_transform)"
        )
    return pairs


def by_module(path: AnyPath) -> dict[str, np.ndarray]:
    """The tensors of an adapter, without PEFT's prefix and the name of the adapter.

    Raises UserError where there are several adapters.
    """
    found: dict[str, np.ndarray] = {}
    adapters = set()
    for key, value in read_arrays(path).items():
        name = key.removeprefix("base_model.model.")
        if match := re.fullmatch(r"(.*\.lora_[AB])(\.[^.]+)?\.weight", name):
            name = f"{match[1]}.weight"
            adapters.add(match[2])
        if name in found or len(adapters) > 1:
            raise UserError(f"{path} holds {key} of a second adapter; keep one adapter")
        found[name] = value
    return found


def take(tensors: dict[str, np.ndarray], key: str, path: AnyPath) -> np.ndarray:
    if key not in tensors:
        raise UserError(f"{path} lacks the tensor {key}, which {CONFIG} names; get it again")
    return tensors.pop(key).astype(np.float32)


def check_pair(
    a: np.ndarray, b: np.ndarray, shape: tuple[int, int], module: str, rank: int, path: AnyPath
) -> None:
    d_in, d_out = shape
    own = a.shape[0] if a.ndim == 2 else 0
    if not own or a.shape != (own, d_in) or b.shape != (d_out, own):
        raise UserError(
            f"{path}: {module} has factors {a.shape} and {b.shape}, which do not "
            f"fit its kernel {(d_out, d_in)}; is the adapter for another model?"
        )
    if own != rank:
        raise UserError(
            f"{path}: {module} has rank {own}, but r and rank_pattern of {CONFIG} say {rank}; get "
            "both files again"
        )


def fold(b: np.ndarray, scale: float, name: str) -> np.ndarray:
    """`b` times the scale; raises UserError where that is beyond fp32."""
    with np.errstate(over="ignore"):
        scaled = b * np.float32(scale)
    check_finite(
        scaled, f"{name}, times its scale {scale:g},", "check lora_alpha and alpha_pattern"
    )
    return scaled


def stack(found: dict[int, tuple], layers: int, d_in: int, d_out: int) -> dict[str, jnp.ndarray]:
    """Layer -> (a, b) as one pair `[L, D, R]`, `[L, R, F]`; zeros for missing layers."""
    rank = max(a.shape[1] for a, _ in found.values())
    a, b = np.zeros((layers, d_in, rank), np.float32), np.zeros((layers, rank, d_out), np.float32)
    for layer, (own_a, own_b) in found.items():
        a[layer, :, : own_a.shape[1]] = own_a
        b[layer, : own_b.shape[0]] = own_b
    return {"a": jnp.asarray(a), "b": jnp.asarray(b)}
