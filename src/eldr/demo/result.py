"""The result of a demo run."""

from __future__ import annotations

from dataclasses import dataclass, field

from eldr.calibration import Calibration
from eldr.demo.change import tpot_changes
from eldr.demo.measure import PolicyRun
from eldr.demo.outputs import OutputCheck
from eldr.demo.padded import ExpertBytes
from eldr.demo.step_cost import StepLine
from eldr.replay.statistics import Change


@dataclass(slots=True)
class DemoResult:
    """The runs of all policies over the same requests.

    workers: the URLs of the decode workers.
    runs: of all policies. The others are compared with the first.
    step_line: what a decode step costs on this machine.
    experts: what the experts weigh.
    """

    calibration: Calibration
    workers: list[str]
    runs: list[PolicyRun]
    step_line: StepLine
    experts: ExpertBytes
    check: OutputCheck = field(default_factory=OutputCheck)

    @property
    def tpot_changes(self) -> dict[str, dict[str, Change]]:
        """The change of TPOT from the first policy to each of the others, as `eldr.demo.change` defines it."""
        return tpot_changes(self.runs)

    @property
    def measured_rounds(self) -> int:
        return min(len(run.measured) for run in self.runs)

    @property
    def passed(self) -> bool:
        """Whether no request failed, and every output is equal to the reference or tied."""
        errors = sum(run.errors for run in self.runs)
        requests = sum(len(run.outcomes) for run in self.runs)
        return errors == 0 and not self.check.differences and self.check.total == requests
