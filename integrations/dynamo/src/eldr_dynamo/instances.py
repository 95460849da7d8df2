"""Keeps eldr's fleet in step with the workers that Dynamo's discovery knows."""

from __future__ import annotations

import time
from collections.abc import Mapping

from eldr.router.config.endpoint import LegName
from eldr.router.fleet.workers import Fleet, Worker
from eldr_dynamo.stages import Client

# Dynamo's workers have queues of their own, and the frontend refuses what is too much.
UNLIMITED = 2**31


class Instances:
    """Lets workers join and leave the fleet as instances come and go.

    A worker's URL is the number of its instance. It leaves once its last request has ended.

    clients: by leg, the client of the workers' endpoint.
    model: what all of them serve.
    """

    def __init__(self, fleet: Fleet, clients: Mapping[LegName, Client], model: str) -> None:
        self._fleet = fleet
        self._clients = clients
        self._model = model
        self._known: dict[LegName, list[int]] = {}
        self._leaving: set[Worker] = set()

    def follow(self) -> None:
        """Bring the fleet up to date. Cheap if nothing has changed."""
        for leg, client in self._clients.items():
            found = client.instance_ids()
            if found != self._known.get(leg):
                self._known[leg] = found
                self._change(leg, {str(instance) for instance in found})
        for worker in [worker for worker in self._leaving if not worker.in_flight]:
            self._leaving.discard(worker)
            self._fleet.remove(worker)

    def _change(self, leg: LegName, found: set[str]) -> None:
        fleet = self._fleet
        workers = dict(fleet.workers(leg))
        for url in sorted(found):
            worker = workers.get(url)
            if worker is None:
                worker = fleet.add(url, leg, UNLIMITED)
                fleet.set_models(worker, [{"id": self._model}], time.monotonic())
                fleet.set_healthy(worker, True)
            elif worker.draining:
                self._leaving.discard(worker)
                fleet.set_draining(worker, False)
        for url, worker in workers.items():
            if url not in found and not worker.draining:
                self._leaving.add(worker)
                fleet.set_draining(worker, True)
