"""Workers that fail again and again leave the service and come back; retries stay within their budget."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from eldr.router.config.endpoint import LegName
from eldr.router.config.groups import EjectionSettings
from eldr.router.fleet.outcomes import Outcomes
from eldr.router.fleet.workers import Fleet
from eldr.router.observe.counters import Metrics
from tests.router.failing import hang
from tests.router.fake_worker import FakeWorker, Seen, reply
from tests.router.harness import ASK, Scripted, Setup, on_uvloop, preferring, running, until

EJECTING: dict[str, Any] = {"eject_failures": 2, "eject_base_s": 0.5, "eject_max_s": 2.0}


async def fail(worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reply(writer, 500, b'{"error":{"message":"engine died","code":500}}')


def later(setup: Setup) -> None:
    """The time of every ejection is over."""
    setup.router.services.legs.outcomes.sweep(time.monotonic() + 1000.0)


@on_uvloop
async def test_a_decode_worker_that_fails_is_ejected_tried_and_taken_back() -> None:
    policy = Scripted()
    async with running(decode=2, policy=policy, **{**EJECTING, "eject_base_s": 60.0, "eject_max_s": 60.0}) as s:
        policy.rule = preferring(s.decode[0])
        bad, good = s.decode
        bad.behaviour = fail
        for _ in range(2):
            assert (await s.post()).status == 200  # repaired on the other one
        assert await s.metric("eldr_ejections_total", worker=bad.url, reason="consecutive") == 1
        assert await s.metric("eldr_worker_ejected", worker=bad.url) == 1
        assert await s.metric("eldr_worker_up", worker=bad.url) == 1  # its probes succeed all the while
        seen = len(bad.generated)
        worker = s.router.services.fleet.workers("decode")[bad.url]
        for _ in range(5):
            assert (await s.post()).status == 200
        assert len(bad.generated) == seen
        later(s)
        assert worker.on_trial

        # The trial: one request, though many come at once. It fails, and the worker is out for longer.
        assert {answer.status for answer in await asyncio.gather(*(s.post() for _ in range(10)))} == {200}
        assert len(bad.generated) == seen + 1
        assert await s.metric("eldr_ejections_total", worker=bad.url, reason="trial") == 1

        bad.behaviour = None
        later(s)
        assert (await s.post()).status == 200
        assert not worker.ejected
        assert not worker.on_trial
        before = len(bad.generated)
        await asyncio.gather(*(s.post() for _ in range(5)))
        assert len(bad.generated) == before + 5  # all of the traffic again
        assert good.generated


@on_uvloop
async def test_a_prefill_worker_that_fails_is_ejected() -> None:
    async with running(prefill=2, **{**EJECTING, "eject_base_s": 60.0, "eject_max_s": 60.0}) as s:
        assert (await s.post()).status == 200
        home = next(worker for worker in s.prefill if worker.generated)
        home.behaviour = fail
        for _ in range(5):
            assert (await s.post()).status == 200
        assert len(home.generated) == 1 + 2
        assert await s.metric("eldr_ejections_total", role="prefill") == 1


@on_uvloop
async def test_a_prefill_worker_comes_back_by_its_trial() -> None:
    async with running(prefill=2, **EJECTING) as s:
        assert (await s.post()).status == 200
        home = next(worker for worker in s.prefill if worker.generated)
        home.behaviour = fail
        for _ in range(2):
            assert (await s.post()).status == 200
        home.behaviour = None
        worker = s.router.services.fleet.workers("prefill")[home.url]
        await until(lambda: worker.on_trial, "its trial")
        before = len(home.generated)
        for n in range(3):
            assert (await s.post()).status == 200
            assert len(home.generated) == before + n + 1
        assert not worker.on_trial


@on_uvloop
async def test_a_trial_whose_client_leaves_is_no_verdict() -> None:
    policy = Scripted()
    async with running(decode=2, policy=policy, **EJECTING) as s:
        policy.rule = preferring(s.decode[0])
        bad = s.decode[0]
        bad.behaviour = fail
        for _ in range(2):
            await s.post()
        worker = s.router.services.fleet.workers("decode")[bad.url]
        await until(lambda: worker.on_trial, "its trial")
        bad.behaviour = hang
        task = asyncio.create_task(s.post())
        await until(lambda: worker.ejected, "the trial runs")
        task.cancel()
        await until(lambda: worker.on_trial, "the next request is the trial")
        bad.behaviour = None
        assert (await s.post()).status == 200
        assert not worker.on_trial


@on_uvloop
async def test_a_long_streams_trial_ends_with_its_first_event() -> None:
    policy = Scripted()
    async with running(decode=2, policy=policy, **EJECTING) as s:
        policy.rule = preferring(s.decode[0])
        bad = s.decode[0]
        bad.behaviour = fail
        for _ in range(2):
            await s.post()
        worker = s.router.services.fleet.workers("decode")[bad.url]
        bad.behaviour, bad.token_gap_s = None, 0.3
        await until(lambda: worker.on_trial, "its trial")
        async with s.session.post(s.url + "/v1/completions", json={**ASK, "stream": True}) as answer:
            await answer.content.readany()
            assert not worker.ejected
            assert worker.in_flight == 1
            await answer.read()


@pytest.mark.parametrize("role", ["prefill", "decode"])
@on_uvloop
async def test_the_only_worker_is_never_ejected(role: LegName) -> None:
    async with running(**EJECTING, retries=0) as s:
        worker = getattr(s, role)[0]
        worker.behaviour = fail
        for _ in range(10):
            assert (await s.post()).status == 500
        worker.behaviour = None
        assert (await s.post()).status == 200


@on_uvloop
async def test_an_ejected_worker_comes_back_when_the_others_go_down() -> None:
    policy = Scripted()
    settings = {**EJECTING, "eject_base_s": 60.0, "eject_max_s": 60.0}
    async with running(decode=2, policy=policy, **settings) as s:
        policy.rule = preferring(s.decode[0])
        s.decode[0].behaviour = fail
        for _ in range(2):
            await s.post()
        assert await s.metric("eldr_worker_ejected") == 1
        s.decode[0].behaviour = None
        await s.decode[1].stop()
        assert (await s.post()).status == 200
        assert await s.metric("eldr_worker_ejected") == 0


@on_uvloop
async def test_the_clients_own_errors_eject_nobody() -> None:
    async def refuse(
        worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await reply(writer, 400, b'{"error":{"message":"no","code":400}}')

    async with running(decode=2, **EJECTING) as s:
        for worker in s.decode:
            worker.behaviour = refuse
        for _ in range(10):
            assert (await s.post()).status == 400
        assert await s.metric("eldr_ejections_total") == 0
        assert await s.metric("eldr_worker_failures_total") == 0


@on_uvloop
async def test_a_dying_fleet_is_not_hammered() -> None:
    async with running(decode=3, retry_burst=4, retry_ratio=0.1, eject_share=0.0) as s:
        for worker in s.decode:
            worker.behaviour = fail
        for _ in range(40):
            assert (await s.post()).status == 500
        sent = sum(len(worker.generated) for worker in s.decode)
        assert 40 <= sent <= 40 + 4 + 0.1 * 40
        assert await s.metric("eldr_retries_denied_total", reason="budget") > 0
        for worker in s.decode:
            worker.behaviour = None
        assert (await s.post()).status == 200


@pytest.mark.parametrize("refused_first", [False, True])
@on_uvloop
async def test_requests_leave_a_worker_that_stops_answering_its_probes(refused_first: bool) -> None:
    """As a stopped process does: it takes connections and bytes, and says nothing."""
    policy = Scripted()
    async with running(decode=2, policy=policy, health_timeout_s=0.2) as s:
        stopped, other = s.decode
        policy.rule = preferring(s.decode[0])
        stopped.behaviour = hang
        tasks = [asyncio.create_task(s.post({**ASK, "stream": n % 2 == 0})) for n in range(6)]
        await until(lambda: len(stopped.generated) == 6, "they wait there")
        stopped.silent = True
        if refused_first:  # as when its queue of connections is full
            services = s.router.services
            services.legs.outcomes.refused(services.fleet.workers("decode")[stopped.url], "refused")
        answers = await asyncio.gather(*tasks)
        assert [answer.status for answer in answers] == [200] * 6
        assert len(other.generated) == 6
        handoffs = [seen.body["kv_transfer_params"]["remote_request_id"] for w in s.decode for seen in w.generated]
        assert len(set(handoffs)) == 12
        stopped.silent, stopped.behaviour = False, None
        await until(lambda: s.router.services.fleet.workers("decode")[stopped.url].healthy, "it is found again")


@on_uvloop
async def test_requests_stay_where_there_is_no_other_worker() -> None:
    async with running(health_timeout_s=0.2) as s:
        gate = asyncio.Event()

        async def late(
            worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
        ) -> None:
            await gate.wait()
            await worker.answer(seen, writer)

        s.decode[0].behaviour = late
        task = asyncio.create_task(s.post())
        await until(lambda: s.decode[0].running == 1, "it runs")
        s.decode[0].silent = True
        await until(lambda: not s.router.services.fleet.ready, "it answers no probes")
        gate.set()
        assert (await task).status == 200


@on_uvloop
async def test_a_pull_from_a_dead_prefill_worker_is_not_the_decode_workers_fault() -> None:
    async with running(prefill=2, decode=2, retries=2, health_interval_s=60) as s:
        assert (await s.post()).status == 200
        home = next(worker for worker in s.prefill if worker.generated)

        async def fails_as_the_prefill_worker_is_gone(
            worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
        ) -> None:
            fleet = s.router.services.fleet
            fleet.set_healthy(fleet.workers("prefill")[home.url], False)
            worker.behaviour = None
            await fail(worker, seen, reader, writer)

        for worker in s.decode:
            worker.behaviour = fails_as_the_prefill_worker_is_gone
        assert (await s.post()).status == 200
        assert await s.metric("eldr_worker_failures_total", role="decode") <= 1
        assert len([worker for worker in s.prefill if worker.generated]) == 2


def test_the_last_request_of_a_worker_that_left_ends_no_trial_of_the_one_that_took_its_url() -> None:
    fleet = Fleet()
    outcomes = Outcomes(fleet, Metrics(), EjectionSettings(eject_failures=1, eject_share=1.0))
    fleet.on_change(outcomes.fleet_changed)
    old = fleet.add("http://d:1", "decode", 2)
    fleet.set_healthy(old, True)
    outcomes.failed(old, "status")
    fleet.remove(old)
    new = fleet.add("http://d:1", "decode", 2)
    fleet.set_healthy(new, True)
    outcomes.failed(new, "status")
    outcomes.sweep(time.monotonic() + 1000.0)
    outcomes.began(new)
    assert new.ejected  # its trial runs
    outcomes.ended(old)
    outcomes.succeeded(new)
    assert not new.ejected
