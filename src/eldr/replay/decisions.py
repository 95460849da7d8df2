"""Repeats a decision log of the router on a fresh policy and says where the choices differ."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from eldr.counts import CountsError
from eldr.policies.base import DecodeRequest, Policy
from eldr.policies.logged import request_from_wire
from eldr.replay.errors import ReplayError


@dataclass(frozen=True, slots=True)
class Repetition:
    """decisions: choices repeated. differing: (line number, worker of the log, worker chosen now)."""

    decisions: int
    differing: list[tuple[int, str, str]]


def repeat_decisions(lines: Iterable[str], policy: Policy) -> Repetition:
    """Let `policy` hear a log made by LoggedPolicy, choose again, and compare.

    Where a choice differs the log's worker is what starts, so that later choices are judged in the logged state.
    Raises ReplayError naming the line that is no event.
    """
    requests: dict[str, DecodeRequest] = {}
    decisions = 0
    differing: list[tuple[int, str, str]] = []
    for number, line in enumerate(lines, 1):
        try:
            event = json.loads(line)
            if event["event"] == "choose":
                request = request_from_wire(event["request"])
                requests[request.request_id] = request
                chosen = policy.choose(request, event["in_flight"]).worker
                decisions += 1
                if chosen != event["worker"]:
                    differing.append((number, event["worker"], chosen))
            else:
                _hear(event, requests, policy)
        except (ValueError, KeyError, TypeError, CountsError, RecursionError) as error:
            raise ReplayError(f"decision log, line {number}: not an event of a decision log ({error!r})") from None
    return Repetition(decisions, differing)


def _hear(event: dict[str, Any], requests: dict[str, DecodeRequest], policy: Policy) -> None:
    kind, worker = event["event"], event["worker"]
    if kind == "joined":
        policy.joined(worker)
    elif kind == "left":
        policy.left(worker)
    elif kind == "started":
        policy.started(requests[event["request_id"]], worker)
    elif kind == "finished":
        policy.finished(requests.pop(event["request_id"]), worker)
    else:
        raise KeyError(kind)
