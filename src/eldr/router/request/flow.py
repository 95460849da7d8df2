"""Drives one request through its life: admit, prefill, place, decode, relay."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any, Final, cast

import orjson

from eldr.router.fleet.groups import Served
from eldr.router.http.client import Answer
from eldr.router.http.errors import ApiError
from eldr.router.http.exchange import ClientExchange
from eldr.router.http.forwarding import answer_headers
from eldr.router.http.message import Request
from eldr.router.placement.decode import Placement
from eldr.router.protocols import openai
from eldr.router.protocols.handoff import HandOff
from eldr.router.request import intake
from eldr.router.request.answer import DecodeAnswer, TokenTimes
from eldr.router.request.attempts import Attempts
from eldr.router.request.intake import Job
from eldr.router.request.legs import Leg, LegFailure, LegRefused, RelayedError
from eldr.router.request.services import Services

log = logging.getLogger("eldr.router")

# A request that runs whole has no lease. It waits at most this long for a decode worker with room.
WHOLE_WAIT_S = 60.0
# The workers of a model that no worker serves.
NONE: Final[frozenset[str]] = frozenset()
# A shorter wait in the queue does not count as a wait.
NO_WAIT_S = 0.0005


class Flow:
    """Answers one completion or chat request. It also listens to the events of its client."""

    def __init__(self, services: Services, client: ClientExchange, request: Request) -> None:
        self._services = services
        self._client = client
        self._request = request
        self._id = intake.request_id(request)
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._leg: Leg | None = None  # the current decode leg, with its answer
        self._answer: DecodeAnswer | None = None
        self._ended: ApiError | None = None  # why the router ended the request before it was answered
        self._notes: dict[str, Any] = {}  # for the log and the trace; nothing reads them back

    # The steps of the request.

    def start(self) -> asyncio.Task[None] | None:
        """Check the request. Answer a bad one at once; otherwise start the task that answers it."""
        try:
            job = self._services.intake.take(self._request, self._id)
            self._request.body = b""  # free the memory while the answer streams
        except ApiError as error:
            self._respond_error(error)
            return None
        self._id = job.request_id
        self._client.listener = self
        self._task = asyncio.get_running_loop().create_task(self._run(job))
        return self._task

    async def _run(self, job: Job) -> None:
        """Answer the request, and leave nothing of it behind."""
        self._wake_at(job, job.deadlines.first_byte_s)
        try:
            await self._respond(job)
        finally:
            cast(asyncio.TimerHandle, self._timer).cancel()
            if job.trace is not None:
                job.trace.end(self._notes)
            self._log()

    async def _respond(self, job: Job) -> None:
        """Give the client its one answer, if it stays for it. Raises RuntimeError for an error after the answer."""
        try:
            await self._serve(job)
        except ApiError as error:
            self._respond_error(error)
        except RelayedError as error:
            self._relay(error.answer)
        except asyncio.CancelledError:
            if self._ended is not None:
                self._respond_error(self._ended)
            else:
                self._notes["status"] = "cancelled"
        except Exception:
            log.exception("request %s failed inside the router", self._id)
            self._respond_error(ApiError(500, "internal error in the router"))

    async def _serve(self, job: Job) -> None:
        """Admit the request, then prefill, place and decode until one attempt succeeds, and relay its answer.

        Raises ApiError or RelayedError.
        """
        services = self._services
        attempts = Attempts(services.retries, self._id)
        served = services.fleet.served(job.model) or await services.lists.find(job.model)
        await self._admit(job, served)
        try:
            handoff: HandOff | None = None
            whole = self._runs_whole(job.why_whole)
            while True:
                try:
                    if handoff is None and not whole:
                        whole = self._runs_whole("prefill_lacks_model" if served.prefill == NONE else None)
                    if handoff is None and not whole:
                        handoff = await self._prefill(job, served, attempts)
                        whole = self._runs_whole("no_handoff" if handoff is None else None)
                    placement = await self._place(job, served, handoff, attempts)
                    answer = await self._decode(job, handoff, placement, attempts)
                    break
                except LegRefused as refused:
                    attempts.refused(refused)
                except LegFailure as failure:
                    attempts.failed(failure)
                    handoff = None  # it is spent, or its lease has ended
                except RelayedError as relayed:
                    if not await self._is_served_elsewhere(served, relayed, attempts):
                        raise
                    handoff = None
        finally:
            services.admission.leave(served)
        if answer.begun:
            self._count(200)
        else:
            self._relay(answer, handoff, record=job.record)

    async def _admit(self, job: Job, served: Served) -> None:
        entered_s = time.monotonic()
        await self._services.admission.enter(job.claim, served)
        waited_s = time.monotonic() - entered_s
        if job.trace is not None:
            job.trace.leg("queue", entered_s)
        if waited_s > NO_WAIT_S:
            self._services.metrics.queue.observe(waited_s)

    def _runs_whole(self, why: str | None) -> bool:
        """Whether there is a reason to prefill and decode on the same decode worker."""
        if why is None:
            return False
        self._services.metrics.passthrough[why] += 1
        self._notes["passthrough"] = why
        return True

    async def _is_served_elsewhere(self, served: Served, relayed: RelayedError, attempts: Attempts) -> bool:
        """Whether a worker answered 404 because it no longer serves the model, and others do. They get the request."""
        worker = relayed.worker
        if relayed.answer.status != 404 or worker is None or not served.name or worker.models is None:
            return False
        await self._services.lists.look_at(worker)
        if worker.models is None or served.name in worker.models or served.decode == NONE:
            return False
        return attempts.unserved(worker)

    async def _prefill(self, job: Job, served: Served, attempts: Attempts) -> HandOff | None:
        """Return a hand-off, or None if the worker gives none.

        Raises NoWorkerError, LegRefused, LegFailure or RelayedError.
        """
        services, config = self._services, self._services.config
        start = openai.prompt_start(job.path, job.body, config.placement.prefix_window_bytes)
        if served.adapter:
            start += served.name.encode()  # the same prompt has other KV blocks
        lanes = services.lanes
        while (chosen := lanes.of(served.group).ring.choose(start, attempts.tried("prefill"), served.prefill)) is None:
            await services.admission.until_changed(served, "prefill")
        worker, spilled = chosen
        services.metrics.prefill_spills += spilled
        body = services.protocol.prefill_body(job.body, job.record)
        with Leg(services.legs, job, worker) as leg:
            await leg.connect()
            leg.send(attempts.next_name("prefill"), body, Answer(), config.timeouts.prefill_timeout_s)
            handoff = leg.read_handoff(await leg.answered())
        self._notes["prefill"] = worker.url
        return handoff

    async def _place(self, job: Job, served: Served, handoff: HandOff | None, attempts: Attempts) -> Placement:
        """Wait for a worker that is eligible before the lease ends.

        Raises LegFailure, or NoWorkerError if there is none.
        """
        services, admission = self._services, self._services.admission
        request = job.decode_request(handoff)
        while True:
            placements = services.lanes.of(served.group).placements
            placement = placements.place(request, served, attempts.tried("decode"), admission.usable(served))
            if placement is not None:
                return placement
            limit_s = WHOLE_WAIT_S if handoff is None else handoff.left_s(time.monotonic())
            if not await admission.until_changed(served, "decode", limit_s):
                raise LegFailure("decode", "lease", "no worker had room before the lease ended")

    async def _decode(
        self, job: Job, handoff: HandOff | None, placement: Placement, attempts: Attempts
    ) -> DecodeAnswer:
        """Run the decode leg and forward a stream as it arrives. Raises LegRefused, LegFailure or RelayedError."""
        services, timeouts, worker = self._services, self._services.config.timeouts, placement.worker
        with placement, Leg(services.legs, job, worker, None if handoff is None else handoff.source) as leg:
            await leg.connect()
            if handoff is not None and handoff.left_s(time.monotonic()) <= 0:
                raise LegFailure("decode", "lease", "the lease ended before the request was sent")
            times = TokenTimes(services.metrics, self._request.received_s, job.wants_usage)
            answer = DecodeAnswer(self._client, times, self._response_headers(), leg.first_event, job.stream)
            leg.send(
                attempts.next_name("decode"),
                services.protocol.decode_body(job.body, handoff, job.record),
                answer,
                timeouts.decode_first_byte_timeout_s if job.stream else timeouts.decode_answer_timeout_s,
                timeouts.decode_idle_timeout_s,
            )
            self._leg, self._answer = leg, answer
            if self._client.stalled:
                leg.pause()
            try:
                await leg.answered()
            finally:
                self._leg = self._answer = None
            if answer.broken is not None:
                leg.broke(answer.broken)
            elif not answer.cut:
                leg.succeeded()
        self._notes["decode"] = worker.url
        self._notes["reason"] = placement.decision.reason
        if answer.begun:
            # Events that are not tokens: [DONE], and the opening event of a chat stream.
            tpot_s = times.observe(1 + (job.path == openai.CHAT), whole=answer.broken is None and not answer.cut)
            if tpot_s is not None:
                worker.observe_tpot(tpot_s)
        return answer

    # The answer.

    def _relay(self, answer: Answer, handoff: HandOff | None = None, *, record: bool = False) -> None:
        body = answer.body
        content_type, retry_after = answer_headers(answer.headers)
        if content_type.startswith(b"application/json"):
            protocol = self._services.protocol
            try:
                body = protocol.recorded(body, handoff) if record else protocol.for_client(body)
            except orjson.JSONDecodeError:
                log.warning("request %s: a worker's answer is not JSON", self._id)
                self._respond_error(ApiError(502, "the worker's answer is not valid JSON"))
                return
        self._client.respond(answer.status, body, content_type, self._response_headers() + retry_after)
        self._count(answer.status)

    def _respond_error(self, error: ApiError) -> None:
        self._client.respond_error(error, self._response_headers())
        self._count(error.status)

    def _response_headers(self) -> bytes:
        return b"x-request-id: %b\r\n" % self._id.encode()

    def _count(self, status: int) -> None:
        self._notes["status"] = status
        self._services.metrics.requests[self._request.path.decode(), status] += 1

    def _log(self) -> None:
        if log.isEnabledFor(logging.DEBUG):
            self._notes["seconds"] = round(time.monotonic() - self._request.received_s, 6)
            log.debug("request", extra={"fields": {"id": self._id, "path": self._request.path.decode(), **self._notes}})

    # Ending early.

    def _wake_at(self, job: Job, deadline_s: float) -> None:
        """Set the request's only timer. Its legs are watched by the fleet's sweep."""
        left_s = max(0.0, deadline_s - time.monotonic())
        # Not get_running_loop, which makes a system call.
        self._timer = cast("asyncio.Task[None]", self._task).get_loop().call_later(left_s, self._on_deadline, job)

    def _on_deadline(self, job: Job) -> None:
        answer = self._answer
        if answer is not None and answer.begun and time.monotonic() < job.deadlines.total_s:
            self._wake_at(job, job.deadlines.total_s)
        elif answer is None or not answer.finished.done():
            self._services.metrics.timeouts["total"] += 1
            self.end_now(ApiError(504, "the request was not answered in the time that its client or the router allows"))

    def end_now(self, error: ApiError) -> None:
        """End the request with `error`, inside the stream if it has begun."""
        answer = self._answer
        if answer is None or not answer.begun:
            self._abort()  # the task ends only in the next turn of the event loop, and a stream must not begin before
            self._ended = error
            cast("asyncio.Task[None]", self._task).cancel()
        elif not answer.finished.done():
            self._abort()
            answer.cut_off(error)

    def _abort(self) -> None:
        """Hear no more of the current decode leg."""
        if self._leg is not None:
            self._leg.abort()

    # The client.

    def on_client_gone(self) -> None:
        self._abort()
        if self._answer is not None and self._answer.complete:
            self._answer.settle()
            return
        self._services.metrics.disconnects += 1
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None:
            self._task.cancel()

    def on_client_stalled(self) -> None:
        if self._leg is not None:
            self._leg.pause()

    def on_client_reading(self) -> None:
        if self._leg is not None:
            self._leg.resume()
