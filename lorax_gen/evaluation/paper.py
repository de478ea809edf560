"""The paper's own numbers (arXiv 2506.11638), to stand beside a report's.

Accuracies are in percent, 5-shot, and means are over the eight benchmarks. The paper's models are
billions of parameters large and were trained on its data, so numbers of other models can be
compared in their order and their differences only.
"""

from __future__ import annotations

from typing import NamedTuple


class PaperTable(NamedTuple):
    """A table of the paper: labels and numbers as printed, and what to make of them here."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str


ORDER = "Compare the order of the rows and their differences, not the values."
ABLATION = f"The paper does not say which edge model it is of. {ORDER}"
MEAN = ("", "mean of eight")
EIGHT = (
    "",
    "ARC-c",
    "ARC-e",
    "OBQA",
    "BoolQ",
    "SIQA",
    "HellaS",
    "WinoG",
    "PIQA",
    "AVE",
    "HAR",
    "ms",
)

TABLES = {
    "2": PaperTable(
        "Table 2, TinyLLaMA-1.1B, in percent",
        EIGHT,
        (
            ("edge", *"34.2 66.9 27.4 58.8 46.0 45.8 60.7 73.9 51.7 46.7 44.5".split()),
            ("+ LoRA", *"33.6 67.6 28.6 71.9 51.5 44.5 61.9 75.1 54.3 48.5 44.5".split()),
            ("+ LoRAMoE", *"35.2 68.8 28.6 73.2 52.1 45.4 62.0 74.1 54.9 49.3 55.9".split()),
            ("+ MixLoRA", *"33.5 67.7 28.4 73.3 51.4 44.9 62.3 74.6 54.5 48.6 100.1".split()),
            ("+ LoRA-Gen", *"35.8 69.1 30.4 73.6 49.6 45.5 62.6 74.1 55.1 49.8 21.2".split()),
        ),
        f"HellaSwag, WinoGrande and PIQA are unseen in training. {ORDER}",
    ),
    "3": PaperTable(
        "Table 3, GPT4Tools with Gemma-2B, mean of the five rates in percent",
        ("", "mean", "compression"),
        (
            ("edge, tool definitions in context", "79.3", ""),
            ("edge + LoRA-Gen, without them", "84.2", "10.1 x"),
        ),
        ORDER,
    ),
    "5": PaperTable(
        "Experts in the pool",
        MEAN,
        (("4", "56.4"), ("8", "58.7"), ("12", "57.3")),
        ABLATION,
    ),
    "6": PaperTable(
        "Coefficient of the balance loss",
        MEAN,
        (("0.1", "57.1"), ("0.01", "58.7"), ("0.005", "56.8")),
        ABLATION,
    ),
    "7": PaperTable(
        "Shots in the prompt", MEAN, (("1", "58.7"), ("3", "55.5"), ("5", "56.0")), ABLATION
    ),
    "8": PaperTable(
        "Routing strategy", MEAN, (("KeepTOP-K", "58.7"), ("Gumbel", "56.4")), ABLATION
    ),
    "9": PaperTable(
        "Table 9, direct generation or meta tokens",
        ("", "seen", "unseen"),
        (("direct generation", "52.4", "61.0"), ("meta tokens", "52.0", "72.1")),
        f"72.1 exceeds every unseen mean of Table 2. {ORDER}",
    ),
    "13": PaperTable(
        "Table 13, Qwen2-1.5B's shape, 100 input and 200 instruction tokens",
        ("", "inference, MACs", "inference, s", "training step, MACs", "training step, s"),
        (
            ("LoRA", "4.708E+11", "0.19", "4.736E+11", ""),
            ("LoRAMoE", "4.742E+11", "", "4.742E+11", ""),
            ("MixLoRA", "5.048E+11", "", "5.061E+11", ""),
            ("LoRA-Gen", "1.552E+11", "0.11", "1.667E+12", "2.84"),
        ),
        "What it calls FLOPs are multiply-accumulates.",
    ),
}
