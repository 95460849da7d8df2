"""Workers that join, drain and leave while the router runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from eldr.router.app import Router
from eldr.router.config.endpoint import Endpoint, Endpoints
from eldr.router.config.settings import RouterConfig
from eldr.router.fleet.discovery.base import Source
from tests.router.admin import ask_admin, listed, until_state
from tests.router.fake_worker import FakeWorker
from tests.router.harness import ASK, Scripted, on_uvloop, running, until

# Joining.


@on_uvloop
async def test_a_policy_that_fails_when_workers_come_and_go_keeps_none_of_them(admin: dict[str, Any]) -> None:
    class Broken(Scripted):
        def joined(self, worker: str) -> None:
            raise ZeroDivisionError

        def left(self, worker: str) -> None:
            raise ZeroDivisionError

    async with running(decode=2, policy=Broken(), **admin) as s:
        goes = s.decode[0].url
        await ask_admin(s, "DELETE", "/admin/workers", {"url": goes, "role": "decode"})
        await until_state(s, "decode", goes, "gone")
        assert (await s.post()).status == 200
        assert await s.metric("eldr_policy_errors_total") == 3


class Hasty(Source):
    """Names other workers before the first ones have answered a probe. The second list is as final as the first."""

    name = "hasty"

    def __init__(self, *lists: list[Endpoint]) -> None:
        self._lists = lists

    async def watch(self) -> AsyncIterator[Endpoints]:
        for known in self._lists:
            yield frozenset(known)
        await asyncio.Event().wait()


@on_uvloop
async def test_a_list_that_changes_while_the_first_workers_are_probed() -> None:
    workers = [await FakeWorker(role).start() for role in ("prefill", "decode", "prefill", "decode")]
    stays, decode, goes, joins = (worker.url for worker in workers)
    first = [Endpoint(stays, "prefill"), Endpoint(decode, "decode"), Endpoint(goes, "prefill")]
    second = [*first[:2], Endpoint(joins, "decode")]
    workers[0].delay_s = 0.3
    router = Router(RouterConfig.of(prefill=[stays], decode=[decode], health_interval_s=0.1), lambda group: Scripted())
    membership, services = router.membership, router.services
    await membership.follow([Hasty(first, second)])
    await until(lambda: joins in services.fleet.eligible, "the new one is up")
    await until(lambda: goes not in services.fleet.workers("prefill"), "the other one has left")
    for n in range(50):
        lane = services.lanes.of(services.fleet.groups[0])
        assert lane is not None
        chosen = lane.ring.choose(b"prompt %d" % n)
        assert chosen is not None
        assert chosen[0].url == stays
    await membership.close()
    for worker in workers:
        await worker.stop()
    assert asyncio.all_tasks() == {asyncio.current_task()}


@on_uvloop
async def test_a_worker_joins_and_gets_requests_once_it_was_probed(admin: dict[str, Any]) -> None:
    policy = Scripted(lambda request, in_flight: list(in_flight)[-1])
    new = await FakeWorker("decode").start()
    async with running(policy=policy, **admin) as s:
        try:
            answer = await ask_admin(s, "POST", "/admin/workers", {"url": new.url + "/", "role": "decode"})
            assert (answer.status, answer.json()["url"], answer.json()["source"]) == (202, new.url, "admin")
            await until(lambda: ("joined", new.url) in policy.heard, "it joins")
            assert (await s.post()).status == 200
            assert len(new.generated) == 1
            assert [seen.path for seen in new.seen][:2] == ["/health", "/v1/models"]
            worker = (await listed(s))["decode", new.url]
            assert (worker["state"], worker["models"], worker["in_flight"]) == ("up", ["tiny"], 0)
            again = await ask_admin(s, "POST", "/admin/workers", {"url": new.url, "role": "decode"})
            assert again.status == 409
        finally:
            await new.stop()


@on_uvloop
async def test_a_prefill_worker_that_joins_takes_its_share_of_the_ring(admin: dict[str, Any]) -> None:
    new = await FakeWorker("prefill").start()
    async with running(**admin) as s:
        try:
            await ask_admin(s, "POST", "/admin/workers", {"url": new.url, "role": "prefill"})
            await until_state(s, "prefill", new.url, "up")
            for n in range(40):
                assert (await s.post({**ASK, "prompt": f"prompt {n}"})).status == 200
            assert 5 < len(new.generated) < 35
        finally:
            await new.stop()


@on_uvloop
async def test_a_worker_without_the_model_that_all_must_serve_gets_nothing(admin: dict[str, Any]) -> None:
    policy = Scripted()
    new = await FakeWorker("decode", model="another").start()
    async with running(policy=policy, model="tiny", **admin) as s:
        try:
            await ask_admin(s, "POST", "/admin/workers", {"url": new.url, "role": "decode"})
            await until_state(s, "decode", new.url, "down")
            assert "another" in (await listed(s))["decode", new.url]["problem"]
            assert "tiny" in (await listed(s))["decode", new.url]["problem"]
            for _ in range(4):
                assert (await s.post()).status == 200
            assert (await s.post({**ASK, "model": "another"})).status == 404
            assert new.generated == []
            assert ("joined", new.url) not in policy.heard
            new.model = "tiny"
            await until_state(s, "decode", new.url, "up")
            assert ("joined", new.url) in policy.heard
        finally:
            await new.stop()


@on_uvloop
async def test_a_worker_that_is_not_there_yet_joins_when_it_comes(admin: dict[str, Any]) -> None:
    new = await FakeWorker("decode").start()
    await new.stop()
    async with running(policy=Scripted(), **admin) as s:
        await ask_admin(s, "POST", "/admin/workers", {"url": new.url, "role": "decode"})
        await until_state(s, "decode", new.url, "down")
        assert (await s.post()).status == 200
        await new.start()
        await until_state(s, "decode", new.url, "up")
        await new.stop()


@on_uvloop
async def test_a_router_may_start_empty_and_be_filled(admin: dict[str, Any]) -> None:
    config = RouterConfig.of(port=0, health_interval_s=0.1, **admin)
    router = Router(config, lambda group: Scripted())
    prefill, decode = workers = [await FakeWorker(role).start() for role in ("prefill", "decode")]
    await router.start()
    try:
        assert not router.services.fleet.ready
        router.membership.join(Endpoint(prefill.url, "prefill"), "admin")
        router.membership.join(Endpoint(decode.url, "decode"), "admin")
        await until(lambda: router.services.fleet.ready, "both are up")
    finally:
        for worker in workers:
            await worker.stop()
        await router.stop(0)


# Draining and leaving.


@on_uvloop
async def test_a_draining_worker_finishes_what_it_runs_and_then_is_gone(admin: dict[str, Any]) -> None:
    policy = Scripted(lambda request, in_flight: next(iter(in_flight)))
    async with running(decode=2, policy=policy, **admin) as s:
        first, second = s.decode
        first.tokens, first.token_gap_s = ["x"] * 8, 0.1
        slow = asyncio.create_task(s.post({**ASK, "max_tokens": 8, "stream": True}))
        await until(lambda: first.running == 1, "it runs")
        answer = await ask_admin(s, "POST", "/admin/drain", {"url": first.url})
        assert (answer.status, answer.json()["state"], answer.json()["in_flight"]) == (202, "draining", 1)
        for _ in range(3):
            assert (await s.post()).status == 200
        assert (len(first.generated), len(second.generated)) == (1, 3)
        assert ("left", first.url) not in policy.heard
        assert [event["choices"][0]["text"] for event in (await slow).events[:-1]] == ["x"] * 8
        await until_state(s, "decode", first.url, "gone")
        assert policy.heard[-1] == ("left", first.url)
        assert policy.heard.index(("finished", first.url)) < policy.heard.index(("left", first.url))
        await until(lambda: first.open_connections == 0, "no connection to it is kept")
        assert await s.metric("eldr_worker_up", worker=first.url) == 0


@pytest.mark.parametrize("by", ["drain", "delete"])
@on_uvloop
async def test_what_does_not_finish_in_time_is_cut_off(admin: dict[str, Any], by: str) -> None:
    async with running(decode=2, policy=Scripted(lambda r, in_flight: next(iter(in_flight))), **admin) as s:
        first, second = s.decode
        first.tokens, first.token_gap_s = ["x"] * 1000, 0.05
        stream = asyncio.create_task(s.post({**ASK, "max_tokens": 1000, "stream": True}))
        whole = asyncio.create_task(s.post({**ASK, "max_tokens": 1000}))
        await until(lambda: first.running == 2, "both run")
        await until(lambda: sum(s.router.services.metrics.ttft.counts) > 0, "a token came")
        if by == "drain":
            body = {"url": first.url, "role": "decode", "timeout_s": 0.2}
            assert (await ask_admin(s, "POST", "/admin/drain", body)).status == 202
        else:
            assert (await ask_admin(s, "DELETE", "/admin/workers", {"url": first.url})).status == 202
        with pytest.raises(Exception, match="payload"):  # the stream ends short of its end
            await stream
        # What had not begun to answer runs again elsewhere.
        assert (await whole).status == 200
        assert len(second.generated) == 1
        await until_state(s, "decode", first.url, "gone")
        assert s.router.services.admission.admitted == 0


@on_uvloop
async def test_a_prefill_worker_stays_until_nobody_may_pull_from_it(admin: dict[str, Any]) -> None:
    async with running(prefill=2, **admin) as s:
        held, free = s.prefill
        held.lease, free.lease = {"left_s": 3600.0}, {"left_s": 1.5}
        while not all(worker.generated for worker in s.prefill):
            assert (await s.post({**ASK, "prompt": str(len(s.decode[0].generated))})).status == 200
        for worker in (held, free):
            await ask_admin(s, "POST", "/admin/drain", {"url": worker.url})
        await until_state(s, "prefill", free.url, "gone")
        assert (await listed(s))["prefill", held.url]["state"] == "draining"
        s.router.services.fleet.workers("prefill")[held.url].lease_until_s = 0.0
        await until_state(s, "prefill", held.url, "gone")


@on_uvloop
async def test_a_worker_that_is_taken_back_while_it_is_cut_off_serves_again(admin: dict[str, Any]) -> None:
    async with running(**admin) as s:
        worker = s.decode[0]
        worker.tokens, worker.token_gap_s = ["x"] * 1000, 0.05
        stream = asyncio.create_task(s.post({**ASK, "max_tokens": 1000, "stream": True}))
        await until(lambda: worker.running == 1, "it runs")
        await ask_admin(s, "DELETE", "/admin/workers", {"url": worker.url})
        s.router.membership.join(Endpoint(worker.url, "decode"), "admin")
        worker.tokens, worker.token_gap_s = ["a"], 0.0
        await asyncio.wait([stream])
        await until_state(s, "decode", worker.url, "up")
        assert (await s.post()).status == 200


@on_uvloop
async def test_a_draining_worker_can_be_taken_back(admin: dict[str, Any]) -> None:
    async with running(decode=1, worker_wait_s=0, **admin) as s:
        worker = s.decode[0]
        worker.tokens, worker.token_gap_s = ["x"] * 4, 0.1
        task = asyncio.create_task(s.post())
        await until(lambda: worker.running == 1, "it runs")
        await ask_admin(s, "POST", "/admin/drain", {"url": worker.url})
        assert (await s.post()).status == 503
        assert (await ask_admin(s, "POST", "/admin/workers", {"url": worker.url, "role": "decode"})).status == 202
        assert (await task).status == 200
        assert (await s.post()).status == 200
        assert (await listed(s))["decode", worker.url]["state"] == "up"


@on_uvloop
async def test_a_worker_may_leave_and_come_back_as_often_as_it_likes(admin: dict[str, Any]) -> None:
    async with running(decode=2, **admin) as s:
        worker = s.decode[0]
        for _ in range(5):
            await ask_admin(s, "POST", "/admin/drain", {"url": worker.url})
            await until_state(s, "decode", worker.url, "gone")
            await ask_admin(s, "POST", "/admin/workers", {"url": worker.url, "role": "decode"})
            await until_state(s, "decode", worker.url, "up")
            assert (await s.post()).status == 200
        assert len(s.router.services.legs.pools) == 3


@on_uvloop
async def test_under_load_workers_come_and_go_and_no_request_is_lost(admin: dict[str, Any]) -> None:
    spare = [await FakeWorker("decode").start() for _ in range(3)]
    async with running(decode=3, max_inflight=4, **admin) as s:
        for worker in (*s.decode, *spare):
            worker.token_gap_s = 0.005
        statuses = []

        async def client(n: int) -> None:
            for k in range(25):
                answer = await s.post({**ASK, "prompt": f"{n} {k}", "stream": k % 2 == 0})
                statuses.append((answer.status, b"d" in answer.body))

        load = asyncio.gather(*(client(n) for n in range(8)))
        for old, new in zip(s.decode, spare, strict=True):
            await ask_admin(s, "POST", "/admin/workers", {"url": new.url, "role": "decode"})
            await until_state(s, "decode", new.url, "up")
            await ask_admin(s, "POST", "/admin/drain", {"url": old.url})
            await until_state(s, "decode", old.url, "gone")
        await load
        assert statuses == [(200, True)] * 200
        assert all(worker.generated for worker in spare)
        assert s.router.services.fleet.workers("decode").keys() == {worker.url for worker in spare}
        for worker in spare:
            await worker.stop()
