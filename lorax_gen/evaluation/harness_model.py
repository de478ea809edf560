"""The model class of lm-evaluation-harness's `--model lorax_gen`.

Texts are tokenised as in lm-eval's own `hf` backend, so that the numbers are the same. Choices of a
question are scored together (`inference.choices`), texts are continued in batches of similar
lengths (`inference.continuations`).

A model that was specialised in a frame (see `frames`) reads each context in it, unless it was
trained on benchmarks as they are: the text that lm-eval makes of a question and its shots stands
where the input does, and the continuation follows. Rolling log-likelihoods have no context and no
frame.
"""

from __future__ import annotations

import difflib
import inspect
import itertools
import json
import logging
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Self, get_type_hints

import jax
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import (
    get_rolling_token_windows,
    make_disjoint_window,
    simple_parse_args_string,
)
from tqdm import tqdm

from lorax_gen.artifacts.export import check_adapted, is_adapter, specialised
from lorax_gen.artifacts.generator import load_generator
from lorax_gen.artifacts.lookup import Found, find_system
from lorax_gen.chat import render_chat
from lorax_gen.documents import convert
from lorax_gen.errors import UserError
from lorax_gen.frames import PLAIN
from lorax_gen.inference.cards import specialize
from lorax_gen.inference.choices import TOKENS_PER_BATCH, ChoiceItem, prefix_id, score_items
from lorax_gen.inference.continuations import continue_texts, room_for
from lorax_gen.mesh.sharding import serving_mesh, tree_shardings
from lorax_gen.models.huggingface import load_model
from lorax_gen.models.model import Model
from lorax_gen.prompts import read_prompt
from lorax_gen.tokenizers import encode

log = logging.getLogger(__name__)

Ids = list[int]
Pair = tuple[Ids, Ids]
DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16", "auto": None}
OPTIONS: dict[str, Any] = {
    "stop": list[str], "max_new_tokens": int, "temperature": float, "top_k": int | None,
    "top_p": float | None, "seed": int,
}  # fmt: skip
# Values of transformers' generation options that have no effect; tasks may set them.
NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0, "use_cache": True, "num_return_sequences": 1}


class HarnessModel(TemplateLM):
    """`--model lorax_gen`; the arguments are those of `--model_args`.

    Args:
      edge: the model that answers: a directory, a shipped one or a hub name; by default the one
        that the card or the generator names.
      card: a task card or a PEFT adapter directory, merged into the edge first.
      prompt: specialise the edge to this text first, or to that of a file (`@FILE`), which may hold
        commas; see `prompts.read_prompt`.
      cloud, generator: used for the prompt; a card needs the generator that it was made with. By
        default those that it names, or for a prompt the shipped ones.
      raw: contexts are read as they are, in no frame.
      dtype: of the parameters: float32, bfloat16, float16, or auto: that of the file.
      max_length: most tokens of a sequence; by default the positions of the model. Longer sequences
        are truncated on the left, and counted in a warning.
      tokens_per_batch: tokens of one batch on the device; larger devices take more.
      batch_size: most texts in a batch of continuations; 1, lm-eval's default, and auto leave it to
        `tokens_per_batch`.
      add_bos_token: whether texts begin with BOS; None: the tokenizer's default, as in lm-eval's
        own `hf`. Its releases before 0.4.4, and the paper, use none for LLaMA.
      fsdp, tensor: devices that weights are sharded over; the batch is sharded over all others.
      max_batch_size, device, trust_remote_code: passed by lm-eval and ignored: jax chooses its
        devices itself, and no code of a model is ever run.

    lm-eval reads `2024`, `1e3`, `true` and `none` as numbers and so on; quotes make them texts.
    """

    def __init__(
        self,
        edge: str | None = None,
        card: str | None = None,
        prompt: str | None = None,
        cloud: str | None = None,
        generator: str | None = None,
        raw: bool = False,
        dtype: str = "float32",
        max_length: int | None = None,
        tokens_per_batch: int = TOKENS_PER_BATCH,
        batch_size: int | str = 1,
        add_bos_token: bool | None = None,
        fsdp: int = 1,
        tensor: int = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        trust_remote_code: bool | None = None,
        **unknown: Any,
    ):
        given = dict(locals())
        super().__init__()
        refuse_unknown(unknown)
        check_types(given)
        if dtype not in DTYPES:
            raise UserError(f"dtype is {dtype!r}: choose one of {', '.join(DTYPES)}")
        if tokens_per_batch < 1:
            raise UserError(f"tokens_per_batch is {tokens_per_batch}: choose at least 1")
        self.tokens_per_batch, self.most_rows = tokens_per_batch, most_rows_of(batch_size)
        self.mesh = serving_mesh(fsdp, tensor)
        shardings = partial(tree_shardings, mesh=self.mesh) if self.mesh else None
        if card is not None and prompt is not None:
            raise UserError("card and prompt both say what to specialise to; give one of them")
        names = system_for(card, prompt, edge, cloud, generator)
        model = load_model(
            names.needed("edge"), DTYPES[dtype], shardings=shardings, bos=add_bos_token
        )
        positions = model.config.max_position_embeddings
        if max_length is not None and not 0 < max_length <= positions:
            raise UserError(f"max_length is {max_length}: choose from 1 to the model's {positions}")
        if edge is None and card is not None and is_adapter(card):
            check_adapted(card, model)
        model = specialise(model, card, prompt, names)
        unframed = raw or model.frame.is_bare or not model.frame.benchmarks
        self.frame = PLAIN if unframed else model.frame
        if self.frame != PLAIN:
            print(
                f"lorax-gen: each context goes into the frame {self.frame.template!r} that the "
                "model was trained in (raw=true in --model_args: as it is)",
                file=sys.stderr,
            )
        self.model, self._max_length = model, max_length or positions
        self.tokenizer = model.tokenizer

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> Self:
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> Self:
        """The model of `--model_args` and of the options of lm-eval's own that it passes on."""
        own = {key: value for key, value in (additional_config or {}).items() if value is not None}
        for key in own.keys() & arg_dict.keys():
            raise UserError(f"--model_args: {key} is an option of lm-eval's own; use --{key}")
        return cls(**arg_dict, **own)

    # --- properties of the model that lm-eval reads ----------------------------------------------

    @property
    def max_length(self) -> int:
        return self._max_length

    @property
    def eot_token_id(self) -> int | None:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context: BOS, or the end of text."""
        return prefix_id(self.tokenizer)

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """The model's fields in lm-eval's results."""
        leaves = jax.tree.leaves(self.model.params)
        return {
            "model_num_parameters": sum(leaf.size for leaf in leaves),
            "model_dtype": str(self.model.params["embed"].dtype),
            "model_sha": self.model.fingerprint,
            "frame": self.frame.template,
        }

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a chat, up to the model's answer or, if it has begun, to its end so far."""
        if self.frame != PLAIN:
            raise UserError(
                f"the model reads contexts in the frame {self.frame.template!r}: leave out "
                "--apply_chat_template, or give raw=true in --model_args to use it instead"
            )
        if not self.tokenizer.chat_template:
            raise UserError("this tokenizer has no chat template; leave out --apply_chat_template")
        return render_chat(
            self.tokenizer,
            chat_history,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> Ids:
        """Token ids; where `add_special_tokens` is None, BOS follows `add_bos_token`."""
        bos = self.model.bos if add_special_tokens is None else add_special_tokens
        first = self.tokenizer.bos_token
        if add_special_tokens is None and first and string.startswith(first):
            bos = False  # a chat template has added it
        return encode(self.tokenizer, string, bos=bos)

    # --- requests --------------------------------------------------------------------------------

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """`(log-likelihood, whether greedy decoding would write it)` of each continuation."""
        pairs = [self.encode_request(*request.args) for request in requests]
        questions = [(request.task_name, request.doc_id) for request in requests]
        return self.score(
            pairs,
            questions,
            disable_tqdm,
            lambda i, answer: self.cache_hook.add_partial(
                "loglikelihood", requests[i].args, answer
            ),
        )

    def encode_request(self, context: str, continuation: str) -> Pair:
        """Ids of a context in its frame, which is at least one token, and of its continuation."""
        context = self.frame.wrap(context)
        if context:
            return self._encode_pair(context, continuation)
        ids = self.tok_encode(continuation, add_special_tokens=False)
        if ids[:1] == [self.prefix_token_id]:
            return ids[:1], ids[1:]
        return [self.prefix_token_id], ids

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, Ids, Ids]], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        return self.score(
            [(context, ids) for _, context, ids in requests], range(len(requests)), disable_tqdm
        )

    def score(
        self,
        pairs: Sequence[Pair],
        questions: Sequence[Any],
        quiet: bool,
        on_answer: Callable[[int, tuple[float, bool]], None] = lambda i, answer: None,
    ) -> list[tuple[float, bool]]:
        """The answers to pairs; adjacent ones of the same question are scored together."""
        groups = [
            list(group)
            for _, group in itertools.groupby(range(len(pairs)), key=lambda i: questions[i])
        ]
        items = [ChoiceItem(tuple(pairs[i] for i in group)) for group in groups]
        answers: list[Any] = [None] * len(pairs)
        with tqdm(total=len(pairs), disable=quiet, desc="log-likelihoods") as bar:

            def on_batch(indices, scores):
                for index, score in zip(indices, scores, strict=True):
                    found = zip(score.loglikelihoods, score.greedy, strict=True)
                    for i, (loglikelihood, greedy) in zip(groups[index], found, strict=True):
                        answers[i] = float(loglikelihood), bool(greedy)
                        on_answer(i, answers[i])
                        bar.update()

            scores = score_items(
                self.model,
                items,
                max_length=self.max_length,
                tokens_per_batch=self.tokens_per_batch,
                mesh=self.mesh,
                on_batch=on_batch,
            )
        warn_of_cuts(sum(score.truncated > 0 for score in scores), "questions", self.max_length)
        return answers

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-likelihood of each text, in windows as long as the model can read."""
        windows: list[tuple[Any, Ids, Ids]] = []
        counts = []
        for (text,) in (request.args for request in requests):
            found = get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
            )
            before = len(windows)
            windows += [(None, *make_disjoint_window(window)) for window in found]
            counts.append(len(windows) - before)
        parts = iter(self._loglikelihood_tokens(windows, disable_tqdm))
        totals = []
        for request, count in zip(requests, counts, strict=True):
            totals.append(sum(part for part, _ in itertools.islice(parts, count)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each text, up to one of its strings `until`."""
        texts, truncated = [""] * len(requests), 0
        alike: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="continuations") as bar:
            for indices in alike.values():
                options = generation_options(requests[indices[0]].args[1])
                room = room_for(self.model, options["max_new_tokens"], self.max_length)
                rows = [self.tok_encode(self.frame.wrap(requests[i].args[0])) for i in indices]
                truncated += sum(len(row) > room for row in rows)

                def on_batch(positions, written, indices=indices):
                    for position, text in zip(positions, written, strict=True):
                        i = indices[position]
                        texts[i] = text
                        self.cache_hook.add_partial("generate_until", requests[i].args, text)
                        bar.update()

                continue_texts(
                    self.model,
                    [row[-room:] for row in rows],
                    tokens_per_batch=self.tokens_per_batch,
                    most_rows=self.most_rows,
                    mesh=self.mesh,
                    on_batch=on_batch,
                    **options,
                )
        warn_of_cuts(truncated, "texts", self.max_length)
        return texts


def system_for(
    card: str | None, prompt: str | None, edge: str | None, cloud: str | None, generator: str | None
) -> Found:
    """Where the edge is, and what a card or a prompt needs besides it."""
    if prompt is not None:
        return find_system(None, generator, cloud, edge)
    if card is not None:
        return find_system(card, generator, edge=edge, need=("generator", "edge"))
    return find_system(edge=edge)


def specialise(model: Model, card: str | None, prompt: str | None, names: Found) -> Model:
    """The model with a card or adapter merged, or specialised to a prompt, or unchanged."""
    if card is not None:
        maker = None if is_adapter(card) else load_generator(names.needed("generator"))
        return specialised(card, model, maker)
    if prompt is not None:
        cloud = load_model(names.needed("cloud"))
        maker = load_generator(names.needed("generator"))
        return specialize(read_prompt(prompt), cloud, model, maker).merge(model, maker)
    return model


def generation_options(asked: dict[str, Any]) -> dict[str, Any]:
    """A task's generation options as those of `continue_texts`.

    Raises UserError for one that would change the result and is not supported.
    """
    try:
        asked = dict(normalize_gen_kwargs(asked, default_max_gen_toks=256))
    except (TypeError, ValueError) as error:
        raise UserError(f"the task's generation options cannot be used: {error}") from None
    sampled = asked.pop("do_sample") and asked.get("temperature", 1.0) > 0
    options = {
        "stop": [string for string in asked.pop("until") if string != ""],
        "max_new_tokens": asked.pop("max_gen_toks"),
    }
    temperature, top_k, top_p = (asked.pop(key, None) for key in ("temperature", "top_k", "top_p"))
    if sampled:
        options |= {
            "temperature": 1.0 if temperature is None else temperature,
            "top_k": top_k or None,  # 0 restricts nothing
            "top_p": top_p,
            "seed": asked.pop("seed", 0),
        }
    for key, kind in OPTIONS.items():
        if key in options:
            options[key] = convert(options[key], kind, f"the task's generation options: {key}")
    for key, value in asked.items():
        if key != "seed" and NEUTRAL.get(key) != value:
            raise UserError(
                f"the task sets {key}={value!r}, which lorax_gen does not support; it supports "
                "until, max_gen_toks, do_sample, temperature, top_k, top_p and seed"
            )
    return options


def most_rows_of(batch_size: int | str) -> int | None:
    """The most rows of a batch; None where `tokens_per_batch` decides."""
    if str(batch_size).partition(":")[0] == "auto":
        return None
    if not str(batch_size).isascii() or not str(batch_size).isdigit() or int(batch_size) < 1:
        raise UserError(f"batch_size is {batch_size!r}: choose auto, or a number of at least 1")
    return None if int(batch_size) == 1 else int(batch_size)


def check_types(given: dict[str, Any]) -> None:
    """Raises UserError where an argument of the model is of another type than declared."""
    for name, kind in get_type_hints(HarnessModel.__init__).items():
        if name not in given or name == "unknown":
            continue
        try:
            convert(given[name], kind)
        except UserError as error:
            message = f"--model_args: {name} is {given[name]!r}, {error}"
            quoted = f"; a text is written in quotes: {name}='{given[name]}'"
            raise UserError(message + (quoted if "str" in str(kind) else "")) from None


def refuse_unknown(unknown: dict[str, Any]) -> None:
    """Raises UserError for an unknown argument of the model, with the nearest name."""
    names = list(inspect.signature(HarnessModel.__init__).parameters)[1:-1]
    for key in unknown:
        near = difflib.get_close_matches(key, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(names)}"
        raise UserError(f"--model_args: unknown key {key}; {hint}")


def warn_of_cuts(count: int, what: str, limit: int) -> None:
    if count:
        log.warning("%d %s longer than %d tokens were truncated on the left", count, what, limit)
