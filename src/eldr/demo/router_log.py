"""Reads from the router's log, at level debug, which decode worker served each request."""

from __future__ import annotations

from pathlib import Path

import orjson


def read_placements(log_path: Path) -> dict[int, str]:
    """Returns the URL of the decode worker of each finished request, by request number.

    Skips lines that are not about a request or are not completely written yet.
    """
    placements = {}
    for line in log_path.read_bytes().splitlines():
        try:
            entry = orjson.loads(line)
            placements[int(entry["id"].rpartition("-")[2])] = str(entry["decode"])
        except (orjson.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError):
            continue
    return placements
