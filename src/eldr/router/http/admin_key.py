"""The admin key, which allows recording and the admin API. It belongs to this router and never goes to a worker."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from pathlib import Path

from eldr.router.config.settings import read_key

SCHEME = b"bearer"


def bearer_key(headers: Mapping[bytes, bytes]) -> bytes | None:
    """Return the key in a request's Authorization header. None if it has none of the scheme Bearer, in any case."""
    scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
    return key.strip() if scheme.lower() == SCHEME else None


class AdminKey:
    """Checks requests for the admin key, which is read from a one-line file. Without a file, no request has it.

    Raises ConfigError if the file cannot be used.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._key: bytes | None = None
        self.reload()

    def reload(self) -> None:
        """Read the file again. If it cannot be used, raises ConfigError and keeps the current key."""
        if self._path is not None:
            self._key = read_key(self._path)

    def is_in(self, headers: Mapping[bytes, bytes]) -> bool:
        """Whether the Authorization header carries the key."""
        given = bearer_key(headers)
        return given is not None and self._key is not None and hmac.compare_digest(given, self._key)
