"""One request's life: queue, prefill leg, placement, decode leg."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any, NoReturn

import orjson

from eldr.fleet import Worker
from eldr.policies.base import DecodeRequest
from eldr.router import forwarding, intake, openai
from eldr.router.admission import NoWorkerError
from eldr.router.answer import DecodeAnswer
from eldr.router.errors import ApiError
from eldr.router.handoff import HandOff, read_handoff
from eldr.router.http import ClientConnection, Request
from eldr.router.intake import RETRY_AFTER_S, Job, no_worker
from eldr.router.placement import Placement
from eldr.router.services import Services
from eldr.router.upstream import Answer, ConnectError, ExchangeError, WorkerConnection, WorkerPool

log = logging.getLogger("eldr.router")

# A leg that broke after it was sent is tried once more, on another worker; the decode leg with a new prefill.
ATTEMPTS = 2
# Longest wait for a decode worker with room, of a request that runs whole and has no lease.
WHOLE_WAIT_S = 60.0


class RelayedError(Exception):
    """A worker answered with something other than 200: the client gets it as it is."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(f"status {answer.status}")
        self.answer = answer


class Flow:
    """Answers one completion or chat request; also the listener that hears of its client."""

    def __init__(self, services: Services, connection: ClientConnection, request: Request) -> None:
        self._services = services
        self._connection = connection
        self._request = request
        self._id = intake.request_id(request)
        self._task: asyncio.Task[None] | None = None
        self._upstream: WorkerConnection | None = None
        self._prefills = 0
        self._decodes = 0
        self._tried_prefill: set[str] = set()
        self._tried_decode: set[str] = set()
        self._failure: Answer | None = None
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
        self._task = asyncio.get_running_loop().create_task(self._run(job))
        return self._task

    # The client.

    def on_client_gone(self) -> None:
        self._services.metrics.disconnects += 1
        if self._upstream is not None:
            self._upstream.abort()
        if self._task is not None:
            self._task.cancel()

    def on_client_stalled(self) -> None:
        if self._upstream is not None:
            self._upstream.pause()

    def on_client_reading(self) -> None:
        if self._upstream is not None:
            self._upstream.resume()

    # The course of the request.

    async def _run(self, job: Job) -> None:
        try:
            await self._serve(job)
        except ApiError as error:
            self._respond_error(error)
        except RelayedError as error:
            self._relay(error.answer)
        except asyncio.CancelledError:
            self._notes["status"] = "cancelled"
        except orjson.JSONEncodeError as error:
            self._respond_error(ApiError(400, f"the request body cannot be passed on: {error}"))
        except Exception:
            log.exception("request %s failed inside the router", self._id)
            self._respond_error(ApiError(500, "the router failed on this request"))
        self._log()

    async def _serve(self, job: Job) -> None:
        services = self._services
        entered_s = time.monotonic()
        try:
            await services.admission.enter()
        except NoWorkerError:
            raise no_worker("decode") from None
        waited_s = time.monotonic() - entered_s
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
        for _ in range(ATTEMPTS):
            handoff = await self._prefill(job)
            if handoff is None:
                await self._whole(job, "no_handoff")
                return
            if await self._decode(job, job.decode_request(handoff), handoff):
                return
        self._give_up()

    async def _whole(self, job: Job, reason: str) -> None:
        """Prefill and decode on one decode worker, for what cannot be handed off."""
        self._services.metrics.passthrough[reason] += 1
        self._notes["passthrough"] = reason
        for _ in range(ATTEMPTS):
            if await self._decode(job, job.decode_request(None), None):
                return
        self._give_up()

    def _give_up(self) -> NoReturn:
        if self._failure is not None:
            raise RelayedError(self._failure)
        raise ApiError(502, "no decode worker completed the request", retry_after_s=RETRY_AFTER_S)

    # The prefill leg.

    async def _prefill(self, job: Job) -> HandOff | None:
        """A hand-off; None if the worker gives none. Raises ApiError or RelayedError."""
        services = self._services
        key = services.ring.key(job.path, job.body)
        body = openai.prefill_body(job.body, job.record)
        failures = 0
        while True:
            chosen = services.ring.choose(key, self._tried_prefill)
            if chosen is None:
                raise no_worker("prefill")
            worker, spilled = chosen
            services.metrics.prefill_spills += spilled
            try:
                return await self._prefill_on(worker, job, body)
            except ConnectError:
                services.refused(worker)
                reason = "refused"
            except ExchangeError as error:
                log.warning("prefill of request %s failed: %s", self._id, error)
                failures += 1
                reason = "failed"
                if failures == ATTEMPTS:
                    raise ApiError(502, "the prefill worker did not answer", retry_after_s=RETRY_AFTER_S) from None
            self._tried_prefill.add(worker.url)
            services.metrics.retries["prefill", reason] += 1

    async def _prefill_on(self, worker: Worker, job: Job, body: bytes) -> HandOff | None:
        services = self._services
        pool = services.pools[worker]
        services.fleet.started(worker)
        try:
            connection = await pool.connection()
            self._prefills += 1
            leg_id = f"{self._id}-prefill-{self._prefills}"
            answer = Answer()
            sent_s = time.monotonic()
            connection.start(answer, _leg(pool, job, leg_id, body), services.config.prefill_timeout_s)
            await connection.finish(answer)
        finally:
            services.fleet.finished(worker)
        services.metrics.prefill.observe(time.monotonic() - sent_s)
        self._notes["prefill"] = worker.url
        if answer.status != 200:
            raise RelayedError(answer)
        handoff = read_handoff(answer.json(), sent_s)
        if handoff is None:
            if services.throttle.due("no_handoff"):
                log.warning("prefill worker %s hands nothing off; its requests run whole", worker.url)
        elif handoff.counts_error is not None:
            reason = handoff.counts_error.reason
            services.metrics.counts_errors[reason] += 1
            if services.throttle.due(reason):
                log.warning("expert counts of %s cannot be used: %s", worker.url, handoff.counts_error)
        return handoff

    # The decode leg.

    async def _decode(self, job: Job, request: DecodeRequest, handoff: HandOff | None) -> bool:
        """Run on a decode worker and answer the client. False if that failed with nothing sent to the client.

        A worker that takes no connection has seen no byte: the hand-off goes to the next one. Once it is spent, the
        only way on is another prefill.
        """
        services = self._services
        while True:
            placement = await self._place(request, handoff)
            if placement is None:
                services.metrics.retries["decode", "lease"] += 1
                return False
            try:
                if await self._decode_on(placement, job, handoff):
                    return True
                services.metrics.retries["decode", "lease"] += 1
                return False
            except ConnectError:
                services.refused(placement.worker)
                services.metrics.retries["decode", "refused"] += 1
            except ExchangeError as error:
                log.warning("decode of request %s failed: %s", self._id, error)
                services.metrics.retries["decode", "failed"] += 1
                self._tried_decode.add(placement.worker.url)
                return False
            finally:
                placement.end()

    async def _place(self, request: DecodeRequest, handoff: HandOff | None) -> Placement | None:
        """A worker that is eligible before the lease ends, None if there is none. Raises ApiError if none exists."""
        services = self._services
        while True:
            placement = services.placements.place(request, self._tried_decode)
            if placement is not None:
                return placement
            if not any(services.fleet.available("decode")):
                raise no_worker("decode")
            left_s = WHOLE_WAIT_S if handoff is None else handoff.left_s(time.monotonic())
            if left_s <= 0 or not await services.admission.until_changed(left_s):
                return None

    async def _decode_on(self, placement: Placement, job: Job, handoff: HandOff | None) -> bool:
        """Send the decode request and pass the answer on. False if the lease ended before it could be sent."""
        services = self._services
        pool = services.pools[placement.worker]
        connection = await pool.connection()
        if handoff is None:
            params = {"eldr_record": True} if job.record else None
        elif handoff.left_s(time.monotonic()) <= 0:
            pool.release(connection)
            return False
        else:
            params = handoff.spend(job.record)
        self._decodes += 1
        leg_id = self._id if self._decodes == 1 else f"{self._id}-decode-{self._decodes}"
        answer = DecodeAnswer(
            self._connection,
            services.metrics,
            self._response_headers(),
            self._request.received_s,
            openai.wants_usage(job.body),
        )
        self._upstream = connection
        body = openai.decode_body(job.body, params)
        connection.start(answer, _leg(pool, job, leg_id, body), services.config.decode_idle_timeout_s)
        if self._connection.stalled:
            connection.pause()
        try:
            await connection.finish(answer)
        finally:
            self._upstream = None
        if handoff is not None and answer.status >= 500 and not answer.streaming:
            # The pull may be what failed: a new hand-off can succeed where this one did not.
            self._failure = answer
            raise ExchangeError(f"{placement.worker.url}: status {answer.status}")
        self._notes["decode"] = placement.worker.url
        self._notes["reason"] = placement.decision.reason
        self._answered(answer, job, handoff)
        return True

    # The answer.

    def _answered(self, answer: DecodeAnswer, job: Job, handoff: HandOff | None) -> None:
        if not answer.streaming:
            self._relay(answer, recorded=job.record, handoff=handoff)
            return
        # Beside the tokens: [DONE] and the chat stream's opening event.
        answer.observe_tpot(1 + (self._request.path == openai.CHAT))
        self._services.metrics.broken_streams += answer.broken
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


def _leg(pool: WorkerPool, job: Job, leg_id: str, body: bytes) -> bytes:
    """The bytes of one leg. vLLM names the request after X-Request-Id: every leg and attempt has its own."""
    headers = b"%bx-request-id: %b\r\n" % (job.leg_headers, leg_id.encode())
    return pool.request(b"POST", job.path, headers, body, job.authorization)


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
