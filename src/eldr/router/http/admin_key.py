"""The keys that a request presents, and the admin key, which belongs to this router and never goes to a worker."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from eldr.router.config.settings import read_key

SCHEME = b"bearer"


# Headers that hold nothing but a key. Anthropic's clients send the first, Azure's the second.
BARE_KEYS: Final = (b"x-api-key", b"api-key")


def keys_in(headers: Mapping[bytes, bytes]) -> list[bytes]:
    """The keys that a request presents: in Authorization, with the scheme Bearer in any case, X-Api-Key and api-key."""
    keys: list[bytes] = []
    authorization = headers.get(b"authorization")
    if authorization is not None:
        scheme, _, key = authorization.partition(b" ")
        if scheme.lower() == SCHEME:
            keys.append(key.strip())
    for name in BARE_KEYS:
        bare = headers.get(name)
        if bare is not None:
            keys.append(bare)
    return keys


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
        """Whether one of the request's keys is this one."""
        if self._key is not None:
            for given in keys_in(headers):
                if hmac.compare_digest(given, self._key):
                    return True
        return False
