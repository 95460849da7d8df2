"""The results file of an evaluation: rows of every experiment on every trace, as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eldr.evaluate.bench import EvaluationError, Row
from eldr.fileio import write_atomically

FORMAT = "eldr-evaluation-v1"
MAX_FILE_BYTES = 2**27


@dataclass(frozen=True, slots=True)
class TraceResults:
    """The results on one trace.

    about: name, model, layers, experts, top_k, requests, kinds, prompt and decode tokens (medians), note and sha256.
    experiments: experiment -> rows.
    skipped: experiment -> why it has no rows.
    """

    about: dict[str, Any]
    experiments: dict[str, list[Row]]
    skipped: dict[str, str]


@dataclass(frozen=True, slots=True)
class Results:
    """The results of a whole evaluation.

    made: how it was made, JSON-serialisable.
    traces: the results on each trace.
    common: the experiments that do not use a trace.
    """

    made: dict[str, Any]
    traces: list[TraceResults]
    common: dict[str, list[Row]]


def write_results(results: Results, path: Path) -> None:
    """Write the results as JSON, atomically. Raises EvaluationError."""
    wire = {
        "format": FORMAT,
        "made": results.made,
        "common": results.common,
        "traces": [
            {"about": trace.about, "skipped": trace.skipped, "experiments": trace.experiments}
            for trace in results.traces
        ],
    }
    # One row per line is readable, and a change of one number changes one line.
    text = json.dumps(rounded(wire), indent=1, allow_nan=False, ensure_ascii=False)
    text = _rows_on_one_line(text)
    try:
        write_atomically(path, lambda file: file.write(text.encode()))
    except OSError as error:
        raise EvaluationError(f"{path}: the results cannot be written: {error.strerror or error}") from None


def rounded(value: Any) -> Any:
    """Return the value with six significant digits. NaN and infinity become None."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [rounded(entry) for entry in value]
    return value


def _rows_on_one_line(text: str) -> str:
    """Put each object without nested objects on one line."""
    lines: list[str] = []
    opened: int | None = None
    for line in text.split("\n"):
        if line.endswith("{"):
            opened = len(lines)
        if opened is not None and line.lstrip().startswith("}"):
            inner = [part.strip() for part in lines[opened + 1 :]]
            lines[opened:] = [lines[opened] + " ".join(inner) + line.strip()]
            opened = None
        else:
            lines.append(line)
    return "\n".join(lines) + "\n"


def parse_results(wire: Any, path: Path) -> Results:
    """Build results from parsed JSON. Raises EvaluationError with `path` and what is missing."""
    try:
        if wire["format"] != FORMAT:
            raise ValueError(f"its format is {wire['format']!r}, expected {FORMAT!r}")
        traces = [TraceResults(entry["about"], entry["experiments"], entry["skipped"]) for entry in wire["traces"]]
        for rows in [*wire["common"].values(), *(rows for trace in traces for rows in trace.experiments.values())]:
            if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
                raise ValueError("an experiment is not a list of rows")
        return Results(wire["made"], traces, wire["common"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        missing = f"{error} is missing" if isinstance(error, KeyError) else error
        raise EvaluationError(f"{path}: not the results of an evaluation: {missing}") from None
