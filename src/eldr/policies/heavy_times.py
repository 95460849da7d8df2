"""How long the steps of a fleet's busiest times are, which set the tail of TPOT."""

from __future__ import annotations

import numpy as np

# The quantile is that of so many starts. Like the fleet's means, it forgets by requests, since policies have no clock.
STARTS = 500
# The share of starts whose limit is at most the one of heavy times.
SHARE = 0.9
# The quantile is computed anew after so many starts.
EVERY = 16


class HeavyTimes:
    """The limit that the tail guard had at the busiest tenth of the last STARTS starts.

    A step that is not longer than this would not stand out at those times, and they hold the slowest requests. So it
    costs the tail of TPOT nothing, however short the other steps are now.

    limit_s: that limit in seconds. 0 before the first EVERY starts.
    """

    def __init__(self) -> None:
        self.limit_s = 0.0
        self._limits_s = np.zeros(STARTS)
        self._starts = 0

    def add(self, limit_s: float) -> None:
        """A request has started. limit_s: the longest step that the guard let pass at that time."""
        self._limits_s[self._starts % STARTS] = limit_s
        self._starts += 1
        if self._starts % EVERY == 0:
            kept = min(self._starts, STARTS)
            rank = int(SHARE * (kept - 1))
            self.limit_s = float(np.partition(self._limits_s[:kept], rank)[rank])
