"""Relays a request to one decode worker and its answer back: the endpoints that have nothing to hand off.

The body goes unchanged, and the answer is collected before the client gets any of it, so a failed worker can be
replaced. Endpoints that run the model wait their turn, take a slot of their worker and count as its outcomes, like a
completion that runs whole. The others only use the worker's tokenizer or describe it. They neither wait nor take a
slot, and they say nothing about the engine: they eject no worker and bring none back.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Final, NamedTuple

from eldr.kernels import NO_OBJECT, JsonNames, JsonObject, JsonTextError
from eldr.router.fleet.groups import Served
from eldr.router.fleet.workers import Worker
from eldr.router.http.client import Answer, ConnectError, ExchangeError, SilenceError
from eldr.router.http.errors import ApiError
from eldr.router.http.exchange import ClientExchange
from eldr.router.http.forwarding import PRINTABLE, answer_headers, client_authorization, session_line
from eldr.router.http.media_types import JSON, essence
from eldr.router.http.message import Request
from eldr.router.http.trace_context import trace_context, trace_lines
from eldr.router.placement.admission import Claim
from eldr.router.protocols import openai
from eldr.router.request import intake
from eldr.router.request.attempts import Attempts
from eldr.router.request.choice import by_load
from eldr.router.request.deadlines import Deadlines
from eldr.router.request.legs import OVERLOAD, LegFailure, LegRefused, RelayedError, check_worker, no_memory
from eldr.router.request.quotas import Charge
from eldr.router.request.services import Services, admit
from eldr.router.request.verdict import WorkerStatusError, WrongAnswerError

log = logging.getLogger("eldr.router")

# The longest wait for an answer that needs no engine. A tokenizer reads some MB a second.
NO_ENGINE_TIMEOUT_S: Final = 60.0
ANSWER_NAMES: Final = JsonNames(("error", "usage"))
# vLLM sends embeddings so if they are asked for as bytes. A header tells their shapes, in the JSON that the body would
# be otherwise (build_pooling_bytes_streaming_response in vllm/entrypoints/pooling/utils.py).
BYTES_TYPE: Final = b"application/octet-stream"
BYTES_HEADER: Final = b"metadata"


class Endpoint(NamedTuple):
    """method: the one that it is asked with. engine: whether it runs the model. model: whether it is about a model."""

    method: bytes
    engine: bool
    model: bool


_IS_VERSION: Final = Endpoint(b"GET", False, False)
_DESCRIBES: Final = Endpoint(b"GET", False, True)
_TOKENIZES: Final = Endpoint(b"POST", False, True)
_COMPUTES: Final = Endpoint(b"POST", True, True)

# Those of vLLM 0.32 that answer from the request alone, so that any worker may be asked.
ENDPOINTS: Final[dict[bytes, Endpoint]] = {
    b"/version": _IS_VERSION,
    b"/tokenizer_info": _DESCRIBES,
    b"/tokenize": _TOKENIZES,
    b"/detokenize": _TOKENIZES,
    b"/v1/messages/count_tokens": _TOKENIZES,
    b"/v1/completions/render": _TOKENIZES,
    b"/v1/chat/completions/render": _TOKENIZES,
    b"/v1/messages/render": _TOKENIZES,
    b"/v1/responses/render": _TOKENIZES,
    b"/v1/completions/derender": _TOKENIZES,
    b"/v1/chat/completions/derender": _TOKENIZES,
    b"/v1/embeddings": _COMPUTES,
    b"/v2/embed": _COMPUTES,
    b"/pooling": _COMPUTES,
    b"/classify": _COMPUTES,
    b"/score": _COMPUTES,
    b"/v1/score": _COMPUTES,
    b"/rerank": _COMPUTES,
    b"/v1/rerank": _COMPUTES,
    b"/v2/rerank": _COMPUTES,
    b"/generative_scoring": _COMPUTES,
}


class PassThrough:
    """Answers one request to one of `ENDPOINTS`."""

    def __init__(self, services: Services, client: ClientExchange, request: Request) -> None:
        self._services = services
        self._client = client
        self._request = request
        self._endpoint = ENDPOINTS[request.path]
        self._id = intake.request_id(request)
        self._model: str | None = None
        self._claim: Claim | None = None  # None if it needs no turn
        self._charge: Charge | None = None  # None if the client has no name
        self._status = 0  # of the answer. 0 before there is one, and for a client that left before
        self._task: asyncio.Task[None] | None = None

    def start(self) -> asyncio.Task[None] | None:
        """Check the request. Answer a bad one at once; otherwise start the task that answers it."""
        request = self._request
        try:
            # The others compute no tokens.
            tokens = len(request.body) // intake.BYTES_PER_TOKEN if self._endpoint.engine else 0
            self._charge = self._services.quotas.admit(request, tokens)
            self._check()
        except ApiError as error:
            self._respond_error(error)
            self._settle()
            return None
        self._client.listener = self
        self._task = asyncio.get_running_loop().create_task(self._run())
        return self._task

    def _check(self) -> None:
        """Raises ApiError."""
        if self._endpoint.method == b"POST":
            body = self._services.intake.read(self._request)
            self._model = openai.model(body)
            if self._endpoint.engine:
                self._claim = self._services.intake.claim(self._request, body, 0)

    async def _run(self) -> None:
        """Give the client its one answer, if it stays for it."""
        request, timeouts = self._request, self._services.config.timeouts
        deadlines = Deadlines.of(request.headers, request.received_s, timeouts.request_timeout_s)
        try:
            async with asyncio.timeout(max(0.0, deadlines.first_byte_s - time.monotonic())):
                answer = await self._admitted()
            self._relay(answer)
        except TimeoutError:
            self._services.metrics.timeouts["total"] += 1
            self._respond_error(ApiError(504, "the request was not answered in the time that was allowed for it"))
        except ApiError as error:
            self._respond_error(error)
        except RelayedError as error:
            self._relay(error.answer)
        except Exception:
            log.exception("request %s failed inside the router", self._id)
            self._respond_error(ApiError(500, "internal error in the router"))
        finally:
            self._settle()

    async def _admitted(self) -> Answer:
        """Wait for a turn, if the endpoint needs one, and for the answer. Raises ApiError or RelayedError."""
        services = self._services
        if self._claim is not None:
            served = await admit(services, self._claim, self._model)
            try:
                return await self._answer(served)
            finally:
                services.admission.leave(served)
        if self._endpoint.model:
            return await self._answer(await services.lists.find(self._model))
        return await self._answer(services.fleet.any_served())

    async def _answer(self, served: Served) -> Answer:
        """Ask workers until one answers. Raises ApiError or RelayedError."""
        services = self._services
        attempts = Attempts(services.retries, self._id, served)
        while True:
            worker = by_load(services, served, self._endpoint.engine, attempts.tried("decode"))
            if worker is None:
                await services.admission.until_changed(served, "decode")
                continue
            try:
                answer = await self._ask(served, worker, attempts.next_name("decode"))
            except LegRefused as refused:
                attempts.refused(refused)
            except LegFailure as failure:
                attempts.failed(failure)
            else:
                if not await attempts.served_elsewhere(RelayedError(answer, worker)):
                    return answer

    async def _ask(self, served: Served, worker: Worker, name: str) -> Answer:
        """Return the worker's answer. Raises LegRefused, LegFailure or ApiError."""
        services, engine = self._services, self._endpoint.engine
        number = 0
        if engine:
            served.release()
            services.outcomes.began(worker)
            services.fleet.started(worker)
            if services.lanes.sharing is not None:
                number = services.lanes.sharing.started(worker.url, None)
        try:
            answer = await self._exchange(worker, name)
            if engine:
                services.outcomes.succeeded(worker)
            return answer
        except LegFailure as failure:
            # A late answer is not blamed on the worker, as for a completion that runs whole: the input may be slow.
            if engine and failure.reason not in (OVERLOAD, SilenceError.reason):
                services.outcomes.failed(worker, failure.reason)
            raise
        finally:
            if engine:
                served.promise()  # it keeps a slot for another attempt
                services.fleet.finished(worker)
                services.outcomes.ended(worker)
                if services.lanes.sharing is not None:
                    services.lanes.sharing.ended(number)

    async def _exchange(self, worker: Worker, name: str) -> Answer:
        services, request = self._services, self._request
        pool = services.legs.pools[worker]
        try:
            connection = await pool.connection()
        except ConnectError as refusal:
            raise LegRefused(worker, refusal) from None
        headers = trace_lines(*trace_context(request)) + session_line(request) + intake.id_line(name)
        if self._endpoint.method == b"POST":
            headers += b"content-type: application/json\r\n"
        message = pool.request(
            self._endpoint.method, request.path, headers, request.body, client_authorization(request)
        )
        limit_s = services.config.timeouts.decode_answer_timeout_s
        if not self._endpoint.engine:
            limit_s = min(limit_s, NO_ENGINE_TIMEOUT_S)
        answer = Answer()
        connection.start(answer, message, limit_s)
        try:
            await connection.finish(answer)
            check_worker(worker, answer)
            fields = _members(answer)
        except ExchangeError as error:
            if answer.no_room:
                raise no_memory() from None
            services.metrics.timeouts["answer"] += error.timed_out
            own = answer if isinstance(error, WorkerStatusError) else None
            raise LegFailure("decode", error.reason, error, worker=worker, answer=own) from None
        if self._charge is not None and self._endpoint.engine:
            self._charge.know(fields)
        return answer

    # The answer.

    def _relay(self, answer: Answer) -> None:
        content_type, lines = answer_headers(answer.headers)
        shapes = answer.headers.get(BYTES_HEADER)
        if shapes is not None and content_type == BYTES_TYPE and PRINTABLE.fullmatch(shapes) is not None:
            lines += b"%b: %b\r\n" % (BYTES_HEADER, shapes)
        self._client.respond(answer.status, answer.body, content_type, intake.id_line(self._id) + lines)
        self._count(answer.status)

    def _respond_error(self, error: ApiError) -> None:
        self._client.respond_error(error, intake.id_line(self._id))
        self._count(error.status)

    def _settle(self) -> None:
        if self._charge is not None:
            self._charge.settle(failed=self._status >= 400)

    def _count(self, status: int) -> None:
        self._status = status
        self._services.metrics.requests[self._request.path.decode(), status] += 1

    # Ending early.

    def end_now(self, error: ApiError) -> None:
        """Answer with an error, unless there is an answer."""
        if not self._status:
            self._respond_error(error)
            self._cancel()

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()
            self._task = None  # it keeps its cancellation, which knows the frames that hold the body: no cycle

    def on_client_gone(self) -> None:
        self._services.metrics.disconnects += 1
        self._cancel()

    def on_client_stalled(self) -> None:
        pass

    def on_client_reading(self) -> None:
        pass


def _members(answer: Answer) -> JsonObject:
    """Return the members of an answer with status 200 that is a JSON object, else of an empty one.

    Raises WrongAnswerError for an answer with status 200 that is none.
    """
    if answer.status != 200:
        return intake.NO_BODY
    kind = essence(answer.headers.get(b"content-type", JSON))
    if kind == BYTES_TYPE:
        try:
            return JsonObject(answer.headers.get(BYTES_HEADER, b""), ANSWER_NAMES)
        except JsonTextError:
            return intake.NO_BODY
    if kind != JSON:
        raise WrongAnswerError(f"status 200 with {kind.decode('latin-1')}")
    try:
        fields = JsonObject(answer.body, ANSWER_NAMES)
    except JsonTextError as error:
        if error.fault == NO_OBJECT:
            return intake.NO_BODY
        raise WrongAnswerError(f"status 200 without JSON: {error}") from None
    if fields.get("error") is not None:
        raise WrongAnswerError("status 200 with an error")
    return fields
