"""Calls of Process as no Envoy makes them: out of order, hostile, and cut off at any point."""

from __future__ import annotations

import asyncio
import gc
import json
import tracemalloc
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from eldr.router.picker.messages_pb2 import HttpBody, HttpHeaders, ProcessingRequest
from tests.router.harness import Scripted, interpreted, until
from tests.router.picker.client import ASK, BUFFERED, PROCESS, Exchange, Picked, header_map, picking
from tests.router.picker.test_choice import all_over

INVALID = grpc.StatusCode.INVALID_ARGUMENT
BODY = json.dumps(ASK).encode()


async def raw_call(g: Any, *messages: bytes) -> grpc.StatusCode:
    """How a call ends that sends these bytes as its messages."""
    call = g.channel.stream_stream(PROCESS)()
    for message in messages:
        try:
            await call.write(message)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            break  # it has ended already
    async with asyncio.timeout(20):
        return await call.code()


@pytest.mark.parametrize("message", [b"\xff\xff", b"", b"\x12\x05ab", ProcessingRequest().SerializeToString()])
async def test_what_is_no_message_ends_the_call(message: bytes) -> None:
    async with picking(aggregated=1) as g:
        assert await raw_call(g, message) is INVALID
        await all_over(g)


@pytest.mark.parametrize("first", ["request_body", "request_trailers", "response_body", "response_trailers"])
async def test_nothing_comes_before_the_headers(first: str) -> None:
    async with picking(aggregated=1) as g:
        message = ProcessingRequest()
        getattr(message, first).SetInParent()
        assert await raw_call(g, message.SerializeToString()) is INVALID


@pytest.mark.parametrize("again", ["request_headers", "request_body", "response_trailers"])
async def test_nothing_comes_twice_or_too_early(again: str) -> None:
    async with picking(aggregated=1) as g:
        exchange, _ = await g.ask()
        message = ProcessingRequest()
        getattr(message, again).SetInParent()
        await exchange.send(message)
        assert await exchange.status() is INVALID
        await all_over(g)


async def test_a_filter_that_only_observes_gets_no_picker() -> None:
    async with picking(aggregated=1) as g:
        message = ProcessingRequest(request_headers=HttpHeaders(headers=header_map({":path": "/"})))
        message.observability_mode = True
        assert await raw_call(g, message.SerializeToString()) is grpc.StatusCode.FAILED_PRECONDITION


@pytest.mark.parametrize("status", ["", "9" * 5000, "-1", "200 OK", "2"])
async def test_an_answer_with_an_odd_status(status: str) -> None:
    async with picking(aggregated=1) as g:
        exchange, _ = await g.ask()
        headers = HttpHeaders(headers=header_map({":status": status}))
        await exchange.send(ProcessingRequest(response_headers=headers))
        assert (await exchange.next()).WhichOneof("response") == "response_headers"
        await exchange.trailers()
        await all_over(g)


@interpreted
async def test_an_error_inside_ends_its_call_alone() -> None:
    async with picking(aggregated=1) as g:
        other, _ = await g.ask()

        def fail(*_: object) -> None:
            raise RuntimeError("for the test")

        exchange, _ = await g.ask()
        outcomes = g.setup.router.services.outcomes
        kept = outcomes.succeeded
        outcomes.succeeded = fail  # type: ignore[method-assign,assignment]
        await exchange.send(ProcessingRequest(response_headers=HttpHeaders(headers=header_map({":status": "200"}))))
        assert await exchange.status() is grpc.StatusCode.INTERNAL
        outcomes.succeeded = kept  # type: ignore[method-assign]
        await other.answer()
        await other.trailers()
        await all_over(g)


async def test_other_methods_are_not_implemented() -> None:
    async with picking(aggregated=1) as g:
        call = g.channel.unary_unary("/some.other/Method")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(b"")
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert "ExternalProcessor" in (caught.value.details() or "")


async def test_a_message_beyond_the_limit_ends_the_call() -> None:
    async with picking(aggregated=1, max_body_bytes=1000) as g:
        message = ProcessingRequest(request_body=HttpBody(body=b"x" * 2**20)).SerializeToString()
        assert await raw_call(g, message) is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_body_in_such_a_message_is_413() -> None:
    async with picking(aggregated=1, max_body_bytes=1000) as g:
        exchange, picked_ = g.exchange(), Picked()
        await exchange.headers(mode=BUFFERED)
        assert (await exchange.next()).WhichOneof("response") == "request_headers"
        await exchange.body(b"x" * 2**20)
        picked_.take(await exchange.next())
        assert picked_.status == 413
        assert await exchange.status() is grpc.StatusCode.OK
        assert g.setup.router.services.metrics.requests["/v1/completions", 413] == 1
        await all_over(g)


async def test_compressed_messages_are_refused() -> None:
    async with picking(aggregated=1) as g:
        call = g.channel.stream_stream(PROCESS)(compression=grpc.Compression.Gzip)
        await call.write(ProcessingRequest(request_body=HttpBody(body=b"x" * 1000)).SerializeToString())
        async with asyncio.timeout(20):
            assert await call.code() is grpc.StatusCode.UNIMPLEMENTED


async def opened(exchange: Exchange) -> None:
    await exchange.headers()


async def half_received(exchange: Exchange) -> None:
    await exchange.headers()
    await exchange.body(BODY[:10], end=False)


async def picked(exchange: Exchange) -> None:
    await exchange.headers()
    await exchange.body(BODY)
    await exchange.next()


async def answering(exchange: Exchange) -> None:
    await picked(exchange)
    await exchange.next()
    await exchange.answer()


POINTS: list[Callable[[Exchange], Any]] = [opened, half_received, picked, answering]


@pytest.mark.parametrize("how", ["reset", "half-close", "connection"])
@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.__name__)
async def test_a_call_that_ends_at_any_point_leaves_nothing(point: Callable[[Exchange], Any], how: str) -> None:
    policy = Scripted()
    async with picking(aggregated=1, policy=policy) as g:
        exchange = g.exchange()
        await point(exchange)
        if how == "reset":
            exchange.cancel()
        elif how == "half-close":
            assert await exchange.end() is grpc.StatusCode.OK
        else:
            await g.channel.close()
        await all_over(g)
        heard = [what for what, _ in policy.heard if what in ("started", "finished")]
        assert heard == ([] if point in (opened, half_received) else ["started", "finished"])


async def test_a_call_in_the_queue_that_ends_takes_no_turn() -> None:
    async with picking(aggregated=1, max_inflight=1) as g:
        await g.ask()
        services = g.setup.router.services
        waiting = [g.exchange() for _ in range(3)]
        for exchange in waiting:
            await exchange.headers()
            await exchange.body(BODY)
        await until(lambda: services.admission.queued == 3, "all wait")
        waiting[0].cancel()
        await waiting[1].answer(503)  # Envoy's own, as when its time is over
        assert await waiting[1].end() is grpc.StatusCode.OK
        await until(lambda: services.admission.queued == 1, "the others have left the queue")
        assert services.metrics.disconnects == 2


async def test_after_a_refusal_nothing_is_of_interest() -> None:
    async with picking(aggregated=1, max_body_bytes=100) as g:
        exchange, picked_ = g.exchange(), Picked()
        await exchange.headers()
        await exchange.body(b"x" * 101, end=False)
        picked_.take(await exchange.next())
        assert picked_.status == 413
        assert await exchange.status() is grpc.StatusCode.OK


async def test_memory_for_bodies_is_limited_in_sum() -> None:
    async with picking(aggregated=1, max_bodies_bytes=1_000_000, max_body_bytes=2_000_000) as g:
        first, second, refused = g.exchange(), g.exchange(), Picked()
        await first.headers()
        await first.body(b"x" * 700_000, end=False)
        await second.headers()
        await second.body(b"x" * 200_000, end=False)
        refused.take(await second.next())
        assert refused.status == 503
        first.cancel()
        await asyncio.sleep(0.05)
        third, passed = g.exchange(), Picked()
        await third.headers()
        await third.body(b"x" * 700_000)
        passed.take(await third.next())
        assert not passed.status


async def test_a_body_that_came_in_pieces_is_held_once() -> None:
    async with picking(aggregated=1, max_inflight=1) as g:
        first, _ = await g.ask()
        second, size = g.exchange(), 8_000_000
        await second.headers()
        tracemalloc.start()
        body = json.dumps({**ASK, "prompt": "x" * size}).encode()
        for start in range(0, len(body), 1_000_000):
            await second.body(body[start : start + 1_000_000], end=False)
        del body
        await second.body(b"", end=True)
        await until(lambda: g.setup.router.services.admission.queued, "it waits")
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert held < 1.6 * size
        first.cancel()
        second.cancel()
        await all_over(g)


async def test_requests_leave_no_cycles() -> None:
    async with picking(aggregated=1) as g:
        for _ in range(3):  # what is made once
            exchange, _ = await g.ask()
            await exchange.answer()
            await exchange.trailers()
            await exchange.end()
        await all_over(g)
        gc.collect()
        gc.disable()
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            for _ in range(5):
                exchange, _ = await g.ask()
                await exchange.answer()
                await exchange.trailers()
                await exchange.end()
                _, refused = await g.ask({**ASK, "model": "nobodys"})
                assert refused.status == 404
            await all_over(g)
            gc.collect()
            found = sorted(
                f"{type(each).__module__}.{type(each).__qualname__}"
                for each in gc.garbage
                if type(each).__module__.startswith("eldr")
            )
            assert not found
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()
