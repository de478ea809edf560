"""`lorax-gen generate`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

import tyro

from lorax_gen.cli.artifacts import generator_of
from lorax_gen.cli.parse import UserPath
from lorax_gen.config import Size
from lorax_gen.errors import UserError
from lorax_gen.prompts import read_prompt


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
    """Texts to continue, used as they are; `-` is the text of standard input, `@FILE` that of a
    file without its last line end, `@@` stands for an @ that begins a text, and `--` goes before a
    text that begins with -."""
    card: UserPath | None = None
    """A task card or a PEFT adapter directory, merged into the model first."""
    context: str = ""
    """A prompt that precedes every question, read as a question is; with --chat the system
    message."""
    separator: str = " "
    """What is put between the context and a question; not used with --chat."""
    chat: bool = False
    """Wrap each question in the tokenizer's chat template."""
    edge: Annotated[str, tyro.conf.arg(aliases=("--model",))] = "world/edge"
    """The model that answers: a directory or a hub name."""
    generator: str = "world/generator"
    """Generator that the card was made with."""
    max_new_tokens: Size = 16
    """Most tokens of an answer."""
    temperature: float = 0.0
    """0 is greedy; higher is more varied."""
    top_k: Size | None = None
    """Sample from the k most likely tokens."""
    top_p: float | None = None
    """Sample from the smallest set of most likely tokens with this total probability."""
    seed: int = 0
    """Seed of sampling."""
    stop: tuple[str, ...] = ()
    """Strings that end an answer, besides the model's end of text; they may be, or contain, special
    tokens. Used as they are: bash writes a new line as $'\\n'; --stop=-x begins with -."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the parameters; bfloat16 on GPUs and TPUs."""

    def run(self) -> int:
        if not self.questions:
            raise UserError('no question given; for example: lorax-gen generate "apple :"')
        if self.chat and self.separator != " ":
            raise UserError("--separator has no use with --chat: the template separates the turns")
        if [self.context, *self.questions].count("-") > 1:
            raise UserError("- is given twice, but standard input can be read only once")
        context, *questions = map(read_prompt, (self.context, *self.questions))
        import lorax_gen
        from lorax_gen.artifacts.export import lora_of

        model = lorax_gen.load_model(self.edge, self.dtype)
        if self.card is not None:
            tree, *_ = lora_of(self.card, model, generator_of(self.card, self.generator))
            model = model.merged(tree)
        texts = questions
        if context and not self.chat:
            texts = [f"{context}{self.separator}{question}" for question in questions]
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
            system=context if self.chat else "",
            in_context=not self.chat,
        )
        # An answer in a chat is a turn of its own, not the continuation of the question's words.
        shown_as = [f"{question} " if self.chat else question for question in questions]
        try:
            show(shown_as, stream)
        except UnicodeEncodeError as error:
            raise UserError(
                f"the output cannot show {error.object[error.start]!r} in {error.encoding}; set "
                "PYTHONIOENCODING=utf-8"
            ) from None
        return 0


def show(questions: Sequence[str], stream: Iterator[list[str]]) -> None:
    """Prints each question with its answer; a single one as it is written."""
    shown, answers = "", [""] * len(questions)
    for answers in stream:
        if len(questions) == 1:
            text = questions[0] + answers[0]
            print(text[len(shown) :], end="", flush=True)
            shown = text
    if len(questions) == 1:
        print()
        return
    for question, answer in zip(questions, answers, strict=True):
        print(question + answer)
