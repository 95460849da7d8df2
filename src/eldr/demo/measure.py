"""Measurements of one policy, round by round: its requests, where they were decoded, and the active experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from eldr.load.outcome import Outcome


@dataclass(frozen=True, slots=True)
class ActiveExperts:
    """How many distinct experts a batch activates: sum and count over decode steps and MoE layers."""

    total: float
    samples: float

    def __sub__(self, earlier: ActiveExperts) -> ActiveExperts:
        return ActiveExperts(self.total - earlier.total, self.samples - earlier.samples)

    def __add__(self, other: ActiveExperts) -> ActiveExperts:
        return ActiveExperts(self.total + other.total, self.samples + other.samples)

    @property
    def mean(self) -> float | None:
        """From 0 to the number of experts. None if nothing was decoded."""
        return self.total / self.samples if self.samples > 0 else None


@dataclass(slots=True)
class Round:
    """One policy's turn: the same requests as those of the other policies in the same round. It grows while it lasts.

    measured: whether its times count. Those of the warm-up do not.
    active: decode worker URL -> the worker's counts since the round began.
    """

    measured: bool = True
    outcomes: list[Outcome] = field(default_factory=list)
    active: dict[str, ActiveExperts] = field(default_factory=dict)
    duration_s: float = 0.0

    @property
    def succeeded(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.error is None]

    @property
    def tpot_s(self) -> list[float]:
        return [tpot for outcome in self.succeeded if (tpot := outcome.tpot_s) is not None]


@dataclass(slots=True)
class PolicyRun:
    """All rounds of one policy. Outcomes and placements are those of all rounds, times those of the measured ones.

    served_by: request number -> URL of its decode worker, if already known.
    """

    policy: str
    rounds: list[Round] = field(default_factory=list)
    served_by: dict[int, str] = field(default_factory=dict)

    @property
    def outcomes(self) -> list[Outcome]:
        return [outcome for turn in self.rounds for outcome in turn.outcomes]

    @property
    def measured(self) -> list[Round]:
        return [turn for turn in self.rounds if turn.measured]

    @property
    def succeeded(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.error is None]

    @property
    def errors(self) -> int:
        return len(self.outcomes) - len(self.succeeded)

    @property
    def ttft_s(self) -> list[float]:
        return [ttft for outcome in self._timed if (ttft := outcome.ttft_s) is not None]

    @property
    def tpot_s(self) -> list[float]:
        return [tpot for turn in self.measured for tpot in turn.tpot_s]

    @property
    def itl_s(self) -> list[float]:
        return [gap for outcome in self._timed for gap in outcome.itl_s]

    @property
    def duration_s(self) -> float:
        return sum(turn.duration_s for turn in self.measured)

    @property
    def active(self) -> dict[str, ActiveExperts]:
        """The counts of each decode worker."""
        total: dict[str, ActiveExperts] = {}
        for turn in self.measured:
            for url, counts in turn.active.items():
                total[url] = total.get(url, ActiveExperts(0, 0)) + counts
        return total

    @property
    def active_experts_mean(self) -> float | None:
        """Mean over the decode steps and MoE layers of all decode workers. None if nothing was decoded."""
        return sum(self.active.values(), ActiveExperts(0, 0)).mean

    @property
    def _timed(self) -> list[Outcome]:
        return [outcome for turn in self.measured for outcome in turn.succeeded]

    def placement(self, kinds: Sequence[str], workers: Sequence[str]) -> list[list[int]]:
        """How many requests of each kind each decode worker served, as [kinds][workers]."""
        counts = [[0] * len(workers) for _ in kinds]
        for outcome in self.outcomes:
            worker = self.served_by.get(outcome.number)
            if worker in workers and outcome.kind in kinds:
                counts[kinds.index(outcome.kind)][workers.index(worker)] += 1
        return counts


def workers_per_kind(placement: Sequence[Sequence[int]]) -> float | None:
    """How many workers a kind of request is spread over, averaged over kinds: 1 to the number of workers.

    placement: requests as [kinds][workers]. A kind's spread is the effective number of its workers: the exponential of
    the Shannon entropy of their shares (Hill 1973). None without requests.
    """
    spreads = []
    for counts in placement:
        shares = np.array([count for count in counts if count > 0], dtype=float) / max(1, sum(counts))
        if shares.size:
            spreads.append(float(np.exp(-np.sum(shares * np.log(shares)))))
    return sum(spreads) / len(spreads) if spreads else None
