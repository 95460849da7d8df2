"""The measurements of one streamed request, with the field's usual definitions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np


@dataclass(slots=True)
class Outcome:
    """One streamed request as its client saw it. Times are in seconds on one monotonic clock.

    number: the index in the workload.
    kind: the kind of its prompt.
    sent_s: when it was sent.
    text: the generated text.
    token_ids: the generated tokens, if the server returns them.
    token_times_s: when each token arrived. Tokens in one event share its time.
    error: what went wrong. None if the request succeeded.
    """

    number: int
    kind: str
    sent_s: float
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    token_times_s: list[float] = field(default_factory=list)
    error: str | None = None

    @property
    def ttft_s(self) -> float | None:
        """Time to first token, from sending the request. None without a token."""
        return self.token_times_s[0] - self.sent_s if self.token_times_s else None

    @property
    def tpot_s(self) -> float | None:
        """Time per output token: (last token time - first token time) / (tokens - 1). None below two tokens."""
        times = self.token_times_s
        return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None

    @property
    def itl_s(self) -> list[float]:
        """Inter-token latencies: the gaps between tokens."""
        return [later - earlier for earlier, later in pairwise(self.token_times_s)]


def percentile_ms(times_s: Sequence[float], percent: float) -> float | None:
    """The percentile in milliseconds, by linear interpolation. None for an empty list."""
    return 1000 * float(np.percentile(times_s, percent)) if len(times_s) else None


def mean_ms(times_s: Sequence[float]) -> float | None:
    """The mean in milliseconds. None for an empty list."""
    return 1000 * float(np.mean(times_s)) if len(times_s) else None
