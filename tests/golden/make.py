"""Writes the golden checkpoints: small random models and what `transformers` computes with them.

    python -m tests.golden.make        # needs torch: pip install -e '.[parity]'

Each case is a directory beside this file: a checkpoint as `save_pretrained` writes it, and
`expected.safetensors` with

    tokens          [B, T] int32
    logits          [B, T, V] fp32
    hidden_states   [L+1, B, T, D] fp32: the scaled embeddings, then what each layer gives; the
                    last layer's is seen through the final norm, as in `output_hidden_states`;
                    not the last one where states are projected to another width after it

computed in fp32 by eager attention. The tests that read them need no torch.
"""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

GOLDEN = Path(__file__).resolve().parent
BATCH, TIME = 2, 24
COMMON = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-3, "tie_word_embeddings": False,
    "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0,
}  # fmt: skip


# Names of `COMMON` in the config of a model type; None: it has no such field.
NAMES = {"opt": {"intermediate_size": "ffn_dim", "rms_norm_eps": None, "num_key_value_heads": None}}


class Case(NamedTuple):
    """What to make of a model type of `transformers`."""

    model_type: str
    settings: dict[str, Any]  # what its config has beyond, or other than, `COMMON`
    dtype: str  # of the file; everything is computed in fp32
    max_shard_size: str


def case(model_type: str, dtype="float16", max_shard_size="5GB", **settings) -> Case:
    return Case(model_type, settings, dtype, max_shard_size)


def rope(theta: float, rope_type: str = "default", **scaling: float) -> dict[str, Any]:
    return {"rope_type": rope_type, "rope_theta": theta, **scaling}


FULL, SLIDING = "full_attention", "sliding_attention"
# Of the eight wavelengths at head size 16 the first, 2 pi, is below 16/2 and kept; the second,
# 13.7, is mixed; the others are above 16/1 and stretched.
LLAMA3 = rope(
    500.0,
    "llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=2.0,
    original_max_position_embeddings=16,
)

CASES = {
    "llama-mha": case("llama", num_key_value_heads=4),
    "llama-gqa2-tied": case("llama", tie_word_embeddings=True, rope_parameters=rope(500.0)),
    "llama-gqa8": case("llama", num_attention_heads=16, head_dim=6),
    "llama-sharded": case("llama", max_shard_size="16KB"),
    "llama3-rope": case("llama", head_dim=16, rope_parameters=LLAMA3),
    "tinyllama": case("llama", "bfloat16", num_attention_heads=8, num_key_value_heads=1),
    "gemma": case("gemma", num_key_value_heads=1, head_dim=16, tie_word_embeddings=True),
    "gemma2": case(
        "gemma2",
        num_hidden_layers=3,
        head_dim=16,
        query_pre_attn_scalar=24,
        sliding_window=6,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
        tie_word_embeddings=True,
    ),
    "qwen2": case("qwen2", tie_word_embeddings=True, rope_parameters=rope(1000.0)),
    "qwen2-window": case(
        "qwen2", num_hidden_layers=3, use_sliding_window=True, sliding_window=6, max_window_layers=1
    ),
    "qwen3": case("qwen3", head_dim=16, tie_word_embeddings=True, rope_parameters=rope(1000.0)),
    "llama-biases": case("llama", attention_bias=True, mlp_bias=True),
    # Windows shorter and longer than the text.
    "gemma3": case(
        "gemma3_text",
        num_hidden_layers=3,
        head_dim=16,
        query_pre_attn_scalar=24,
        sliding_window=6,
        sliding_window_pattern=2,
        rope_parameters={FULL: rope(500.0, "linear", factor=4.0), SLIDING: rope(20.0)},
        tie_word_embeddings=True,
    ),
    "gemma3-wide-window": case(
        "gemma3_text",
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=10,
        query_pre_attn_scalar=10,
        sliding_window=40,
        sliding_window_pattern=2,
    ),
    "smollm3": case(
        "smollm3",
        num_hidden_layers=3,
        no_rope_layer_interval=2,
        attention_bias=True,
        tie_word_embeddings=True,
        rope_parameters=rope(500.0),
    ),
    "smollm3-window": case(
        "smollm3",
        num_hidden_layers=4,
        head_dim=6,
        no_rope_layer_interval=2,
        use_sliding_window=True,
        sliding_window=6,
    ),
    "opt": case("opt", tie_word_embeddings=True),
    "opt-untied": case("opt", "bfloat16", num_attention_heads=2),
    "opt-350m": case(
        "opt", tie_word_embeddings=True, word_embed_proj_dim=12, do_layer_norm_before=False
    ),
}


def random_model(case: Case, seed: int) -> PreTrainedModel:
    """An fp32 model of the case whose weights are numbers of the case's dtype.

    Filled by numpy, so that a seed means the same in every torch, and with no norm at 1 (in Gemma:
    at 0) and no bias at 0.
    """
    names = NAMES.get(case.model_type, {})
    settings = {names.get(name, name): value for name, value in (COMMON | case.settings).items()}
    settings.pop(None, None)
    config = AutoConfig.for_model(case.model_type, **settings)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    )
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = torch.from_numpy(rng.normal(size=parameter.shape))
            if name.endswith("bias"):
                value = 0.5 * value
            elif "norm" in name:
                value = 0.2 * value + (0 if case.model_type.startswith("gemma") else 1)
            else:
                value = value * parameter.shape[1] ** -0.5
            parameter.copy_(value.to(getattr(torch, case.dtype)))
    return model.eval()


def random_tokens(seed: int) -> np.ndarray:
    """`[B, T]` int32."""
    return np.random.default_rng(seed).integers(0, COMMON["vocab_size"], (BATCH, TIME), np.int32)


def compute(model: PreTrainedModel, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """`logits` and `hidden_states` of tokens, as described above."""
    with torch.no_grad():
        out = model(torch.from_numpy(tokens), output_hidden_states=True, use_cache=False)
    width = out.hidden_states[0].shape[-1]
    states = [state for state in out.hidden_states if state.shape[-1] == width]
    return {"logits": out.logits.numpy(), "hidden_states": torch.stack(states).numpy()}


def save(directory: Path, model: PreTrainedModel, case: Case) -> None:
    """Writes the checkpoint alone; the model is of the file's dtype afterwards."""
    model.to(getattr(torch, case.dtype))
    model.save_pretrained(directory, max_shard_size=case.max_shard_size)
    (directory / "generation_config.json").unlink()


def main() -> None:
    logging.disable_progress_bar()
    for seed, (name, case) in enumerate(CASES.items()):
        shutil.rmtree(GOLDEN / name, ignore_errors=True)
        model, tokens = random_model(case, seed), random_tokens(seed)
        expected = compute(model, tokens)
        save(GOLDEN / name, model, case)
        save_file({"tokens": tokens, **expected}, GOLDEN / name / "expected.safetensors")
        print(f"{name}: logits up to {np.abs(expected['logits']).max():.2f}")


if __name__ == "__main__":
    main()
