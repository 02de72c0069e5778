"""Intervals: 95%, from scipy, made in one place from per-row records."""

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
