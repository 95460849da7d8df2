"""Paired comparisons over seeds: signed percent changes with Student's t intervals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Change:
    """A signed percent change and the 95 % confidence interval of its mean over seeds.

    With one seed the bounds are NaN.
    """

    percent: float
    low: float
    high: float


def paired_change(values: NDArray[np.float64], baseline: NDArray[np.float64]) -> Change:
    """Mean over seeds of 100 * (value / baseline - 1). Both arrays are [S] and paired by seed."""
    changes = 100 * (values / baseline - 1)
    mean = float(changes.mean())
    if len(changes) < 2:
        return Change(mean, float("nan"), float("nan"))
    error = float(changes.std(ddof=1)) / np.sqrt(len(changes))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(changes) - 1)) * error
    return Change(mean, mean - half, mean + half)
