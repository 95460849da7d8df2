"""The result of a prefill: transfer parameters that are valid once within a lease, and expert counts."""

from __future__ import annotations

import time
from typing import Any

import orjson

from eldr.counts import CountsError, ExpertCounts, decode_counts
from eldr.kernels import JsonObject
from eldr.router.fleet.workers import Worker
from eldr.router.protocols.json_text import tree_of

# How long a hand-off may wait in the router if its lease is unknown, because the prefill worker has no eldr connector.
# NIXL's own lease is 30 s by default.
UNKNOWN_LEASE_S = 10.0
# What the worker tells the router, and not the decode worker; and what the router tells the decode worker itself.
FOR_ROUTER = frozenset(("eldr_counts", "eldr_lease", "eldr_record"))


class Lease:
    """Time until the prefill worker may free the blocks: `left_s` when it was received, at `received_s` (monotonic)."""

    __slots__ = ("left_s", "received_s")

    def __init__(self, left_s: float, received_s: float) -> None:
        self.left_s = left_s
        self.received_s = received_s

    @staticmethod
    def from_wire(wire: object, sent_s: float | None, received_s: float, received_unix_s: float) -> Lease | None:
        """Read the lease that the prefill worker stated, minus the age of the answer. None if it stated none.

        The age depends on the worker's clock and ours. It is clamped between zero and the time since the prefill
        request was sent (`sent_s`, monotonic), so a wrong clock does little harm. If somebody else sent that, and
        `sent_s` is None, nothing but the clocks tells the age.
        """
        if not isinstance(wire, dict):
            return None
        left_s, unix_s = wire.get("left_s"), wire.get("unix_s")
        if not isinstance(left_s, (int, float)) or not isinstance(unix_s, (int, float)):
            return None
        age_s = max(received_unix_s - unix_s, 0.0)
        if sent_s is not None:
            age_s = min(age_s, received_s - sent_s)
        return Lease(left_s - age_s, received_s)

    def left_at(self, now_s: float) -> float:
        return self.left_s - (now_s - self.received_s)


class HandOff:
    """The result of one prefill.

    Its parameters are kept as the prefill worker wrote them.

    params: in which do_remote_prefill is, and in which the members of FOR_ROUTER were looked for.
    counts: the expert counts of the prompt. None if there are no usable ones.
    counts_reason, counts_problem: why there are none, as a metric label and for people. Empty if there are. The
        exception itself is not kept: it knows the frames that hold the bodies.
    counts_wire: the counts as the worker sent them. Once the hand-off is spent both are dropped, except that a
        recording keeps counts_wire.
    prompt_tokens: the worker's count of them. 0 if it did not say.
    prefill_s: how long its prefill took, with the wait at the worker. 0 if somebody else sent that.
    source: the prefill worker. None if somebody else chose it.
    name: the worker's name for the request whose blocks these are.
    """

    def __init__(
        self, params: JsonObject, source: Worker | None, name: object, prompt_tokens: int, sent_s: float | None
    ) -> None:
        self._params = params.spliced(FOR_ROUTER)
        self._spent = False
        received_s = time.monotonic()
        self.prefill_s = 0.0 if sent_s is None else received_s - sent_s
        self.source = source
        self.name = name
        self.prompt_tokens = prompt_tokens
        self.counts: ExpertCounts | None = None
        self.counts_reason = self.counts_problem = ""
        self.counts_wire: Any = tree_of(params.raw("eldr_counts"))
        self.lease = Lease.from_wire(tree_of(params.raw("eldr_lease")), sent_s, received_s, time.time())
        self._unknown_until_s = received_s + UNKNOWN_LEASE_S
        try:
            if self.counts_wire is None:
                raise CountsError("missing", "the prefill worker sent no expert counts; is the eldr connector on?")
            self.counts = decode_counts(self.counts_wire)
        except CountsError as error:
            self.counts_reason, self.counts_problem = error.reason, str(error)

    def left_s(self, now_s: float) -> float:
        """Seconds left at monotonic time `now_s`."""
        return self._unknown_until_s - now_s if self.lease is None else self.lease.left_at(now_s)

    def spend(self, record: bool) -> bytes:
        """Return the parameters, as a JSON object, for the one decode request that may use them.

        The prefill worker frees the blocks at the first completion, abort or rejection that it learns of, and a pull is
        an unchecked read of its memory. Once a byte of this request is sent, the parameters are void, whatever happens
        to it.
        """
        if self._spent:
            raise AssertionError("a hand-off was about to be sent twice")
        self._spent = True
        # A thousand streams would hold 30 MB of counts that nobody reads again.
        self.counts = None
        if not record:
            self.counts_wire = None
        params, self._params = self._params, b""
        added = b""
        if self.lease is not None:
            lease = {"left_s": self.lease.left_at(time.monotonic()), "unix_s": time.time()}
            added = b',"eldr_lease":%b' % orjson.dumps(lease)
        if record:
            added += b',"eldr_record":true'
        # They are never empty: an answer without do_remote_prefill is no hand-off.
        return b"%b%b}" % (params[:-1], added) if added else params
