"""Intervals and sign-flip tests against SciPy, closed forms and simulated coverage."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from wellposed.lab.statistics import (
    direction,
    mean_interval,
    paired_interval,
    sign_flip_p,
    simultaneous_level,
    smallest_n,
)

VALUES = st.lists(st.floats(-100, 100), min_size=2, max_size=12)


@given(VALUES)
def test_the_interval_is_scipys(values):
    found = mean_interval(values, 0.9)
    if np.std(values) > 1e-6:
        expected = stats.ttest_1samp(values, 0).confidence_interval(0.9)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-6, abs=1e-9)


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=9))
def test_the_sign_flip_test_counts_all_patterns(values):
    sums = [
        abs(sum(s * v for s, v in zip(signs, values, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(values))
    ]
    assert sign_flip_p(values) == np.mean(np.array(sums) >= abs(sum(values)))


def test_beyond_twenty_values_the_drawn_test_agrees_with_scipy():
    values = np.random.default_rng(0).normal(0.4, 1, 30)
    expected = stats.permutation_test((values,), np.mean, permutation_type="samples", n_resamples=20_000, rng=0).pvalue
    assert sign_flip_p(values) == pytest.approx(expected, abs=0.01)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    random = np.random.default_rng(1)
    inside = 0
    for _ in range(2000):
        interval = mean_interval(random.normal(3, 2, 12))
        inside += interval.low <= 3 <= interval.high
    assert abs(inside / 2000 - 0.95) < 4 * np.sqrt(0.95 * 0.05 / 2000)


def test_a_direction_under_the_null_is_claimed_no_more_often_than_the_level_allows():
    random = np.random.default_rng(2)
    claims = sum(direction(random.standard_t(3, 12)) != 0 for _ in range(1500))
    assert claims / 1500 < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 1500)


def test_few_seeds_cannot_claim_a_direction_at_a_strict_level():
    level = simultaneous_level(11)
    enough = smallest_n(level)
    assert enough == 9
    certain = [1.0 + 1e-3 * i for i in range(enough)]
    assert direction(certain, level) == 1
    assert direction(certain[:-1], level) == 0


def test_pairs_must_pair_up_and_values_be_finite():
    assert paired_interval([2.0, 3.0], [1.0, 1.0]).estimate == 1.5
    with pytest.raises(ValueError, match="must pair up, got 1 and 2"):
        paired_interval([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="finite numbers"):
        mean_interval([1.0, float("nan")])


def test_the_exact_sign_flip_test_is_scipys_permutation_test():
    values = np.random.default_rng(3).normal(0.5, 1, 10)
    expected = stats.permutation_test((values,), np.sum, permutation_type="samples", n_resamples=np.inf).pvalue
    assert sign_flip_p(values) == pytest.approx(expected, abs=1e-12)


def test_the_drawn_test_is_exact_in_expectation_and_never_zero():
    assert sign_flip_p([1.0] * 40, draws=500) == 1 / 501
    assert sign_flip_p([1.0, -1.0] * 15, draws=500) == 1.0


@given(VALUES)
def test_a_direction_turns_with_the_values(values):
    assert direction([-v for v in values]) == -direction(values)


@pytest.mark.parametrize("level", [0.0, 1.0, 95])
def test_levels_lie_between_none_and_certain(level):
    for call in (
        lambda: mean_interval([1.0, 2.0], level),
        lambda: smallest_n(level),
        lambda: simultaneous_level(2, level),
    ):
        with pytest.raises(ValueError, match=r"level must lie in \(0, 1\), got"):
            call()


def test_rounding_to_ten_digits_changes_no_p_value():
    # Accuracies are multiples of one over the number of test examples: sums of them tie, and must do so when rounded.
    generator = np.random.default_rng(0)
    for _ in range(30):
        values = generator.integers(-200, 200, 12) / 60000
        rounded = [float(f"{value:.10g}") for value in values / 3]
        assert sign_flip_p(list(values / 3)) == sign_flip_p(rounded)
