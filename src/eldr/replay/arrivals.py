"""Recorded arrival times, from a trace or from the published files of production traces."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eldr.replay.errors import ReplayError
from eldr.replay.recorded import read_entries


def read_arrivals(path: Path) -> NDArray[np.float64]:
    """Read arrival times as seconds since the first arrival, float64 [n], ascending.

    path: a .csv file with dates in a TIMESTAMP column (Azure LLM inference traces), a .jsonl file of objects with a
        "timestamp" in ms (Mooncake traces), or any other text file with one number of seconds per line.
    Raises ReplayError with the file and the line.
    """
    parsers: dict[str, Callable[[Any], float]] = {".csv": _azure_s, ".jsonl": _mooncake_s, "": float}
    times = read_entries(path, "arrivals", "an arrival time", parsers)
    seconds = np.sort(np.array(times, dtype=np.float64))
    if not len(seconds) or not np.isfinite(seconds).all() or seconds[0] == seconds[-1]:
        raise ReplayError(f"arrivals {path}: fewer than two different arrival times")
    return np.asarray(seconds - seconds[0])


def _mooncake_s(line: str) -> float:
    return float(json.loads(line)["timestamp"]) / 1e3


def _azure_s(row: Mapping[str, str]) -> float:
    """Parse a date such as 2023-11-16 18:17:03.9799600 into seconds."""
    head, _, fraction = row["TIMESTAMP"].strip().partition(".")
    return datetime.fromisoformat(f"{head}+00:00").timestamp() + (float(f"0.{fraction}") if fraction else 0.0)
