"""The file behind `--decision-log`: lines are made on the event loop, and written by a thread of their own.

A disk that is slow, full or gone costs lines, never requests: what cannot be written waits in a bounded buffer, what
does not fit is dropped, counted, and marked in the file by a gap.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import orjson

from eldr.policies.logged import LogHeader
from eldr.router.config.groups import PlacementSettings
from eldr.router.config.settings import ConfigError
from eldr.router.observe.counters import Metrics
from eldr.router.observe.logs import Throttle

log = logging.getLogger("eldr.router")

# Some two seconds of a thousand requests a second with counts of 48 x 128 experts.
BUFFER_BYTES = 16 * 2**20
WRITE_BYTES = 2**20
# Linux's IOV_MAX.
MOST_LINES = 1024
FLUSH_S = 0.25
CLOSE_S = 5.0


def log_header(placement: PlacementSettings) -> LogHeader:
    """What repeats the decisions of a router with this configuration."""
    path = placement.calibration
    return LogHeader(
        policy=placement.policy,
        seed=placement.seed,
        options=placement.options,
        calibration=None if path is None else str(path),
        calibration_sha256=None if path is None else hashlib.sha256(path.read_bytes()).hexdigest(),
    )


class DecisionLog:
    """Appends events to a file as JSON lines. Whole lines only, whatever the disk does: a line that could be written in
    part is finished before anything else is. Raises ConfigError where the file cannot be opened.
    """

    def __init__(self, path: Path, metrics: Metrics, buffer_bytes: int = BUFFER_BYTES) -> None:
        self._path = path
        # While one router replaces another both append to the file.
        self._run_name = os.urandom(4).hex()
        self._metrics = metrics
        self._limit_bytes = buffer_bytes
        self._lines: deque[bytes] = deque()
        # Each is changed by one thread alone; the difference is what waits.
        self._added_bytes = 0
        self._taken_bytes = 0
        self._gap = 0  # lines dropped since the last one that was kept
        self._rest = b""  # of what was taken from the buffer and not yet written
        self._rest_lines = 0
        self._wake = threading.Event()
        self._closing = False
        self._reopening = False
        self._throttle = Throttle()
        try:
            self._file = _open(path)
        except OSError as error:
            raise ConfigError(f"decision_log {path} cannot be written: {error.strerror}") from None
        self._writer = threading.Thread(target=self._run, name="decision-log", daemon=True)
        self._writer.start()

    # On the event loop.

    def write(self, event: dict[str, Any]) -> None:
        """Take an event; time and run are added. Never waits and never raises for the disk's sake."""
        line = self._line(event)
        waiting_bytes = self._added_bytes - self._taken_bytes
        if waiting_bytes + len(line) > self._limit_bytes:
            self._metrics.decision_log_dropped += 1
            self._gap += 1
            return
        if self._gap:
            self._add_gap()
        self._add(line)
        if waiting_bytes < WRITE_BYTES <= waiting_bytes + len(line):
            self._wake.set()

    def _add(self, line: bytes) -> None:
        self._added_bytes += len(line)
        self._lines.append(line)

    def _add_gap(self) -> None:
        self._add(self._line({"event": "gap", "lines": self._gap}))
        self._gap = 0

    def _line(self, event: dict[str, Any]) -> bytes:
        event["unix_s"] = time.time_ns() // 1_000_000 / 1000
        event["run"] = self._run_name
        # A copy of the right size: orjson's own holds on to the room that it grew into.
        return b"%b\n" % orjson.dumps(event)

    def reopen(self) -> None:
        """Write what is buffered and go on in a new file at the path, after the old one was renamed."""
        self._reopening = True
        self._wake.set()

    def close(self) -> None:
        """Write what is buffered, for at most CLOSE_S seconds. A second call does nothing."""
        if self._closing:
            return
        if self._gap:
            self._add_gap()
        self._closing = True
        self._wake.set()
        self._writer.join(CLOSE_S)
        left = self._rest_lines + len(self._lines)
        if left:
            log.error("decision log %s: %d lines were lost at the end", self._path, left)

    # In the thread.

    def _run(self) -> None:
        while True:
            self._wake.wait(FLUSH_S)
            self._wake.clear()
            closing = self._closing
            written = self._write_waiting()
            if self._reopening and written:
                self._reopen_file()
            if closing:
                break
        os.close(self._file)

    def _write_waiting(self) -> bool:
        """Write what waits now; what is added meanwhile can wait, for after every write this thread and the event loop
        contend for Python's lock. Whether all of it could be written."""
        waiting = len(self._lines)
        while self._rest or waiting:
            if self._rest:
                parts = [self._rest]
            else:
                parts = self._take(waiting)
                waiting -= len(parts)
            try:
                done = os.writev(self._file, parts)
            except OSError as error:
                self._rest = b"".join(parts)
                if self._throttle.due("write"):
                    log.error(
                        "decision log %s cannot be written: %s; %d bytes wait, %d lines were dropped so far",
                        self._path, error.strerror, self._added_bytes - self._taken_bytes,
                        self._metrics.decision_log_dropped,
                    )  # fmt: skip
                return False
            self._rest = b"" if done == sum(map(len, parts)) else b"".join(parts)[done:]
            if not self._rest:
                self._metrics.decision_log_lines += self._rest_lines
                self._rest_lines = 0
        return True

    def _take(self, most: int) -> list[bytes]:
        """At most so many lines from the buffer, some WRITE_BYTES of them, but no more than one call can write."""
        taken: list[bytes] = []
        size = 0
        while size < WRITE_BYTES and len(taken) < min(most, MOST_LINES):
            taken.append(self._lines.popleft())
            size += len(taken[-1])
        self._taken_bytes += size
        self._rest_lines = len(taken)
        return taken

    def _reopen_file(self) -> None:
        self._reopening = False
        try:
            new = _open(self._path)
        except OSError as error:
            log.error("decision log %s cannot be reopened: %s; the old file is kept", self._path, error.strerror)
            return
        os.close(self._file)
        self._file = new


def _open(path: Path) -> int:
    """Append to the file, on a line of its own where the last one was cut off by a crash.

    Readable by its owner alone. O_NONBLOCK: a pipe that nobody reads is a full disk, not a wait without end.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    try:
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":
            os.write(file, b"\n")
    except OSError:
        os.close(file)
        raise
    return file
