"""A file of lines that a separate thread writes, so that code that adds lines never waits for the disk.

Lines that cannot be written yet wait in a bounded buffer. A line that does not fit is refused.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from pathlib import Path

from eldr.router.observe.logs import Throttle

log = logging.getLogger("eldr.router")

WRITE_BYTES = 2**20
# Linux's IOV_MAX.
MOST_LINES = 1024
FLUSH_S = 0.25
CLOSE_S = 5.0


class LineBuffer:
    """Lines on their way from one thread to another, at most `limit_bytes` of them."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._lines: deque[bytes] = deque()
        # Each counter is changed by only one thread. Their difference is what waits.
        self._added_bytes = 0
        self._taken_bytes = 0

    def __len__(self) -> int:
        return len(self._lines)

    @property
    def waiting_bytes(self) -> int:
        return self._added_bytes - self._taken_bytes

    def has_room(self, line: bytes) -> bool:
        return self.waiting_bytes + len(line) <= self._limit_bytes

    def add(self, line: bytes) -> None:
        self._added_bytes += len(line)
        self._lines.append(line)

    def take(self, most: int) -> list[bytes]:
        """Take at most `most` lines, about WRITE_BYTES in total, but no more than one call can write."""
        taken: list[bytes] = []
        size = 0
        while size < WRITE_BYTES and len(taken) < min(most, MOST_LINES):
            taken.append(self._lines.popleft())
            size += len(taken[-1])
        self._taken_bytes += size
        return taken


class LineFile:
    """Appends whole lines, whatever the disk does: a line that was partly written is finished before anything else.

    written, refused: the number of lines so far.
    Raises OSError if the file cannot be opened.
    """

    def __init__(self, path: Path, limit_bytes: int) -> None:
        self._path = path
        self._file = _open(path)
        self._buffer = LineBuffer(limit_bytes)
        self._rest = b""  # taken from the buffer but not yet written
        self._rest_lines = 0
        self._wake = threading.Event()
        self._closing = False
        self._reopening = False
        self.written = 0
        self.refused = 0
        self._writer = threading.Thread(target=self._run, name=path.name, daemon=True)
        self._writer.start()

    # Called by the code that adds lines.

    def has_room(self, line: bytes) -> bool:
        """Whether `add` can take the line."""
        return self._buffer.has_room(line)

    def refuse(self) -> None:
        """Count a line that did not fit."""
        self.refused += 1

    def add(self, line: bytes) -> None:
        """Add a line, which must end in a line end."""
        waiting_bytes = self._buffer.waiting_bytes
        self._buffer.add(line)
        if waiting_bytes < WRITE_BYTES <= waiting_bytes + len(line):
            self._wake.set()

    def reopen(self) -> None:
        """Write what is buffered, then continue in a new file at the path, after the old one was renamed."""
        self._reopening = True
        self._wake.set()

    def close(self) -> None:
        """Write what is buffered, for at most CLOSE_S seconds."""
        self._closing = True
        self._wake.set()
        self._writer.join(CLOSE_S)
        left = self._rest_lines + len(self._buffer)
        if left:
            log.error("%s: %d lines were lost at the end", self._path, left)

    # In the thread.

    def _run(self) -> None:
        throttle = Throttle()
        while True:
            self._wake.wait(FLUSH_S)
            self._wake.clear()
            closing = self._closing
            written = self._write_waiting(throttle)
            if self._reopening and written:
                self._reopen_file()
            if closing:
                break
        os.close(self._file)

    def _write_waiting(self, throttle: Throttle) -> bool:
        """Write the lines that wait now. Returns whether all of them could be written.

        Lines added meanwhile can wait, because after every write this thread and the event loop contend for Python's
        lock.
        """
        waiting = len(self._buffer)
        while self._rest or waiting:
            if self._rest:
                parts = [self._rest]
            else:
                parts = self._buffer.take(waiting)
                waiting -= len(parts)
                self._rest_lines = len(parts)
            try:
                done = os.writev(self._file, parts)
            except OSError as error:
                self._rest = b"".join(parts)
                if throttle.due("write"):
                    log.error(
                        "%s cannot be written: %s; %d bytes wait, %d lines were dropped so far",
                        self._path, error.strerror, self._buffer.waiting_bytes, self.refused,
                    )  # fmt: skip
                return False
            self._rest = b"" if done == sum(map(len, parts)) else b"".join(parts)[done:]
            if not self._rest:
                self.written += self._rest_lines
                self._rest_lines = 0
        return True

    def _reopen_file(self) -> None:
        self._reopening = False
        try:
            new = _open(self._path)
        except OSError as error:
            log.error("%s cannot be reopened: %s; the old file is kept", self._path, error.strerror)
            return
        os.close(self._file)
        self._file = new


def _open(path: Path) -> int:
    """Open the file for appending. If a crash cut off the last line, start a new one.

    Only the owner can read it. O_NONBLOCK makes a pipe that nobody reads behave like a full disk instead of blocking
    forever.
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
