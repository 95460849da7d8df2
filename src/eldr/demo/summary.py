"""Writes summary.json, the figures of a demo run for other programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO, Any

from eldr.demo.measure import PolicyRun
from eldr.demo.result import DemoResult
from eldr.fileio import write_atomically
from eldr.load.outcome import percentile_ms


def summarise(result: DemoResult) -> dict[str, Any]:
    """The figures by name. A figure that could not be measured is None."""
    calibration = result.calibration
    return {
        "policies": {run.policy: _policy(run) for run in result.runs},
        "outputs_equal": result.check.equal,
        "outputs_ties": result.check.ties,
        "outputs_total": result.check.total,
        "calibration": {"requests": calibration.provenance["requests"], "rho": calibration.signature.rho},
    }


def _policy(run: PolicyRun) -> dict[str, Any]:
    return {
        "requests": len(run.outcomes),
        "errors": run.errors,
        "ttft_p50_ms": percentile_ms(run.ttft_s, 50),
        "tpot_p50_ms": percentile_ms(run.tpot_s, 50),
        "tpot_p99_ms": percentile_ms(run.tpot_s, 99),
        "active_experts_mean": run.active_experts_mean,
    }


def write_summary(summary: dict[str, Any], path: Path) -> None:
    """Write `summary` as JSON, completely or not at all."""
    text = json.dumps(summary, indent=2, allow_nan=False) + "\n"

    def write(file: IO[bytes]) -> None:
        file.write(text.encode())

    write_atomically(path, write)
