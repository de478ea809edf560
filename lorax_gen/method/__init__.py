"""The method of the paper, section 3, and nothing else.

Pure functions over arrays and plain dicts of arrays: put meta tokens behind a prompt and read their
states (`meta_tokens`), route each state to gates over the experts (`router`), sum the gated experts
into a LoRA (`experts`), keep the experts in balance (`balance`), apply or merge the LoRA (`lora`).
`generator` composes them. No transformer, tokenizer, file or mesh is known here; the numbers in the
docstrings are the paper's equations.

Dims, for the entire package; a module names only what it has beyond, or means otherwise:

    B batch   T time   D model width   F feed-forward width   H heads   V vocabulary
    L layers  N experts   K experts kept   R rank   P prompts   Q questions under each, B = P Q
"""

from lorax_gen.method.balance import balance_loss, expert_load, gate_entropy
from lorax_gen.method.experts import apply_experts, compose, init_pool
from lorax_gen.method.generator import (
    Generated,
    GeneratorConfig,
    cloud_lora,
    gates_from_states,
    generate,
    init_generator,
    lora_from_gates,
)
from lorax_gen.method.lora import (
    apply_lora,
    count_params,
    init_factors,
    init_lora,
    merge,
    scaled,
    take_example,
)
from lorax_gen.method.meta_tokens import init_meta_tokens, insert_meta_tokens, read_meta_states
from lorax_gen.method.router import gumbel, init_router, keep_top_k, router_logits

__all__ = [
    "Generated",
    "GeneratorConfig",
    "apply_experts",
    "apply_lora",
    "balance_loss",
    "cloud_lora",
    "compose",
    "count_params",
    "expert_load",
    "gate_entropy",
    "gates_from_states",
    "generate",
    "gumbel",
    "init_factors",
    "init_generator",
    "init_lora",
    "init_meta_tokens",
    "init_pool",
    "init_router",
    "insert_meta_tokens",
    "keep_top_k",
    "lora_from_gates",
    "merge",
    "read_meta_states",
    "router_logits",
    "scaled",
    "take_example",
]
