"""Several routers that decide as one, over a real NATS server."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.router.harness import Scripted, on_uvloop, until
from tests.router.peers.replicas import Replica, replicas, slow

STREAM: dict[str, Any] = {"stream": True, "max_tokens": 2000}


async def begun(replica: Replica, count: int = 1, **fields: Any) -> list[asyncio.Task[Any]]:
    """Requests that have been placed by this replica and run on."""
    fleet = replica.router.services.fleet
    before = sum(worker.in_flight for worker in fleet.workers("decode").values())
    tasks = [asyncio.create_task(replica.post(**STREAM, **fields)) for _ in range(count)]
    await until(
        lambda: sum(worker.in_flight for worker in fleet.workers("decode").values()) == before + count, "they run"
    )
    return tasks


async def end(tasks: list[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@on_uvloop
async def test_a_decision_of_one_counts_the_requests_of_the_other() -> None:
    async with replicas(2, decode=2, prepare=slow) as fleet:
        one, other = fleet.all
        first, second = fleet.decode
        assert isinstance(one.policy, Scripted)
        one.policy.rule = lambda request, load: first.url
        tasks = await begun(one, 3)
        await until(lambda: other.load == {first.url: 3, second.url: 0}, "the other counts them")
        tasks += await begun(other)
        assert isinstance(other.policy, Scripted)
        assert other.policy.asked[-1][1] == {first.url: 3, second.url: 0}
        assert other.worker(second).in_flight == 1
        await until(lambda: one.load == {first.url: 3, second.url: 1}, "the one counts the other's")
        await end(tasks)
        await until(lambda: set(one.load.values()) | set(other.load.values()) == {0}, "they have ended everywhere")
        assert (one.elsewhere, other.elsewhere) == (0, 0)


@on_uvloop
async def test_capacity_is_the_fleets_and_a_slot_that_ends_elsewhere_is_used() -> None:
    async with replicas(2, decode=1, prepare=slow, max_inflight=3) as fleet:
        one, other = fleet.all
        tasks = await begun(one, 3)
        await until(lambda: other.worker(fleet.decode[0]).free == 0, "the other knows that it is full")
        waiting = asyncio.create_task(other.post(**STREAM))
        await until(lambda: other.router.services.admission.queued == 1, "it waits")
        await end(tasks[:1])
        await until(lambda: fleet.decode[0].running == 3 and not other.router.services.admission.queued, "it runs")
        assert fleet.decode[0].most_running == 3
        await end([*tasks, waiting])
