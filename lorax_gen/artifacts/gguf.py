"""LoRA trees as GGUF adapters, which llama.cpp loads with `--lora`.

    general.type            'adapter'
    general.architecture    the model's: such as 'llama', see `Family.gguf`
    general.name            any
    adapter.type            'lora'
    adapter.lora.alpha      fp32
    lorax_gen.*             provenance of the LoRA, strings

    blk.{layer}.{kernel}.weight.lora_a    [R, D] fp32
    blk.{layer}.{kernel}.weight.lora_b    [F, R] fp32

where `kernel` is a value of `models.gguf_files.KERNELS`. llama.cpp adds alpha / R * b (a x) to the
output of that kernel, with the R of the pair but one alpha for the entire file. A tree's scale is
already folded into its b, so alpha is R; where ranks differ, alpha is the largest of them and the b
of a lower rank R is multiplied by R / alpha.

Dims beyond the legend (`lorax_gen.method`): E head size.
"""

from __future__ import annotations

import contextlib

import numpy as np

from lorax_gen import files
from lorax_gen.artifacts.checks import check_tree
from lorax_gen.errors import UserError
from lorax_gen.files import AnyPath
from lorax_gen.method.lora import Tree, check_fits
from lorax_gen.models.decoder import DecoderConfig, kernel_shapes
from lorax_gen.models.families import FAMILIES, family_of
from lorax_gen.models.gguf_files import KERNELS


def save_gguf_lora(
    path: str | AnyPath,
    tree: Tree,
    config: DecoderConfig,
    *,
    name: str = "",
    provenance: dict[str, str] | None = None,
) -> None:
    """Writes a GGUF adapter to a new file, atomically.

    Args:
      tree: `{name: {'a': [L, D, R], 'b': [L, R, F]}}`, its scale folded in; with fewer layers than
        the model has, of its last blocks; of any dtype, written
        as fp32.
      config: of the model that the tree was made for; determines the architecture.
      name: what llama.cpp shows for the adapter.
      provenance: key -> text, kept as `lorax_gen.{key}`.

    Raises:
      UserError: `gguf` is not installed, `path` exists, llama.cpp has no such family, or
        the tree does not fit the model or is not finite.
    """
    try:
        import gguf
    except ImportError:
        raise UserError("GGUF files need one more package: pip install 'lorax-gen[gguf]'") from None
    family = family_of(config)
    architecture = family.gguf or family.model_type
    if family.neighbours is None:
        known = [each.gguf or each.model_type for each in FAMILIES if each.neighbours is not None]
        raise UserError(
            f"no GGUF adapter for the family {architecture!r}; known are {', '.join(known)}"
        )
    count = config.num_hidden_layers
    first = count - check_fits(tree, kernel_shapes(config), count)
    check_tree(tree)
    alpha = max((pair["a"].shape[-1] for pair in tree.values()), default=1)
    with (
        files.new_file(path) as temporary,
        contextlib.closing(gguf.GGUFWriter(temporary, architecture)) as writer,
    ):
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_name(name)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        for key, text in (provenance or {}).items():
            writer.add_string(f"lorax_gen.{key}", str(text))
        for ours, pair in tree.items():
            a, b = (np.asarray(pair[factor], np.float32) for factor in ("a", "b"))
            b = b * np.float32(a.shape[-1] / alpha)
            if family.neighbours and ours in ("q", "k"):
                b = pair_neighbours(b, config.head_dim)
            for layer in range(count - first):
                kernel = f"blk.{first + layer}.{KERNELS[ours]}.weight"
                writer.add_tensor(f"{kernel}.lora_a", np.ascontiguousarray(a[layer].T))
                writer.add_tensor(f"{kernel}.lora_b", np.ascontiguousarray(b[layer].T))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def pair_neighbours(b: np.ndarray, head_dim: int) -> np.ndarray:
    """`b: [L, R, F]` with features i and i + E/2 of every head side by side, at 2 i and 2 i + 1."""
    halves = b.reshape(*b.shape[:2], -1, 2, head_dim // 2)
    return halves.swapaxes(-1, -2).reshape(b.shape)
