"""Accuracies, their errors and means, by hand."""

import math

import numpy as np
import pytest

from lorax_gen.evaluation.metrics import (
    arithmetic_mean,
    choose,
    choose_normalised,
    harmonic_mean,
    standard_error,
)


def test_the_likeliest_choice_counts_as_a_whole_or_by_character():
    found = np.array([-4.0, -6.0, -4.0])
    assert choose(found) == 0  # the first of equals
    assert choose_normalised(found, ["four", "eleven of it", "fourfour"]) == 1
    assert choose_normalised(found, ["four", "five", "fourfour"]) == 2
    # Characters, not bytes: six and seven of them.
    assert choose_normalised(np.array([-6.0, -6.5]), ["éééééé", "eeeeeee"]) == 1


def test_the_standard_error_is_that_of_the_sample():
    values = np.array([1, 0, 0, 1, 1])
    deviation = math.sqrt(sum((v - 0.6) ** 2 for v in values) / 4)
    assert standard_error(values) == pytest.approx(deviation / math.sqrt(5))
    assert standard_error(np.array([1.0])) == 0.0


def test_means_over_tasks_are_those_of_the_papers_first_row():
    """TinyLLaMA in its Table 2."""
    accuracies = [34.2, 66.9, 27.4, 58.8, 46.0, 45.8, 60.7, 73.9]
    assert arithmetic_mean(accuracies) == pytest.approx(51.7, abs=0.05)
    assert harmonic_mean(accuracies) == pytest.approx(46.7, abs=0.15)
    assert harmonic_mean([0.5, 0.0]) == 0.0
