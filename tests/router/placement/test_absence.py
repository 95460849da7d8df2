"""A role without any worker: requests wait for one that is back soon, and are refused when it is not."""

from __future__ import annotations

import asyncio

import pytest

from eldr.router.config.endpoint import LegName
from eldr.router.fleet.workers import Fleet
from eldr.router.http.client import ConnectError, WorkerConnection
from tests.router.fake_worker import FakeWorker, Seen, reply
from tests.router.harness import ASK, CHAT, Setup, interpreted, on_uvloop, running, until


async def hold(worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(3600)


@pytest.mark.parametrize("role", ["prefill", "decode"])
@on_uvloop
async def test_requests_wait_for_a_worker_that_is_restarted(role: LegName) -> None:
    async with running(prefill=1, decode=1) as s:
        worker = getattr(s, role)[0]
        await worker.stop()
        await until(lambda: not s.router.services.fleet.ready, "it is found out")
        asked = [asyncio.create_task(s.post()), asyncio.create_task(s.chat({**CHAT, "stream": True}))]
        admission = s.router.services.admission
        waiting = (lambda: admission.queued == 2) if role == "decode" else (lambda: admission.admitted == 2)
        await until(waiting, "they wait")
        await worker.start()
        whole, streamed = await asyncio.gather(*asked)
        assert (whole.status, whole.json()["choices"][0]["text"]) == (200, "abcd")
        assert streamed.events[-1] == "data: [DONE]"
        assert (admission.queued, admission.admitted) == (0, 0)


@pytest.mark.parametrize("role", ["prefill", "decode"])
@on_uvloop
async def test_the_request_that_finds_the_last_worker_gone_waits_too(role: LegName) -> None:
    async with running(prefill=1, decode=1, health_interval_s=0.3) as s:
        worker = getattr(s, role)[0]
        await worker.stop()
        asked = asyncio.create_task(s.post())
        await until(lambda: s.router.services.metrics.retries[role, "refused"] == 1, "it was refused")
        assert not asked.done()
        await worker.start()
        assert (await asked).status == 200


@pytest.mark.parametrize("role", ["prefill", "decode"])
@on_uvloop
async def test_a_request_whose_only_worker_died_is_tried_again_on_its_successor(role: LegName) -> None:
    async with running(prefill=1, decode=1) as s:
        worker = getattr(s, role)[0]
        worker.behaviour = hold
        asked = asyncio.create_task(s.post())
        await until(lambda: worker.running == 1, "it runs")
        await worker.stop()
        worker.behaviour = None
        await until(lambda: not s.router.services.fleet.ready, "it is found out")
        await worker.start()
        answer = await asked
        assert (answer.status, answer.json()["choices"][0]["text"]) == (200, "abcd")
        # The hand-off that was spent at the worker that died is not sent again.
        spent = [seen.body["kv_transfer_params"]["remote_request_id"] for seen in s.decode[0].generated]
        assert len(set(spent)) == len(spent) == (2 if role == "decode" else 1)


@pytest.mark.parametrize("role", ["prefill", "decode"])
@on_uvloop
async def test_a_role_that_stays_away_is_refused(role: LegName) -> None:
    async with running(prefill=1, decode=1, worker_wait_s=0.2, health_interval_s=60) as s:
        await getattr(s, role)[0].stop()
        first = await s.post()
        assert (first.status, first.error["message"]) == (503, f"no {role} worker is available")
        assert int(first.headers["retry-after"]) > 0
        # From then on at once: nothing is left to wait for.
        assert s.router.services.admission.patience_s(s.router.services.fleet.groups[0].whole, role) <= 0
        assert (await s.post()).status == 503
        assert s.router.services.admission.queued == s.router.services.admission.admitted == 0


@on_uvloop
async def test_nobody_waits_for_a_role_that_was_never_there() -> None:
    def break_down(s: Setup) -> None:
        s.decode[0].healthy = False

    async with running(prepare=break_down, worker_wait_s=3600) as s:
        assert (await s.post()).status == 503


@on_uvloop
async def test_what_waits_in_the_queue_outlives_the_last_worker() -> None:
    async with running(max_inflight=1) as s:
        s.decode[0].behaviour = hold
        first = asyncio.create_task(s.post())
        await until(lambda: s.decode[0].running == 1, "it runs")
        second = asyncio.create_task(s.post({**ASK, "prompt": "second"}))
        await until(lambda: s.router.services.admission.queued == 1, "it waits")
        await s.decode[0].stop()
        await until(lambda: not s.router.services.fleet.ready, "it is found out")
        assert not second.done()
        s.decode[0].behaviour = None
        await s.decode[0].start()
        assert [(await task).status for task in (first, second)] == [200, 200]


@on_uvloop
async def test_a_client_that_leaves_waits_no_more() -> None:
    async with running(prefill=1, worker_wait_s=3600) as s:
        await s.prefill[0].stop()
        asked = asyncio.create_task(s.post())
        await until(lambda: not s.router.services.fleet.ready, "it waits")
        asked.cancel()
        await until(lambda: s.router.services.admission.admitted == 0, "its slot is free")


@interpreted
@pytest.mark.parametrize("role", ["prefill", "decode"])
@on_uvloop
async def test_a_worker_that_answers_probes_and_takes_no_request_is_not_asked_for_ever(
    role: LegName, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(prefill=1, decode=1, health_interval_s=60, worker_wait_s=3600) as s:
        services = s.router.services
        worker = next(iter(services.fleet.workers(role).values()))

        def answers_its_probe() -> None:
            services.fleet.set_healthy(worker, True)
            services.admission.changed()

        async def refuse() -> WorkerConnection:
            asyncio.get_running_loop().call_soon(answers_its_probe)
            raise ConnectError("refused")

        monkeypatch.setattr(services.legs.pools[worker], "connection", refuse)
        assert (await s.post()).status == 503
        assert services.metrics.retries[role, "refused"] == 3


@on_uvloop
async def test_an_unknown_model_is_told_from_an_absent_worker() -> None:
    async def not_served(
        worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await reply(writer, 404, b'{"error":{"message":"The model `other` does not exist.","code":404}}')

    async with running(decode=1) as s:
        assert (await s.post({**ASK, "model": "other"})).status == 404
        await s.decode[0].stop()
        await until(lambda: not s.router.services.fleet.ready, "it is found out")
        asked = asyncio.create_task(s.post({**ASK, "model": "other"}))
        await until(lambda: s.router.services.admission.queued == 1, "who serves what is not known now")
        s.prefill[0].behaviour = not_served
        await s.decode[0].start()
        assert (await asked).status == 404


def test_how_long_a_role_has_been_gone() -> None:
    fleet = Fleet()
    served = fleet.groups[0].whole
    assert served.gone_for_s("decode") == float("inf")
    one, other = (fleet.add(f"http://d:{port}", "decode", 1) for port in (1, 2))
    assert served.gone_for_s("decode") == float("inf")
    fleet.set_healthy(one, True)
    assert served.gone_for_s("decode") is None
    assert served.gone_for_s("prefill") == float("inf")
    fleet.set_healthy(other, True)
    fleet.set_draining(one, True)
    assert served.gone_for_s("decode") is None
    fleet.set_ejected(other, True)
    first = served.gone_for_s("decode")
    fleet.remove(other)
    second = served.gone_for_s("decode")
    assert first is not None
    assert second is not None
    assert 0 <= first <= second < 3600
    fleet.set_draining(one, False)
    assert served.gone_for_s("decode") is None
