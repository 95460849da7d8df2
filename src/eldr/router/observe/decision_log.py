"""The decision log: every event of the policy as a line of JSON.

A disk that is slow, full or gone costs lines, never requests. Events that do not fit are dropped and counted, and a gap
marks them in the file.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import orjson

from eldr.policies.logged import LogHeader
from eldr.router.config.groups import PlacementSettings
from eldr.router.config.settings import ConfigError
from eldr.router.observe.line_file import LineFile

# About two seconds of a thousand requests per second, with counts of 48 x 128 experts.
BUFFER_BYTES = 16 * 2**20


def calibration_digests(placement: PlacementSettings) -> dict[Path, str]:
    """The digests of the calibrations. Take them at the start, when the files are read: they may be replaced later."""
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in placement.calibration.values()}


def log_header(
    placement: PlacementSettings, digests: Mapping[Path, str], policy: str, models: Iterable[str]
) -> LogHeader:
    """Return the header that allows the decisions of a router with this configuration to be repeated.

    digests: of the calibrations. policy: the name of the policy. models: the names of the model whose requests it
    places.
    """
    models = sorted(models)
    path = placement.calibration_of(models)
    return LogHeader(
        policy=policy,
        model=next(iter(models), ""),
        seed=placement.seed,
        options=placement.options,
        calibration=None if path is None else str(path),
        calibration_sha256=None if path is None else digests[path],
    )


class DecisionLog:
    """Appends the events of policies to a file. Raises ConfigError if it cannot be opened."""

    def __init__(self, path: Path, buffer_bytes: int = BUFFER_BYTES) -> None:
        self._gaps: dict[str, int] = {}  # by run, events dropped since the last one that was kept
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

    def run(self) -> Callable[[dict[str, Any]], None]:
        """Return a function that adds an event of one policy, with its time and the name of its run.

        Several policies write to one file: one for each model, and those of another router while it is replaced. The
        function never waits for the disk, and never raises because of it.
        """
        name = os.urandom(4).hex()

        def write(event: dict[str, Any]) -> None:
            self._write(name, event)

        return write

    def _write(self, run: str, event: dict[str, Any]) -> None:
        line = _line(run, event)
        if not self._file.has_room(line):
            self._file.refuse()
            self._gaps[run] = self._gaps.get(run, 0) + 1
            return
        if self._gaps:
            self._add_gap(run)
        self._file.add(line)

    def _add_gap(self, run: str) -> None:
        lines = self._gaps.pop(run, 0)
        if lines:
            self._file.add(_line(run, {"event": "gap", "lines": lines}))

    def reopen(self) -> None:
        """Continue in a new file at the path, after the old one was renamed."""
        self._file.reopen()

    def close(self) -> None:
        """Write what is buffered, within seconds. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        for run in list(self._gaps):
            self._add_gap(run)
        self._file.close()


def _line(run: str, event: dict[str, Any]) -> bytes:
    event["unix_s"] = time.time_ns() // 1_000_000 / 1000
    event["run"] = run
    # Make a copy of the right size, because orjson's buffer keeps the space that it grew into.
    return b"%b\n" % orjson.dumps(event)
