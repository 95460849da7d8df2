"""Several routers in front of the same fake workers, and the NATS server between them."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import numpy as np

from eldr.policies.base import DecodeRequest, Policy
from eldr.policies.shares import Share
from eldr.router.app import Router
from eldr.router.config.settings import RouterConfig
from eldr.router.fleet.workers import Worker
from eldr.router.peers.bus import Bus
from tests.nats_server import NatsServer
from tests.router.fake_worker import FakeWorker
from tests.router.harness import ASK, Reply, Scripted, bearer, until
from tests.router.peers.network import D, sums_of


async def nats_server(*arguments: str) -> NatsServer:
    """One that listens."""
    server = NatsServer(*arguments)
    server.launch()
    await until(server.listens, "the NATS server listens")
    return server


class Replica:
    """One router of several."""

    def __init__(self, router: Router, policy: Policy, session: aiohttp.ClientSession) -> None:
        self.router = router
        self.policy = policy
        self._session = session

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.router.port}"

    def worker(self, fake: FakeWorker) -> Worker:
        return self.router.services.fleet.workers("decode")[fake.url]

    @property
    def load(self) -> dict[str, int]:
        """Decode worker -> what the policy is told of its requests."""
        return dict(self.router.services.fleet.eligible)

    @property
    def elsewhere(self) -> int:
        """The requests that the others run, as this one knows."""
        assert self.router.peers is not None
        return self.router.peers.elsewhere.running

    @property
    def synced(self) -> int:
        """The others that this one knows completely."""
        assert self.router.peers is not None
        return self.router.peers.others.synced

    async def post(self, path: str = "/v1/completions", **fields: Any) -> Reply:
        return await self.send({**ASK, **fields}, path)

    async def send(self, fields: dict[str, Any], path: str, key: str = "") -> Reply:
        body = json.dumps(fields).encode()
        headers = {"content-type": "application/json", **(bearer(key) if key else {})}
        async with self._session.post(self.url + path, data=body, headers=headers) as answer:
            return Reply(answer.status, answer.headers, await answer.read())

    async def metrics(self) -> str:
        async with self._session.get(self.url + "/metrics") as answer:
            return await answer.text()

    async def ready(self) -> int:
        """The status of /ready."""
        async with self._session.get(self.url + "/ready") as answer:
            return answer.status

    @property
    def up(self) -> bool:
        """Whether it can hear others."""
        assert self.router.peers is not None
        return self.router.peers.up


class AllSums(Scripted):
    """Keeps the sums of all requests, of this router and of the others, with profiles drawn at random.

    dimension: of a profile.
    """

    def __init__(self, dimension: int = D) -> None:
        super().__init__()
        self._dimension = dimension
        self._own: dict[str, tuple[str, Share]] = {}
        self._others: dict[Share, str] = {}

    def share(self, request: DecodeRequest, worker: str) -> Share:
        share = Share(np.frombuffer(os.urandom(self._dimension), dtype=np.uint8), request.prompt_tokens, True)
        self._own[request.request_id] = worker, share
        return share

    def finished(self, request: DecodeRequest, worker: str) -> None:
        del self._own[request.request_id]

    def elsewhere_started(self, worker: str, share: Share) -> None:
        self._others[share] = worker

    def elsewhere_finished(self, worker: str, share: Share) -> None:
        assert self._others.pop(share) == worker

    @property
    def sums(self) -> dict[str, tuple[int, ...]]:
        """Worker -> count, context tokens, and the sum of the codes."""
        return sums_of([*self._own.values(), *((worker, share) for share, worker in self._others.items())])


def total(sums: dict[str, tuple[int, ...]]) -> int:
    """How many requests these are."""
    return sum(each[0] for each in sums.values())


class Replicas:
    """nats: the server. all: the replicas that were started, in order."""

    def __init__(self, nats: NatsServer, workers: Sequence[FakeWorker], settings: dict[str, Any]) -> None:
        self.nats = nats
        self.prefill = [worker for worker in workers if worker.role == "prefill"]
        self.decode = [worker for worker in workers if worker.role == "decode"]
        self.settings = settings
        self.all: list[Replica] = []
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))

    async def start(self, policy: Policy | None = None, bus: Bus | None = None, **settings: Any) -> Replica:
        """Start one more replica. bus: instead of the configured one."""
        config = RouterConfig.of(
            **{
                "prefill": tuple(worker.url for worker in self.prefill),
                "decode": tuple(worker.url for worker in self.decode),
                "peers": (self.nats.url,),
                "port": 0,
                "health_interval_s": 0.1,
                **self.settings,
                **settings,
            }
        )
        own = policy or Scripted()
        replica = Replica(Router(config, lambda group: own, bus=bus), own, self._session)
        await replica.router.start()
        self.all.append(replica)
        return replica

    async def meet(self) -> None:
        """Wait until all know each other."""
        wanted = len(self.all) - 1
        await until(lambda: all(each.synced == wanted for each in self.all), "all replicas know each other")

    async def close(self) -> None:
        for worker in (*self.prefill, *self.decode):
            await worker.stop()
        for replica in self.all:
            await replica.router.stop(0)
        await self._session.close()


@asynccontextmanager
async def replicas(
    count: int = 2,
    decode: int = 2,
    policy: Callable[[], Policy] = Scripted,
    prepare: Callable[[FakeWorker], None] | None = None,
    **settings: Any,
) -> AsyncIterator[Replicas]:
    """That many replicas that know each other, in front of the same workers."""
    nats = await nats_server()
    workers = [await FakeWorker("prefill").start()]
    workers += [await FakeWorker("decode").start() for _ in range(decode)]
    for worker in workers:
        if prepare is not None:
            prepare(worker)
    fleet = Replicas(nats, workers, settings)
    try:
        for _ in range(count):
            await fleet.start(policy())
        await fleet.meet()
        yield fleet
    finally:
        await fleet.close()
        nats.stop()


def slow(worker: FakeWorker) -> None:
    """Let a decode worker take seconds for an answer."""
    if worker.role == "decode":
        worker.tokens, worker.token_gap_s = ["x"] * 2000, 0.02
