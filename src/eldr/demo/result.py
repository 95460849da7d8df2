"""The result of a demo run."""

from __future__ import annotations

from dataclasses import dataclass, field

from eldr.calibration import Calibration
from eldr.demo.measure import PolicyRun
from eldr.demo.outputs import OutputCheck


@dataclass(slots=True)
class DemoResult:
    """The runs of all policies over the same requests.

    workers: the URLs of the decode workers.
    """

    calibration: Calibration
    workers: list[str]
    runs: list[PolicyRun]
    check: OutputCheck = field(default_factory=OutputCheck)

    @property
    def passed(self) -> bool:
        """Whether no request failed, and every output is equal to the reference or tied."""
        errors = sum(run.errors for run in self.runs)
        requests = sum(len(run.outcomes) for run in self.runs)
        return errors == 0 and not self.check.differences and self.check.total == requests
