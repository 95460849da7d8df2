"""GET /v1/models: what all workers serve together, whatever some of them answer."""

from __future__ import annotations

import asyncio
import json
from typing import Any
from urllib.parse import quote

import pytest
from yarl import URL

from eldr.router.api.models import ModelsFlow
from eldr.router.fleet.lists import MAX_LIST_BYTES
from eldr.router.http.errors import ApiError
from eldr.router.http.exchange import ClientExchange
from eldr.router.http.message import Request
from tests.router.admin import ask_admin
from tests.router.harness import Reply, Setup, bearer, on_uvloop, running, until
from tests.router.memory import MemoryTransport, OpenChannel
from tests.router.wire import answers_in


def names(answer: Reply) -> list[str]:
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["object"] == "list"
    return [card["id"] for card in answer.json()["data"]]


SICK = [(500, b"no"), (200, b"<html>"), (200, b"[]"), (200, b'{"data": 7}'), (404, b"{}"), (302, b""), (200, b"")]


@pytest.mark.parametrize("said", SICK)
@on_uvloop
async def test_what_is_no_list_of_models_reaches_no_client(said: tuple[int, bytes]) -> None:
    async with running(decode=2, health_interval_s=60) as s:
        s.decode[0].list_answer = said
        for _ in range(2):
            assert names(await s.get("/v1/models")) == ["tiny"]


@on_uvloop
async def test_the_list_is_what_all_workers_serve_together_with_their_own_entries() -> None:
    def prepare(s: Setup) -> None:
        s.decode[0].adapters, s.decode[1].adapters = ["sql", "both"], ["both", "poem"]
        s.decode[2].model, s.prefill[0].adapters = "big", ["on prefill alone"]

    async with running(decode=3, prepare=prepare) as s:
        answer = await s.get("/v1/models", {"X-Request-Id": "abc"})
        assert set(names(answer)[:2]) == {"tiny", "big"}
        assert sorted(names(answer)[2:]) == ["both", "poem", "sql"]
        assert answer.headers["x-request-id"] == "abc"
        own = [card for worker in s.decode for card in json.loads(worker.model_list())["data"]]
        assert all(card in own for card in answer.json()["data"])
        assert (await s.get("/v1/models")).headers["x-request-id"]
        worker = s.router.services.fleet.workers("decode")[s.decode[1].url]
        await s.decode[1].stop()
        await until(lambda: not worker.healthy, "it is found out")
        assert sorted(names(await s.get("/v1/models"))) == ["big", "both", "sql", "tiny"]


@on_uvloop
async def test_the_list_is_as_new_as_a_second_and_asking_for_it_floods_no_worker() -> None:
    async with running(health_interval_s=60) as s:
        before = s.decode[0].asked("/v1/models")
        assert [names(await s.get("/v1/models")) for _ in range(20)] == [["tiny"]] * 20
        assert s.decode[0].asked("/v1/models") - before <= 2
        s.decode[0].adapters = ["sql"]
        async with asyncio.timeout(10):
            while names(await s.get("/v1/models")) != ["tiny", "sql"]:
                await asyncio.sleep(0.05)


@pytest.mark.parametrize("name", ["tiny", "org/an adapter", "ä+%"])
@on_uvloop
async def test_one_model_can_be_asked_for(name: str) -> None:
    async with running(health_interval_s=60) as s:
        if name != "tiny":
            for worker in s.decode:
                worker.adapters = [name]  # loaded a moment ago
        for quoted in (quote(name), quote(name, safe="")):
            url = URL(f"{s.url}/v1/models/{quoted}", encoded=True)
            async with s.session.get(url, headers={"X-Request-Id": "abc"}) as found:
                assert (found.status, (await found.json())["id"]) == (200, name)
                assert found.headers["x-request-id"] == "abc"
        answer = await s.get("/v1/models/absent")
        assert (answer.status, answer.error["message"]) == (
            404,
            "The model `absent` does not exist. Valid aliases: tiny.",
        )
        assert (await s.post({}, "/v1/models/tiny")).status == 405


@on_uvloop
async def test_workers_that_know_the_keys_of_clients_are_asked_with_them() -> None:
    def prepare(s: Setup) -> None:
        for worker in (*s.prefill, *s.decode):
            worker.api_key = "a-clients-key"

    async with running(decode=2, prepare=prepare) as s:
        answer = await s.get("/v1/models")
        assert (answer.status, answer.body) == (401, b'{"error":"Unauthorized"}')
        assert names(await s.get("/v1/models", bearer("a-clients-key"))) == ["tiny"]
        assert (await s.get("/v1/models/tiny", bearer("a-clients-key"))).json()["id"] == "tiny"
        assert (await s.get("/v1/models/other", bearer("a-clients-key"))).status == 404
        s.decode[0].list_answer = (500, b"no")
        assert names(await s.get("/v1/models", bearer("a-clients-key"))) == ["tiny"]
        await s.decode[0].stop()
        assert names(await s.get("/v1/models", bearer("a-clients-key"))) == ["tiny"]


@on_uvloop
async def test_there_is_no_list_without_a_worker() -> None:
    async with running() as s:
        await s.decode[0].stop()
        await until(lambda: not s.router.services.fleet.ready, "it is found out")
        for path in ("/v1/models", "/v1/models/tiny"):
            assert (await s.get(path)).status == 503


@on_uvloop
async def test_a_list_without_end_is_given_up() -> None:
    async with running(decode=2, health_interval_s=60) as s:
        s.decode[0].list_answer = (200, b'{"data":["' + b"x" * MAX_LIST_BYTES + b'"]}')
        assert names(await s.get("/v1/models")) == ["tiny"]


@on_uvloop
async def test_a_worker_that_leaves_while_another_is_asked_is_passed_over(admin: dict[str, Any]) -> None:
    def prepare(s: Setup) -> None:
        for worker in s.decode:
            worker.api_key = "a-clients-key"

    async with running(decode=3, health_interval_s=60, prepare=prepare, **admin) as s:
        first, leaves, _ = s.decode
        assert (await s.get("/v1/models")).status == 401  # what follows waits for no other look
        first.delay_s = 5
        asked = first.asked("/v1/models")
        answer = asyncio.create_task(s.get("/v1/models", bearer("a-clients-key")))
        await until(lambda: first.asked("/v1/models") > asked, "it is asked")
        await ask_admin(s, "DELETE", "/admin/workers", {"url": leaves.url, "role": "decode"})
        workers = s.router.services.fleet.workers("decode")
        await until(lambda: leaves.url not in workers, "it leaves")
        await first.stop()  # which breaks its connections off
        assert names(await answer) == ["tiny"]


@on_uvloop
async def test_a_router_that_stops_ends_no_request_that_has_just_been_answered() -> None:
    async with running() as s:
        transport, request = MemoryTransport(), Request(b"GET", b"/v1/models", {}, b"")
        flow = ModelsFlow(s.router.services, ClientExchange(OpenChannel(), transport, request), request)
        await flow.start()
        flow.end_now(ApiError(503, "the router is shutting down"))
        assert answers_in(transport.written) == 1
