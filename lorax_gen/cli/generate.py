"""`lorax-gen generate`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

import tyro

from lorax_gen.cli.artifacts import load_for
from lorax_gen.cli.parse import UserPath
from lorax_gen.config import Size
from lorax_gen.errors import UserError
from lorax_gen.frames import PLAIN, Frame
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
    """Texts to continue. They go into the frame that the card or the merged model was trained with,
    if it has one; --raw: not. `-` is the text of standard input, `@FILE` that of a
    file without its last line end, `@@` stands for an @ that begins a text, and `--` goes before a
    text that begins with -."""
    card: UserPath | None = None
    """A task card or a PEFT adapter directory, merged into the model first."""
    context: str = ""
    """A prompt that precedes every question, read as a question is; with --chat the system
    message."""
    separator: str | None = None
    """What is put between the context and a question, default a space; not used with --chat or a
    frame."""
    raw: bool = False
    """Use the texts as they are, in no frame."""
    chat: bool = False
    """Wrap each question in the tokenizer's chat template."""
    edge: Annotated[str | None, tyro.conf.arg(aliases=("--model",))] = None
    """The model that answers: a directory or a hub name; default the one that the card names."""
    generator: str | None = None
    """Generator that the card was made with; default the one that it names."""
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
        if self.chat and self.separator is not None:
            raise UserError("--separator has no use with --chat: the template separates the turns")
        if [self.context, *self.questions].count("-") > 1:
            raise UserError("- is given twice, but standard input can be read only once")
        context, *questions = map(read_prompt, (self.context, *self.questions))
        import lorax_gen
        from lorax_gen.artifacts.export import specialised
        from lorax_gen.artifacts.lookup import find_system

        if self.card is None:
            model = lorax_gen.load_model(find_system(edge=self.edge).needed("edge"), self.dtype)
        else:
            edge, generator = load_for(self.card, self.edge, self.generator, self.dtype)
            model = specialised(self.card, edge, generator)
        frame = PLAIN if self.raw or model.frame.is_bare else model.frame
        self.check_no_other(frame)
        texts = self.framed(questions, context, frame)
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
        apart = self.chat or not frame.separator
        shown_as = [f"{question} " if apart else question for question in questions]
        try:
            show(shown_as, stream)
        except UnicodeEncodeError as error:
            raise UserError(
                f"the output cannot show {error.object[error.start]!r} in {error.encoding}; set "
                "PYTHONIOENCODING=utf-8"
            ) from None
        return 0

    def check_no_other(self, frame: Frame) -> None:
        """Raises UserError where an option says otherwise what a question is put into."""
        for given, option in ((self.chat, "--chat"), (self.separator is not None, "--separator")):
            if given and frame != PLAIN:
                raise UserError(
                    f"{option} does not go with the frame {frame.template!r} that inputs were "
                    "trained in; leave it out, or give --raw to use texts without that frame"
                )

    def framed(self, questions: Sequence[str], context: str, frame: Frame) -> list[str]:
        """What the model reads for each question, with a context before it."""
        if not context or self.chat:
            return [frame.wrap(question) for question in questions]
        if frame != PLAIN:
            return [frame.prompted(context, question) for question in questions]
        separator = " " if self.separator is None else self.separator
        return [f"{context}{separator}{question}" for question in questions]


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
