"""The tokenizer of a GGUF file, from its metadata.

    tokenizer.ggml.model        'gpt2': BPE over bytes; 'llama': SentencePiece
    tokenizer.ggml.pre          how BPE over bytes splits a text: see `SPLITS`
    tokenizer.ggml.tokens       by their ids, with types (`NORMAL` and others) and scores
    tokenizer.ggml.merges       of BPE over bytes
    tokenizer.ggml.*_token_id   the special tokens
    tokenizer.chat_template     a Jinja template

SentencePiece models of both kinds are stored as 'llama'. One of BPE scores a piece by its rank, an
integer; one of Unigram by a log-probability. A file has no normaliser, so there is none.
"""

from __future__ import annotations

import warnings
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from tokenizers import pre_tokenizers as pre
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lorax_gen.errors import UserError
from lorax_gen.models.gguf_files import GGUFFile

# Types of tokens.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
# Patterns that a text is split by, each as its tokenizer.json has it, or one after the other.
GPT2 = ""  # the one that is built in
DIGITS = "digits"  # GPT2's, after single digits are split off
DEFAULT = (  # of no model, but what llama.cpp has where a file names none
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS: dict[str, str | tuple[str, ...]] = {
    **dict.fromkeys(("gpt-2", "olmo", "jais", "mpt", "phi-2", "trillion"), GPT2),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), DIGITS
    ),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "dbrx", "smaug-bpe"), LLAMA3
    ),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen", "megrez"), QWEN2),
    "tekken": TEKKEN,
    "default": DEFAULT,
}
# Where BOS is added unless the file says otherwise, as in llama.cpp, and where a part of a text
# that is a token is one without its merges.
WITH_BOS = {"llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken"}
WHOLE_TOKENS = WITH_BOS
NORMALIZED = {"qwen2", "deepseek-r1-qwen", "megrez"}  # to NFC
SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
# Ends of a turn, which older files have no key for.
TURNS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>")


def read_gguf_tokenizer(file: GGUFFile) -> PreTrainedTokenizerBase:
    """The tokenizer of a file.

    Raises UserError where it is of a kind that is unknown, incomplete, has a token twice, or ids
    beyond its tokens.
    """
    try:
        return _read(file)
    except UserError:
        raise
    except BaseException as error:  # what contradicts itself may raise anything, panics included
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{file.source}: its tokenizer cannot be read ({error})") from None


def _read(file: GGUFFile) -> PreTrainedTokenizerBase:
    tokens, types = _tokens(file)
    if len(set(tokens)) < len(tokens):
        twice = next(token for i, token in enumerate(tokens) if token in tokens[:i])
        raise UserError(f"{file.source}: tokenizer.ggml.tokens has {twice!r} twice")
    names = {name: _token(file, key, tokens) for name, key in SPECIAL.items()}
    model = file.get("tokenizer.ggml.model", str)
    build = {"gpt2": _byte_level, "llama": _sentencepiece}.get(model)
    if build is None:
        raise UserError(
            f"{file.source}: tokenizer.ggml.model is {model!r}; supported are 'gpt2' and 'llama'"
        )
    tokenizer, with_bos = build(file, tokens, types)
    bos, eos = names["bos_token"], names["eos_token"]
    with_bos = file.get("tokenizer.ggml.add_bos_token", bool, with_bos)
    with_eos = file.get("tokenizer.ggml.add_eos_token", bool, False)
    if (with_bos and bos is None) or (with_eos and eos is None):
        raise UserError(f"{file.source} adds BOS or EOS to each text, but names no such token")
    special, plain = [], []  # Gemma has 6,000; one call for each would take half a minute
    for token, kind in zip(tokens, types, strict=True):
        if kind in (CONTROL, UNKNOWN) or token in names.values():
            special.append(AddedToken(token, normalized=False, special=True))
        elif kind == USER_DEFINED:
            plain.append(AddedToken(token, normalized=False))
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(plain)
    if tokenizer.get_vocab_size() != len(tokens):
        raise UserError(f"{file.source}: tokenizer.ggml.tokens has one that cannot be a token")
    tokenizer.post_processor = _with_ends(
        tokenizer, bos if with_bos else None, eos if with_eos else None
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=file.get("tokenizer.chat_template", str, None),
        clean_up_tokenization_spaces=False,
        **{name: token for name, token in names.items() if token is not None},
    )


def read_gguf_stop_ids(file: GGUFFile) -> tuple[int, ...]:
    """The tokens that end a text: end of text, and of a turn if there is one."""
    tokens, types = _tokens(file)
    found = [_token(file, key, tokens) for key in ENDS]
    found += [token for token in TURNS if token in tokens and types[tokens.index(token)] == CONTROL]
    return tuple(dict.fromkeys(tokens.index(token) for token in found if token is not None))


def _tokens(file: GGUFFile) -> tuple[list[str], list[int]]:
    """As the tokenizer has them, and their types. Gemma's runs of spaces are stored as such."""
    tokens = file.get("tokenizer.ggml.tokens", list[str])
    types = _one_each(file, "token_type", int, [NORMAL] * len(tokens))
    if unknown := set(types) - set(range(NORMAL, BYTE + 1)):
        raise UserError(
            f"{file.source}: tokenizer.ggml.token_type has {min(unknown)}; expected 1 to 6"
        )
    if _is_gemma(file):
        tokens = ["▁" * len(each) if each and not each.strip(" ") else each for each in tokens]
    return tokens, types


def _is_gemma(file: GGUFFile) -> bool:
    return file.get("general.architecture", str).startswith("gemma")


def _one_each(file: GGUFFile, name: str, kind: type, default: list) -> list:
    values = file.get(f"tokenizer.ggml.{name}", list[kind], default)  # type: ignore[valid-type]
    if len(values) != len(default):
        raise UserError(
            f"{file.source}: tokenizer.ggml.{name} has {len(values)} values for {len(default)} "
            "tokens; expected one each"
        )
    return values


def _token(file: GGUFFile, key: str, tokens: list[str]) -> str | None:
    if f"tokenizer.ggml.{key}" not in file.metadata:
        return None
    number = file.get(f"tokenizer.ggml.{key}", int)
    if not 0 <= number < len(tokens):
        raise UserError(
            f"{file.source}: tokenizer.ggml.{key} is {number}, but there are {len(tokens)} tokens"
        )
    return tokens[number]


def _with_ends(tokenizer: Tokenizer, bos: str | None, eos: str | None) -> Any:
    """Adds them to a text, and to both texts of a pair."""
    single = [token for token in (bos, "$A", eos) if token]
    second = [token.replace("$A", "$B") + ":1" for token in single]
    special = {token: tokenizer.token_to_id(token) for token in (bos, eos) if token}
    return processors.TemplateProcessing(
        single=single, pair=single + second, special_tokens=list(special.items())
    )


def _byte_level(file: GGUFFile, tokens: list[str], types: list[int]) -> tuple[Tokenizer, bool]:
    """The tokenizer without special tokens, and whether it adds BOS if the file says nothing."""
    if "tokenizer.ggml.pre" not in file.metadata:
        warnings.warn(
            f"{file.source} has no tokenizer.ggml.pre, so texts are split as llama.cpp does it by "
            "default, which the model may not know: convert the original model again",
            stacklevel=6,
        )
    kind = file.get("tokenizer.ggml.pre", str, "default")
    if kind not in SPLITS:
        raise UserError(
            f"{file.source}: tokenizer.ggml.pre is {kind!r}; supported are {', '.join(SPLITS)}"
        )
    merges = []
    for merge in file.get("tokenizer.ggml.merges", list[str]):
        left, _, right = merge.partition(" ")
        merges.append((left, right))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, fuse_unk=False, ignore_merges=kind in WHOLE_TOKENS)
    )
    pattern = SPLITS[kind]
    last = pre.ByteLevel(add_prefix_space=False, use_regex=pattern in (GPT2, DIGITS))
    if pattern == GPT2:
        tokenizer.pre_tokenizer = last
    elif pattern == DIGITS:
        tokenizer.pre_tokenizer = pre.Sequence([pre.Digits(individual_digits=True), last])
    else:
        patterns = (pattern,) if isinstance(pattern, str) else pattern
        splits = [pre.Split(Regex(each), "isolated") for each in patterns]
        tokenizer.pre_tokenizer = pre.Sequence([*splits, last])
    if kind in NORMALIZED:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, kind in WITH_BOS


def _sentencepiece(file: GGUFFile, tokens: list[str], types: list[int]) -> tuple[Tokenizer, bool]:
    """See `_byte_level`."""
    scores = _one_each(file, "scores", float, [0.0] * len(tokens))
    unknown = _token(file, "unknown_token_id", tokens)
    if unknown is None and UNKNOWN in types:
        unknown = tokens[types.index(UNKNOWN)]
    by_bytes, gemma = BYTE in types, _is_gemma(file)
    if gemma or all(score == int(score) for score in scores):
        # Gemma's scores are not its ranks; the order of its tokens is.
        ranks = [-float(i) for i in range(len(tokens))] if gemma else scores
        made = [kind in (NORMAL, USER_DEFINED) for kind in types]
        model: Any = models.BPE(
            {token: i for i, token in enumerate(tokens)},
            _merges(tokens, ranks, made),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=by_bytes,
        )
    else:
        pieces = list(zip(tokens, scores, strict=True))
        number = None if unknown is None else tokens.index(unknown)
        model = models.Unigram(pieces, number, byte_fallback=by_bytes)
    tokenizer = Tokenizer(model)
    spaces = normalizers.Replace(" ", "▁")
    after: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if file.get("tokenizer.ggml.add_space_prefix", bool, True):
        # Prepended to each part between special tokens, as llama.cpp does it too.
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        after.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = spaces
    tokenizer.decoder = decoders.Sequence(after)
    return tokenizer, True


def _merges(tokens: list[str], scores: list[float], made: list[bool]) -> list[tuple[str, str]]:
    """The merges of SentencePiece's BPE: any two pieces whose join is a piece that may be `made`,
    that of the highest score first."""
    numbers = {token: i for i, token in enumerate(tokens)}
    found: list[tuple[float, int, int, tuple[str, str]]] = []
    for token, score, may_be in zip(tokens, scores, made, strict=True):
        for cut in range(1, len(token) if may_be else 0):
            pair = token[:cut], token[cut:]
            if pair[0] in numbers and pair[1] in numbers:
                found.append((-score, numbers[pair[0]], numbers[pair[1]], pair))
    return [pair for *_, pair in sorted(found)]
