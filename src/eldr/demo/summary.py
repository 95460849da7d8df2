"""Writes summary.json, the figures of a demo run for other programs."""

from __future__ import annotations

import json
from math import isnan
from pathlib import Path
from typing import IO, Any

from eldr.demo.measure import PolicyRun
from eldr.demo.result import DemoResult
from eldr.fileio import write_atomically
from eldr.load.outcome import mean_ms, percentile_ms
from eldr.replay.statistics import Change


def summarise(result: DemoResult) -> dict[str, Any]:
    """The figures by name. A figure that could not be measured is None."""
    calibration, line = result.calibration, result.step_line
    return {
        "tpot_change": {
            policy: {name: _change(change) for name, change in figures.items()}
            for policy, figures in result.tpot_changes.items()
        },
        "step_cost": {
            "base_ms": line.base_ms,
            "per_expert_ms": line.per_expert_ms,
            "per_token_ms": line.per_token_ms,
            "r2": line.r2,
        },
        "rounds": result.measured_rounds,
        "expert_bytes": result.experts.padded,
        "policies": {run.policy: _policy(run) for run in result.runs},
        "outputs_equal": result.check.equal,
        "outputs_ties": result.check.ties,
        "outputs_total": result.check.total,
        "calibration": {"requests": calibration.provenance["requests"], "rho": calibration.signature.rho},
    }


def _change(change: Change) -> dict[str, float | None]:
    """A signed change in percent. The bounds of its interval are None if a single round was measured."""
    bounds = {"low": change.low, "high": change.high}
    return {"percent": change.percent, **{name: None if isnan(at) else at for name, at in bounds.items()}}


def _policy(run: PolicyRun) -> dict[str, Any]:
    return {
        "requests": len(run.outcomes),
        "errors": run.errors,
        "ttft_p50_ms": percentile_ms(run.ttft_s, 50),
        "tpot_p50_ms": percentile_ms(run.tpot_s, 50),
        "tpot_p99_ms": percentile_ms(run.tpot_s, 99),
        "tpot_mean_ms": mean_ms(run.tpot_s),
        "active_experts_mean": run.active_experts_mean,
    }


def write_summary(summary: dict[str, Any], path: Path) -> None:
    """Write `summary` as JSON, completely or not at all."""
    text = json.dumps(summary, indent=2, allow_nan=False) + "\n"

    def write(file: IO[bytes]) -> None:
        file.write(text.encode())

    write_atomically(path, write)
