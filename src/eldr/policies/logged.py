"""A decision log: everything a policy heard and what it chose, one JSON object per line, so that it can be repeated.

Policies read neither clock nor socket and draw from a seeded generator: a fresh policy with the same options that
hears the same log makes the same choices (`eldr.replay.decisions`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from eldr.counts import decode_counts, encode_counts
from eldr.policies.base import Decision, DecodeRequest, Policy


class LoggedPolicy(Policy):
    """Passes everything on to another policy and writes a line of it. write: takes the line without its end.

    A request's counts are written once, with its choice; its start and finish name it by id.
    """

    def __init__(self, policy: Policy, write: Callable[[str], None]) -> None:
        self._policy = policy
        self._write = write
        self.name = policy.name

    def _tell(self, event: str, **fields: Any) -> None:
        self._write(json.dumps({"event": event, **fields}, separators=(",", ":")))

    def choose(self, request: DecodeRequest, in_flight: Mapping[str, int]) -> Decision:
        decision = self._policy.choose(request, in_flight)
        self._tell(
            "choose",
            request=request_to_wire(request),
            in_flight=dict(in_flight),
            worker=decision.worker,
            reason=decision.reason,
        )
        return decision

    def started(self, request: DecodeRequest, worker: str) -> None:
        self._tell("started", request_id=request.request_id, worker=worker)
        self._policy.started(request, worker)

    def finished(self, request: DecodeRequest, worker: str) -> None:
        self._tell("finished", request_id=request.request_id, worker=worker)
        self._policy.finished(request, worker)

    def joined(self, worker: str) -> None:
        self._tell("joined", worker=worker)
        self._policy.joined(worker)

    def left(self, worker: str) -> None:
        self._tell("left", worker=worker)
        self._policy.left(worker)


def request_to_wire(request: DecodeRequest) -> dict[str, Any]:
    """JSON-able form of a request, counts included."""
    return {
        "request_id": request.request_id,
        "prompt_tokens": request.prompt_tokens,
        "counts": None if request.counts is None else encode_counts(request.counts),
        "label": request.label,
        "max_tokens": request.max_tokens,
    }


def request_from_wire(wire: Mapping[str, Any]) -> DecodeRequest:
    """The request; raises CountsError, KeyError or TypeError for what is none."""
    counts = wire["counts"]
    return DecodeRequest(
        request_id=wire["request_id"],
        prompt_tokens=wire["prompt_tokens"],
        counts=None if counts is None else decode_counts(counts),
        label=wire["label"],
        max_tokens=wire["max_tokens"],
    )
