"""The clients' API keys: which requests are allowed in, and for which client."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Mapping
from pathlib import Path

from eldr.router.config.settings import ConfigError
from eldr.router.http.admin_key import keys_in
from eldr.router.http.errors import ApiError
from eldr.router.request.quotas import LIMITS

MAX_NAME_BYTES = 64
NUMBER = re.compile("[1-9][0-9]{0,11}")


class ApiKeys:
    """The keys of a file with one key per line, optionally followed by the client's name, and then by its limits.

    A limit is written NAME=NUMBER (see `LIMITS`). A client may have several keys, which share its limits. Lines that
    start with `#` are comments. Only keyed hashes are held, under a secret drawn at every start. The time of
    a lookup therefore reveals nothing about other keys, however many there are. Raises ConfigError for a file that
    cannot be used.

    limits: client -> its limits, by name.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._secret = os.urandom(32)
        self._clients: dict[bytes, tuple[bytes, str]] = {}
        self.limits: dict[str, dict[str, int]] = {}
        self.reload()

    def reload(self) -> None:
        """Read the file again. If it cannot be used, raise ConfigError and keep the current keys."""
        try:
            lines = self._path.read_bytes().splitlines()
        except OSError as error:
            raise ConfigError(f"{self._path}: the API keys cannot be read: {error.strerror}") from None
        clients: dict[bytes, tuple[bytes, str]] = {}
        limits: dict[str, dict[str, int]] = {}
        for number, line in enumerate(lines, 1):
            if not line.strip() or line.lstrip().startswith(b"#"):
                continue
            digest, name, limited = self._parse(line, number)
            if digest in clients:
                raise ConfigError(f"{self._path}:{number}: the same key as {clients[digest][1]}")
            clients[digest] = digest, name
            if limits.setdefault(name, limited) != limited:
                raise ConfigError(f"{self._path}:{number}: another key of {name} has other limits; give all the same")
        if not clients:
            raise ConfigError(f"{self._path}: it has no keys; to run without keys, omit api_key_file")
        self._clients, self.limits = clients, limits

    def _parse(self, line: bytes, number: int) -> tuple[bytes, str, dict[str, int]]:
        key, *rest = [part for part in line.strip().split(b" ") if part]
        name = rest[0] if rest else b"client-%d" % number
        limits: dict[str, int] = {}
        for field in rest[1:]:
            limit, _, value = field.decode("latin-1").partition("=")
            if limit in limits or limit not in LIMITS or NUMBER.fullmatch(value) is None:
                raise self._malformed(number)
            limits[limit] = int(value)
        if not _visible(key) or not _visible(name) or len(name) > MAX_NAME_BYTES:
            raise self._malformed(number)
        return self._digest(key), name.decode(), limits

    def _malformed(self, number: int) -> ConfigError:
        return ConfigError(
            f"{self._path}:{number}: expected KEY, KEY NAME or KEY NAME LIMIT=NUMBER ..., in visible ASCII characters; "
            f"the limits are {', '.join(LIMITS)}, from 1"
        )

    def _digest(self, key: bytes) -> bytes:
        return hashlib.blake2b(key, digest_size=32, key=self._secret).digest()

    def client(self, headers: Mapping[bytes, bytes]) -> str | None:
        """Return the name of the client whose key the request presents. None if it presents none of our keys.

        A key of ours counts beside others, because many clients cannot leave out a header and fill it with any text.
        Raises ApiError 400 if the request presents the keys of two clients.
        """
        found: str | None = None
        for key in keys_in(headers):
            name = self._name(key)
            if name is not None and found is not None and name != found:
                raise ApiError(400, "the request has the API keys of two clients; send one of them")
            found = found or name
        return found

    def _name(self, key: bytes) -> str | None:
        digest = self._digest(key)
        held, name = self._clients.get(digest, (bytes(len(digest)), None))
        return name if hmac.compare_digest(held, digest) else None


def _visible(text: bytes) -> bool:
    return bool(text) and all(0x20 < byte < 0x7F for byte in text)
