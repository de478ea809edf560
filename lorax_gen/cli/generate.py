"""`lorax-gen generate`."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

import tyro

from lorax_gen.cli.artifacts import generator_of
from lorax_gen.cli.parse import UserPath
from lorax_gen.errors import UserError


@dataclasses.dataclass(frozen=True)
class Generate:
    """Continue texts: with a task card, with a prompt in context, or with neither. The answer to a
    single text is streamed.

    Examples:
      lorax-gen generate --card task.card.safetensors "apple :" "bell :"
      lorax-gen generate --edge org/name --chat --temperature 0.7 --top-p 0.9 "Why is it so?"
    """

    questions: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="QUESTION ...")
    ]
    """Texts to continue."""
    card: UserPath | None = None
    """A task card or a PEFT adapter directory, merged into the model first."""
    context: str = ""
    """A prompt that precedes every question; with --chat the system message."""
    chat: bool = False
    """Wrap each question in the tokenizer's chat template."""
    edge: Annotated[str, tyro.conf.arg(aliases=("--model",))] = "world/edge"
    """The model that answers: a directory or a hub name."""
    generator: str = "world/generator"
    """Generator that the card was made with."""
    max_new_tokens: int = 16
    """Most tokens of an answer."""
    temperature: float = 0.0
    """0 is greedy; higher is more varied."""
    top_k: int | None = None
    """Sample from the k most likely tokens."""
    top_p: float | None = None
    """Sample from the smallest set of most likely tokens with this total probability."""
    seed: int = 0
    """Seed of sampling."""
    stop: tuple[str, ...] = ()
    """Strings that end an answer, besides the model's end of text."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the parameters; bfloat16 on GPUs and TPUs."""

    def run(self) -> int:
        if not self.questions:
            raise UserError('no question given; for example: lorax-gen generate "apple :"')
        import lorax_gen
        from lorax_gen.artifacts.export import lora_of

        model = lorax_gen.load_model(self.edge, self.dtype)
        if self.card is not None:
            tree, *_ = lora_of(self.card, model, generator_of(self.card, self.generator))
            model = model.merged(tree)
        texts = list(self.questions)
        if not self.chat:
            texts = [f"{self.context} {question}".strip() for question in texts]
        stream = lorax_gen.stream_text(
            model,
            texts,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
            stop=self.stop,
            chat=self.chat,
            system=self.context if self.chat else "",
        )
        if len(texts) == 1:
            shown = ""
            for [answer] in stream:
                text = f"{self.questions[0]} {answer}"
                print(text[len(shown) :], end="", flush=True)
                shown = text
            print()
            return 0
        answers = []
        for answers in stream:  # noqa: B007
            pass
        for question, answer in zip(self.questions, answers, strict=True):
            print(f"{question} {answer}")
        return 0
