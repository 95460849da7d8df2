"""Medians over the rounds, as a dictionary and as a table."""

from __future__ import annotations

from statistics import median
from typing import Any

from rich.table import Table

DIRECT = "direct"
Figures = dict[str, float]

# Name in the summary, words in the table, digits after the point.
ROWS = (
    ("whole_cpu_ms_per_request", "CPU-ms a request, not streamed", 3),
    ("first_token_cpu_ms_per_request", "CPU-ms a request, streamed, 1 token", 3),
    ("s256_cpu_s_per_million_tokens", "CPU-s a million tokens, 256 streams", 1),
    ("s1000_cpu_s_per_million_tokens", "CPU-s a million tokens, 1,000 streams", 1),
    ("whole_requests_per_s", "requests/s on one core", 0),
    ("s256_ttft_p50_ms", "TTFT p50, 256 streams, ms", 2),
    ("s256_ttft_p99_ms", "TTFT p99, 256 streams, ms", 2),
    ("s256_itl_added_p99_ms", "ITL added p99, 256 streams, ms", 2),
    ("s256_transit_p50_ms", "worker to client p50, 256 streams, ms", 2),
    ("s256_transit_p99_ms", "worker to client p99, 256 streams, ms", 2),
    ("s1000_ttft_p50_ms", "TTFT p50, 1,000 streams, ms", 2),
    ("s1000_ttft_p99_ms", "TTFT p99, 1,000 streams, ms", 2),
    ("s1000_itl_added_p99_ms", "ITL added p99, 1,000 streams, ms", 2),
    ("s1000_transit_p50_ms", "worker to client p50, 1,000 streams, ms", 2),
    ("s1000_transit_p99_ms", "worker to client p99, 1,000 streams, ms", 2),
    ("memory_mib", "peak memory, 1,000 streams, MiB", 0),
)
NO_ROUTER = ("cpu_ms", "cpu_s", "memory")


def summarise(rounds: list[dict[str, Figures]], saturated: float) -> dict[str, Any]:
    """Medians, least and most over the rounds, eldr's ratio to each other router, and the void figures."""
    names = list(rounds[0])
    values = {name: {key: [figures[name][key] for figures in rounds] for key in rounds[0][name]} for name in names}
    medians = {name: {key: median(found) for key, found in of_name.items()} for name, of_name in values.items()}
    void = [
        f"{name} {key}" for name in names for key, value in medians[name].items()
        if name != DIRECT and key.endswith("load_share") and value > saturated
    ]  # fmt: skip
    ratios = {
        name: {key: medians["eldr"][key] / value for key, value in medians[name].items() if value > 0}
        for name in names
        if name not in ("eldr", DIRECT) and "eldr" in medians
    }
    spread = {name: {key: [min(v), max(v)] for key, v in of_name.items()} for name, of_name in values.items()}
    return {"rounds": len(rounds), "median": medians, "range": spread, "eldr_ratio": ratios, "void": void}


def table(summary: dict[str, Any]) -> Table:
    """One row a figure, one column a router; in brackets eldr's figure over the router's."""
    medians, ratios = summary["median"], summary["eldr_ratio"]
    shown = Table(title=f"medians of {summary['rounds']} rounds (in brackets: eldr's figure over this one)")
    shown.add_column("")
    for name in medians:
        shown.add_column(name, justify="right")
    for key, words, digits in ROWS:
        cells = []
        for name, figures in medians.items():
            if key not in figures or (name == DIRECT and any(word in key for word in NO_ROUTER)):
                cells.append("")
                continue
            ratio = ratios.get(name, {}).get(key)
            cells.append(f"{figures[key]:.{digits}f}" + (f" ({ratio:.2f})" if ratio is not None else ""))
        shown.add_row(words, *cells)
    for void in summary["void"]:
        shown.caption = f"{shown.caption or 'void, the load was saturated:'} {void}"
    return shown
