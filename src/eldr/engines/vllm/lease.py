"""The lease of a hand-off: how long the prefill worker keeps the blocks that a decode worker will pull.

A NIXL pull is a one-sided read that nobody checks. After the lease, the prefill worker may have put another prompt's KV
into the blocks, and the pull still succeeds. So the remaining time travels with the hand-off. The decode side refuses a
pull that would start too late, and discards one that ended too late. vLLM then computes the prompt itself. The
heartbeats with which a NIXL decode worker extends leases prove nothing here, because they are not acknowledged.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard


def grant(lease_s: float, now_unix_s: float) -> dict[str, float]:
    """Encode a lease that starts now."""
    return {"left_s": float(lease_s), "unix_s": now_unix_s}


def deadline_unix_s(wire: object, now_unix_s: float, margin_s: float) -> float | None:
    """Return when to stop trusting a hand-off seen now, on this machine's wall clock. None if `wire` is not a lease.

    `unix_s` is the sender's clock at the moment `left_s` was true. It accounts for the time in transit, including time
    in the socket buffer of a stopped process. A sender whose clock is ahead cannot lengthen a lease.
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
    """Enforces deadlines on a decode worker's pulls. An engine has one for each of its workers.

    It works on NIXL's ReqMeta and vLLM's KVConnectorTransferResults. `events` counts refused and discarded pulls by
    reason, until the caller clears it.
    """

    def __init__(self, clock_unix_s: Callable[[], float]) -> None:
        self._clock_unix_s = clock_unix_s
        self._running: dict[str, float] = {}
        self._refused: set[str] = set()
        self.events: Counter[str] = Counter()

    def admit(self, pulls: dict[str, Any], deadlines_unix_s: Mapping[str, float | None]) -> None:
        """Remove the pulls that must not start from `pulls` (request id -> ReqMeta), before NIXL sees them."""
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
        """Mark refused pulls, and pulls that ended after their deadline, as failed in `results`."""
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
