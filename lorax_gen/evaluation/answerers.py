"""Answerers: what is evaluated on benchmarks, GPT4Tools and the embedded world.

An answerer is a model, what it reads of a question, and how it is specialised:

    plain        the edge, the question alone
    icl          the edge, the question after the prompt
    lora, card   as `plain`, with a LoRA of all tasks or of one merged; as `icl` where it was
                 trained so
    cloud_icl    the cloud, the question after the prompt
    lora_gen     the edge, the question alone; the prompt goes to the cloud, which generates the
                 LoRA that the edge answers with

and controls, which differ from `lora_gen` in what the cloud reads (`control`):

    shuffled     the prompt of another task
    empty        nothing
    random       as many random tokens as the question's own prompt has

A new baseline is an `Answerer`, or a subclass with its own `specialise`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeVar, get_args

import numpy as np
from jax.sharding import Mesh

from lorax_gen.artifacts.generator import Generator
from lorax_gen.cost import Macs, generator_macs, no_macs, prefill_macs
from lorax_gen.data.tokens import Encoder
from lorax_gen.errors import UserError
from lorax_gen.frames import PLAIN, Frame
from lorax_gen.inference.cards import gates_of_prompts
from lorax_gen.inference.choices import TOKENS_PER_BATCH
from lorax_gen.mesh import hosts
from lorax_gen.method.lora import Tree
from lorax_gen.models.adapter import Adapter, LowRank
from lorax_gen.models.model import Model
from lorax_gen.system import gated_pool
from lorax_gen.tensors import tree_hash

Ids = Sequence[int]
Control = Literal["shuffled", "empty", "random"]
CONTROLS: tuple[Control, ...] = get_args(Control)


class Cases(Protocol):
    """N questions, and the texts that an answerer can read for each."""

    def bare(self) -> list[tuple[str, ...]]:
        """The question alone: one text, or one for each choice."""

    def prompted(self) -> list[tuple[str, ...]]:
        """The question after its prompt, for a model that reads both in its context."""

    def prompts(self) -> list[str]:
        """The prompt alone."""

    def other_prompts(self) -> list[str]:
        """The prompt of another task."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What a cloud model reads: token ids, after `truncated` ids were dropped on the left."""

    ids: Ids
    truncated: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Answerer:
    """A model that answers questions, specialised by its context or by a fixed adapter.

    Attributes:
      name: in options, reports and files; label: in tables.
      in_context: whether the prompt is in its own context.
      adapter: for all questions, where it is not merged.
      max_length: most tokens that it reads; None: as many as it has positions.
      adapter_macs: what an adapter that is not merged adds to the reading of so many tokens.
    """

    name: str
    label: str
    model: Model
    in_context: bool = False
    adapter: Adapter | None = None
    max_length: int | None = None
    adapter_macs: Callable[[int], Macs] = no_macs

    @property
    def reads_prompts(self) -> bool:
        """Whether its answers depend on the prompt, in its context or otherwise."""
        return self.in_context

    @property
    def serving_adapter(self) -> Adapter | None:
        """What one question is answered with where latency and memory are measured: without what
        is merged for serving."""
        return self.adapter

    def contexts(self, cases: Cases) -> list[tuple[str, ...]]:
        """What the answering model reads before its answers."""
        return cases.prompted() if self.in_context else cases.bare()

    def prompts(self, cases: Cases) -> list[Prompt] | None:
        """What the cloud reads for each question, to specialise the model; None: nothing."""
        return None

    def specialise(
        self,
        prompts: Sequence[Prompt],
        *,
        tokens_per_batch: int = TOKENS_PER_BATCH,
        wanted: Sequence[int] | None = None,
        mesh: Mesh | None = None,
        progress: Callable[[int], object] = lambda prompts: None,
    ) -> Adapter | None:
        """The adapter with one row per prompt; see `LoraGen.specialise`."""
        return self.adapter

    @property
    def is_fitted(self) -> bool:
        """Whether it is another one for each task, by `fit`."""
        return False

    def fit(self, task: str, shots: Sequence[tuple[str, str]]) -> Answerer:
        """The answerer fitted to solved examples of a task; by default it stays the same."""
        return self

    def macs(self, context_tokens: int) -> Macs:
        """Of the model that reads a context, up to the first token of an answer."""
        own = prefill_macs(self.model.config, context_tokens, logits=1)
        return own + self.adapter_macs(context_tokens)

    def prompt_macs(self, prompt_tokens: int) -> Macs:
        """Of specialising it, once for each prompt."""
        return Macs()

    def identity(self) -> dict[str, Any]:
        """What its answers depend on, as plain values; an evaluation resumes if they are equal."""
        found = {
            "answerer": self.name,
            "model": identity(self.model),
            "dtype": str(self.model.params["embed"].dtype),
            "bos": self.model.bos,
            "in_context": self.in_context,
            "max_length": self.max_length,
        }
        if self.adapter is not None:
            found["adapter"] = tree_hash({"shared": self.adapter.shared})
            if self.adapter.apply != LowRank():
                found["apply"] = repr(self.adapter.apply)
        return found


@dataclasses.dataclass(frozen=True, eq=False)
class CloudAnswerer(Answerer):
    """The edge, specialised by what the cloud reads; a subclass has its own `specialise`.

    Attributes:
      which: what the cloud reads; None: the question's own prompt. See `control`.
      seed: of random prompts.
    """

    cloud: Model = dataclasses.field(kw_only=True)
    which: Control | None = None
    seed: int = 0

    @property
    def reads_prompts(self) -> bool:
        return self.which != "empty"

    @property
    def meta_tokens(self) -> int:
        """That the cloud reads after each prompt: one for each layer of the edge, or for fewer."""
        return self.model.config.num_hidden_layers

    @property
    def room(self) -> int:
        """Most tokens of a prompt that fit into the cloud before the meta tokens."""
        positions = self.cloud.config.max_position_embeddings
        limit = min(self.max_length or positions, positions)
        meta = self.meta_tokens
        if limit <= meta:
            raise UserError(f"{meta} meta tokens leave no room for a prompt in {limit} positions")
        return limit - meta

    def prompts(self, cases: Cases) -> list[Prompt]:
        encoder = Encoder.of(self.cloud)
        if self.which == "empty":
            return [Prompt(encoder.ids(""))] * len(cases.bare())
        texts = cases.other_prompts() if self.which == "shuffled" else cases.prompts()
        rows = [encoder.ids(text) for text in texts]
        if self.which == "random":
            rngs = (np.random.default_rng([self.seed, i]) for i in range(len(rows)))
            rows = [random_ids(self.cloud, ids, rng) for ids, rng in zip(rows, rngs, strict=True)]
        return [Prompt(ids[-self.room :], max(len(ids) - self.room, 0)) for ids in rows]

    def identity(self) -> dict[str, Any]:
        found = super().identity() | {"cloud": identity(self.cloud), "which": self.which}
        return found | ({"random_seed": self.seed} if self.which == "random" else {})


Reading = TypeVar("Reading", bound=CloudAnswerer)


@dataclasses.dataclass(frozen=True, eq=False)
class LoraGen(CloudAnswerer):
    """The edge with the LoRA that a generator makes from each question's prompt."""

    generator: Generator = dataclasses.field(kw_only=True)

    @property
    def meta_tokens(self) -> int:
        return self.generator.config.layers(self.model.config.num_hidden_layers)

    def specialise(
        self,
        prompts: Sequence[Prompt],
        *,
        tokens_per_batch: int = TOKENS_PER_BATCH,
        wanted: Sequence[int] | None = None,
        mesh: Mesh | None = None,
        progress: Callable[[int], object] = lambda prompts: None,
    ) -> Adapter:
        """The adapter with one row per prompt; the cloud reads each distinct prompt once.

        Args:
          wanted: see `read_prompts`; other rows are not to be used.
        """
        gates = gates_of_prompts(
            [prompt.ids for prompt in prompts],
            self.cloud,
            self.model,
            self.generator,
            tokens_per_batch=tokens_per_batch,
            wanted=wanted,
            mesh=mesh,
            progress=progress,
        )
        return gated_pool(self.generator.params["pool"], gates, self.generator.config)

    def prompt_macs(self, prompt_tokens: int) -> Macs:
        spec = self.generator.spec(self.cloud, self.model)
        return generator_macs(spec, prompt_tokens)

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"generator": self.generator.fingerprint}


def control(answerer: Reading, which: Control, seed: int = 0) -> Reading:
    """The answerer with a cloud that reads something else than the question's own prompt."""
    label = ANSWERERS[which][0]
    return dataclasses.replace(answerer, name=which, label=label, which=which, seed=seed)


def random_ids(model: Model, ids: Ids, rng: np.random.Generator) -> list[int]:
    """As many ids, drawn from all that are not special; special ids stay."""
    special = set(model.tokenizer.all_special_ids)
    known = min(len(model.tokenizer), model.config.vocab_size)
    choices = np.setdiff1d(np.arange(known), list(special))
    drawn = rng.choice(choices, len(ids)).tolist()
    return [old if old in special else new for old, new in zip(ids, drawn, strict=True)]


def identity(model: Model) -> str:
    """Identifies a model: the hash of its weights, or its name if they span several hosts."""
    return model.name if hosts.several() else model.fingerprint


# --- by name -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class System:
    """The parts that answerers are made of: an edge model, and what specialises it.

    Attributes:
      lora: a LoRA tree of all tasks; card: one of a single task; cards: several of these by their
        names, for answerers `card:NAME`. Each is merged into the edge: the same shapes, so that
        nothing is compiled again.
      max_length: most tokens that the edge, or the cloud, reads; None: as many as it has positions.
      frame: how the edge reads an input, for evaluations that put it into one.
      others: answerers made elsewhere, such as those of released baselines, by their names.
      in_context: those of `lora`, `card` and `card:NAME` whose LoRA was trained on questions after
        their prompts, and which read them so.
    """

    edge: Model
    cloud: Model | None = None
    generator: Generator | None = None
    lora: Tree | None = None
    card: Tree | None = None
    max_length: int | None = None
    cards: Mapping[str, Tree] = dataclasses.field(default_factory=dict)
    frame: Frame = PLAIN
    others: Mapping[str, Answerer] = dataclasses.field(default_factory=dict)
    in_context: Collection[str] = ()

    def check(self, name: str) -> None:
        """Raises UserError where `answerer` would: before anything else is computed."""
        if name in self.others:
            return
        kind, mark, card = name.partition(":")
        if kind not in ANSWERERS or (mark and kind != "card"):
            known = ", ".join([*ANSWERERS, *self.others])
            raise UserError(f"unknown mode {name!r}; choose one of {known}")
        if mark and card not in self.cards:
            there = f"there are {', '.join(self.cards)}" if self.cards else "none is given"
            raise UserError(f"mode {name} needs a card of that name; {there}")
        needs = () if mark else ANSWERERS[kind][1]
        if any(getattr(self, part) is None for part in needs):
            raise UserError(f"mode {name} needs {' and '.join(PARTS[part] for part in needs)}")

    def reads_prompts(self, name: str) -> bool:
        """Whether the answers of the answerer of this name depend on a question's prompt."""
        own = self.others.get(name)
        return name in (*PROMPTED, *self.in_context) or (own is not None and own.reads_prompts)

    def answerer(self, name: str, seed: int = 0) -> Answerer:
        """The answerer of a name of `ANSWERERS`, of `card:NAME`, or of `others`.

        Raises UserError where the name is unknown, or the system lacks a part that it needs.
        """
        self.check(name)
        options: dict[str, Any] = {"max_length": self.max_length}
        if name in self.others:
            return dataclasses.replace(self.others[name], **options)
        kind, _, card = name.partition(":")
        own: dict[str, Any] = {"in_context": name in self.in_context, **options}
        if card:
            return Answerer(name, card, self.edge.merged(self.cards[card]), **own)
        label, needs = ANSWERERS[kind]
        parts: dict[str, Any] = {part: getattr(self, part) for part in needs}
        if name in ("lora", "card"):
            return Answerer(name, label, self.edge.merged(parts[name]), **own)
        if name == "cloud_icl":
            return Answerer(name, label, parts["cloud"], in_context=True, **options)
        if name in ("plain", "icl"):
            return Answerer(name, label, self.edge, in_context=name == "icl", **options)
        made = LoraGen("lora_gen", ANSWERERS["lora_gen"][0], self.edge, **parts, **options)
        which = next((each for each in CONTROLS if each == name), None)
        return made if which is None else control(made, which, seed)


PARTS = {
    "cloud": "a cloud model",
    "generator": "a generator",
    "lora": "a LoRA of all tasks",
    "card": "a card or an adapter",
}
# Name -> its label, and the parts of a system that it needs.
ANSWERERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "plain": ("edge, no prompt", ()),
    "icl": ("edge, prompted", ()),
    "lora": ("edge + one LoRA", ("lora",)),
    "card": ("edge + card", ("card",)),
    "cloud_icl": ("cloud, prompted", ("cloud",)),
    "lora_gen": ("edge + LoRA-Gen", ("cloud", "generator")),
    "shuffled": ("  other prompt", ("cloud", "generator")),
    "empty": ("  empty prompt", ("cloud", "generator")),
    "random": ("  random prompt", ("cloud", "generator")),
}
PROMPTED = ("icl", "cloud_icl", "lora_gen", "random")  # read a question's own prompt, and its shots
