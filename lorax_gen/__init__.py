"""LoRA-Gen in JAX: a large model reads a task's prompt once and generates LoRA weights for a
small one, which then serves the task without the prompt.

`method` is section 3 of the paper as pure functions; `models` a plain Flax decoder; `data` makes
fixed-shape batches; `system` is where method and models meet; `training` the sharded train step and
its loop; `inference` prompts to cards and text to text; `evaluation` measures; `artifacts` is what
leaves the program; `recipes` are the methods that can be trained. The names below are the short way
in, loaded when they are first used:

    cloud, edge = load_model("world/cloud"), load_model("world/edge")
    generator = load_generator("world/generator")
    card = specialize("Look at the color ...", cloud, edge, generator)
    specialised = card.merge(edge, generator)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorax_gen.artifacts.baseline import Baseline, load_baseline, save_baseline
    from lorax_gen.artifacts.card import TaskCard, load_card, save_card
    from lorax_gen.artifacts.export import export
    from lorax_gen.artifacts.generator import Generator, load_generator, save_generator
    from lorax_gen.artifacts.peft import load_adapter, save_adapter
    from lorax_gen.artifacts.verify import verify
    from lorax_gen.errors import UserError
    from lorax_gen.evaluation.answerers import Answerer, LoraGen, System
    from lorax_gen.evaluation.suite import evaluate_agent_suite, evaluate_suite
    from lorax_gen.evaluation.tables import print_report
    from lorax_gen.evaluation.world import evaluate_world
    from lorax_gen.inference.cards import gates_of_prompts, specialize
    from lorax_gen.inference.choices import encode_items, score_items
    from lorax_gen.inference.generation import generate_text, stream_text
    from lorax_gen.models.adapter import Adapter
    from lorax_gen.models.huggingface import load_model, save_model
    from lorax_gen.models.model import Model
    from lorax_gen.recipes.registry import RECIPES, load_config
    from lorax_gen.system import GeneratorSpec, gated_pool
    from lorax_gen.training.loop import fit
else:  # type checkers would take it as a promise of any name

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


__version__ = "0.1.0"

# Where each public name lives. Imported when asked for: `import lorax_gen.method` brings jax alone.
_MODULES = {
    "artifacts.baseline": ("Baseline", "load_baseline", "save_baseline"),
    "artifacts.card": ("TaskCard", "load_card", "save_card"),
    "artifacts.export": ("export",),
    "artifacts.generator": ("Generator", "load_generator", "save_generator"),
    "artifacts.peft": ("load_adapter", "save_adapter"),
    "artifacts.verify": ("verify",),
    "errors": ("UserError",),
    "evaluation.answerers": ("Answerer", "LoraGen", "System"),
    "evaluation.suite": ("evaluate_agent_suite", "evaluate_suite"),
    "evaluation.tables": ("print_report",),
    "evaluation.world": ("evaluate_world",),
    "inference.cards": ("gates_of_prompts", "specialize"),
    "inference.choices": ("encode_items", "score_items"),
    "inference.generation": ("generate_text", "stream_text"),
    "models.adapter": ("Adapter",),
    "models.huggingface": ("load_model", "save_model"),
    "models.model": ("Model",),
    "recipes.registry": ("RECIPES", "load_config"),
    "system": ("GeneratorSpec", "gated_pool"),
    "training.loop": ("fit",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "RECIPES",
    "Adapter",
    "Answerer",
    "Baseline",
    "Generator",
    "GeneratorSpec",
    "LoraGen",
    "Model",
    "System",
    "TaskCard",
    "UserError",
    "encode_items",
    "evaluate_agent_suite",
    "evaluate_suite",
    "evaluate_world",
    "export",
    "fit",
    "gated_pool",
    "gates_of_prompts",
    "generate_text",
    "load_adapter",
    "load_baseline",
    "load_card",
    "load_config",
    "load_generator",
    "load_model",
    "print_report",
    "save_adapter",
    "save_baseline",
    "save_card",
    "save_generator",
    "save_model",
    "score_items",
    "specialize",
    "stream_text",
    "verify",
]


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
