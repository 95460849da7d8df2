"""Whether a calibration that was fitted elsewhere fits a trace."""

from __future__ import annotations

from eldr.calibration import Calibration
from eldr.replay.errors import ReplayError
from eldr.trace import TraceMeta


def check_calibration(calibration: Calibration, meta: TraceMeta) -> None:
    """Raise ReplayError if the calibration is for a model of another shape than the trace's."""
    if calibration.geometry.shape != (meta.layers, meta.experts, meta.top_k):
        raise ReplayError(
            f"the calibration is for {calibration.geometry}, the trace has {meta.layers} layers x {meta.experts} "
            f"experts, top-{meta.top_k}"
        )
