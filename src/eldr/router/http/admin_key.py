"""The admin key, which allows recording and the admin API. It belongs to this router and never goes to a worker."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from pathlib import Path

from eldr.router.config.settings import read_key


class AdminKey:
    """Checks requests for the admin key, which is read from a one-line file. Without a file, no request has it.

    Raises ConfigError if the file cannot be used.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._line: bytes | None = None
        self.reload()

    def reload(self) -> None:
        """Read the file again. If it cannot be used, raises ConfigError and keeps the current key."""
        if self._path is not None:
            self._line = b"Bearer " + read_key(self._path)

    def is_in(self, headers: Mapping[bytes, bytes]) -> bool:
        """Whether the Authorization header carries the key."""
        given = headers.get(b"authorization")
        return given is not None and self._line is not None and hmac.compare_digest(given, self._line)
