"""Metrics of single items, choices and texts; standard errors, and means over tasks."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np


def choose(loglikelihoods: np.ndarray) -> int:
    """The choice that `acc` counts: the highest log-likelihood, the first of ties."""
    return int(np.argmax(loglikelihoods))


def choose_normalised(loglikelihoods: np.ndarray, choices: Sequence[str]) -> int:
    """The choice that `acc_norm` counts: the highest log-likelihood per character."""
    return int(np.argmax(loglikelihoods / np.array([len(text) for text in choices])))


def standard_error(values: np.ndarray) -> float:
    """Of the mean of values `[n]`: sample standard deviation / sqrt(n). 0 for one value."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def arithmetic_mean(accuracies: Sequence[float]) -> float:
    """AVE of the paper's tables."""
    return float(np.mean(accuracies))


def harmonic_mean(accuracies: Sequence[float]) -> float:
    """HAR of the paper's tables, which one weak task lowers; 0 where an accuracy is 0."""
    values = np.asarray(accuracies, float)
    return float(len(values) / np.sum(1 / values)) if (values > 0).all() else 0.0


# --- texts ----------------------------------------------------------------------------------------


def exact_match(answer: str, outputs: Sequence[str]) -> bool:
    """Whether an answer is one of the correct outputs, without case and white space at the ends."""
    return answer.strip().lower() in [output.strip().lower() for output in outputs]


def rouge_l(answer: str, outputs: Sequence[str]) -> float:
    """ROUGE-L (Lin, 2004): the F-measure of the longest common subsequence of words, the highest of
    all correct outputs. 0 where a text has no words."""
    return float(_scorer().score_multi(list(outputs), answer)["rougeL"].fmeasure)


class _Words:
    """Words of any script; rouge-score's own tokenizer has those of a to z and 0 to 9 only."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


@functools.cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # imports nltk, which takes a second

    return RougeScorer(["rougeL"], tokenizer=_Words())
