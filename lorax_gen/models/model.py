"""A language model: its config, parameters and tokenizer."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from lorax_gen import tokenizers
from lorax_gen.frames import PLAIN, Frame
from lorax_gen.method.lora import Tree, merge
from lorax_gen.models import decoder, int8
from lorax_gen.models.adapter import Adapter
from lorax_gen.models.decoder import DecoderConfig, Params
from lorax_gen.tensors import tree_hash


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A language model: its config, its parameters and its tokenizer.

    Attributes:
      stop_ids: tokens that end a text; default the tokenizer's end of text.
      bos: whether a text begins with BOS, the one rule for training, scoring, decoding, prompts and
        requests; None is resolved to the tokenizer's default.
      name: as it was given, see `hub.public_name`.
      frame: of the inputs that it was specialised to. Nothing applies it unasked: it is for
        `model.frame.wrap(text)` before `encode`, `generate_text` and others.
    """

    config: DecoderConfig
    params: Params
    tokenizer: Any
    stop_ids: tuple[int, ...] = ()
    name: str = ""
    bos: bool | None = None
    frame: Frame = PLAIN

    def __post_init__(self):
        if self.bos is None and self.tokenizer is not None:
            object.__setattr__(self, "bos", tokenizers.adds_bos(self.tokenizer))
        eos = getattr(self.tokenizer, "eos_token_id", None)
        if not self.stop_ids and eos is not None:
            object.__setattr__(self, "stop_ids", (eos,))
        self.check_ids(self.stop_ids)

    @property
    def is_abstract(self) -> bool:
        """Whether it has only shapes, no values; for planning there is no tokenizer either."""
        return isinstance(self.params["embed"], jax.ShapeDtypeStruct)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Identifies the parameters: equal for every directory, and in fp32 and bf16."""
        return tree_hash(self.params, jnp.bfloat16)

    @functools.cached_property
    def tokenizer_fingerprint(self) -> str:
        """Identifies the tokenizer."""
        return tokenizers.fingerprint(self.tokenizer)

    @functools.cached_property
    def decoding_params(self) -> Params:
        """The parameters with `layers` as a list, for decoding: a copy, made once."""
        layers = decoder.unstack(self.params["layers"], self.config.num_hidden_layers)
        return {**self.params, "layers": layers}

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with BOS if `bos`.

        Raises UserError for a token of the tokenizer that the model has no embedding for.
        """
        ids = tokenizers.encode(self.tokenizer, text, bos=self.bos)
        self.check_ids(ids)
        return ids

    def check_ids(self, ids: Any) -> None:
        """Raises UserError where integers of any shape are not all ids of the vocabulary."""
        tokenizers.check_ids(ids, self.config.vocab_size, self.tokenizer)

    def merged(self, lora: Tree) -> Model:
        """The model with a LoRA tree merged into its kernels (eq. 1): the same shape, no LoRA.

        Raises UserError where the tree does not fit, or the kernels are in int8.
        """
        int8.refuse(self.params, "merge a LoRA into")
        layers = merge(self.params["layers"], lora)
        return dataclasses.replace(self, params={**self.params, "layers": layers})

    def __call__(self, tokens: jax.Array, adapter: Adapter | None = None) -> jax.Array:
        """Next-token logits `[B, T, V]` (fp32) of token ids `[B, T]`.

        Raises UserError where ids that are known, not traced, are beyond the vocabulary.
        """
        if not isinstance(tokens, jax.core.Tracer) and getattr(
            tokens, "is_fully_addressable", True
        ):
            self.check_ids(tokens)
        tokens = jnp.asarray(tokens)
        hidden = decoder.hidden_states(self.params, self.config, tokens, adapter=adapter)
        return decoder.logits(self.params, self.config, hidden)
