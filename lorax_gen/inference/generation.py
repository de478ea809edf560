"""Text in, text out: continuations of batches of prompts, complete or streamed.

Shapes are bucketed, so a session of many prompts compiles few programs: a handful of lengths and
batch sizes, for each one program for prefill and one for a chunk of new tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lorax_gen.data.tokens import bucket, pad_rows
from lorax_gen.errors import UserError
from lorax_gen.inference.stopping import Decoder, finished_text, settled_text
from lorax_gen.mesh import hosts
from lorax_gen.mesh.sharding import keep_decoding, place_adapter, put_batch, row_shards
from lorax_gen.models import decoding
from lorax_gen.models.adapter import Adapter, prefix_length
from lorax_gen.models.decoder import Execution
from lorax_gen.models.decoding import Sampling
from lorax_gen.models.model import Model
from lorax_gen.prompts import check_size, check_text
from lorax_gen.tokenizers import chat_ids, check_ids

CHUNK = 8  # tokens between two detokenisations: few enough to stream, enough to hide their time

STATIC = ("config", "stop_ids", "execution")
prefill = partial(jax.jit, static_argnames=(*STATIC, "slots"))(decoding.prefill)
advance = partial(jax.jit, static_argnames=(*STATIC, "steps"), donate_argnames="state")(
    decoding.advance
)


def generate_text(
    model: Model, texts: Sequence[str] | Sequence[Sequence[int]], **options: Any
) -> list[str]:
    """The continuations of texts, all in one batch, without special tokens.

    Options as of `stream_text`.
    """
    written = [""] * len(texts)
    for written in stream_text(model, texts, **options):  # noqa: B007
        pass
    return written


def stream_text(
    model: Model,
    texts: Sequence[str] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 16,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: Sequence[str] = (),
    adapter: Adapter | None = None,
    chat: bool = False,
    system: str = "",
    in_context: bool = False,
    mesh: Mesh | None = None,
) -> Iterator[list[str]]:
    """Yields all continuations so far, a few tokens longer each time.

    Yielded text does not change: an incomplete character, or a possible beginning of a stop string,
    is held back.

    Args:
      texts: strings, or token ids, which are used as they are. For inputs of a model that was
        specialised in a frame, give `model.frame.wrap(text)`.
      temperature: 0 is greedy; above 0, tokens are sampled, restricted by `top_k` and `top_p`.
      seed: of sampling; row i uses the same random numbers in all calls with one seed.
      stop: strings that end a continuation and are removed from it; so do the model's `stop_ids`.
        They may be, or contain, special tokens; see `inference.stopping`.
      adapter: see `models.adapter`; its rows, and its prefix, are one per text.
      chat: texts are user turns in the tokenizer's chat template, after `system`.
      in_context: continuations begin with the space that some tokenizers leave out before the first
        word, so that text + continuation is what the model has read and written.
      mesh: that the weights are sharded over (`load_model(..., shardings=...)`); texts are sharded
        over its batch axes. None: no mesh.

    Raises UserError for an option out of range, an empty text where the tokenizer adds no token, a
    text too long for the model, or a tokenizer without a chat template.
    """
    if isinstance(texts, str):
        raise UserError("texts is a string, not a list of strings; pass [text]")
    stop = [stop] if isinstance(stop, str) else stop
    check_options(max_new_tokens, temperature, top_k, top_p, seed, stop)
    top_p = None if top_p == 1 else top_p  # rounding would drop the far tail
    if not texts:
        return
    rows = [encoded(model, text, chat, system) for text in texts]
    before = prefix_length(adapter)
    check_rows(rows, texts, max_new_tokens, model, before)
    shards = 1 if mesh is None else row_shards(mesh)
    count = bucket(-(-len(rows) // shards), 1) * shards
    rows += [rows[-1]] * (count - len(rows))
    lengths = np.array([len(row) for row in rows], np.int32)
    tokens = pad_rows(rows, bucket(lengths.max()), 0, "a prompt")

    greedy = temperature == 0.0
    shared: dict[str, Any] = {
        "stop_ids": model.stop_ids,
        "sampling": None if greedy else Sampling(temperature, top_k, top_p),
        "key": None if greedy else jax.random.key(seed),
        "adapter": pad_rows_of(adapter, len(texts), count),
    }
    params, config = model.decoding_params, model.config
    put = jax.device_put if mesh is None else partial(put_batch, mesh=mesh)
    if mesh is not None:
        shared["adapter"] = place_adapter(shared["adapter"], mesh)
        shared["execution"] = Execution(constrain=keep_decoding(mesh))
    slots = before + tokens.shape[1] + bucket(max_new_tokens)
    state = prefill(params, config, *put((tokens, lengths)), slots=slots, **shared)
    ids = np.asarray(hosts.gather(state.token))[:, None]
    decoders = [Decoder.of(model, row if in_context else ()) for row in rows]
    shown, ended = [""] * len(texts), np.ones(len(rows), bool)  # padding rows have ended
    ended[: len(texts)] = False
    while True:
        full = ids.shape[1] >= max_new_tokens
        for i in np.flatnonzero(~ended):  # an ended row only repeats its last token
            own = ids[i, :max_new_tokens].tolist()
            text, ended[i] = finished_text(decoders[i], own, stop)
            text = text if full or ended[i] else settled_text(decoders[i], own, stop)
            # With byte tokens, an incomplete character makes those before it undecodable too.
            shown[i] = text if text.startswith(shown[i]) else shown[i]
        yield list(shown)
        if full or ended.all():
            return
        state = state._replace(finished=put(ended))
        # Always full chunks, so that there is one program; the excess is truncated.
        state, more = advance(params, config, state, steps=CHUNK, **shared)
        ids = np.concatenate([ids, np.asarray(hosts.gather(more))], axis=1)


def encoded(model: Model, text: str | Sequence[int], chat: bool, system: str) -> list[int]:
    """The token ids of a text, or of its turn in a chat; token ids as they are."""
    if not isinstance(text, str):
        if not all(isinstance(token, int | np.integer) for token in text):
            raise UserError(f"token ids should be integers, not as in {text!r}")
        return [int(token) for token in text]
    limit = model.config.max_position_embeddings
    check_size(system + text, limit, model.tokenizer)
    return chat_ids(model.tokenizer, text, system) if chat else model.encode(text)


def pad_rows_of(adapter: Adapter | None, rows: int, padded: int) -> Adapter | None:
    """An adapter for a batch that is padded by repeating its last row."""
    if adapter is None or rows == padded:
        return adapter
    return adapter.take_rows(np.minimum(np.arange(padded), rows - 1))


def check_options(
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    stop: Sequence[str],
) -> None:
    valid = {
        f"max_new_tokens={max_new_tokens}: choose at least 1": max_new_tokens >= 1,
        f"temperature={temperature}: choose 0 (greedy) or more": 0 <= temperature < float("inf"),
        f"top_k={top_k}: choose at least 1": top_k is None or top_k >= 1,
        f"top_p={top_p}: choose a probability above 0, up to 1": top_p is None or 0 < top_p <= 1,
        f"seed={seed}: choose a number of at least 0 and below 2**63": 0 <= seed < 2**63,
        "a stop string is empty: it would end every text immediately": "" not in stop,
        "stop should hold strings": all(isinstance(string, str) for string in stop),
    }
    for message, holds in valid.items():
        if not holds:
            raise UserError(message)
    for string in stop:
        check_text(string)


def check_rows(
    rows: Sequence[Sequence[int]],
    texts: Sequence[Any],
    max_new_tokens: int,
    model: Model,
    before: int = 0,
) -> None:
    limit = model.config.max_position_embeddings
    for row, text in zip(rows, texts, strict=True):
        if not row:
            raise UserError(f"the text {text!r} has no tokens to continue; write some")
        check_ids(row, model.config.vocab_size, model.tokenizer)
        if before + len(row) + max_new_tokens > limit:
            prefix = f"a prefix of {before}, " if before else ""
            raise UserError(
                f"{prefix}a text of {len(row)} tokens and {max_new_tokens} new ones are more than "
                f"the {limit} positions of the model; reduce either"
            )
