"""The two stages of a request in Dynamo, prefill and decode: choose a worker, and forward the request to it."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping
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
from eldr_dynamo.errors import Failure, read_error
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


class Errors(Protocol):
    """Makes the errors that Dynamo's frontend understands."""

    def of(self, failure: Failure) -> Exception: ...

    def unavailable(self, text: str) -> Exception:
        """There is no worker."""


class Stages:
    """Handles the requests of Dynamo's frontend.

    Errors of workers reach the frontend, which then decides whether to migrate the request. Only a worker that cannot
    be reached is replaced here, because nothing of the request has been spent.

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
        self.clients = clients
        self._lanes = lanes
        self._instances = instances
        self._prefix_window_bytes = prefix_window_bytes
        self._numbers = count()
        self._throttle = Throttle()

    async def prefill(self, request: Request, context: Context) -> AsyncIterator[Request]:
        """Answer a prefill request by the worker that has most likely the start of its prompt in its cache."""
        self._instances.follow()
        request = with_token_list(request)
        start = prompt_start(request, self._prefix_window_bytes)
        tried: dict[str, Exception] = {}
        while True:
            chosen = self._lane("prefill").ring.choose(start, tried)
            if chosen is None:
                raise self.errors.unavailable("no prefill worker is available")
            worker, spilled = chosen
            self._again(tried, "prefill", worker)
            self.metrics.prefill_spills += spilled
            with _Leg(self, worker, context) as leg:
                async for output in await leg.send(request):
                    yield output
            if leg.refusal is None:
                return
            tried[worker.url] = leg.refusal

    async def decode(self, request: Request, context: Context) -> AsyncIterator[Request]:
        """Answer a decode request by the worker that the policy chooses."""
        self._instances.follow()
        request, has_handoff, wire = take_counts(with_token_list(request))
        counts = self._read(wire) if has_handoff else None
        served = self.fleet.groups[0].whole
        served.promise()  # which Placement expects of a request until it leaves
        try:
            tried: dict[str, Exception] = {}
            while True:
                placement = self._place(request, counts, wire, served, context.id(), tried)
                worker = placement.worker
                with placement, _Leg(self, worker, context) as leg:
                    stream = await leg.send(request)
                    request, counts, wire = {}, None, None  # a thousand streams would hold their prompts
                    async for output in stream:
                        yield output
                if leg.refusal is None:
                    return
                tried[worker.url] = leg.refusal
        finally:
            served.release()

    def _place(
        self,
        request: Request,
        counts: ExpertCounts | None,
        wire: Any,
        served: Served,
        name: str,
        tried: dict[str, Exception],
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

    def _again(self, tried: dict[str, Exception], leg: LegName, worker: Worker) -> None:
        """Raise the worker's own error if it was tried before: all others were, too."""
        if worker.url in tried:
            raise tried[worker.url]
        if tried:
            self.metrics.retries[leg, "refused"] += 1

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

    refusal: why the worker could not be reached, after the block. That ends the block without an error.
    """

    __slots__ = ("_context", "_sent", "_stages", "_worker", "refusal")

    def __init__(self, stages: Stages, worker: Worker, context: Context) -> None:
        self._stages = stages
        self._worker = worker
        self._context = context
        self._sent = False
        self.refusal: Exception | None = None

    async def send(self, request: Request) -> AsyncIterator[Request]:
        """Send the request. Returns the worker's outputs."""
        client = self._stages.clients[self._worker.leg]
        outputs = await client.direct(request, int(self._worker.url), annotated=False, context=self._context)
        self._sent = True
        return outputs

    def __enter__(self) -> _Leg:
        self._stages.outcomes.began(self._worker)
        self._stages.fleet.started(self._worker)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> bool:
        """Judge how it ended. Raises the error that the frontend gets."""
        stages, worker = self._stages, self._worker
        failure = read_error(error, self._sent) if isinstance(error, Exception) else None
        if not self._context.is_stopped():  # else the client has left, and the end says nothing about the worker
            if error is None:
                stages.outcomes.succeeded(worker)
            elif failure is not None and failure.fault:
                stages.outcomes.failed(worker, failure.fault)
                stages.metrics.broken_streams += self._sent
        stages.fleet.finished(worker)
        stages.outcomes.ended(worker)
        if failure is None:
            return False
        if not failure.refused:
            raise stages.errors.of(failure) from error
        self.refusal = stages.errors.of(failure)
        return True
