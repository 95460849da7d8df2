"""How many retries a router may add to its load."""

from __future__ import annotations


class RetryBudget:
    """Every request pays a part of a retry in, every retry takes one out: a dying fleet is not hammered.

    ratio: retries per request in the long run. burst: the most that can be saved up, and what there is at the start.
    """

    def __init__(self, ratio: float, burst: int) -> None:
        self._ratio = ratio
        self._burst = float(burst)
        self.left = self._burst

    def request(self) -> None:
        self.left = min(self._burst, self.left + self._ratio)

    def take(self) -> bool:
        """Whether one more retry is allowed, which is then taken."""
        if self.left < 1.0:
            return False
        self.left -= 1.0
        return True
