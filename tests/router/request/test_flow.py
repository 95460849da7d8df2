"""A request whose end meets its answer: one answer, and nothing of the request stays behind."""

from __future__ import annotations

import logging

import pytest

from eldr.router.fleet.workers import Worker
from eldr.router.http.errors import ApiError
from eldr.router.http.exchange import ClientExchange
from eldr.router.http.message import Request
from eldr.router.request.flow import Flow
from tests.router.failing import hang
from tests.router.harness import ASK, interpreted, on_uvloop, raw_stream, running, until
from tests.router.memory import MemoryTransport, OpenChannel
from tests.router.wire import answers_in, status_of

JSON = {b"content-type": b"application/json"}
FIRST_EVENT = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    b'18\r\ndata: {"choices":[{}]}\n\n\r\n'
)


@on_uvloop
async def test_a_stream_that_begins_just_when_the_request_is_ended_is_not_answered_twice() -> None:
    async with running(health_interval_s=60.0) as s:
        (decode,) = s.decode
        decode.behaviour = hang
        body = b'{"model":"tiny","prompt":"hello","stream":true}'
        transport, request = MemoryTransport(), Request(b"POST", b"/v1/completions", JSON, body)
        flow = Flow(s.router.services, ClientExchange(OpenChannel(), transport, request), request)
        task = flow.start()
        assert task is not None
        await until(lambda: decode.running == 1, "it runs")
        worker = s.router.services.fleet.workers("decode")[decode.url]
        (connection,) = s.router.services.legs.pools[worker].active
        flow.end_now(ApiError(503, "the router is shutting down"))
        connection.data_received(FIRST_EVENT)  # in the same turn of the event loop
        await task
        assert answers_in(transport.written) == 1
        assert status_of(transport.written) == 503
        assert await s.metric("eldr_admitted") == await s.metric("eldr_inflight") == 0


@interpreted
@on_uvloop
async def test_an_error_of_the_routers_own_after_the_answer_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(worker: Worker, tpot_s: float) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Worker, "observe_tpot", broken)
    caplog.set_level(logging.DEBUG, "eldr.router")
    async with running() as s:
        assert b"[DONE]" in await raw_stream(s, b"connection: close\r\nx-request-timeout-ms: 1000\r\n")
        await until(lambda: s.router.running == 0, "it is over")
        assert "request" in caplog.messages  # the line that every request ends with
        assert (await s.post(ASK)).status == 200
        assert await s.metric("eldr_admitted") == await s.metric("eldr_inflight") == 0
