"""The lease of a hand-off: how long the prefill worker keeps the blocks that a decode worker is to pull.

A NIXL pull is a one-sided read that nobody checks: after the lease the prefill worker may have put another prompt's
KV into the blocks, and the pull succeeds all the same. So the time left travels with the hand-off, and the decode
side refuses a pull that would start too late and discards one that ended too late; vLLM then computes the prompt
itself. The heartbeats by which a NIXL decode worker extends leases prove nothing here: they are not acknowledged.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard


def grant(lease_s: float, now_unix_s: float) -> dict[str, float]:
    """Wire form of a lease that starts now."""
    return {"left_s": float(lease_s), "unix_s": now_unix_s}


def deadline_unix_s(wire: object, now_unix_s: float, margin_s: float) -> float | None:
    """When to stop trusting a hand-off seen now, by this machine's wall clock; None if `wire` is no lease.

    `unix_s`, the sender's clock when `left_s` was true, counts the time on the way, also in the socket buffer of a
    stopped process. A sender whose clock is ahead cannot lengthen a lease.
    """
    if not isinstance(wire, dict):
        return None
    left_s, sent_unix_s = wire.get("left_s"), wire.get("unix_s")
    if not (_is_finite(left_s) and _is_finite(sent_unix_s)):
        return None
    return now_unix_s + left_s - max(0.0, now_unix_s - sent_unix_s) - margin_s


def _is_finite(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class PullGuard:
    """Enforces deadlines on a decode worker's pulls; one for each worker of an engine.

    Works on NIXL's ReqMeta and vLLM's KVConnectorTransferResults. `events` counts what was refused or discarded,
    by reason, until the caller clears it.
    """

    def __init__(self, clock_unix_s: Callable[[], float]) -> None:
        self._clock_unix_s = clock_unix_s
        self._running: dict[str, float] = {}
        self._refused: set[str] = set()
        self.events: Counter[str] = Counter()

    def admit(self, pulls: dict[str, Any], deadlines_unix_s: Mapping[str, float | None]) -> None:
        """Take the pulls that must not start out of `pulls` (request id -> ReqMeta), before NIXL sees them."""
        now = self._clock_unix_s()
        for request_id, deadline in deadlines_unix_s.items():
            if deadline is None:
                self._refuse(request_id, "no_lease")
                # NIXL's form of "nothing to pull": tells the prefill worker that it may free the blocks.
                pulls[request_id].local_block_ids = ()
                pulls[request_id].awaiting_kvs = False
            elif now >= deadline:
                self._refuse(request_id, "expired_before_pull")
                del pulls[request_id]
            else:
                self._running[request_id] = deadline

    def settle(self, results: Any) -> None:
        """Mark in `results` the refused pulls as failed, and those that ended after their deadline."""
        now = self._clock_unix_s()
        for request_id in results.finished_recving:
            deadline = self._running.pop(request_id, None)
            if deadline is not None and now >= deadline and request_id not in results.failed_recving:
                self.events["expired_during_pull"] += 1
                results.failed_recving.add(request_id)
        results.finished_recving |= self._refused
        results.failed_recving |= self._refused
        self._refused = set()

    def _refuse(self, request_id: str, reason: str) -> None:
        self._refused.add(request_id)
        self.events[reason] += 1
