"""All that a demo run found out."""

from __future__ import annotations

from dataclasses import dataclass, field

from eldr.calibration import Calibration
from eldr.demo.measure import PolicyRun
from eldr.demo.outputs import OutputCheck


@dataclass(slots=True)
class DemoResult:
    """Runs of the policies over the same requests, on decode workers at the URLs `workers`."""

    calibration: Calibration
    workers: list[str]
    runs: list[PolicyRun]
    check: OutputCheck = field(default_factory=OutputCheck)

    @property
    def passed(self) -> bool:
        """No request failed, and every output is the reference's or a tie."""
        errors = sum(run.errors for run in self.runs)
        requests = sum(len(run.outcomes) for run in self.runs)
        return errors == 0 and not self.check.differences and self.check.total == requests
