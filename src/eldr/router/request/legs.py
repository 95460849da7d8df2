"""One leg: one attempt of a request at one worker, how it ended, and who is to blame if it failed."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import defaultdict
from types import TracebackType
from typing import cast

from eldr.event_stream import Event
from eldr.kernels import JsonObject
from eldr.router.config.endpoint import LegName
from eldr.router.fleet.outcomes import Outcomes
from eldr.router.fleet.workers import Fleet, Worker
from eldr.router.http.client import Answer, ConnectError, ExchangeError, WorkerConnection
from eldr.router.http.errors import ApiError
from eldr.router.http.pool import WorkerPool
from eldr.router.observe.counters import Metrics
from eldr.router.observe.logs import Throttle
from eldr.router.placement.admission import RETRY_AFTER_S
from eldr.router.placement.decode import Placement
from eldr.router.protocols.base import ConcurrentLegs, LegProtocol, SequentialLegs
from eldr.router.protocols.handoff import HandOff
from eldr.router.protocols.streams import FORMS
from eldr.router.request.answer import DecodeAnswer
from eldr.router.request.intake import NO_BODY, Job, id_line
from eldr.router.request.verdict import (
    Names,
    WorkerStatusError,
    WrongAnswerError,
    check_completion,
    check_first_event,
    check_status,
)

log = logging.getLogger("eldr.router")

# Errors that another worker may not have. 501 is not among them, because it means that the request cannot be served.
WORKERS_ERRORS = frozenset((500, 502, 503, 504))
# The worker has too much to do. Another may have room, but this one is not at fault.
OVERLOADED = 429
# Why such a leg failed, as a metric label. It is no fault of the worker.
OVERLOAD = "overloaded"
# Why a worker counts as failed whose partner said that the transfer between them failed.
TRANSFER = "transfer"


class RelayedError(Exception):
    """A worker answered with a status other than 200. The client gets that answer unchanged.

    worker: the worker, if its answer may be the client's fault. None if it is what is left of a failed leg.
    """

    def __init__(self, answer: Answer, worker: Worker | None = None) -> None:
        super().__init__(f"status {answer.status}")
        self.answer = answer
        self.worker = worker


class LegRefused(Exception):  # noqa: N818 - it can often be repaired
    """The worker accepted no connection. No byte was sent, and a hand-off is still valid."""

    def __init__(self, worker: Worker, error: ConnectError) -> None:
        super().__init__(str(error))
        self.worker = worker
        self.reason = error.reason
        self.timed_out = error.timed_out


class LegFailure(Exception):  # noqa: N818 - it can often be repaired
    """A leg failed and may be tried again, because nothing of its answer has reached the client.

    reason: a metric label.
    worker: the worker that failed. None if there was none.
    partner: the worker of the other leg, if it can be the cause.
    answer: the worker's own answer, which the client gets if there is no further attempt.
    """

    def __init__(
        self,
        leg: LegName,
        reason: str,
        why: object,
        *,
        worker: Worker | None = None,
        partner: Worker | None = None,
        answer: Answer | None = None,
    ) -> None:
        super().__init__(f"{leg} leg: {why}")
        self.leg = leg
        self.reason = reason
        self.worker = worker
        self.partner = partner
        self.answer = answer

    @property
    def error(self) -> ApiError:
        """The error that the client gets if there is no answer to pass on."""
        role = self.leg if self.worker is None else self.worker.role
        if self.reason == "timeout":
            return ApiError(504, f"the {role} worker did not answer in time", retry_after_s=RETRY_AFTER_S)
        return ApiError(502, f"no {role} worker completed the request", retry_after_s=RETRY_AFTER_S)


def check_worker(worker: Worker, answer: Answer) -> None:
    """Raise ExchangeError if the status says that the worker failed, and LegFailure if it has too much to do."""
    if answer.status == 200:
        return
    check_status(answer.status)
    if answer.status in WORKERS_ERRORS:
        raise WorkerStatusError(f"status {answer.status}")
    if answer.status == OVERLOADED:
        raise LegFailure(worker.leg, OVERLOAD, f"status {answer.status}", worker=worker, answer=answer)


def no_memory() -> ApiError:
    """The error for a client whose answer found no room."""
    return ApiError(503, "the router has no memory left for the answer", retry_after_s=RETRY_AFTER_S)


class Legs:
    """The state that the legs of all requests share.

    pools: the connections to each worker.
    concurrent: whether both legs of a request run at once.
    answer_names: by leg, path and stream, whether workers name answers after their legs. No prefill is a stream.
    handoff_names: the same for hand-offs.
    """

    def __init__(
        self,
        fleet: Fleet,
        pools: dict[Worker, WorkerPool],
        outcomes: Outcomes,
        protocol: LegProtocol,
        metrics: Metrics,
    ) -> None:
        self.fleet = fleet
        self.pools = pools
        self.outcomes = outcomes
        self.protocol = protocol
        self.concurrent = isinstance(protocol, ConcurrentLegs)
        self.metrics = metrics
        self.answer_names: defaultdict[tuple[LegName, bytes, bool | None], Names] = defaultdict(Names)
        self.handoff_names = Names()
        self.throttle = Throttle()

    def count(self, handoff: HandOff) -> None:
        self.metrics.handoffs += 1
        reason = handoff.counts_reason
        if reason:
            self.metrics.counts_errors[reason] += 1
            if self.throttle.due(reason):
                source = "a prefill worker" if handoff.source is None else handoff.source.url
                log.warning("expert counts of %s cannot be used: %s", source, handoff.counts_problem)

    def leave(self, worker: Worker, most: int) -> None:
        """Move waiting legs away from a worker that does not answer its probes, if another of its group is available.

        Up to `most` legs that wait there for an answer are tried elsewhere. Streams that have begun stay until their
        own deadline, because the worker may only be slow.
        """
        group = self.fleet.group(worker)
        if group is not None and group.whole.any_available(worker.leg):
            moved = self.pools[worker].give_up_waiting("the worker does not answer its probes", most)
            if moved:
                log.warning("%d waiting exchanges leave %s worker %s", moved, worker.role, worker.url)


class Leg:
    """One attempt of a request at one worker. Use it in a `with` block.

    Inside the block the worker has one more request in flight, the leg may be the worker's trial, and its time is part
    of the request's trace. What is not over at the end of the block is given up.

    name: its X-Request-Id, which the engine uses in the name of the answer.
    partner: the other worker that it depends on: the one whose blocks it pulls, or that it runs at once with.
    placement: what hears that the prompt is computed. None for a prefill.
    """

    def __init__(
        self,
        shared: Legs,
        job: Job,
        worker: Worker,
        partner: Worker | None = None,
        placement: Placement | None = None,
    ) -> None:
        self._shared = shared
        self._job = job
        self._partner = partner
        self._placement = placement
        self._connection: WorkerConnection | None = None
        self._answer: Answer | None = None
        self._report = b""  # of an error, in the first event of a stream
        self._began_s = 0.0
        self._sent_s = 0.0
        self.worker = worker
        self.name = ""

    def __enter__(self) -> Leg:
        self._began_s = time.monotonic()
        self._shared.outcomes.began(self.worker)
        self._shared.fleet.started(self.worker)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._connection is not None:
            if self._answer is None:  # nothing was sent
                self._shared.pools[self.worker].release(self._connection)
            else:
                self._connection.abort(self._answer)
        # The answer knows this leg. No cycle is left to the collector.
        self._connection = self._answer = self._placement = None
        self._shared.fleet.finished(self.worker)
        self._shared.outcomes.ended(self.worker)
        if self._job.trace is not None:
            self._job.trace.leg(self.worker.leg, self._began_s, self.worker.url, error)

    async def connect(self) -> None:
        """Open a connection. Raises LegRefused."""
        try:
            self._connection = await self._shared.pools[self.worker].connection()
        except ConnectError as error:
            raise LegRefused(self.worker, error) from None

    def send(self, name: str, body: bytes, answer: Answer, limit_s: float, idle_limit_s: float = math.inf) -> None:
        """Send the request. Nothing keeps `body`, which a thousand streams would otherwise hold to their ends.

        limit_s: the longest wait for the answer, or for the start of a stream.
        idle_limit_s: the longest silence after that.
        """
        job, connection = self._job, self._connection
        assert connection is not None
        self.name = name
        self._answer = answer
        self._sent_s = time.monotonic()
        headers = job.leg_headers + id_line(name)
        request = self._shared.pools[self.worker].request(b"POST", job.path, headers, body, job.authorization)
        connection.start(answer, request, limit_s, idle_limit_s)

    @property
    def over(self) -> asyncio.Future[None]:
        """Resolves when the answer is complete or has failed."""
        assert self._answer is not None
        return self._answer.finished

    async def answered(self) -> JsonObject:
        """Wait until all of the answer is there: the members of a whole completion, none of a stream.

        Raises LegFailure, RelayedError for an error of the client's, or ApiError if there is no memory for it.
        """
        connection, answer = self._connection, self._answer
        assert connection is not None
        assert answer is not None
        try:
            await connection.finish(answer)
            if answer.begun:
                return NO_BODY
            check_worker(self.worker, answer)
            if answer.status == 200:
                return check_completion(answer, self._job.endpoint, self._shared.protocol, self.name, self._names())
        except ExchangeError as error:
            if answer.no_room:
                raise no_memory() from None
            self._shared.metrics.timeouts[self._deadline()] += error.timed_out
            raise self.failed(error, answer if isinstance(error, WorkerStatusError) else None) from None
        self.succeeded()
        raise RelayedError(answer, self.worker)

    def first_event(self, event: Event) -> None:
        """A stream has begun, so nothing is tried again. Raises WrongAnswerError if it does not belong to this leg."""
        try:
            check_first_event(event, FORMS[self._job.path], self._shared.protocol, self.name, self._names())
        except WrongAnswerError:
            self._report = event.data
            raise
        self._job.free_body()
        if self._placement is not None:
            self._placement.prompt_computed()
        if self.worker.ejected:  # its trial must not last as long as the stream
            self.succeeded()

    def read_handoff(self, answer: JsonObject) -> HandOff | None:
        """Return the hand-off of a prefill, or None if the worker returned none.

        Raises LegFailure for the hand-off of another leg, because its blocks would be read as this prompt's.
        """
        shared, worker = self._shared, self.worker
        protocol = cast(SequentialLegs, shared.protocol)
        handoff = protocol.read_handoff(answer, worker, self._sent_s)
        now_s = time.monotonic()
        if handoff is None:
            if shared.throttle.due("no_handoff"):
                log.warning("prefill worker %s returns no hand-off; its requests run whole", worker.url)
        else:
            try:
                shared.handoff_names.check(protocol.handoff_is_named_after(handoff, self.name))
            except ExchangeError as error:
                raise self.failed(error) from None
            shared.count(handoff)
            worker.lease_until_s = max(worker.lease_until_s, now_s + handoff.left_s(now_s))
        shared.metrics.prefill.observe(now_s - self._sent_s)
        self.succeeded()
        return handoff

    def transferred(self) -> None:
        """The answer to a prefill shows that its blocks are where they are needed."""
        self._shared.metrics.handoffs += 1
        self._shared.metrics.prefill.observe(time.monotonic() - self._sent_s)
        self.succeeded()

    def succeeded(self) -> None:
        self._shared.outcomes.succeeded(self.worker)

    def failed(self, error: ExchangeError, answer: Answer | None = None) -> LegFailure:
        """Return the failure to raise, and count it against the worker if that is to blame.

        answer: the worker's own, for the client.
        """
        worker, partner = self.worker, self._partner
        if self._is_to_blame(error):
            self._shared.outcomes.failed(worker, error.reason)
            if partner is not None and self._is_transfers(self._report if answer is None else answer.body):
                self._shared.outcomes.failed(partner, TRANSFER)
        return LegFailure(worker.leg, error.reason, error, worker=worker, partner=partner, answer=answer)

    def _is_transfers(self, report: bytes) -> bool:
        """Whether both workers count as failed. If only the one did that noticed first, a worker that receives nothing
        would take out one sender after the other.
        """
        protocol = self._shared.protocol
        return isinstance(protocol, ConcurrentLegs) and protocol.is_transfers(report)

    def _is_to_blame(self, error: ExchangeError) -> bool:
        """Whether the worker is to blame for a failure.

        It is not if the worker that it depends on is gone, because the transfer would have failed everywhere. Of two
        that wait for each other, the silence of one may be the fault of the other.

        Of a request that cannot be handed off, the client may be the cause, and would take out one worker after the
        other. Its prompt may be slow. And vLLM opens a stream of /v1/responses before it has read all that the client
        wants, and then closes the connection if it refuses that. A worker that is broken fails its probes as well.

        An aggregated worker that does not answer an ordinary request is to blame, as a prefill worker would be.
        """
        worker, partner = self.worker, self._partner
        if partner is not None and not (self._shared.fleet.has(partner) and partner.available):
            return False
        pair = partner is not None and self._shared.concurrent
        if not pair and (partner is not None or worker.leg == "prefill"):
            return True
        if error.timed_out and worker.role == "aggregated" and self._job.why_whole is None:
            return True
        if pair and isinstance(error, WrongAnswerError):
            return True
        return not error.timed_out and not (isinstance(self._answer, DecodeAnswer) and self._answer.opened)

    def broke(self, error: ExchangeError) -> None:
        """The worker failed in the middle of a stream."""
        self._shared.outcomes.failed(self.worker, "broken_stream")
        self._shared.metrics.broken_streams += 1
        self._shared.metrics.timeouts["idle"] += error.timed_out
        fields = {"id": self._job.request_id, "worker": self.worker.url, "reason": error.reason}
        log.warning("stream broken off: %s", str(error), extra={"fields": fields})

    def _names(self) -> Names:
        leg = self.worker.leg
        return self._shared.answer_names[leg, self._job.path, self._job.stream if leg == "decode" else False]

    def _deadline(self) -> str:
        """The metric label of the deadline that `limit_s` enforces."""
        if self.worker.leg == "prefill":
            return "prefill"
        return "first_byte" if self._job.stream else "answer"

    # The client's pace. It does not concern an exchange that has ended.

    def abort(self) -> None:
        if self._connection is not None and self._answer is not None:
            self._connection.abort(self._answer)

    def pause(self) -> None:
        if self._connection is not None and self._answer is not None:
            self._connection.pause(self._answer)

    def resume(self) -> None:
        if self._connection is not None and self._answer is not None:
            self._connection.resume(self._answer)
