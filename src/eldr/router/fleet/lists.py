"""Reads the workers' lists of models: for probes, and again before the router says that a model does not exist."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from eldr.router.config.endpoint import LEGS
from eldr.router.config.groups import WorkerSettings
from eldr.router.fleet.groups import Served, model_not_found
from eldr.router.fleet.sglang import name_adapters
from eldr.router.fleet.workers import Fleet, Worker
from eldr.router.http.client import Answer, ExchangeError, UpstreamError
from eldr.router.http.errors import ApiError
from eldr.router.http.pool import WorkerPool

MODELS = b"/v1/models"
# A list with ten thousand adapters has about six megabytes.
MAX_LIST_BYTES = 16 * 2**20
# Whoever waits for a look waits no longer for a worker. What a slower worker serves stays as it was known.
LOOK_TIMEOUT_S = 1.0
# Between the starts of two looks, so that a client that asks for models that do not exist cannot flood the workers.
LOOK_EVERY_S = 1.0


class Looks:
    """One reading that many wait for. No two readings run at once, or start within `LOOK_EVERY_S`.

    read: the reading. It raises nothing.
    """

    def __init__(self, read: Callable[[], Awaitable[None]]) -> None:
        self._read = read
        # When the last reading began, and when the last one that is over did.
        self._began_s = self._read_s = float("-inf")
        self._task: asyncio.Task[None] | None = None

    async def since(self, begun_s: float) -> None:
        """Wait for a reading that began after the monotonic time `begun_s` and is over."""
        while self._read_s < begun_s:
            if self._task is None:
                self._task = asyncio.create_task(self._look())
            await asyncio.shield(self._task)

    async def close(self) -> None:
        """End the reading, if there is one. Whoever waits for it is cancelled."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _look(self) -> None:
        try:
            await asyncio.sleep(self._began_s + LOOK_EVERY_S - time.monotonic())
            self._began_s = time.monotonic()
            await self._read()
            self._read_s = self._began_s
        finally:
            self._task = None


class ModelLists:
    """Reads what each worker serves, and keeps it in the fleet. pools: the connections to each worker."""

    def __init__(self, config: WorkerSettings, fleet: Fleet, pools: Mapping[Worker, WorkerPool]) -> None:
        self._config = config
        self._fleet = fleet
        self._pools = pools
        self._all = Looks(self._read_all)
        self._one: dict[Worker, Looks] = {}

    async def read(self, worker: Worker, timeout_s: float) -> Answer:
        """Read the list of one worker into the fleet. Raises UpstreamError if it cannot be used."""
        asked_s = time.monotonic()
        answer = await self.ask(worker, timeout_s)
        cards = None if answer.status in (401, 403) else model_cards(answer)
        if cards is not None and self._config.engine == "sglang":
            name_adapters(cards)
        if cards is not None:
            names, wanted = {card["id"] for card in cards}, self._config.model
            if not names or (wanted is not None and wanted not in names):
                serves = ", ".join(sorted(names)) or "no model"
                raise ExchangeError(f"it serves {serves}" + (f", not {wanted}" if wanted else ""))
        self._fleet.set_models(worker, cards, asked_s)
        return answer

    async def ask(self, worker: Worker, timeout_s: float, authorization: bytes = b"") -> Answer:
        """Ask a worker for its list. Raises UpstreamError if it does not answer.

        authorization: header lines with a client's keys, for workers that need no key of the router's.
        """
        pool = self._pools[worker]
        connection = await pool.connection()
        answer = Answer(MAX_LIST_BYTES, ours=True)
        connection.start(answer, pool.request(b"GET", MODELS, client_authorization=authorization), timeout_s)
        await connection.finish(answer)
        return answer

    # Looking again.

    async def find(self, model: str | None) -> Served:
        """Return who serves `model`, after another look at all workers if it is unknown. Raises ApiError."""
        fleet = self._fleet
        served = fleet.served(model)
        if served is None and model and fleet.any_available("decode"):
            await self._all.since(time.monotonic())
            served = fleet.served(model)
        if served is not None:
            return served
        if not fleet.any_available("decode"):
            return fleet.groups[0].whole  # unknown until a worker is back
        if model:
            raise model_not_found(model, sorted(name for group in fleet.groups for name in group.bases))
        names = ", ".join(sorted(group.name for group in fleet.groups if group.name))
        raise ApiError(400, f"model must be given: this router serves {names}", param="model")

    async def look(self, oldest_s: float) -> None:
        """Read the lists of all workers in service, unless that was done after the monotonic time `oldest_s`."""
        await self._all.since(oldest_s)

    async def look_at(self, worker: Worker) -> None:
        """Read the list of one worker again."""
        looks = self._one.get(worker)
        if looks is None:
            looks = self._one[worker] = Looks(lambda: self._read_again(worker))
        await looks.since(time.monotonic())

    async def close(self) -> None:
        """End all readings."""
        await asyncio.gather(self._all.close(), *(looks.close() for looks in self._one.values()))

    def fleet_changed(self, worker: Worker) -> None:
        """A listener of the fleet."""
        if not self._fleet.has(worker):
            self._one.pop(worker, None)

    async def _read_all(self) -> None:
        workers = [worker for leg in LEGS for worker in self._fleet.available(leg)]
        await asyncio.gather(*map(self._read_again, workers))

    async def _read_again(self, worker: Worker) -> None:
        """Read the list of a worker. If that fails, what is known stays; its probes will find out."""
        if worker not in self._pools:
            return
        with contextlib.suppress(UpstreamError, TimeoutError):
            async with asyncio.timeout(LOOK_TIMEOUT_S):
                await self.read(worker, LOOK_TIMEOUT_S)


def model_cards(answer: Answer) -> list[dict[str, Any]]:
    """Return the entries of a list of models. Raises ExchangeError if the answer is not such a list."""
    if answer.status != 200:
        raise ExchangeError(f"/v1/models answered {answer.status}")
    fields = answer.json()
    data = fields.get("data") if isinstance(fields, dict) else None
    if not isinstance(data, list):
        raise ExchangeError("/v1/models has no list of models")
    return [card for card in data if isinstance(card, dict) and isinstance(card.get("id"), str) and card["id"]]
