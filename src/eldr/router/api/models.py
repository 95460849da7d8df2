"""GET /v1/models: the models that the decode workers serve, as reported by one of them."""

from __future__ import annotations

import asyncio

from eldr.router.fleet.workers import Worker
from eldr.router.http.client import Answer, UpstreamError
from eldr.router.http.errors import ApiError
from eldr.router.http.exchange import ClientExchange
from eldr.router.http.forwarding import client_authorization, content_type
from eldr.router.http.message import Request
from eldr.router.placement.admission import NoWorkerError
from eldr.router.request.services import Services

TIMEOUT_S = 10.0


class ModelsFlow:
    """Answers one request with the first list of models that a decode worker returns."""

    def __init__(self, services: Services, exchange: ClientExchange, request: Request) -> None:
        self._services = services
        self._exchange = exchange
        self._request = request
        self._task: asyncio.Task[None] | None = None

    def start(self) -> asyncio.Task[None]:
        self._exchange.listener = self
        self._task = asyncio.get_running_loop().create_task(self._run())
        return self._task

    def end_now(self, error: ApiError) -> None:
        """Answer with an error, unless there is an answer."""
        if self._task is None or self._task.done():
            return
        self._exchange.respond_error(error)
        self._count(error.status)
        self.on_client_gone()

    def on_client_gone(self) -> None:
        if self._task is not None:
            self._task.cancel()
            self._task = None  # the task keeps its cancellation, which knows this flow: no cycle

    def on_client_stalled(self) -> None:
        pass

    def on_client_reading(self) -> None:
        pass

    async def _run(self) -> None:
        fleet = self._services.fleet
        for worker in list(fleet.available("decode")):
            if not fleet.has(worker):  # it has left while another one was asked
                continue
            try:
                answer = await self._ask(worker)
            except UpstreamError:
                continue
            self._exchange.respond(answer.status, answer.body, content_type(answer.headers))
            self._count(answer.status)
            return
        self._exchange.respond_error(NoWorkerError("decode"))
        self._count(503)

    async def _ask(self, worker: Worker) -> Answer:
        pool = self._services.legs.pools[worker]
        connection = await pool.connection()
        answer = Answer()
        request = pool.request(b"GET", b"/v1/models", client_authorization=client_authorization(self._request))
        connection.start(answer, request, TIMEOUT_S)
        await connection.finish(answer)
        return answer

    def _count(self, status: int) -> None:
        self._services.metrics.requests["/v1/models", status] += 1
