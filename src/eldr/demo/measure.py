"""What is measured of a policy: requests, active experts, and where they were decoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from eldr.load.outcome import Outcome


@dataclass(frozen=True, slots=True)
class ActiveExperts:
    """Sum and count of the distinct experts that a batch activates, over decode steps and MoE layers."""

    total: float
    samples: float

    def __sub__(self, earlier: ActiveExperts) -> ActiveExperts:
        return ActiveExperts(self.total - earlier.total, self.samples - earlier.samples)

    def __add__(self, other: ActiveExperts) -> ActiveExperts:
        return ActiveExperts(self.total + other.total, self.samples + other.samples)

    @property
    def mean(self) -> float | None:
        """0 to E; None if nothing was decoded."""
        return self.total / self.samples if self.samples > 0 else None


@dataclass(slots=True)
class PolicyRun:
    """One policy's run of the workload, growing while it runs.

    active: decode worker URL -> what that worker counted since the run began.
    served_by: number of a request -> URL of its decode worker, as far as known.
    """

    policy: str
    outcomes: list[Outcome] = field(default_factory=list)
    active: dict[str, ActiveExperts] = field(default_factory=dict)
    served_by: dict[int, str] = field(default_factory=dict)
    duration_s: float = 0.0

    @property
    def succeeded(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.error is None]

    @property
    def errors(self) -> int:
        return len(self.outcomes) - len(self.succeeded)

    @property
    def ttft_s(self) -> list[float]:
        return [ttft for outcome in self.succeeded if (ttft := outcome.ttft_s) is not None]

    @property
    def tpot_s(self) -> list[float]:
        return [tpot for outcome in self.succeeded if (tpot := outcome.tpot_s) is not None]

    @property
    def itl_s(self) -> list[float]:
        return [gap for outcome in self.succeeded for gap in outcome.itl_s]

    @property
    def active_experts_mean(self) -> float | None:
        """Mean over the decode steps and MoE layers of all decode workers."""
        return sum(self.active.values(), ActiveExperts(0, 0)).mean

    def placement(self, kinds: Sequence[str], workers: Sequence[str]) -> list[list[int]]:
        """[kinds][workers] requests of a kind that a decode worker served."""
        counts = [[0] * len(workers) for _ in kinds]
        for outcome in self.outcomes:
            worker = self.served_by.get(outcome.number)
            if worker in workers and outcome.kind in kinds:
                counts[kinds.index(outcome.kind)][workers.index(worker)] += 1
        return counts


def workers_per_kind(placement: Sequence[Sequence[int]]) -> float | None:
    """Over how many workers a kind of request is spread: 1 to the number of workers, mean over kinds.

    placement: [kinds][workers] requests. Each kind gives the exponential of the Shannon entropy of its shares, the
    effective number of workers (Hill 1973). None without requests.
    """
    spreads = []
    for counts in placement:
        shares = np.array([count for count in counts if count > 0], dtype=float) / max(1, sum(counts))
        if shares.size:
            spreads.append(float(np.exp(-np.sum(shares * np.log(shares)))))
    return sum(spreads) / len(spreads) if spreads else None
