"""Intervals and tests, from scipy, made in one place from per-row records. Intervals are of 95%."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


def share_interval(hits: int, n: int) -> tuple[float, float]:
    """Exact (Clopper–Pearson) interval of a share: right for rare leaks too, where a bootstrap says 0 to 0."""
    interval = stats.binomtest(hits, n).proportion_ci(CONFIDENCE, method="exact")
    return float(interval.low), float(interval.high)


def bootstrap_interval(values: Sequence[float], statistic: Any = np.mean, *, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap over rows of a mean or a median.

    Constant values, and a single row, have the interval of one point: there is nothing to resample.
    """
    array = np.asarray(values, dtype=float)
    if array.size < 2 or np.all(array == array[0]):
        point = float(statistic(array))
        return point, point
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        interval = stats.bootstrap(
            (array,),
            statistic,
            n_resamples=2000,
            confidence_level=CONFIDENCE,
            method="percentile",
            rng=np.random.default_rng(seed),
        ).confidence_interval
    return float(interval.low), float(interval.high)


def paired_statistic_interval(
    after: Sequence[float], before: Sequence[float], statistic: Any, *, factor: float = 1.0, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap of statistic(after) − factor · statistic(before), the two of one row drawn together."""
    pairs = np.asarray([after, before], dtype=float)
    if pairs.shape[1] < 2:
        point = float(statistic(pairs[0]) - factor * statistic(pairs[1]))
        return point, point
    drawn = np.random.default_rng(seed).integers(pairs.shape[1], size=(2000, pairs.shape[1]))
    found = statistic(pairs[0][drawn], axis=-1) - factor * statistic(pairs[1][drawn], axis=-1)
    low, high = np.quantile(found, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def kept_interval(
    after: Sequence[float], before: Sequence[float], whole: Sequence[float], *, seed: int = 0
) -> tuple[float, float] | None:
    """Percentile bootstrap of (mean after − mean before) / (mean whole − mean before), all of one row drawn together.

    Draws in which the whole did not move say nothing of what was kept of it; none where most of them are such.
    """
    rows = np.asarray([after, before, whole], dtype=float)
    drawn = rows[:, np.random.default_rng(seed).integers(rows.shape[1], size=(2000, rows.shape[1]))].mean(-1)
    moved = drawn[2] - drawn[1]
    says = np.sign(moved) == np.sign(rows[2].mean() - rows[1].mean())
    if rows.shape[1] < 2 or says.mean() < 0.5 or not moved[says].all():
        return None
    low, high = np.quantile(
        ((drawn[0] - drawn[1]) / np.where(says, moved, 1.0))[says], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    )
    return float(low), float(high)


def paired_share_interval(after: Sequence[bool], before: Sequence[bool], *, factor: float = 1.0) -> tuple[float, float]:
    """Interval of the mean of `after − factor · before` for rows that are 0 or 1, right for few rows and rare changes.

    Agresti and Min (2005): half a row is added to each of the four cells; a bootstrap would say of rows that all
    changed alike that there is no doubt.
    """
    cells = [(a, b) for a in (0, 1) for b in (0, 1)]
    values = np.array([a - factor * b for a, b in [*zip(after, before, strict=True), *cells]], dtype=float)
    weights = np.array([1.0] * len(after) + [0.5] * len(cells))
    total = weights.sum()
    mean = float((weights * values).sum() / total)
    error = float(np.sqrt((weights * (values - mean) ** 2).sum()) / total)
    z = float(stats.norm.ppf(0.5 + CONFIDENCE / 2))
    return mean - z * error, mean + z * error


def mcnemar(after: Sequence[bool], before: Sequence[bool]) -> float:
    """Exact McNemar test, two-sided p: rows that changed are as likely to have changed one way as the other."""
    gained = sum(one and not other for one, other in zip(after, before, strict=True))
    lost = sum(other and not one for one, other in zip(after, before, strict=True))
    return float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def holm(pvalues: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: p values that hold for all of the tests together."""
    order = sorted(range(len(pvalues)), key=lambda at: pvalues[at])
    adjusted, worst = [0.0] * len(pvalues), 0.0
    for rank, at in enumerate(order):
        worst = max(worst, min(1.0, (len(pvalues) - rank) * pvalues[at]))
        adjusted[at] = worst
    return adjusted


def cohens_h(after: float, before: float) -> float:
    """Effect size of a difference of shares: 2 asin √after − 2 asin √before; 0.2 is small, 0.8 large."""
    return float(2 * np.arcsin(np.sqrt(after)) - 2 * np.arcsin(np.sqrt(before)))


def most_likely_leak(leaks: int, draws: int) -> float:
    """Clopper–Pearson upper bound (one-sided, 95%) on the chance that one more draw leaks."""
    return 1.0 if leaks == draws else float(stats.beta.ppf(CONFIDENCE, leaks + 1, draws - leaks))
