"""Metrics of multiple-choice items: accuracies, their standard errors, means over tasks."""

from __future__ import annotations

from collections.abc import Sequence

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
