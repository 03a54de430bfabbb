"""Statistics of paired seeds against hand-computed values, definitions and simulation."""

import itertools
import math

import numpy
import pytest

from biofunc import statistics


def test_interval_is_that_of_a_normal_mean_where_it_should_be():
    differences = numpy.random.default_rng(1).normal(1.0, 2.0, 200)
    low, high = statistics.bca_interval(differences)
    half = 1.96 * differences.std(ddof=1) / 200**0.5
    # The bootstrap of a mean of 200 normals is normal to about 1 % of its width, and 9999 resamples resolve 2 %
    assert abs(low - (differences.mean() - half)) < 0.1 * half
    assert abs(high - (differences.mean() + half)) < 0.1 * half


def test_interval_leans_to_the_side_of_the_long_tail():
    differences = numpy.random.default_rng(2).exponential(1.0, 30)
    low, high = statistics.bca_interval(differences)
    assert high - differences.mean() > 1.1 * (differences.mean() - low)  # a percentile or normal interval does not


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([0.5, 0.5, 0.5], (0.5, 0.5)),
        ([0.0, 0.0], (0.0, 0.0)),
        ([0.1 + 0.2, 0.3], (0.3, 0.3)),
        ([1.0], (math.nan, math.nan)),
        ([], (math.nan, math.nan)),
        ([1.0, math.inf, 2.0], (math.nan, math.nan)),
    ],
)
def test_degenerate_intervals(differences, expected):
    assert statistics.bca_interval(differences) == pytest.approx(expected, nan_ok=True)


def test_coverage_and_false_positives():
    """Intervals of 12 normals hold the true mean almost as often as they say, and null effects are rarely claimed.

    Bootstrap intervals of so few values are a little too narrow: they cover about 92 %. With 300 cases the standard
    error is 1.5 points, so 0.86 and 0.98 lie four of them away. An exact p < 0.05 and an interval without 0 happen
    together in at most 5 % of null cases; 0.09 is three standard errors above.
    """
    rng = numpy.random.default_rng(3)
    covered = claimed = 0
    for _ in range(300):
        differences = rng.normal(0.0, 1.0, 12)
        interval = statistics.bca_interval(differences)
        covered += interval[0] <= 0 <= interval[1]
        p = statistics.sign_flip_test(differences)
        claimed += statistics.verdict(differences.mean(), interval, p) != "no effect found"
    assert 0.86 < covered / 300 < 0.98
    assert claimed / 300 < 0.09


def test_sign_flips_by_hand():
    assert statistics.sign_flip_test([1.0, 2.0, 3.0]) == 2 / 8  # only all signs alike reach a sum of 6
    assert statistics.sign_flip_test([3.0, -1.0]) == 4 / 4  # |3 - 1| = 2 is the smallest sum there is
    assert statistics.sign_flip_test([1.0, 1.0, -1.0]) == 1.0  # every sum is at least 1 in size
    assert statistics.sign_flip_test([5.0]) == 1.0
    assert statistics.sign_flip_test([0.1] * 10) == 2 / 2**10
    assert math.isnan(statistics.sign_flip_test([]))
    assert math.isnan(statistics.sign_flip_test([1.0, math.nan]))


def test_random_flips_agree_with_counting():
    differences = numpy.random.default_rng(4).normal(0.3, 1.0, 15)
    sums = numpy.array(list(itertools.product((-1, 1), repeat=15))) @ differences
    exact = (abs(sums) >= abs(differences.sum()) - 1e-12).mean()
    # 10^5 flips: the standard error of a p of 0.3 is 0.0015
    assert abs(statistics.sign_flip_test(differences) - exact) < 0.006
    assert statistics.sign_flip_test([1.0] * 40) == pytest.approx(1 / 100_001)  # never 0


def test_p_is_uniform_under_the_null():
    rng = numpy.random.default_rng(5)
    p_values = [statistics.sign_flip_test(rng.standard_t(2, 10)) for _ in range(400)]
    for level in (0.05, 0.25, 0.5):
        share = numpy.mean([p <= level for p in p_values])
        assert abs(share - level) < 3.5 * (level * (1 - level) / 400) ** 0.5


def test_holm_by_hand():
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([0.5, 0.6]) == [1.0, 1.0]
    assert statistics.holm([0.2]) == [0.2]
    assert statistics.holm([]) == []
    with_gap = statistics.holm([0.01, math.nan, 0.03])
    assert with_gap == pytest.approx([0.02, math.nan, 0.03], nan_ok=True)


def test_holm_rejects_what_the_step_down_procedure_rejects():
    rng = numpy.random.default_rng(6)
    for _ in range(50):
        p_values = list(rng.beta(0.3, 2.0, 7))
        rejected = set()
        for step, i in enumerate(numpy.argsort(p_values)):
            if p_values[i] > 0.05 / (7 - step):
                break
            rejected.add(int(i))
        assert {i for i, p in enumerate(statistics.holm(p_values)) if p <= 0.05} == rejected


def test_interquartile_mean_trims_a_quarter_at_either_end():
    assert statistics.iqm([100.0, 1.0, 2.0, -50.0]) == 1.5
    assert statistics.iqm([[8.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0]]) == 4.5
    assert statistics.iqm([1.0, 5.0, 3.0]) == 3.0  # less than four values: the mean
    low, high = statistics.iqm_interval([[1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 4.0, 5.0]])
    assert 1 < low < 3 < high < 5
    assert all(math.isnan(end) for end in statistics.iqm_interval([[1.0]]))


def test_interval_over_tasks_draws_a_seed_with_all_its_tasks():
    """The same runs under two names are no more evidence than under one."""
    values = list(numpy.random.default_rng(7).normal(0, 1, 16))
    one, two = statistics.iqm_interval([values]), statistics.iqm_interval([values, values])
    assert two == pytest.approx(one)


def test_probability_of_improvement_counts_pairs():
    assert statistics.probability_of_improvement([3.0, 1.0], [2.0, 0.0]) == 3 / 4
    assert statistics.probability_of_improvement([1.0, 1.0], [1.0]) == 0.5
    assert statistics.probability_of_improvement([0.0], [1.0, 2.0, 3.0]) == 0.0


@pytest.mark.parametrize(
    ("difference", "interval", "p", "smallest", "expected"),
    [
        (0.02, (0.01, 0.03), 0.01, 0.0, "helps"),
        (-0.02, (-0.03, -0.01), 0.01, 0.0, "harms"),
        (0.02, (-0.01, 0.05), 0.01, 0.0, "no effect found"),
        (0.02, (0.01, 0.03), 0.05, 0.0, "no effect found"),
        (0.02, (0.01, 0.03), 0.01, 0.03, "no effect found"),
        (0.02, (0.0, 0.03), 0.01, 0.0, "no effect found"),
        (0.02, (math.nan, math.nan), 0.01, 0.0, "no verdict"),
        (0.02, (0.01, 0.03), math.nan, 0.0, "no verdict"),
    ],
)
def test_verdict_needs_interval_p_and_size(difference, interval, p, smallest, expected):
    assert statistics.verdict(difference, interval, p, smallest=smallest) == expected


def test_factorial_effects_recover_an_additive_model_with_one_interaction():
    factors = ("a", "b", "c")
    subsets = [frozenset(chosen) for n in range(4) for chosen in itertools.combinations(factors, n)]
    base = numpy.array([1.0, 2.0])
    effects = {"a": 0.5, "b": -0.25, "c": 0.0}
    outcomes = {
        subset: base + sum(effects[f] for f in subset) + (0.75 if {"a", "b"} <= subset else 0.0) for subset in subsets
    }
    # half of all backgrounds of a hold b, and add half of the interaction
    assert statistics.main_effect(outcomes, "a") == pytest.approx([0.875, 0.875])
    assert statistics.main_effect(outcomes, "b") == pytest.approx([0.125, 0.125])
    assert statistics.main_effect(outcomes, "c") == pytest.approx([0.0, 0.0])
    assert statistics.interaction(outcomes, "a", "b") == pytest.approx([0.75, 0.75])
    assert statistics.interaction(outcomes, "a", "c") == pytest.approx([0.0, 0.0])
