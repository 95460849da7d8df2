"""gRPC's health checks, as Kubernetes, Envoy and GAIE's gateways ask for them."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from eldr.router.picker.messages_pb2 import HealthCheckResponse
from tests.router.picker.client import HEALTH, Gateway, picking

SERVING, NOT_SERVING = HealthCheckResponse.SERVING, HealthCheckResponse.NOT_SERVING
READY = ["", "readiness", "envoy.service.ext_proc.v3.ExternalProcessor"]


async def next_of(call: object) -> HealthCheckResponse.ServingStatus:
    async with asyncio.timeout(20):
        return (await call.read()).status  # type: ignore[attr-defined]


@pytest.mark.parametrize("service", [*READY, "liveness"])
async def test_a_picker_with_workers_serves(service: str) -> None:
    async with picking(aggregated=1) as g:
        assert await g.check(service) == SERVING


@pytest.mark.parametrize(("prefill", "decode"), [(1, 0), (0, 1), (1, 1)])
async def test_a_picker_for_one_phase_is_ready_with_its_workers(prefill: int, decode: int) -> None:
    async with picking(prefill, decode) as g:
        assert await g.check("readiness") == SERVING
        assert (await g.setup.get("/ready")).status == 200


@pytest.mark.parametrize("gone", ["prefill", "decode"])
async def test_one_that_lacks_the_workers_of_one_phase_is_not(gone: str) -> None:
    def down(setup: object) -> None:
        getattr(setup, gone)[0].healthy = False

    async with picking(1, 1, prepare=down) as g:
        assert await g.check("readiness") == NOT_SERVING
        assert (await g.setup.get("/ready")).status == 503


async def test_an_unknown_service_is_not_found_and_may_be_watched() -> None:
    async with picking(aggregated=1) as g:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await g.check("nobody")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert await next_of(g.watch("nobody")) == HealthCheckResponse.SERVICE_UNKNOWN


@pytest.mark.parametrize("service", READY)
async def test_a_watch_hears_of_every_change(service: str) -> None:
    async with picking(aggregated=1) as g:
        watch = g.watch(service)
        assert await next_of(watch) == SERVING
        for healthy, status in ((False, NOT_SERVING), (True, SERVING)):
            g.setup.aggregated[0].healthy = healthy
            assert await next_of(watch) == status


async def ask_badly(g: Gateway, method: str, *messages: bytes) -> grpc.StatusCode:
    call = g.channel.stream_stream(HEALTH + method)()
    for message in messages:
        await call.write(message)
    await call.done_writing()
    async with asyncio.timeout(20):
        return await call.code()


@pytest.mark.parametrize("method", ["Check", "Watch"])
@pytest.mark.parametrize("messages", [(), (b"\xff",), (b"", b"")], ids=["none", "no message", "two"])
async def test_a_check_is_one_message(method: str, messages: tuple[bytes, ...]) -> None:
    async with picking(aggregated=1) as g:
        assert await ask_badly(g, method, *messages) is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_stopping_picker_says_so_and_ends_watches() -> None:
    async with picking(aggregated=1) as g:
        watch = g.watch("readiness")
        alive = g.watch("liveness")
        assert await next_of(watch) == SERVING
        assert await next_of(alive) == SERVING
        stopping = asyncio.create_task(g.setup.router.stop(1, 0.3))
        assert await next_of(watch) == NOT_SERVING
        assert await g.check("liveness") == SERVING
        assert (await g.setup.get("/ready")).status == 503
        await stopping
        assert await watch.code() is grpc.StatusCode.UNAVAILABLE
        assert await alive.code() is grpc.StatusCode.UNAVAILABLE
