"""Tokenizers: the only file that imports `transformers`, of which nothing else is used."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

# Without torch, transformers advises at import that only its tokenizers work: all we want.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lorax_gen.errors import UserError

SPECIAL = ("<pad>", "<unk>", "<bos>", "<eos>")


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory. Raises UserError where there is none."""
    if not (directory / "tokenizer.json").is_file():
        raise UserError(f"no tokenizer.json in {directory}; a model directory needs its tokenizer")
    return AutoTokenizer.from_pretrained(directory)


def word_level(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of whole lower-case words between white space, `<bos>` in front of each text."""
    ids = {word: i for i, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", ids["<bos>"])]
    )
    names = {f"{name[1:-1]}_token": name for name in SPECIAL}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
