"""The result figures of a load run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from eldr.load.outcome import Outcome, mean_ms, percentile_ms

PERCENTILES = {"p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0}
ERROR_EXAMPLES = 5


def summarise(outcomes: Sequence[Outcome], duration_s: float) -> dict[str, Any]:
    """Summarise a run as JSON-serialisable figures.

    Latencies cover the requests that succeeded, and are null if there are none. Percentiles of TTFT and TPOT are over
    requests; those of ITL are over all gaps between tokens.
    """
    good = [outcome for outcome in outcomes if outcome.error is None]
    errors = Counter(outcome.error for outcome in outcomes if outcome.error is not None)
    tokens = sum(len(outcome.token_times_s) for outcome in good)
    return {
        "requests": len(outcomes),
        "errors": sum(errors.values()),
        "error_examples": [{"error": text, "count": count} for text, count in errors.most_common(ERROR_EXAMPLES)],
        "duration_s": duration_s,
        "requests_per_s": len(good) / duration_s,
        "tokens": tokens,
        "tokens_per_s": tokens / duration_s,
        **_latencies(good),
        "kinds": {
            kind: {"requests": sum(o.kind == kind for o in outcomes), **_latencies([o for o in good if o.kind == kind])}
            for kind in sorted({outcome.kind for outcome in outcomes})
        },
    }


def _latencies(good: Sequence[Outcome]) -> dict[str, Any]:
    return {
        "ttft_ms": _percentiles([ttft for outcome in good if (ttft := outcome.ttft_s) is not None]),
        "tpot_ms": _percentiles([tpot for outcome in good if (tpot := outcome.tpot_s) is not None]),
        "itl_ms": _percentiles([gap for outcome in good for gap in outcome.itl_s]),
    }


def _percentiles(times_s: Sequence[float]) -> dict[str, float | None]:
    return {name: percentile_ms(times_s, percent) for name, percent in PERCENTILES.items()} | {"mean": mean_ms(times_s)}


def as_table(summary: dict[str, Any], title: str) -> Table:
    """Format the latencies as a table."""
    table = Table(title=title, title_justify="left")
    table.add_column("ms")
    for name in (*PERCENTILES, "mean"):
        table.add_column(name, justify="right")
    for key, shown in (("ttft_ms", "TTFT"), ("tpot_ms", "TPOT"), ("itl_ms", "ITL")):
        values = summary[key]
        table.add_row(shown, *("–" if value is None else f"{value:.1f}" for value in values.values()))
    return table
