"""One request's life: queue, prefill leg, placement, decode leg."""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import time
from dataclasses import dataclass
from typing import Any

import orjson

from eldr.fleet import Fleet, Worker
from eldr.policies.base import DecodeRequest
from eldr.router import openai
from eldr.router.admission import Admission, NoWorkerError
from eldr.router.answer import DecodeAnswer
from eldr.router.config import RouterConfig
from eldr.router.errors import ApiError
from eldr.router.handoff import HandOff, read_handoff
from eldr.router.http import ClientConnection, Request
from eldr.router.logs import Throttle
from eldr.router.metrics import Metrics
from eldr.router.placement import Placement, Placements
from eldr.router.prefix import PrefillRing
from eldr.router.upstream import Answer, ConnectError, ExchangeError, WorkerConnection, WorkerPool

log = logging.getLogger("eldr.router")

# A leg that broke after it was sent is tried once more, on another worker; the decode leg with a new prefill.
ATTEMPTS = 2
RETRY_AFTER_S = 2
MAX_ID_BYTES = 128
# Client headers that go on to workers beside Authorization. Everything else stays here: vLLM takes orders from
# headers (X-data-parallel-rank, X-Vllm-Priority, ...).
FORWARDED = (b"traceparent", b"tracestate")


@dataclass
class Services:
    """What every request works with."""

    config: RouterConfig
    fleet: Fleet
    pools: dict[str, WorkerPool]
    ring: PrefillRing
    admission: Admission
    placements: Placements
    metrics: Metrics
    throttle: Throttle
    admin_key: bytes | None

    def refused(self, worker: Worker) -> None:
        """A worker takes no connections: it gets nothing more until a probe succeeds."""
        if worker.healthy:
            log.warning("%s worker %s takes no connections", worker.role, worker.url)
        self.fleet.set_healthy(worker, False)
        self.admission.changed()


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
        self._task: asyncio.Task[None] | None = None
        self._upstream: WorkerConnection | None = None
        self._prefills = 0
        self._decodes = 0
        self._tried_prefill: set[str] = set()
        self._tried_decode: set[str] = set()
        self._notes: dict[str, Any] = {}

    def start(self) -> asyncio.Task[None] | None:
        """Check the request; answer it at once if it is bad, else start the task that answers it."""
        self._id = ""
        try:
            media_type = self._request.headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
            if media_type != b"application/json":
                raise ApiError(415, "Content-Type must be application/json")
            self._body = openai.parse_body(self._request.path, self._request.body)
            self._id = self._request_id()
            self._record = self._wants_record()
            self._why_whole = openai.why_not_handed_off(self._request.path, self._body)
            if self._record and self._why_whole is not None:
                raise ApiError(400, f"a request that is not handed off ({self._why_whole}) cannot be recorded")
            self._check_fleet()
        except ApiError as error:
            self._respond_error(error)
            return None
        self._leg_headers = self._headers_for_workers()
        self._connection.listener = self
        self._task = asyncio.get_running_loop().create_task(self._run())
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

    # What the request says.

    def _request_id(self) -> str:
        """The client's X-Request-Id, else its body's request_id, else a random one. vLLM's answer ids show it."""
        chosen = self._request.headers.get(b"x-request-id")
        in_body = self._body.pop("request_id", None)
        if chosen is None and isinstance(in_body, str):
            chosen = in_body.encode()
        if chosen and len(chosen) <= MAX_ID_BYTES and all(0x20 < byte < 0x7F for byte in chosen):
            return chosen.decode()
        return os.urandom(16).hex()

    def _wants_record(self) -> bool:
        if self._request.headers.get(b"x-eldr-record") != b"1":
            return False
        key = self._services.admin_key
        given = self._request.headers.get(b"authorization", b"")
        if key is None or not hmac.compare_digest(given, b"Bearer " + key):
            raise ApiError(403, "recording needs the admin key as Authorization: Bearer KEY (see --admin-key-file)")
        if self._body.get("stream"):
            raise ApiError(400, "recording needs stream: false", param="stream")
        return True

    def _check_fleet(self) -> None:
        fleet = self._services.fleet
        if not any(fleet.available("decode")):
            raise _no_worker("decode")
        model = self._body.get("model")
        if model and not fleet.serves(model):
            raise ApiError(404, f"The model `{model}` does not exist.", param="model")

    def _headers_for_workers(self) -> bytes:
        headers = self._request.headers
        lines = b"content-type: application/json\r\n"
        for name in FORWARDED:
            if name in headers:
                lines += b"%b: %b\r\n" % (name, headers[name])
        return lines

    def _client_authorization(self) -> bytes | None:
        given = self._request.headers.get(b"authorization")
        # The admin key is for this router alone.
        return None if self._record else given

    # The course of the request.

    async def _run(self) -> None:
        try:
            await self._serve()
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

    async def _serve(self) -> None:
        services = self._services
        entered_s = time.monotonic()
        try:
            await services.admission.enter()
        except NoWorkerError:
            raise _no_worker("decode") from None
        waited_s = time.monotonic() - entered_s
        if waited_s > 0.0005:
            services.metrics.queue.observe(waited_s)
        try:
            if self._why_whole is None:
                await self._hand_off()
            else:
                await self._whole(self._why_whole)
        finally:
            services.admission.leave()

    async def _hand_off(self) -> None:
        for _ in range(ATTEMPTS):
            handoff = await self._prefill()
            if handoff is None:
                await self._whole("no_handoff")
                return
            request = self._decode_request(handoff)
            if await self._decode(request, handoff):
                return
        raise ApiError(502, "no decode worker completed the request", retry_after_s=RETRY_AFTER_S)

    async def _whole(self, reason: str) -> None:
        """Prefill and decode on one decode worker, for what cannot be handed off."""
        self._services.metrics.passthrough[reason] += 1
        self._notes["passthrough"] = reason
        for _ in range(ATTEMPTS):
            if await self._decode(self._decode_request(None), None):
                return
        raise ApiError(502, "no decode worker completed the request", retry_after_s=RETRY_AFTER_S)

    def _decode_request(self, handoff: HandOff | None) -> DecodeRequest:
        label = self._request.headers.get(b"x-eldr-label")
        return DecodeRequest(
            self._id,
            0 if handoff is None else handoff.prompt_tokens,
            None if handoff is None else handoff.counts,
            None if label is None else label.decode("latin-1"),
            openai.max_tokens(self._request.path, self._body),
        )

    # The prefill leg.

    async def _prefill(self) -> HandOff | None:
        """A hand-off; None if the worker gives none. Raises ApiError or RelayedError."""
        services = self._services
        key = services.ring.key(self._request.path, self._body)
        body = openai.prefill_body(self._body, self._record)
        failures = 0
        while True:
            chosen = services.ring.choose(key, self._tried_prefill)
            if chosen is None:
                raise _no_worker("prefill") if not self._tried_prefill else ApiError(
                    502, "no prefill worker completed the request", retry_after_s=RETRY_AFTER_S
                )  # fmt: skip
            worker, spilled = chosen
            services.metrics.prefill_spills += spilled
            try:
                return await self._prefill_on(worker, body)
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

    async def _prefill_on(self, worker: Worker, body: bytes) -> HandOff | None:
        services = self._services
        pool = services.pools[worker.url]
        services.fleet.started(worker)
        try:
            connection = await pool.connection()
            self._prefills += 1
            leg_id = f"{self._id}-prefill-{self._prefills}"
            answer = Answer()
            sent_s = time.monotonic()
            connection.start(answer, self._leg(pool, leg_id, body), services.config.prefill_timeout_s)
            try:
                await answer.finished
            except asyncio.CancelledError:
                connection.abort()
                raise
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

    def _leg(self, pool: WorkerPool, leg_id: str, body: bytes) -> bytes:
        headers = b"%bx-request-id: %b\r\n" % (self._leg_headers, leg_id.encode())
        return pool.request(b"POST", self._request.path, headers, body, self._client_authorization())

    # The decode leg.

    async def _decode(self, request: DecodeRequest, handoff: HandOff | None) -> bool:
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
                if await self._decode_on(placement, handoff):
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
            placement = services.placements.place(request, frozenset(self._tried_decode))
            if placement is not None:
                return placement
            if all(worker.url in self._tried_decode for worker in services.fleet.available("decode")):
                raise _no_worker("decode")
            left_s = 60.0 if handoff is None else handoff.left_s(time.monotonic())
            if left_s <= 0 or not await services.admission.until_changed(left_s):
                return None

    async def _decode_on(self, placement: Placement, handoff: HandOff | None) -> bool:
        """Send the decode request and pass the answer on. False if the lease ended before it could be sent."""
        services = self._services
        pool = services.pools[placement.worker.url]
        connection = await pool.connection()
        if handoff is None:
            params = {"eldr_record": True} if self._record else None
        elif handoff.left_s(time.monotonic()) <= 0:
            pool.release(connection)
            return False
        else:
            params = handoff.spend(self._record)
        self._decodes += 1
        leg_id = self._id if self._decodes == 1 else f"{self._id}-decode-{self._decodes}"
        answer = DecodeAnswer(
            self._connection,
            services.metrics,
            self._response_headers(),
            self._request.received_s,
            openai.wants_usage(self._body),
        )
        self._upstream = connection
        body = openai.decode_body(self._body, params)
        connection.start(answer, self._leg(pool, leg_id, body), services.config.decode_idle_timeout_s)
        if self._connection.stalled:
            connection.pause()
        try:
            await answer.finished
        except asyncio.CancelledError:
            connection.abort()
            raise
        finally:
            self._upstream = None
        self._notes["decode"] = placement.worker.url
        self._notes["reason"] = placement.decision.reason
        self._answered(answer, handoff)
        return True

    # The answer.

    def _answered(self, answer: DecodeAnswer, handoff: HandOff | None) -> None:
        if not answer.streaming:
            self._relay(answer, handoff)
            return
        # Beside the tokens: [DONE] and the chat stream's opening event.
        answer.observe_tpot(1 + (self._request.path == openai.CHAT))
        self._services.metrics.broken_streams += answer.broken
        self._count(200)

    def _relay(self, answer: Answer, handoff: HandOff | None = None) -> None:
        body = answer.body
        content_type = answer.headers.get(b"content-type", b"application/json")
        if content_type.startswith(b"application/json"):
            try:
                body = self._client_body(answer, handoff)
            except (orjson.JSONDecodeError, ExchangeError):
                log.warning("request %s: a worker's answer is not JSON", self._id)
                self._respond_error(ApiError(502, "the worker's answer is not valid JSON"))
                return
        extra = self._response_headers()
        retry_after = answer.headers.get(b"retry-after")
        if retry_after is not None:
            extra += b"retry-after: %b\r\n" % retry_after
        self._connection.respond(answer.status, body, content_type, extra)
        self._count(answer.status)

    def _client_body(self, answer: Answer, handoff: HandOff | None) -> bytes:
        if not self._record or answer.status != 200:
            return openai.without_transfer_params(answer.body)
        fields = answer.json()
        if not isinstance(fields, dict):
            raise ExchangeError("the answer is not an object")
        params = fields.get("kv_transfer_params")
        params = params if isinstance(params, dict) else {}
        counts = params.get("eldr_counts") if handoff is None else handoff.counts_wire
        fields["kv_transfer_params"] = None
        fields["eldr_record"] = {"counts": counts, "decode_experts": params.get("eldr_decode_experts")}
        return orjson.dumps(fields)

    def _respond_error(self, error: ApiError) -> None:
        self._connection.respond_error(error, self._response_headers())
        self._count(error.status)

    def _response_headers(self) -> bytes:
        return b"x-request-id: %b\r\n" % self._id.encode() if self._id else b""

    def _count(self, status: int) -> None:
        self._notes["status"] = status
        self._services.metrics.requests[self._request.path.decode(), status] += 1

    def _log(self) -> None:
        if log.isEnabledFor(logging.DEBUG):
            self._notes["seconds"] = round(time.monotonic() - self._request.received_s, 6)
            log.debug("request", extra={"fields": {"id": self._id, "path": self._request.path.decode(), **self._notes}})


def _no_worker(role: str) -> ApiError:
    return ApiError(503, f"no {role} worker is available", retry_after_s=RETRY_AFTER_S)
