"""Tokenizers. Only `chat_worker` imports `transformers` too, and nothing else of it is used."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

# Without torch, transformers warns at import that only its tokenizers work; only they are used.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lorax_gen.chat import render_chat
from lorax_gen.errors import UserError
from lorax_gen.prompts import check_text

SPECIAL = ("<pad>", "<unk>", "<bos>", "<eos>")
FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")  # any of them is enough


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory. Raises UserError if it is missing or invalid."""
    if not any((directory / name).is_file() for name in FILES):
        raise UserError(f"no tokenizer.json in {directory}; a model directory needs its tokenizer")
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # an invalid file may raise anything in transformers
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"cannot read the tokenizer in {directory}: {reason[0]}") from None


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer prepends BOS by default, as LLaMA's and Gemma's do."""
    first = tokenizer.bos_token_id
    return first is not None and tokenizer("a")["input_ids"][:1] == [first]


def encode(tokenizer: PreTrainedTokenizerBase, text: str, *, bos: bool | None = None) -> list[int]:
    """Token ids of a text, with one BOS or none, and no other special tokens.

    Args:
      bos: whether to prepend BOS; None: the tokenizer's default.

    Raises UserError if `bos` is set and the tokenizer has none, or the text is not UTF-8.
    """
    ids = tokenizer(check_text(text), add_special_tokens=False)["input_ids"]
    if not (adds_bos(tokenizer) if bos is None else bos):
        return ids
    if tokenizer.bos_token_id is None:
        raise UserError("this tokenizer has no BOS token to put before a text")
    return ids if ids[:1] == [tokenizer.bos_token_id] else [tokenizer.bos_token_id, *ids]


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """First 16 hex digits of the SHA-256 over all that determines the ids of a text."""
    if tokenizer.is_fast:
        text = tokenizer.backend_tokenizer.to_str()
    else:
        text = json.dumps(sorted(tokenizer.get_vocab().items()))
    special = json.dumps([tokenizer.bos_token_id, tokenizer.eos_token_id, adds_bos(tokenizer)])
    return hashlib.sha256((text + special).encode()).hexdigest()[:16]


def chat_ids(tokenizer: PreTrainedTokenizerBase, user: str, system: str = "") -> list[int]:
    """Token ids of a user's turn in the tokenizer's chat template, up to where the answer begins.

    Raises UserError if the tokenizer has no chat template, or its template refuses the turns
    (Gemma's has no system turn) or goes beyond the limits of `chat`.
    """
    if not tokenizer.chat_template:
        raise UserError("this tokenizer has no chat template; leave out --chat")
    turns = [{"role": "system", "content": check_text(system)}] if system else []
    turns.append({"role": "user", "content": check_text(user)})
    text = render_chat(tokenizer, turns)
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # the template adds them


def word_level(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of lower-case words split at white space; it prepends `<bos>` to each text."""
    ids = {word: i for i, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", ids["<bos>"])]
    )
    names = {f"{name[1:-1]}_token": name for name in SPECIAL}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
