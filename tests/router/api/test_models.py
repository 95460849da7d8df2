"""GET /v1/models while the fleet changes or the router stops."""

from __future__ import annotations

import asyncio
from typing import Any

from eldr.router.api.models import ModelsFlow
from eldr.router.http.errors import ApiError
from eldr.router.http.exchange import ClientExchange
from eldr.router.http.message import Request
from tests.router.admin import ask_admin
from tests.router.harness import on_uvloop, running, until
from tests.router.memory import MemoryTransport, OpenChannel
from tests.router.wire import answers_in


@on_uvloop
async def test_a_worker_that_leaves_while_another_is_asked_is_passed_over(admin: dict[str, Any]) -> None:
    async with running(decode=3, health_timeout_s=30.0, **admin) as s:
        first, leaves, last = s.decode
        asked = first.asked("/v1/models")
        first.silent = True
        answer = asyncio.create_task(s.get("/v1/models"))
        await until(lambda: first.asked("/v1/models") > asked, "it is asked")
        await ask_admin(s, "DELETE", "/admin/workers", {"url": leaves.url, "role": "decode"})
        workers = s.router.services.fleet.workers("decode")
        await until(lambda: leaves.url not in workers, "it leaves")
        before = last.asked("/v1/models")
        await first.stop()  # which breaks its connections off
        assert (await answer).status == 200
        assert last.asked("/v1/models") == before + 1


@on_uvloop
async def test_a_router_that_stops_ends_no_request_that_has_just_been_answered() -> None:
    async with running() as s:
        transport, request = MemoryTransport(), Request(b"GET", b"/v1/models", {}, b"")
        flow = ModelsFlow(s.router.services, ClientExchange(OpenChannel(), transport, request), request)
        await flow.start()
        flow.end_now(ApiError(503, "the router is shutting down"))
        assert answers_in(transport.written) == 1
