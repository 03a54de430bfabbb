"""What paired seeds say: intervals, tests and verdicts.

Two arms of an experiment share their seeds, so that the difference of a seed is free of what they have in common. An
effect is claimed only if two different methods see it: the bootstrap interval of the mean difference leaves out 0, and
few of the ways in which the signs of the differences could have fallen give a mean as large.

    import biofunc.statistics                                              # needs the extra demo, for NumPy and SciPy

    differences = (accuracy["mine"] - accuracy["plain"]).tolist()          # one number per seed
    interval = biofunc.statistics.bca_interval(differences)
    p = biofunc.statistics.sign_flip_test(differences)
    biofunc.statistics.verdict(sum(differences) / len(differences), interval, p)
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy

__all__ = [
    "bca_interval",
    "holm",
    "interaction",
    "iqm",
    "iqm_interval",
    "main_effect",
    "probability_of_improvement",
    "sign_flip_test",
    "verdict",
]

CONFIDENCE = 0.95
RESAMPLES = 9999
EXACT_UP_TO = 14
"""Seeds up to which all 2^n sign flips are counted out."""
FLIPS = 100_000

Values = Sequence[float]


def bca_interval(differences: Values) -> tuple[float, float]:
    """Interval of 95 % for the mean, by the bias-corrected and accelerated bootstrap (Efron 1987).

    Args:
        differences: one number per seed, independent of each other.

    Returns:
        Lower and upper end. NaN with less than two seeds or if a number is not finite; a point if all are equal.
    """
    from scipy.stats import bootstrap

    values = numpy.asarray(differences, dtype=float)
    if len(values) < 2 or not numpy.isfinite(values).all():
        return math.nan, math.nan
    if numpy.ptp(values) <= 1e-12 * numpy.abs(values).max():  # no spread: the bootstrap distribution is a point
        return float(values[0]), float(values[0])
    interval = bootstrap(
        (values,), numpy.mean, n_resamples=RESAMPLES, confidence_level=CONFIDENCE, rng=0
    ).confidence_interval
    return float(interval.low), float(interval.high)


def sign_flip_test(differences: Values) -> float:
    """Two-sided p of the mean difference: the share of sign flips whose mean is at least as far from 0.

        p = P(|mean(s d)| >= |mean(d)|),  s uniform on {-1, 1}^n

    Args:
        differences: one number per seed.

    Returns:
        The exact p with up to 14 seeds; beyond, from 10^5 random flips with a fixed generator, the observed one
        counted among them, so that p is never 0. NaN if a number is not finite or there is none.
    """
    values = numpy.asarray(differences, dtype=float)
    if not len(values) or not numpy.isfinite(values).all():
        return math.nan
    seeds = len(values)
    observed = abs(values.sum()) * (1 - 1e-9)  # flips that tie with it in exact arithmetic count
    if seeds <= EXACT_UP_TO:
        signs = numpy.array(list(itertools.product((-1.0, 1.0), repeat=seeds)))
        return float((numpy.abs(signs @ values) >= observed).mean())
    signs = 2.0 * numpy.random.default_rng(0).integers(0, 2, (FLIPS, seeds)) - 1
    return float((1 + (numpy.abs(signs @ values) >= observed).sum()) / (1 + FLIPS))


def holm(p_values: Values) -> list[float]:
    """Holm's step-down correction: `p_(i) <- max over j <= i of min(1, (m - j) p_(j))`, p sorted, j from 0.

    Args:
        p_values: of m tests; a NaN (no test was possible) stays NaN and is not counted.

    Returns:
        Corrected p in the order given.
    """
    corrected = [math.nan] * len(p_values)
    order = sorted([i for i, p in enumerate(p_values) if not math.isnan(p)], key=lambda i: p_values[i])
    largest = 0.0
    for j, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - j) * p_values[i]))
        corrected[i] = largest
    return corrected


def iqm(values: Any) -> float:
    """Interquartile mean: the mean of the middle half, a quarter trimmed at either end (rounded down).

    Args:
        values: numbers of any shape; runs and tasks are pooled.

    Returns:
        The mean of those that stay.
    """
    ordered = numpy.sort(numpy.asarray(values, dtype=float), axis=None)
    trimmed = len(ordered) // 4
    return float(ordered[trimmed : len(ordered) - trimmed].mean())


def iqm_interval(tasks: Sequence[Values], resamples: int = 2000) -> tuple[float, float]:
    """Interval of 95 % by the percentile bootstrap for the interquartile mean over tasks and seeds.

    A seed is drawn with all its tasks, since what it fixes is shared by them.

    Args:
        tasks: one sequence of numbers per task, one number per seed, the same seeds in all.
        resamples: bootstrap samples.

    Returns:
        Lower and upper end; NaN with less than two seeds or if a number is not finite.
    """
    values = numpy.asarray(tasks, dtype=float)
    seeds = values.shape[1]
    if seeds < 2 or not numpy.isfinite(values).all():
        return math.nan, math.nan
    drawn = values[:, numpy.random.default_rng(0).integers(0, seeds, (resamples, seeds))]
    ordered = numpy.sort(drawn.transpose(1, 0, 2).reshape(resamples, -1), axis=1)
    trimmed = ordered.shape[1] // 4
    means = ordered[:, trimmed : ordered.shape[1] - trimmed].mean(axis=1)
    low, high = numpy.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def probability_of_improvement(arm: Values, control: Values) -> float:
    """P(arm > control) for a random run of each, ties counted half: the Mann-Whitney U over the number of pairs.

    Args:
        arm: one number per run.
        control: one number per run; not paired with those of the arm.

    Returns:
        In [0, 1]; 0.5 where neither is better.
    """
    left, right = numpy.asarray(arm, dtype=float)[:, None], numpy.asarray(control, dtype=float)[None]
    return float((left > right).mean() + 0.5 * (left == right).mean())


def verdict(
    difference: float,
    interval: tuple[float, float],
    p: float,
    *,
    alpha: float = 0.05,
    smallest: float = 0.0,
    names: tuple[str, str, str] = ("helps", "harms", "no effect found"),
) -> str:
    """Says what may be claimed.

    Args:
        difference: mean paired difference, positive where the arm is better.
        interval: its confidence interval.
        p: of the permutation test, corrected for the number of arms.
        alpha: p below which an effect is claimed.
        smallest: size from which on an effect counts.
        names: of a positive, a negative and no effect.

    Returns:
        The name of a positive or negative effect if the interval leaves out 0, p < alpha and |difference| >= smallest;
        else the name of no effect. "no verdict" where a number is missing or not finite.
    """
    low, high = interval
    if not all(math.isfinite(number) for number in (difference, low, high, p)):
        return "no verdict"
    if p < alpha and abs(difference) >= smallest:
        if low > 0:
            return names[0]
        if high < 0:
            return names[1]
    return names[2]


def main_effect(outcomes: Mapping[frozenset[str], Values], factor: str) -> list[float]:
    """Effect of a factor of a full factorial, per seed: the mean of `y(with) - y(without)` over all other factors.

    Args:
        outcomes: one number per seed for every subset of the factors.
        factor: the factor.

    Returns:
        One number per seed.
    """
    pairs = [(outcomes[subset | {factor}], outcomes[subset]) for subset in outcomes if factor not in subset]
    return [float(d) for d in numpy.mean([numpy.subtract(on, off) for on, off in pairs], axis=0)]


def interaction(outcomes: Mapping[frozenset[str], Values], first: str, second: str) -> list[float]:
    """How much more two factors do together than one by one, per seed, as a mean over all other factors.

        y(both) - y(first) - y(second) + y(neither)

    Args:
        outcomes: one number per seed for every subset of the factors.
        first: a factor.
        second: another.

    Returns:
        One number per seed; positive where the two help each other.
    """
    contrasts = [
        numpy.asarray(outcomes[subset | {first, second}], dtype=float)
        - outcomes[subset | {first}]
        - outcomes[subset | {second}]
        + outcomes[subset]
        for subset in outcomes
        if not subset & {first, second}
    ]
    return [float(d) for d in numpy.mean(contrasts, axis=0)]
