"""The key of recording and of the admin API. It is for this router alone and never goes to a worker."""

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
    """The key in a one-line file; without a file nobody has it. Raises ConfigError for a file that cannot be used."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._key: bytes | None = None
        self.reload()

    def reload(self) -> None:
        """Read the file again. Raises ConfigError, and keeps the key it has, if it cannot be used."""
        if self._path is not None:
            self._key = read_key(self._path)

    def is_in(self, headers: Mapping[bytes, bytes]) -> bool:
        """Whether the Authorization header holds the key."""
        given = bearer_key(headers)
        return given is not None and self._key is not None and hmac.compare_digest(given, self._key)
