"""Which decode worker served which request, read from the router's log of requests (log level debug)."""

from __future__ import annotations

from pathlib import Path

import orjson


def read_placements(log_path: Path) -> dict[int, str]:
    """Number of a finished request -> URL of the decode worker that served it.

    A line that is not a request's, or is only half written yet, is passed over.
    """
    placements = {}
    for line in log_path.read_bytes().splitlines():
        try:
            entry = orjson.loads(line)
            placements[int(entry["id"].rpartition("-")[2])] = str(entry["decode"])
        except (orjson.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError):
            continue
    return placements
