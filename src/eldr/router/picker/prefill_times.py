"""How long a prefill takes that the picker does not see end: learned from streams, whose answers begin right after it.

An answer that is not streamed begins when it ends, so its prefill worker would count as busy for the whole decode. The
time until a stream begins is that of queues, prefill, transfer and the first step. It grows with the prompt, of which
bytes are known. Twice the mean is allowed, because a worker that counts as busy for a moment too long does less harm
than one that looks idle and is not.
"""

from __future__ import annotations

from typing import Final

# Length of the moving averages, in streams.
RECENT: Final = 50
MARGIN: Final = 2.0


class PrefillTimes:
    """Moving averages over the latest streams. No clock and no IO."""

    def __init__(self) -> None:
        self._seen = 0
        self._seconds = 0.0
        self._bytes = 0.0

    def began(self, prompt_bytes: int, seconds: float) -> None:
        """A stream has begun so long after its workers were chosen."""
        self._seen += 1
        weight = 1 / min(self._seen, RECENT)
        self._seconds += weight * (seconds - self._seconds)
        self._bytes += weight * (prompt_bytes - self._bytes)

    def most_s(self, prompt_bytes: int) -> float | None:
        """How long a prefill worker counts as busy with such a prompt, at most. None as long as nothing is known.

        A short prompt counts as an average one: part of the time is the same for all.
        """
        if not self._seen:
            return None
        return MARGIN * self._seconds * max(1.0, prompt_bytes / max(self._bytes, 1.0))
