"""Tokenizers. Only `chat_worker` imports `transformers` too, and nothing else of it is used."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

# Without torch, transformers warns at import that only its tokenizers work; only they are used.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lorax_gen.chat import render_chat
from lorax_gen.errors import UserError
from lorax_gen.prompts import check_text

SPECIAL = ("<pad>", "<unk>", "<bos>", "<eos>")
FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")  # read in this order, one is enough


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory.

    Raises UserError if it is missing or invalid, if what reads it is not installed, if it comes
    with Python code of its own, or if an added token has another id than its file says.
    """
    found = next((name for name in FILES if (directory / name).is_file()), None)
    if found is None:
        raise UserError(f"no tokenizer.json in {directory}; a model directory needs its tokenizer")
    if found == "vocab.json" and not (directory / "merges.txt").is_file():
        raise UserError(f"{directory} has vocab.json without merges.txt; a tokenizer needs both")
    for name in ("tokenizer_config.json", "config.json"):
        if code := _own_code(directory / name):
            raise UserError(
                f"cannot read the tokenizer in {directory}: {name} names code of its own "
                f"({code}), which is never run"
            )
    if found == "tokenizer.model":
        _needs_reader(directory / found)
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        tokenizer("a")  # some settings are not looked at before
    except BaseException as error:  # an invalid file may raise anything, Rust's panics included
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        if "tiktoken" in reason[0] and not _is_tiktoken(directory / found):
            # What transformers cannot read as a SentencePiece model it tries as tiktoken's.
            reason = ["tokenizer.model is not a complete SentencePiece model; get it again"]
        raise UserError(f"cannot read the tokenizer in {directory}: {reason[0]}") from None
    for token, number in _added_tokens(directory).items():
        if (actual := tokenizer.convert_tokens_to_ids(token)) != number:
            raise UserError(
                f"the tokenizer in {directory} says that {token!r} has id {number}, but it gets "
                f"{actual}: another token has that id, or ids have a gap; get the files again"
            )
    return tokenizer


class _Token(msgspec.Struct):
    content: str
    id: int = -1


class _Json(msgspec.Struct):
    added_tokens: list[_Token] = []


class _Config(msgspec.Struct):
    added_tokens_decoder: dict[int, _Token] = {}


def _added_tokens(directory: Path) -> dict[str, int]:
    """The ids that the files of a tokenizer, already read, state for added tokens.

    Its reader numbers new tokens itself and passes over the ids that are stated.
    """
    found: dict[str, int] = {}
    kinds: dict[str, type[_Json | _Config]] = {
        "tokenizer.json": _Json,
        "tokenizer_config.json": _Config,
    }
    for name, kind in kinds.items():
        try:
            file = msgspec.json.decode((directory / name).read_bytes(), type=kind)
        except (FileNotFoundError, msgspec.DecodeError):
            continue
        if isinstance(file, _Json):
            found |= {token.content: token.id for token in file.added_tokens}
        else:
            found |= {token.content: i for i, token in file.added_tokens_decoder.items()}
    return found


def _own_code(path: Path) -> Any:
    """The Python class for the tokenizer that a repository brings along, if any."""
    try:
        code = json.loads(path.read_bytes()).get("auto_map")
    except (OSError, ValueError, RecursionError, AttributeError):
        return None  # missing or invalid, which its reader says
    return code.get("AutoTokenizer") if isinstance(code, dict) else code


def _needs_reader(path: Path) -> None:
    """Raises UserError where a `tokenizer.model` needs a package that is not installed."""
    needed = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}
    if _is_tiktoken(path):
        needed = {"tiktoken": "tiktoken"}
    if not all(_is_installed(module) for module in needed):
        raise UserError(
            f"{path} needs {' and '.join(needed.values())}: pip install {' '.join(needed.values())}"
        )


def _is_tiktoken(path: Path) -> bool:
    """Whether it is lines of base64 and a number, as LLaMA 3 has it, and no SentencePiece model."""
    with path.open("rb") as file:
        return re.match(rb"[A-Za-z0-9+/]+=* \d+\n", file.read(500)) is not None


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent of a submodule
        return False


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


def check_ids(ids: Any, vocab_size: int, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Raises UserError where integers of any shape are not all ids of a vocabulary.

    A tokenizer may have tokens that a model has no embedding for, such as added ones. Indexing in
    JAX would take another row in silence. A tokenizer smaller than the vocabulary is common.

    Args:
      tokenizer: names the token in the message.
    """
    ids = np.asarray(ids)
    if not ids.size:
        return
    if ids.dtype.kind not in "iu":
        raise UserError(f"token ids are {ids.dtype}; expected integers")
    beyond = ids[(ids < 0) | (ids >= vocab_size)]
    if not beyond.size:
        return
    first, name = int(beyond[0]), None
    if tokenizer is not None and 0 <= first < 2**31:
        name = tokenizer.convert_ids_to_tokens(first)
    named = f"the token {name!r} has the id {first}" if name else f"{first} is a token id"
    raise UserError(
        f"{named}, but the model's vocabulary has {vocab_size} ids from 0; does the tokenizer "
        "belong to another model?"
    )


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
