"""GET /v1/models and /v1/models/MODEL: what the workers that generate serve together."""

from __future__ import annotations

import asyncio
import time
from typing import Any
from urllib.parse import unquote

import orjson

from eldr.router.fleet.groups import Served, model_not_found
from eldr.router.fleet.lists import model_cards
from eldr.router.http.client import Answer, UpstreamError
from eldr.router.http.errors import ApiError
from eldr.router.http.exchange import ClientExchange
from eldr.router.http.forwarding import client_authorization, content_type
from eldr.router.http.message import Request
from eldr.router.placement.admission import NoWorkerError
from eldr.router.request import intake
from eldr.router.request.services import Services

LIST = b"/v1/models"
TIMEOUT_S = 10.0
# What is known of the workers' lists may be so old.
FRESH_S = 1.0


class ModelsFlow:
    """Answers one request with the models that any available worker that generates serves, base models first.

    Each entry is as a worker lists it.
    """

    def __init__(self, services: Services, exchange: ClientExchange, request: Request) -> None:
        self._services = services
        self._exchange = exchange
        self._request = request
        self._headers = intake.id_line(intake.request_id(request))
        name = request.path[len(LIST) + 1 :]
        self._model = unquote(name.decode("latin-1")) if name else None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> asyncio.Task[None]:
        self._exchange.listener = self
        self._task = asyncio.get_running_loop().create_task(self._run())
        return self._task

    def end_now(self, error: ApiError) -> None:
        """Answer with an error, unless there is an answer."""
        if self._task is None or self._task.done():
            return
        self._respond_error(error)
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
        try:
            body = orjson.dumps(await self._answer())
        except _RefusedError as refused:
            answer = refused.answer
            self._exchange.respond(answer.status, answer.body, content_type(answer.headers), self._headers)
            self._count(answer.status)
        except ApiError as error:
            self._respond_error(error)
        else:
            self._exchange.respond(200, body, extra=self._headers)
            self._count(200)

    async def _answer(self) -> object:
        """Raises ApiError, or _RefusedError if only the workers could check the client's key, and none accepts it."""
        fleet, lists = self._services.fleet, self._services.lists
        if self._model is not None:
            await lists.find(self._model)
        else:
            await lists.look(time.monotonic() - FRESH_S)
        if not fleet.any_available("decode"):
            raise NoWorkerError(fleet.groups[0].whole.role("decode"))
        listed = sorted(fleet.listed(), key=lambda served: served.adapter)
        cards = {served.name: served.card for served in listed if served.card is not None and _is_listed(served)}
        if any(worker.models is None for worker in fleet.available("decode")):
            cards = {card["id"]: card for card in await self._ask_for_client(required=not cards)} | cards
        if self._model is None:
            return {"object": "list", "data": list(cards.values())}
        if self._model not in cards:
            raise model_not_found(self._model)
        return cards[self._model]

    async def _ask_for_client(self, required: bool) -> list[dict[str, Any]]:
        """Return the list of a worker that has one only for clients with a key of its own. Raises like `_answer`."""
        fleet, authorization = self._services.fleet, client_authorization(self._request)
        refused: Answer | None = None
        for worker in list(fleet.available("decode")):
            if worker.models is not None or not fleet.has(worker):  # it has left while another one was asked
                continue
            try:
                answer = await self._services.lists.ask(worker, TIMEOUT_S, authorization)
                if answer.status in (401, 403):
                    refused = answer
                else:
                    return model_cards(answer)
            except UpstreamError:
                continue
        if not required:
            return []
        raise NoWorkerError(fleet.groups[0].whole.role("decode")) if refused is None else _RefusedError(refused)

    def _respond_error(self, error: ApiError) -> None:
        self._exchange.respond_error(error, self._headers)
        self._count(error.status)

    def _count(self, status: int) -> None:
        self._services.metrics.requests["/v1/models", status] += 1


def _is_listed(served: Served) -> bool:
    """Whether an available worker lists it, and not only may serve it."""
    return any(worker.available and worker.models is not None for worker in served.workers("decode"))


class _RefusedError(Exception):
    """A worker refuses the client's key."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(f"status {answer.status}")
        self.answer = answer
