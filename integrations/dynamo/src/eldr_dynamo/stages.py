"""The two stages of a request in Dynamo, prefill and decode: choose a worker, and forward the request to it."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from itertools import count
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from eldr.counts import CountsError, ExpertCounts, decode_counts
from eldr.policies.base import DecodeRequest
from eldr.router.config.endpoint import LegName
from eldr.router.fleet.groups import Served
from eldr.router.fleet.outcomes import Outcomes
from eldr.router.fleet.workers import Fleet, Worker
from eldr.router.observe.counters import Metrics
from eldr.router.observe.logs import Throttle
from eldr.router.placement.decode import Placement
from eldr.router.placement.lanes import Lane, Lanes
from eldr_dynamo.requests import Request, max_tokens, prompt_start, prompt_words, take_counts, with_token_list

if TYPE_CHECKING:
    from eldr_dynamo.instances import Instances

log = logging.getLogger("eldr.router")


class Context(Protocol):
    """What is used of Dynamo's context of a request."""

    def id(self) -> str: ...

    def is_stopped(self) -> bool: ...


class Client(Protocol):
    """What is used of Dynamo's client of an endpoint."""

    def instance_ids(self) -> list[int]: ...

    async def direct(
        self, request: Request, instance_id: int, *, annotated: bool, context: Any
    ) -> AsyncIterator[Request]: ...


@dataclass(frozen=True, slots=True)
class Errors:
    """What Dynamo's client raises.

    refused: the worker could not be reached, so nothing was sent.
    faults: the worker is to blame. All others may be the client's fault.
    unavailable: makes the error that says that there is no worker.
    """

    refused: tuple[type[BaseException], ...]
    faults: tuple[type[BaseException], ...]
    unavailable: Callable[[str], Exception]


class Stages:
    """Handles the requests of Dynamo's frontend.

    Errors of workers reach the frontend as they are, which then decides whether to migrate the request. Only a worker
    that cannot be reached is replaced here, because nothing of the request has been spent.

    It has many attributes because a leg concerns most parts of a router.
    """

    def __init__(
        self,
        fleet: Fleet,
        lanes: Lanes,
        outcomes: Outcomes,
        instances: Instances,
        clients: Mapping[LegName, Client],
        errors: Errors,
        metrics: Metrics,
        prefix_window_bytes: int,
    ) -> None:
        self.fleet = fleet
        self.outcomes = outcomes
        self.errors = errors
        self.metrics = metrics
        self._lanes = lanes
        self._instances = instances
        self._clients = clients
        self._prefix_window_bytes = prefix_window_bytes
        self._numbers = count()
        self._throttle = Throttle()

    async def prefill(self, request: Request, context: Context) -> AsyncIterator[Request]:
        """Answer a prefill request by the worker that has most likely the start of its prompt in its cache."""
        self._instances.follow()
        request = with_token_list(request)
        start = prompt_start(request, self._prefix_window_bytes)
        tried: dict[str, BaseException] = {}
        while True:
            chosen = self._lane("prefill").ring.choose(start, tried)
            if chosen is None:
                raise self.errors.unavailable("no prefill worker is available")
            worker, spilled = chosen
            self._again(tried, "prefill", worker)
            self.metrics.prefill_spills += spilled
            with _Leg(self, worker, context) as leg:
                async for output in await self._sent(worker, request, context):
                    leg.begun = True
                    yield output
            if leg.refused is None:
                return
            tried[worker.url] = leg.refused

    async def decode(self, request: Request, context: Context) -> AsyncIterator[Request]:
        """Answer a decode request by the worker that the policy chooses."""
        self._instances.follow()
        request, has_handoff, wire = take_counts(with_token_list(request))
        counts = self._read(wire) if has_handoff else None
        served = self.fleet.groups[0].whole
        served.promise()  # which Placement expects of a request until it leaves
        try:
            tried: dict[str, BaseException] = {}
            while True:
                placement = self._place(request, counts, wire, served, context.id(), tried)
                worker = placement.worker
                with placement, _Leg(self, worker, context) as leg:
                    async for output in await self._sent(worker, request, context):
                        if not leg.begun:
                            leg.begun = True
                            request, counts, wire = {}, None, None  # a thousand streams would hold their prompts
                        yield output
                if leg.refused is None:
                    return
                tried[worker.url] = leg.refused
        finally:
            served.release()

    def _place(
        self,
        request: Request,
        counts: ExpertCounts | None,
        wire: Any,
        served: Served,
        name: str,
        tried: dict[str, BaseException],
    ) -> Placement:
        placements = self._lane("decode").placements
        words = prompt_words(request) if placements.wants_words(counts is not None) else None
        known = DecodeRequest(
            f"{name}/{next(self._numbers)}",
            len(request["token_ids"]),
            counts,
            max_tokens=max_tokens(request),
            counts_wire=None if counts is None else wire,
            words=words,
        )
        placement = placements.place(known, served, tried, None)
        if placement is None:
            raise self.errors.unavailable("no decode worker is available")
        if placement.worker.url in tried:
            with placement:
                self._again(tried, "decode", placement.worker)
        elif tried:
            self.metrics.retries["decode", "refused"] += 1
        return placement

    def _lane(self, leg: LegName) -> Lane:
        lane = self._lanes.of(self.fleet.groups[0])
        if lane is None:
            raise self.errors.unavailable(f"no {leg} worker is available")
        return lane

    def _again(self, tried: dict[str, BaseException], leg: LegName, worker: Worker) -> None:
        """Raise the worker's own error if it was tried before: all others were, too."""
        if worker.url in tried:
            raise tried[worker.url]
        if tried:
            self.metrics.retries[leg, "refused"] += 1

    def _sent(self, worker: Worker, request: Request, context: Context) -> Any:
        client = self._clients[worker.leg]
        return client.direct(request, int(worker.url), annotated=False, context=context)

    def _read(self, wire: Any) -> ExpertCounts | None:
        """Decode the counts that came with a hand-off. None if they cannot be used."""
        self.metrics.handoffs += 1
        try:
            if wire is None:
                raise CountsError("missing", "the prefill worker sent no expert counts; is the eldr connector on?")
            return decode_counts(wire)
        except CountsError as error:
            self.metrics.counts_errors[error.reason] += 1
            if self._throttle.due(error.reason):
                log.warning("expert counts cannot be used: %s", error)
            return None


class _Leg:
    """One attempt at one worker. Inside the `with` block, the worker has one more request in flight.

    begun: whether an output has come.
    refused: why the worker could not be reached, after the block. It ends the block without an error.
    """

    __slots__ = ("_context", "_stages", "_worker", "begun", "refused")

    def __init__(self, stages: Stages, worker: Worker, context: Context) -> None:
        self._stages = stages
        self._worker = worker
        self._context = context
        self.begun = False
        self.refused: BaseException | None = None

    def __enter__(self) -> _Leg:
        self._stages.outcomes.began(self._worker)
        self._stages.fleet.started(self._worker)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> bool:
        stages, worker = self._stages, self._worker
        self._judge(error)
        stages.fleet.finished(worker)
        stages.outcomes.ended(worker)
        return self.refused is not None

    def _judge(self, error: BaseException | None) -> None:
        stages, worker = self._stages, self._worker
        if self._context.is_stopped():  # the client has left: nothing that follows says anything about the worker
            return
        if error is None:
            stages.outcomes.succeeded(worker)
        elif isinstance(error, stages.errors.refused) and not self.begun:
            self.refused = error
            stages.outcomes.failed(worker, "refused")
        elif isinstance(error, stages.errors.faults):
            stages.outcomes.failed(worker, "broken_stream" if self.begun else "failed")
            stages.metrics.broken_streams += self.begun
