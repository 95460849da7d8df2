"""Changes during a replay: workers join, or drain and leave, and TPOT takes time to recover; or workers slow down."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from eldr.replay.errors import ReplayError
from eldr.replay.measurements import RunResult

# TPOT has recovered when it is at most this multiple of its later level.
RECOVERED = 1.1
BIN_S = 1.0


@dataclass(frozen=True, slots=True)
class FleetChange:
    """A change of the fleet during a replay.

    at: when, as a share 0..1 of the measured run.
    workers: how many workers join (positive), or drain and leave (negative).
    """

    at: float
    workers: int


@dataclass(frozen=True, slots=True)
class Slowdown:
    """A worker whose steps take longer for a while.

    worker: its name.
    factor: how many times as long its steps take.
    begins, ends: when, as shares 0..1 of the measured run.
    """

    worker: str
    factor: float
    begins: float
    ends: float

    @property
    def index(self) -> int:
        """The number in the worker's name."""
        return int(self.worker[1:])


def parse_slowdowns(text: str) -> tuple[Slowdown, ...]:
    """Parse slowdowns such as w3=1.5@0.4-0.7,w0=2@0.5-1. Raises ReplayError."""
    share, slowdowns = r"(0?\.\d+|0|1)", []
    for part in text.split(","):
        found = re.fullmatch(rf"(w\d+)=(\d+|\d*\.\d+)@{share}-{share}", part.strip())
        if not found or float(found[2]) == 0 or float(found[3]) >= float(found[4]):
            raise ReplayError(f"{part!r} is not a slowdown; expected WORKER=FACTOR@FROM-TO, such as w3=1.5@0.4-0.7")
        slowdowns.append(Slowdown(found[1], float(found[2]), float(found[3]), float(found[4])))
    return tuple(slowdowns)


def parse_changes(text: str) -> tuple[FleetChange, ...]:
    """Parse changes such as 0.3:+2,0.7:-1. Raises ReplayError."""
    changes = []
    for part in text.split(","):
        found = re.fullmatch(r"(0?\.\d+|0|1):([+-][1-9]\d*)", part.strip())
        if not found:
            raise ReplayError(f"{part!r} is not a fleet change; expected SHARE:+N or SHARE:-N, such as 0.5:-1")
        changes.append(FleetChange(float(found[1]), int(found[2])))
    return tuple(sorted(changes, key=lambda change: change.at))


def recovery_s(run: RunResult, change: FleetChange, until: float) -> float:
    """Seconds from a change until mean TPOT stays at its later level. NaN if it never does.

    The level is the mean over requests that arrive in the second half of the time between the change and the share
    `until` of the run. It is reached when the mean of two seconds of arrivals is within a tenth of it.
    """
    count = len(run.tpot_s)
    first, last = round(change.at * count), round(until * count)
    if last - first < 4:
        return float("nan")
    since_s = run.arrival_s[first:last] - run.arrival_s[first]
    tpot_s = run.tpot_s[first:last]
    level_s = tpot_s[len(tpot_s) // 2 :].mean()
    for start_s in np.arange(0.0, float(since_s[-1]), BIN_S):
        window = tpot_s[(since_s >= start_s) & (since_s < start_s + 2 * BIN_S)]
        if len(window) and window.mean() <= RECOVERED * level_s:
            return float(start_s)
    return float("nan")
