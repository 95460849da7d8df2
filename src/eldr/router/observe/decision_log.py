"""The decision log: every event of the policy as a line of JSON.

A disk that is slow, full or gone costs lines, never requests. Events that do not fit are dropped and counted, and a gap
marks them in the file.
"""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Any

import orjson

from eldr.policies.logged import LogHeader
from eldr.router.config.groups import PlacementSettings
from eldr.router.config.settings import ConfigError
from eldr.router.observe.line_file import LineFile

# About two seconds of a thousand requests per second, with counts of 48 x 128 experts.
BUFFER_BYTES = 16 * 2**20


def log_header(placement: PlacementSettings) -> LogHeader:
    """Return the header that allows the decisions of a router with this configuration to be repeated."""
    path = placement.calibration
    return LogHeader(
        policy=placement.policy,
        seed=placement.seed,
        options=placement.options,
        calibration=None if path is None else str(path),
        calibration_sha256=None if path is None else hashlib.sha256(path.read_bytes()).hexdigest(),
    )


class DecisionLog:
    """Appends events to a file. Raises ConfigError if it cannot be opened."""

    def __init__(self, path: Path, buffer_bytes: int = BUFFER_BYTES) -> None:
        # While one router replaces another, both append to the file.
        self._run_name = os.urandom(4).hex()
        self._gap = 0  # events dropped since the last one that was kept
        self._closed = False
        try:
            self._file = LineFile(path, buffer_bytes)
        except OSError as error:
            raise ConfigError(f"decision_log {path} cannot be written: {error.strerror}") from None

    @property
    def written(self) -> int:
        """Lines written to the file."""
        return self._file.written

    @property
    def dropped(self) -> int:
        """Events that did not fit into the buffer."""
        return self._file.refused

    def write(self, event: dict[str, Any]) -> None:
        """Add an event, with its time and run. It never waits for the disk, and never raises because of it."""
        line = self._line(event)
        if not self._file.has_room(line):
            self._file.refuse()
            self._gap += 1
            return
        if self._gap:
            self._add_gap()
        self._file.add(line)

    def _add_gap(self) -> None:
        self._file.add(self._line({"event": "gap", "lines": self._gap}))
        self._gap = 0

    def _line(self, event: dict[str, Any]) -> bytes:
        event["unix_s"] = time.time_ns() // 1_000_000 / 1000
        event["run"] = self._run_name
        # Make a copy of the right size, because orjson's buffer keeps the space that it grew into.
        return b"%b\n" % orjson.dumps(event)

    def reopen(self) -> None:
        """Continue in a new file at the path, after the old one was renamed."""
        self._file.reopen()

    def close(self) -> None:
        """Write what is buffered, within seconds. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._gap:
            self._add_gap()
        self._file.close()
