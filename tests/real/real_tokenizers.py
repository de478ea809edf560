"""Tokenizers of real models, built from the files that their authors publish.

Model directories hold a `tokenizer.json`; what lies in the data folder is older than that format.
`build_llama2`, `build_llama3` and `build_qwen` each write a directory that `load_tokenizer` reads.
Gemma's file is not in the data folder: `build_gemma_like` makes a small stand-in of the same make.
"""

from __future__ import annotations

import base64
import gzip
import lzma
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

Pieces = Sequence[tuple[str, float]]  # text and score; the index is the id

SPACE = "▁"  # how SentencePiece writes a space
SPECIAL = ("<unk>", "<s>", "</s>")
GEMMA_SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))

LLAMA2_FILE = "tokenizers/llama2_32k_sentencepiece/tokenizer.bin.gz"
LLAMA3_FILE = "tokenizers/llama3_128k_tiktoken/tokenizer.model.xz"
QWEN_FILE = "tokenizers/qwen_151k_tiktoken/qwen.tiktoken.xz"

# How text is cut into words before bytes are merged. The two differ in digits: LLaMA 3 takes up to
# three together, Qwen one.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_WORDS = WORDS % "{1,3}"
QWEN_WORDS = WORDS % ""

# Ids 128000 to 128255, named as from LLaMA 3.1 on.
LLAMA3_SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(3, 248)),
)
QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # from id 151643 on


# --- one function per family ---------------------------------------------------------------------


def build_llama2(data: Path, directory: Path) -> Path:
    """LLaMA 2 (and TinyLLaMA): 32,000 pieces of SentencePiece, `<s>` in front of each text."""
    return save_sentencepiece(directory, read_pieces(data / LLAMA2_FILE))


def build_llama3(data: Path, directory: Path) -> Path:
    """LLaMA 3: 128,000 runs of bytes, 256 special tokens, `<|begin_of_text|>` in front."""
    tokenizer = byte_pairs(read_ranks(data / LLAMA3_FILE), LLAMA3_WORDS, LLAMA3_SPECIAL)
    bos = LLAMA3_SPECIAL[0]
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), starting_with(bos, tokenizer)]
    )
    return save(directory, tokenizer, bos_token=bos, eos_token=LLAMA3_SPECIAL[1])


def build_qwen(data: Path, directory: Path) -> Path:
    """Qwen (1, 1.5 and 2): 151,643 runs of bytes, no token in front; composes accents (NFC)."""
    tokenizer = byte_pairs(read_ranks(data / QWEN_FILE), QWEN_WORDS, QWEN_SPECIAL)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    end = QWEN_SPECIAL[0]
    return save(directory, tokenizer, eos_token=end, pad_token=end)


def build_gemma_like(directory: Path, words: Sequence[str] = ("the", "that", "hello")) -> Path:
    """A tokenizer as Gemma's in all but its size: pieces of `words`, letters and bytes.

    Like LLaMA 2's, but with other special tokens, and without a space in front of the text.
    """
    texts = [*map(chr, range(33, 127)), SPACE]
    texts += {SPACE + word[:end]: None for word in words for end in range(1, len(word) + 1)}
    pieces = [(text, 0.0) for text in GEMMA_SPECIAL + BYTES]
    pieces += [(text, -float(i)) for i, text in enumerate(texts)]
    tokenizer = sentencepiece(pieces, GEMMA_SPECIAL)
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = starting_with("<bos>", tokenizer)
    names = {f"{name[1:-1]}_token": name for name in GEMMA_SPECIAL}
    return save(directory, tokenizer, **names)


# --- SentencePiece -------------------------------------------------------------------------------


def read_pieces(path: Path) -> list[tuple[str, float]]:
    """Pieces of a `tokenizer.bin` as llama2.c exports it from SentencePiece, zipped or not.

    int32 length of the longest piece; then for each piece float32 score, int32 length, bytes.
    """
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    pieces, at = [], 4
    while at < len(content):
        score, length = struct.unpack_from("<fi", content, at)
        at += 8
        pieces.append((content[at : at + length].decode().replace(" ", SPACE), score))
        at += length
    pieces[: len(SPECIAL)] = [(text, 0.0) for text in SPECIAL]  # written there for the screen
    return pieces


def save_sentencepiece(directory: Path, pieces: Pieces) -> Path:
    """A directory with LLaMA's use of SentencePiece: a space and `<s>` in front of each text."""
    tokenizer = sentencepiece(pieces, SPECIAL)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = starting_with("<s>", tokenizer)
    return save(directory, tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def sentencepiece(pieces: Pieces, special: Sequence[str]) -> Tokenizer:
    """The merges of SentencePiece's BPE: of all neighbours that make a piece, best score first."""
    ids = {text: i for i, (text, _) in enumerate(pieces)}
    unmergeable = {*special, *BYTES}
    ranks = {text: -score for text, score in pieces if text not in unmergeable}
    tokenizer = Tokenizer(
        models.BPE(ids, merges(ranks), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    add_special(tokenizer, special)
    return tokenizer


# --- tiktoken ------------------------------------------------------------------------------------


def read_ranks(path: Path) -> dict[bytes, int]:
    """Runs of bytes and their ranks, which are their ids: one pair a line, in base 64."""
    with lzma.open(path) as file:
        return {base64.b64decode(run): int(rank) for run, rank in map(bytes.split, file)}


def byte_pairs(ranks: Mapping[bytes, int], words: str, special: Sequence[str]) -> Tokenizer:
    """Byte-level BPE that merges, within each match of `words`, the pair of lowest rank first."""
    characters = byte_characters()

    def text(run: bytes) -> str:
        return run.decode("latin-1").translate(characters)

    ids = {text(run): rank for run, rank in ranks.items()}
    pairs = [(text(left), text(right)) for left, right in merges(ranks)]
    # A word that is itself in the vocabulary is taken whole, whatever the merges say.
    tokenizer = Tokenizer(models.BPE(ids, pairs, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    add_special(tokenizer, special)
    return tokenizer


def byte_characters() -> dict[int, str]:
    """The printable character that stands for each byte in byte-level vocabularies."""
    own = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in own]
    return {byte: chr(byte) for byte in own} | {byte: chr(256 + i) for i, byte in enumerate(others)}


# --- both ----------------------------------------------------------------------------------------


def merges(ranks: Mapping) -> list[tuple]:
    """All pairs of pieces that together make a piece, in the order in which they are merged.

    Args:
      ranks: the rank of each piece (text or bytes); the lowest is merged first. Among equals, as
        runs of spaces are, the one with the longest beginning: so a run grows from its left end.
    """
    pairs = [
        (piece[:cut], piece[cut:])
        for piece in ranks
        for cut in range(1, len(piece))
        if piece[:cut] in ranks and piece[cut:] in ranks
    ]
    return sorted(pairs, key=lambda pair: (ranks[pair[0] + pair[1]], -len(pair[0])))


def add_special(tokenizer: Tokenizer, names: Sequence[str]) -> None:
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in names])


def starting_with(name: str, tokenizer: Tokenizer) -> processors.TemplateProcessing:
    """Puts the special token in front of each text."""
    return processors.TemplateProcessing(
        single=f"{name} $A",
        pair=f"{name} $A {name}:1 $B:1",
        special_tokens=[(name, tokenizer.token_to_id(name))],
    )


def save(directory: Path, tokenizer: Tokenizer, **names: str) -> Path:
    """Writes `tokenizer.json` and `tokenizer_config.json`; `names` are the roles of tokens."""
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names
    ).save_pretrained(directory)
    return Path(directory)
