"""The method of the paper, section 3, and nothing else.

Pure functions over arrays and plain dicts of arrays: insert meta tokens after a prompt and read
their states (`meta_tokens`), route each state to gates over the experts (`router`), sum the gated
experts into a LoRA (`experts`), balance the experts (`balance`), apply or merge the LoRA (`lora`).
`generator` composes them. Nothing here depends on a transformer, tokenizer, file or mesh; under a
mesh with explicit axes results are sharded as `explicit` says. Equation numbers in the docstrings
are the paper's.

Dims: this is the legend of the package; a module lists only letters that it adds or redefines.

    B batch   T time   D model or input width   F feed-forward or output width   H heads
    V vocabulary   L layers, of the edge model in the method (with `last_layers`, those that have
    experts)   N experts   K experts kept
    R rank   P prompts   Q questions per prompt, B = P Q
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
