"""Structured logs: one JSON object per line on standard error. They never contain a prompt, an answer or a key."""

from __future__ import annotations

import logging
import time
import traceback

import orjson


class JsonLines(logging.Formatter):
    """Formats a record as one JSON line. `extra={"fields": {...}}` adds its keys."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[0] is not None:
            # Log its type and where it was raised, but not its message, which may quote a prompt, a key or an answer.
            kind, _, where = record.exc_info
            line["exception"] = f"{kind.__name__}\n" + "".join(traceback.format_tb(where))
        return orjson.dumps(line, default=str).decode()


class Throttle:
    """Lets one message of each kind through per period, so that a flood of failures does not flood the logs."""

    def __init__(self, period_s: float = 10.0) -> None:
        self._period_s = period_s
        self._next_s: dict[str, float] = {}

    def due(self, kind: str) -> bool:
        now_s = time.monotonic()
        if now_s < self._next_s.get(kind, 0.0):
            return False
        self._next_s[kind] = now_s + self._period_s
        return True


def set_up(level: str) -> None:
    """Send the router's log to standard error, from `level` up."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    for name in ("eldr.router", "asyncio"):  # the event loop reports uncaught exceptions
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level.upper())
        logger.propagate = False
