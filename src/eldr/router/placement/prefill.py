"""Which prefill worker gets a request: consistent hashing of the prompt's start, with bounded load.

Requests with the same start meet on the worker that has it in its prefix cache. No worker takes more than 1.25 times
the mean load (Mirrokni, Thorup, Zadimoghaddam: Consistent Hashing with Bounded Loads, SODA 2018); what exceeds it
spills to the next on the ring. ELDR (arXiv 2607.00466) hashes the first 1,024 bytes of the prompt.
"""

from __future__ import annotations

import bisect
import hashlib
import math
import zlib
from collections.abc import Collection
from typing import Any

import orjson

from eldr.router.fleet.workers import Fleet, Worker
from eldr.router.request.openai import CHAT

LOAD_FACTOR = 1.25
# Points per worker on the ring; the largest share of eight workers is then about 1.2 times the mean.
POINTS = 128
# A token id in a JSON array takes about this many bytes of text.
BYTES_PER_TOKEN = 4


class PrefillRing:
    """The ring of prefill workers."""

    def __init__(self, fleet: Fleet, window_bytes: int) -> None:
        self._fleet = fleet
        self._window_bytes = window_bytes
        self._points: list[int] = []
        self._workers: list[str] = []

    def rebuild(self) -> None:
        """Take the fleet's prefill workers as they are now; to be called when one is added or removed."""
        ring = sorted(
            (_point(f"{url}#{index}".encode()), url)
            for url in self._fleet.workers("prefill")
            for index in range(POINTS)
        )
        self._points = [point for point, _ in ring]
        self._workers = [url for _, url in ring]

    def key(self, path: bytes, body: dict[str, Any]) -> int:
        """Hash of the prompt's start."""
        if path == CHAT:
            return _key(chat_start(body["messages"], self._window_bytes))
        prompt = body.get("prompt")
        if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
            prompt = prompt[0]
        if isinstance(prompt, str):
            # At most window_bytes characters can lie in the first window_bytes bytes.
            return _key(prompt[: self._window_bytes].encode()[: self._window_bytes])
        if isinstance(prompt, list):
            return _key(orjson.dumps(prompt[: max(1, self._window_bytes // BYTES_PER_TOKEN)]))
        return _key(orjson.dumps(prompt))

    def choose(self, key: int, excluded: Collection[str] = ()) -> tuple[Worker, bool] | None:
        """The worker for `key` and whether it spilled there; None if no prefill worker is available.

        Workers in `excluded` are taken only if there is no other.
        """
        fleet = self._fleet.workers("prefill")
        available = [worker for worker in fleet.values() if worker.available]
        if not available:
            return None
        if excluded:
            available = [worker for worker in available if worker.url not in excluded] or available
        total = 1 + sum(worker.in_flight for worker in available)
        most = math.ceil(LOAD_FACTOR * total / len(available))
        start = bisect.bisect(self._points, key)
        first: str | None = None
        for step in range(len(self._workers)):
            worker = fleet[self._workers[(start + step) % len(self._workers)]]
            if worker not in available:
                continue
            if first is None:
                first = worker.url
            if worker.in_flight < most:
                return worker, worker.url != first
        # Unreachable while `most` exceeds the mean, as bounded loads guarantee.
        return min(available, key=lambda worker: worker.in_flight), True


def chat_start(messages: list[Any], window_bytes: int) -> bytes:
    """The start of a conversation as canonical JSON: all leading system messages and `window_bytes` beyond them.

    A system prompt is shared by many conversations: within a fixed window from the very start a long one would send
    them all to one worker. Each worker caches it once, and the conversations spread by what follows it.
    """
    leading = 0
    while leading < len(messages) and _is_system(messages[leading]):
        leading += 1
    start = orjson.dumps(messages[:leading], option=orjson.OPT_SORT_KEYS)
    rest = b""
    for message in messages[leading:]:
        rest += orjson.dumps(message, option=orjson.OPT_SORT_KEYS)
        if len(rest) >= window_bytes:
            break
    return start + rest[:window_bytes]


def _is_system(message: object) -> bool:
    return isinstance(message, dict) and message.get("role") in ("system", "developer")


def _point(data: bytes) -> int:
    """A place on the ring, 0 to 2^64. Names that differ in a digit must lie as if drawn at random: a good hash."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def _key(data: bytes) -> int:
    """A place on the ring for a kilobyte of a prompt. Prompts differ in more than a digit, and whoever wants two to
    meet can begin them alike: a checksum will do, at a tenth of the time."""
    return zlib.crc32(data) << 32
