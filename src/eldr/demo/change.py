"""What a policy does to TPOT: signed changes against the first policy, paired by round, with intervals over rounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from eldr.demo.measure import PolicyRun
from eldr.replay.statistics import Change, paired_change

# Figures of TPOT over the requests of a round.
FIGURES: Mapping[str, Callable[[NDArray[np.float64]], np.floating]] = {
    "p50": lambda tpot_s: np.percentile(tpot_s, 50),
    "p99": lambda tpot_s: np.percentile(tpot_s, 99),
    "mean": lambda tpot_s: np.mean(tpot_s),
}


def tpot_changes(runs: Sequence[PolicyRun]) -> dict[str, dict[str, Change]]:
    """For each policy but the first, the change of each of FIGURES against the first, in percent.

    Rounds are paired: all policies had the same requests in a round, minutes apart at most. The interval is Student's,
    over the measured rounds, and its bounds are NaN with a single one. A policy without a round to compare is left out.
    """
    changes = {}
    for run in runs[1:]:
        turns = [
            (np.array(own.tpot_s), np.array(base.tpot_s))
            for own, base in zip(run.measured, runs[0].measured, strict=False)
            if own.tpot_s and base.tpot_s
        ]
        if turns:
            changes[run.policy] = {name: _change(figure, turns) for name, figure in FIGURES.items()}
    return changes


def _change(
    figure: Callable[[NDArray[np.float64]], np.floating],
    turns: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]],
) -> Change:
    own, base = (np.array([float(figure(tpot_s)) for tpot_s in side]) for side in zip(*turns, strict=True))
    return paired_change(own, base)


def in_words(change: Change) -> str:
    """A change as text, such as `-18.2 % (-20.1 to -16.3)`."""
    text = f"{change.percent:+.1f} %"
    return text if np.isnan(change.low) else f"{text} ({change.low:+.1f} to {change.high:+.1f})"
