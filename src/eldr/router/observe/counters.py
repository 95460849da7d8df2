"""The router's counters as plain numbers. `api/metrics.py` turns them into Prometheus' exposition format."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict

from eldr.router.config.endpoint import Role

# vLLM's own bucket bounds for the same quantities, so that both can be compared.
TTFT_BOUNDS_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
# Finer than the bounds of TPOT around the time of a decode step, because the tail of the gaps between events matters.
ITL_BOUNDS_S = (
    0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 10.0,
)  # fmt: skip
TPOT_BOUNDS_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip


class Histogram:
    """Counts of observations per bucket, and their sum.

    Code that observes a million times a second updates it directly.
    """

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


class Metrics:
    """The counters, one attribute per metric.

    Dictionary keys are label values, in the order in which `api/metrics.py` names them.
    """

    def __init__(self) -> None:
        self.requests: defaultdict[tuple[str, int], int] = defaultdict(int)
        self.disconnects = 0
        self.decisions: defaultdict[tuple[str, str], int] = defaultdict(int)
        self.policy_errors = 0
        self.counts_errors: defaultdict[str, int] = defaultdict(int)
        self.expert_reports: defaultdict[tuple[str, str], int] = defaultdict(int)
        self.passthrough: defaultdict[str, int] = defaultdict(int)
        self.retries: defaultdict[tuple[str, str], int] = defaultdict(int)
        self.retries_denied: defaultdict[tuple[str, str], int] = defaultdict(int)
        self.timeouts: defaultdict[str, int] = defaultdict(int)
        self.failures: defaultdict[tuple[str, str, str], int] = defaultdict(int)
        self.ejections: defaultdict[tuple[str, str, str], int] = defaultdict(int)
        self.handoffs = 0
        self.prefill_spills = 0
        self.prompt_tokens = 0
        self.prompt_tokens_cached = 0
        self.broken_streams = 0
        self.stream_events = 0
        self.refits: defaultdict[str, int] = defaultdict(int)
        self.zones_moved = 0
        self.refit_shift = 0.0
        # Fits of prompt models by outcome; how long the last took, and what share of the variance it explained.
        self.learning: defaultdict[str, int] = defaultdict(int)
        self.learning_duration_s = 0.0
        self.learning_r2 = 0.0
        self.learning_trust: float | None = None
        self.refit_duration_s = 0.0
        self.last_refit_s: float | None = None
        self.ttft = Histogram(TTFT_BOUNDS_S)
        self.itl = Histogram(ITL_BOUNDS_S)
        self.tpot = Histogram(TPOT_BOUNDS_S)
        self.prefill = Histogram(TTFT_BOUNDS_S)
        self.queue = Histogram(TTFT_BOUNDS_S)

    def forget(self, role: Role, url: str) -> None:
        """Drop the series of a worker that has left, so that the exposition does not grow forever."""
        for counts in (self.failures, self.ejections):
            for key in [key for key in counts if key[:2] == (role, url)]:
                del counts[key]
