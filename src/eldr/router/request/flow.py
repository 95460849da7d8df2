"""One request's life: queue, prefill leg, placement, decode leg."""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from typing import Any, cast

import orjson

from eldr.router.config.endpoint import Role
from eldr.router.fleet.workers import Worker
from eldr.router.http import forwarding
from eldr.router.http.client import Answer, ConnectError, ExchangeError, SilenceError, WorkerConnection
from eldr.router.http.errors import ApiError
from eldr.router.http.exchange import ClientExchange
from eldr.router.http.message import Request
from eldr.router.placement.admission import NoWorkerError
from eldr.router.placement.decode import Placement
from eldr.router.protocols.handoff import HandOff
from eldr.router.request import intake, legs, openai
from eldr.router.request.answer import DecodeAnswer
from eldr.router.request.deadlines import Deadlines
from eldr.router.request.intake import Job, no_worker
from eldr.router.request.legs import LegFailure, RelayedError
from eldr.router.request.services import Services
from eldr.router.request.verdict import check_completion

log = logging.getLogger("eldr.router")

# Longest wait for a decode worker with room, of a request that runs whole and has no lease.
WHOLE_WAIT_S = 60.0
# Connections that one worker may refuse one request: each ends what the worker gets until a probe succeeds.
MOST_REFUSALS = 3


class Flow:
    """Answers one completion or chat request; also the listener that hears of its client."""

    def __init__(self, services: Services, connection: ClientExchange, request: Request) -> None:
        self._services = services
        self._connection = connection
        self._request = request
        self._id = intake.request_id(request)
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._running = False
        self._late = False
        self._ended: ApiError | None = None
        self._upstream: WorkerConnection | None = None
        self._answer: DecodeAnswer | None = None
        self._prefills = 0
        self._decodes = 0
        self._retries = 0
        self._tried: dict[Role, set[str]] = {"prefill": set(), "decode": set()}
        self._refused: dict[str, int] = {}
        self._notes: dict[str, Any] = {}

    def start(self) -> asyncio.Task[None] | None:
        """Check the request; answer it at once if it is bad, else start the task that answers it."""
        try:
            job = intake.take_in(self._request, self._id, self._services)
            self._request.body = b""  # not to be held twice while the answer streams
        except ApiError as error:
            self._respond_error(error)
            return None
        self._id = job.request_id
        self._connection.listener = self
        loop = asyncio.get_running_loop()
        self._task = loop.create_task(self._run(job))
        # One timer for a request's whole life; its legs are watched by the router's sweep.
        left_s = max(0.0, job.deadlines.first_byte_s - time.monotonic())
        self._timer = loop.call_later(left_s, self._on_deadline, job.deadlines)
        return self._task

    def _on_deadline(self, deadlines: Deadlines) -> None:
        answer = self._answer
        if not self._running:  # a cancelled task that never ran would answer nobody
            self._timer = asyncio.get_running_loop().call_later(0.001, self._on_deadline, deadlines)
        elif answer is not None and answer.begun and (left_s := deadlines.total_s - time.monotonic()) > 0:
            self._timer = asyncio.get_running_loop().call_later(left_s, self._on_deadline, deadlines)
        elif answer is None or not answer.finished.done():
            self._late = True
            self._end(SilenceError("the request took too long"), _too_late())

    def end_now(self, error: ApiError) -> None:
        """The router stops: the client hears `error`, within the stream if it has begun."""
        self._end(ExchangeError("the router stops"), error)

    def _end(self, why: ExchangeError, error: ApiError) -> None:
        answer = self._answer
        if answer is None or not answer.begun:
            self._ended = error
            cast("asyncio.Task[None]", self._task).cancel()
        elif not answer.finished.done():
            cast(WorkerConnection, self._upstream).abort(answer)
            answer.break_off(why, error)

    # The client.

    def on_client_gone(self) -> None:
        if self._upstream is not None and self._answer is not None:
            self._upstream.abort(self._answer)
        if self._answer is not None and self._answer.complete:
            self._answer.settle()
            return
        self._services.metrics.disconnects += 1
        if self._task is not None and self._timer is not None:
            self._timer.cancel()
            self._task.cancel()

    def on_client_stalled(self) -> None:
        if self._upstream is not None and self._answer is not None:
            self._upstream.pause(self._answer)

    def on_client_reading(self) -> None:
        if self._upstream is not None and self._answer is not None:
            self._upstream.resume(self._answer)

    # The course of the request.

    async def _run(self, job: Job) -> None:
        self._running = True
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
            self._respond_error(ApiError(500, "the router failed on this request"))
        cast(asyncio.TimerHandle, self._timer).cancel()
        self._services.metrics.timeouts["total"] += self._late
        if job.trace is not None:
            job.trace.end(self._notes)
        self._log()

    async def _serve(self, job: Job) -> None:
        services = self._services
        services.budget.request()
        entered_s = time.monotonic()
        try:
            await services.admission.enter(job.claim)
        except NoWorkerError:
            raise no_worker("decode") from None
        waited_s = time.monotonic() - entered_s
        if job.trace is not None:
            job.trace.leg("queue", entered_s)
        if waited_s > 0.0005:
            services.metrics.queue.observe(waited_s)
        try:
            if job.why_whole is None:
                await self._hand_off(job)
            else:
                await self._whole(job, job.why_whole)
        finally:
            services.admission.leave()

    async def _hand_off(self, job: Job) -> None:
        while True:
            handoff = await self._prefill(job)
            if handoff is None:
                await self._whole(job, "no_handoff")
                return
            try:
                await self._decode(job, handoff)
                return
            except LegFailure as failure:
                self._retry(failure)
                if failure.reason in ("status", "timeout"):
                    # What the decode worker failed at may have been the pull.
                    self._tried["prefill"].add(self._notes["prefill"])

    async def _whole(self, job: Job, reason: str) -> None:
        """Prefill and decode on one decode worker, for what cannot be handed off."""
        self._services.metrics.passthrough[reason] += 1
        self._notes["passthrough"] = reason
        while True:
            try:
                await self._decode(job, None)
                return
            except LegFailure as failure:
                self._retry(failure)

    async def _prefill(self, job: Job) -> HandOff | None:
        """A hand-off; None if the worker gives none. Raises ApiError or RelayedError."""
        services = self._services
        body = openai.prefill_body(job.body, job.record)
        key = services.ring.key(job.path, job.body)
        while True:
            chosen = services.ring.choose(key, self._tried["prefill"])
            if chosen is None:
                await services.admission.until_changed(self._patience_s("prefill"))
                continue
            worker, spilled = chosen
            services.metrics.prefill_spills += spilled
            self._prefills += 1
            began_s = time.monotonic()
            try:
                try:
                    handoff = await legs.prefill(services, job, worker, f"{self._id}-prefill-{self._prefills}", body)
                finally:
                    if job.trace is not None:
                        job.trace.leg("prefill", began_s, worker.url)
            except ConnectError as error:
                self._on_refused(worker, error)
            except LegFailure as failure:
                self._retry(failure)
            else:
                self._notes["prefill"] = worker.url
                return handoff

    async def _decode(self, job: Job, handoff: HandOff | None) -> None:
        """Run on a decode worker and answer the client. Raises LegFailure if that failed with nothing sent to it.

        A worker that takes no connection has seen no byte: the hand-off goes to the next one. Once it is spent, the
        only way on is another prefill.
        """
        services = self._services
        while True:
            placement = await self._place(job, handoff)
            services.outcomes.began(placement.worker)
            began_s = time.monotonic()
            try:
                try:
                    await self._decode_on(placement, job, handoff)
                finally:
                    if job.trace is not None:
                        job.trace.leg("decode", began_s, placement.worker.url)
                return
            except ConnectError as error:
                self._on_refused(placement.worker, error)
            finally:
                placement.end()
                services.outcomes.ended(placement.worker)

    async def _place(self, job: Job, handoff: HandOff | None) -> Placement:
        """A worker that is eligible before the lease ends. Raises LegFailure, or ApiError if there is no worker."""
        services = self._services
        request = job.decode_request(handoff)
        while True:
            placement = services.placements.place(request, self._tried["decode"])
            if placement is not None:
                return placement
            left_s = WHOLE_WAIT_S if handoff is None else handoff.left_s(time.monotonic())
            patience_s = self._patience_s("decode")
            if left_s <= 0 or (
                not await services.admission.until_changed(min(left_s, patience_s)) and left_s < patience_s
            ):
                raise LegFailure("decode", "lease", "no worker had room before the lease ended")

    async def _decode_on(self, placement: Placement, job: Job, handoff: HandOff | None) -> None:
        """Send the decode request and pass the answer on. Raises ConnectError, LegFailure or RelayedError."""
        services, config = self._services, self._services.config
        worker = placement.worker
        pool = services.pools[worker]
        connection = await pool.connection()
        if handoff is None:
            params = {"eldr_record": True} if job.record else None
        elif handoff.left_s(time.monotonic()) <= 0:
            pool.release(connection)
            raise LegFailure("decode", "lease", "the lease ended before the request was sent")
        else:
            params = handoff.spend(job.record)
        self._decodes += 1
        leg_id = self._id if self._decodes == 1 else f"{self._id}-decode-{self._decodes}"
        answer = self._decode_answer(job, leg_id, worker)
        limit_s = config.decode_first_byte_timeout_s if job.stream else config.decode_answer_timeout_s
        self._upstream, self._answer = connection, answer
        connection.start(
            answer,
            legs.request_bytes(pool, job, leg_id, openai.decode_body(job.body, params)),
            limit_s,
            config.decode_idle_timeout_s,
        )
        if self._connection.stalled:
            connection.pause(answer)
        try:
            await connection.finish(answer)
            if not answer.begun:
                legs.check_answered(services, worker, answer, self._pulled_from(handoff))
                check_completion(answer, leg_id, services.answer_names["decode", job.path, job.stream])
        except ExchangeError as error:
            services.metrics.timeouts["first_byte" if job.stream else "answer"] += error.timed_out
            raise legs.blame(services, worker, error.reason, error, self._pulled_from(handoff)) from None
        finally:
            self._upstream = self._answer = None
        self._notes["decode"] = worker.url
        self._notes["reason"] = placement.decision.reason
        self._answered(answer, job, worker, handoff)

    def _decode_answer(self, job: Job, leg_id: str, worker: Worker) -> DecodeAnswer:
        services = self._services
        return DecodeAnswer(
            self._connection,
            services.metrics,
            self._response_headers(),
            self._request.received_s,
            leg_id,
            services.answer_names["decode", job.path, job.stream],
            wants_stream=job.stream,
            wants_usage=openai.wants_usage(job.body),
            on_begun=functools.partial(self._begun, job, worker),
        )

    def _begun(self, job: Job, worker: Worker) -> None:
        """The first event of a stream is there: nothing will be tried again."""
        job.body = {}  # a thousand streams with long prompts would hold a gigabyte
        if worker.ejected:  # its trial shall not last as long as the stream
            self._services.outcomes.succeeded(worker)

    # When a leg fails.

    def _pulled_from(self, handoff: HandOff | None) -> str | None:
        """The prefill worker whose blocks a decode leg asks for."""
        return None if handoff is None else str(self._notes["prefill"])

    def _on_refused(self, worker: Worker, error: ConnectError) -> None:
        """No byte was sent: the leg goes to another worker, which costs no retry. Raises ApiError for a worker that
        answers its probes and refuses again and again."""
        self._refused[worker.url] = refusals = self._refused.get(worker.url, 0) + 1
        self._tried[worker.role].add(worker.url)
        self._services.metrics.retries[worker.role, error.reason] += 1
        self._services.refused(worker, error)
        if refusals == MOST_REFUSALS:
            raise no_worker(worker.role)

    def _patience_s(self, role: Role) -> float:
        """How much longer to wait for a worker of `role`. Raises ApiError when that is over."""
        patience_s = self._services.patience_s(role)
        if patience_s <= 0:
            raise no_worker(role)
        return patience_s

    def _retry(self, failure: LegFailure) -> None:
        """Count another try of a leg. Raises what the client gets if there is none to be had."""
        services = self._services
        leg, reason = failure.leg, failure.reason
        if failure.worker is not None:
            self._tried[leg].add(failure.worker)
        why_not = None
        if self._retries == services.config.retries:
            why_not = "tries"
        elif not services.budget.take():
            why_not = "budget"
        fields = {"id": self._id, "worker": failure.worker, "reason": reason, "retried": why_not is None}
        # Of a fleet's failure one line each for a while; the rest is counted, and there for who asks for it.
        level = logging.WARNING if services.throttle.due(f"{leg} {reason} {failure.worker}") else logging.DEBUG
        log.log(level, "%s", failure, extra={"fields": fields})
        if why_not is None:
            self._retries += 1
            services.metrics.retries[leg, reason] += 1
            return
        services.metrics.retries_denied[leg, why_not] += 1
        raise RelayedError(failure.answer) if failure.answer is not None else failure.error

    # The answer.

    def _answered(self, answer: DecodeAnswer, job: Job, worker: Worker, handoff: HandOff | None) -> None:
        services = self._services
        if answer.broken is None:
            services.outcomes.succeeded(worker)
        elif not self._late:
            services.outcomes.failed(worker, "broken_stream")
            services.metrics.broken_streams += 1
            services.metrics.timeouts["idle"] += answer.broken.timed_out
            fields = {"id": self._id, "worker": worker.url, "reason": answer.broken.reason}
            log.warning("stream broken off: %s", answer.broken, extra={"fields": fields})
        if not answer.begun:
            self._relay(answer, recorded=job.record, handoff=handoff)
            return
        # Beside the tokens: [DONE] and the chat stream's opening event.
        tpot_s = answer.observe_tpot(1 + (self._request.path == openai.CHAT))
        if tpot_s is not None:
            worker.observe_tpot(tpot_s)
        self._count(200)

    def _relay(self, answer: Answer, recorded: bool = False, handoff: HandOff | None = None) -> None:
        body = answer.body
        content_type = forwarding.content_type(answer.headers)
        if content_type.startswith(b"application/json"):
            try:
                body = (
                    _with_record(answer, handoff)
                    if recorded and answer.status == 200
                    else openai.without_transfer_params(body)
                )
            except (orjson.JSONDecodeError, ExchangeError):
                log.warning("request %s: a worker's answer is not JSON", self._id)
                self._respond_error(ApiError(502, "the worker's answer is not valid JSON"))
                return
        extra = self._response_headers() + forwarding.retry_after_line(answer.headers)
        self._connection.respond(answer.status, body, content_type, extra)
        self._count(answer.status)

    def _respond_error(self, error: ApiError) -> None:
        self._connection.respond_error(error, self._response_headers())
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


def _too_late() -> ApiError:
    return ApiError(504, "the request was not answered in the time that its client or the router allows")


def _with_record(answer: Answer, handoff: HandOff | None) -> bytes:
    """The answer with what was recorded in place of the transfer parameters. Raises ExchangeError."""
    fields = answer.json()
    if not isinstance(fields, dict):
        raise ExchangeError("the answer is not an object")
    params = fields.get("kv_transfer_params")
    params = params if isinstance(params, dict) else {}
    counts = params.get("eldr_counts") if handoff is None else handoff.counts_wire
    fields["kv_transfer_params"] = None
    fields["eldr_record"] = {"counts": counts, "decode_experts": params.get("eldr_decode_experts")}
    return orjson.dumps(fields)
