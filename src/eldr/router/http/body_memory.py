"""How much memory bodies take up, all together: requests that arrive, wait or are sent, and answers that are collected.

One account serves both directions, because both use the same memory. It gives way from the top:

- A large request may use three quarters of it. It is refused before its body is read if the stated length does not fit,
  and otherwise at the piece that does not fit. A stated length reserves nothing: a client that only promises bytes
  would take room from those that send them.
- The last quarter is left to small requests and to answers, for which workers have already computed.
- What is written but not yet taken by a peer is counted and never refused. Requests are refused instead.

A hold is counted as long as somebody knows it, like the bytes that it stands for. So every way in which a request can
end gives it back, and gives it back once. `Hold.release` does so earlier.
"""

from __future__ import annotations

from eldr.router.config.groups import ClientLimits
from eldr.router.http.errors import ApiError

# Requests and answers up to these sizes count as small. 10,000 tokens take 50 KB as text, in a prompt or a completion,
# and a worker's metrics take 130 KB.
SMALL_REQUEST_BYTES = 64 * 1024
SMALL_ANSWER_BYTES = 256 * 1024
# A client that is refused may come back after so long.
RETRY_AFTER_S = 2


class BodyMemory:
    """The account.

    held_bytes: the bytes held now.
    refused_requests, refused_answers: those that found no room.
    """

    def __init__(self, limits: ClientLimits) -> None:
        self._limits = limits
        self.held_bytes = 0
        self.refused_requests = 0
        self.refused_answers = 0

    @property
    def most_request_bytes(self) -> int:
        """The largest request that can ever find room."""
        return max(self._share, min(SMALL_REQUEST_BYTES, self._limits.max_bodies_bytes))

    @property
    def _share(self) -> int:
        """What large requests may fill."""
        limit = self._limits.max_bodies_bytes
        return limit - limit // 4

    @property
    def scarce(self) -> bool:
        """Whether large requests have less than half of their share left, so that slow ones must hurry."""
        return 2 * self.held_bytes > self._share

    def admit_request(self, size: int, more: int) -> None:
        """Check that a request of which `size` bytes are held may grow by `more` bytes. Raises ApiError 503."""
        small = size + more <= SMALL_REQUEST_BYTES
        if self.held_bytes + more > (self._limits.max_bodies_bytes if small else self._share):
            self.refused_requests += 1
            raise ApiError(503, "the router has no memory left for this request", retry_after_s=RETRY_AFTER_S)

    def admits_answer(self, size: int, more: int) -> bool:
        """Whether an answer of which `size` bytes are held may grow by `more` bytes. A small one always may."""
        if size + more <= SMALL_ANSWER_BYTES or self.held_bytes + more <= self._limits.max_bodies_bytes:
            return True
        self.refused_answers += 1
        return False


class Hold:
    """Some bytes that are counted: those of one body, or of one buffer. size: how many."""

    __slots__ = ("_memory", "size")

    def __init__(self, memory: BodyMemory) -> None:
        self._memory = memory
        self.size = 0

    def add(self, size: int) -> None:
        self.size += size
        self._memory.held_bytes += size

    def release(self) -> None:
        """Count the bytes no longer. Does nothing the second time."""
        self._memory.held_bytes -= self.size
        self.size = 0

    def __del__(self) -> None:
        self._memory.held_bytes -= self.size
