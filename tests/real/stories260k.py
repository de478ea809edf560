"""The small trained model stories260K of llama2.c as a Hugging Face model directory.

python -m tests.real.stories260k SOURCE TARGET
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tests.real.real_tokenizers import read_pieces, save_sentencepiece

HEADER = ("dim", "hidden", "layers", "heads", "kv_heads", "vocab", "positions")


def convert(source_dir: Path, target_dir: Path) -> Path:
    """Writes config, weights and tokenizer of `source_dir`'s stories260K.bin and tok512.bin.

    Raises ValueError where the file is not as long as its header says.
    """
    source_dir, target_dir = Path(source_dir), Path(target_dir)
    target_dir.mkdir(parents=True, exist_ok=True)
    size, tensors = read_checkpoint(source_dir / "stories260K.bin")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": size["vocab"],
        "hidden_size": size["dim"],
        "intermediate_size": size["hidden"],
        "num_hidden_layers": size["layers"],
        "num_attention_heads": size["heads"],
        "num_key_value_heads": size["kv_heads"],
        "max_position_embeddings": size["positions"],
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "float32",
    }
    (target_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, target_dir / "model.safetensors", {"format": "pt"})
    return save_sentencepiece(target_dir, read_pieces(source_dir / "tok512.bin"))


def read_checkpoint(path: Path) -> tuple[dict[str, int], dict[str, np.ndarray]]:
    """Sizes and tensors, under Hugging Face's names, of a llama2.c checkpoint of version 0.

    Seven int32 (`HEADER`), then float32: each kind of tensor for all layers, `[out, in]`. A
    negative vocabulary would announce a head of its own; here the head is the embedding.
    """
    size = dict(zip(HEADER, np.fromfile(path, "<i4", len(HEADER)).tolist(), strict=True))
    values = np.fromfile(path, "<f4", offset=4 * len(HEADER))
    dim, hidden, layers, vocab = (size[name] for name in ("dim", "hidden", "layers", "vocab"))
    head_dim = dim // size["heads"]
    kv_dim = size["kv_heads"] * head_dim
    layer_shapes = {
        "input_layernorm": (dim,),
        "self_attn.q_proj": (dim, dim),
        "self_attn.k_proj": (kv_dim, dim),
        "self_attn.v_proj": (kv_dim, dim),
        "self_attn.o_proj": (dim, dim),
        "post_attention_layernorm": (dim,),
        "mlp.gate_proj": (hidden, dim),
        "mlp.down_proj": (dim, hidden),
        "mlp.up_proj": (hidden, dim),
    }
    shapes = {"embed_tokens": (vocab, dim)}
    shapes |= {name: (layers, *shape) for name, shape in layer_shapes.items()}
    shapes |= {"norm": (dim,), "rope_tables": (2, size["positions"], head_dim // 2)}
    expected = sum(map(np.prod, shapes.values()))
    if len(values) != expected:
        raise ValueError(f"{path} holds {len(values)} numbers, but its header tells of {expected}")

    tensors, at = {}, 0
    for name, shape in shapes.items():
        value = values[at : at + np.prod(shape)].reshape(shape)
        at += value.size
        if name in layer_shapes:
            for i, row in enumerate(value):
                if name in ("self_attn.q_proj", "self_attn.k_proj"):
                    row = split_pairs(row, head_dim)
                tensors[f"model.layers.{i}.{name}.weight"] = np.ascontiguousarray(row)
        elif name != "rope_tables":
            tensors[f"model.{name}.weight"] = value
    return size, tensors


def split_pairs(kernel: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorders the rows of q or k, `[heads * head_dim, in]`, for the other form of rope.

    llama2.c turns rows 2i and 2i + 1 of a head together, Hugging Face rows i and i + head_dim / 2.
    """
    pairs = kernel.reshape(-1, head_dim // 2, 2, kernel.shape[-1])
    return pairs.swapaxes(1, 2).reshape(kernel.shape)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Makes a Hugging Face model directory of the checkpoint stories260K."
    )
    parser.add_argument(
        "source", type=Path, help="folder that holds stories260K.bin and tok512.bin"
    )
    parser.add_argument("target", type=Path, help="folder to write")
    arguments = parser.parse_args()
    print(convert(arguments.source, arguments.target))
