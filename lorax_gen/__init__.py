"""LoRA-Gen in JAX: a large model reads a task's prompt once and generates LoRA weights for a
small one, which then serves the task without the prompt.

`method` is section 3 of the paper as pure functions; `models` a plain Flax decoder; `data` makes
fixed-shape batches; `training` composes method and models into sharded train steps; `evaluation`
measures; `artifacts` is what leaves the program. The names below are the short way in:

    cloud, edge = load_model("world/cloud"), load_model("world/edge")
    generator = load_generator("world/generator")
    card = specialize("Look at the color ...", cloud, edge, generator)
    specialised = card.merge(edge, generator)
"""

from lorax_gen.artifacts.card import TaskCard, load_card, save_card
from lorax_gen.artifacts.export import export
from lorax_gen.artifacts.generator import Generator, load_generator, save_generator
from lorax_gen.artifacts.peft import load_adapter, save_adapter
from lorax_gen.artifacts.verify import verify
from lorax_gen.errors import UserError
from lorax_gen.inference.cards import specialize
from lorax_gen.inference.generation import generate_text, stream_text
from lorax_gen.models.huggingface import load_model, save_model
from lorax_gen.models.model import Model

__version__ = "0.1.0"

__all__ = [
    "Generator",
    "Model",
    "TaskCard",
    "UserError",
    "export",
    "generate_text",
    "load_adapter",
    "load_card",
    "load_generator",
    "load_model",
    "save_adapter",
    "save_card",
    "save_generator",
    "save_model",
    "specialize",
    "stream_text",
    "verify",
]
