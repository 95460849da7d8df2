"""Until when a request must be answered, and what its client hears when it is not."""

from __future__ import annotations

import asyncio
import json
import math

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eldr.router.request.deadlines import Deadlines
from tests.router.failing import hang
from tests.router.fake_worker import FakeWorker, Seen, begin_stream, chunk
from tests.router.harness import ASK, Reply, on_uvloop, raw_stream, running, until


@pytest.mark.parametrize(
    ("headers", "first_byte_s", "total_s"),
    [
        ({}, 60.0, 60.0),
        ({b"x-request-timeout-ms": b"2500"}, 2.5, 2.5),
        ({b"x-envoy-expected-rq-timeout-ms": b"15000"}, 15.0, 15.0),
        ({b"x-envoy-expected-rq-timeout-ms": b"15000", b"x-request-timeout-ms": b"3000"}, 3.0, 3.0),
        ({b"x-stainless-read-timeout": b"10.5"}, 10.5, 60.0),
        ({b"x-stainless-timeout": b"10"}, 10.0, 60.0),
        ({b"x-stainless-timeout": b"10", b"x-request-timeout-ms": b"3000"}, 3.0, 3.0),
        ({b"x-stainless-timeout": b"600"}, 60.0, 60.0),
        ({b"x-request-timeout-ms": b"0"}, 60.0, 60.0),
        ({b"x-request-timeout-ms": b"-1"}, 60.0, 60.0),
        ({b"x-request-timeout-ms": b"nan"}, 60.0, 60.0),
        ({b"x-request-timeout-ms": b"inf"}, 60.0, 60.0),
        ({b"x-request-timeout-ms": b"soon"}, 60.0, 60.0),
        ({b"x-request-timeout-ms": b"1" * 400}, 60.0, 60.0),
        ({b"x-stainless-read-timeout": b"NOT_GIVEN", b"x-request-timeout-ms": b"\xff"}, 60.0, 60.0),
    ],
)
def test_what_headers_say(headers: dict[bytes, bytes], first_byte_s: float, total_s: float) -> None:
    deadlines = Deadlines.of(headers, 1000.0, 60.0)
    assert deadlines.first_byte_s == 1000.0 + first_byte_s
    assert deadlines.total_s == 1000.0 + total_s


@given(st.dictionaries(st.sampled_from([b"x-request-timeout-ms", b"x-stainless-timeout"]), st.binary(max_size=40)))
def test_no_header_lengthens_a_request(headers: dict[bytes, bytes]) -> None:
    deadlines = Deadlines.of(headers, 0.0, 60.0)
    assert 0.0 < deadlines.first_byte_s <= deadlines.total_s <= 60.0
    assert not math.isnan(deadlines.total_s)


def assert_too_late(answer: Reply) -> None:
    assert answer.status == 504
    assert answer.error["type"] == "GatewayTimeoutError"
    assert answer.error["message"]


@pytest.mark.parametrize("leg", ["prefill", "decode"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("header", [{"x-request-timeout-ms": "300"}, {"x-stainless-timeout": "0.3"}])
@on_uvloop
async def test_the_clients_deadline_ends_a_leg_and_nothing_is_tried_again(
    leg: str, stream: bool, header: dict[str, str]
) -> None:
    async with running(prefill=2, decode=2) as s:
        for worker in getattr(s, leg):
            worker.behaviour = hang
        assert_too_late(await s.post({**ASK, "stream": stream}, headers=header))
        waited = [seen for worker in getattr(s, leg) for seen in worker.generated]
        assert len(waited) == 1
        await until(lambda: waited[0].aborted, "the worker hears of it")
        assert await s.metric("eldr_timeouts_total", leg="total") == 1
        assert await s.metric("eldr_retries_total") == 0
        assert await s.metric("eldr_worker_failures_total") == 0  # the client's haste is not the worker's fault
        assert await s.metric("eldr_inflight") == 0
        assert await s.metric("eldr_admitted") == 0
        for worker in getattr(s, leg):
            worker.behaviour = None
        assert (await s.post(headers={"x-request-timeout-ms": "30000"})).status == 200


@on_uvloop
async def test_a_deadline_in_the_queue() -> None:
    async with running(max_inflight=1) as s:
        s.decode[0].behaviour = hang
        first = asyncio.create_task(s.post())
        await until(lambda: s.decode[0].running == 1, "it runs")
        assert_too_late(await s.post(headers={"x-request-timeout-ms": "200"}))
        assert s.router.services.admission.queued == 0
        first.cancel()


@pytest.mark.parametrize("timeout_ms", ["0.001", "1", "2"])
@on_uvloop
async def test_a_deadline_that_is_over_at_once(timeout_ms: str) -> None:
    async with running() as s:
        for worker in (*s.prefill, *s.decode):
            worker.behaviour = hang
        assert_too_late(await s.post(headers={"x-request-timeout-ms": timeout_ms}))
        assert await s.metric("eldr_admitted") == 0


@on_uvloop
async def test_the_routers_own_limit() -> None:
    async with running(request_timeout_s=0.3) as s:
        s.decode[0].behaviour = hang
        assert_too_late(await s.post())


async def endless(worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await begin_stream(writer)
    while True:
        await chunk(writer, worker.events(seen, ["a"], False)[0])
        await asyncio.sleep(0.02)


@on_uvloop
async def test_a_stream_that_outlives_its_deadline_ends_with_an_error_event() -> None:
    async with running() as s:
        s.decode[0].behaviour = endless
        raw = await raw_stream(s, b"x-request-timeout-ms: 500\r\n")
        assert raw.count(b'"text":"a"') > 1
        assert json.loads(raw.rstrip().rsplit(b"data: ", 1)[1])["error"]["code"] == 504
        assert b"[DONE]" not in raw
        assert not raw.endswith(b"0\r\n\r\n")
        await until(lambda: s.decode[0].generated[0].aborted, "the worker hears of it")
        assert await s.metric("eldr_inflight") == 0
        assert await s.metric("eldr_worker_failures_total") == 0


@on_uvloop
async def test_the_first_bytes_deadline_does_not_end_a_stream() -> None:
    async with running() as s:
        s.decode[0].token_gap_s = 0.2
        answer = await s.post({**ASK, "stream": True}, headers={"x-stainless-timeout": "0.5"})
        assert answer.events[-1] == "data: [DONE]"


@on_uvloop
async def test_the_openai_client_states_its_timeout() -> None:
    async with running() as s:
        s.decode[0].behaviour = hang
        client = openai.AsyncOpenAI(base_url=f"{s.url}/v1", api_key="unused", max_retries=0, timeout=0.5)
        with pytest.raises((openai.APITimeoutError, openai.InternalServerError)):
            await client.completions.create(**ASK)
        await until(lambda: s.decode[0].generated[0].aborted, "the worker hears of it")
        await client.close()
