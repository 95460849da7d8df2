"""What a client can make the router send, and what a worker can make it answer."""

from __future__ import annotations

import asyncio

import pytest

from tests.router.fake_worker import FakeWorker, Seen, reply
from tests.router.harness import ASK, CHAT, on_uvloop, running

STEERING = {
    "host": "10.0.0.1:6379",
    "x-forwarded-for": "1.2.3.4",
    "x-forwarded-host": "evil",
    "x-forwarded-proto": "https",
    "forwarded": "for=1.2.3.4",
    "x-real-ip": "1.2.3.4",
    "via": "1.1 evil",
    "te": "trailers",
    "keep-alive": "timeout=9",
    "proxy-authorization": "Basic abc",
    "cookie": "a=b",
    "x-data-parallel-rank": "1",
    "x-vllm-priority": "-5",
    "endpoint-load-metrics-format": "JSON",
    "x-eldr-worker": "http://evil",
    "x-eldr-decode": "http://evil",
}


@on_uvloop
async def test_no_header_steers_the_router_or_a_worker() -> None:
    async with running(decode=2) as s:
        assert (await s.post(headers=STEERING)).status == 200
        for worker in (*s.prefill, *s.decode):
            for seen in worker.generated:
                assert seen.headers.keys() <= {"host", "content-type", "x-request-id", "content-length"}
                assert seen.headers["host"] == worker.url.removeprefix("http://")


@pytest.mark.parametrize(
    ("headers", "passed"),
    [
        (
            {"traceparent": "00-" + "a" * 32 + "-" + "b" * 16 + "-01", "tracestate": "x=1"},
            {"traceparent", "tracestate"},
        ),
        ({"traceparent": "00-" + "a" * 32 + "-" + "b" * 16 + "-01"}, {"traceparent"}),
        ({"traceparent": "rubbish", "tracestate": "x=1"}, set()),
        ({"tracestate": "x=1"}, set()),
        ({"authorization": "Bearer theirs"}, {"authorization"}),
        ({"authorization": "Bearer theirs", "connection": "keep-alive, Authorization"}, set()),
        ({"traceparent": "00-" + "a" * 32 + "-" + "b" * 16 + "-01", "connection": "traceparent"}, set()),
        ({"traceparent": "00-" + "0" * 32 + "-" + "b" * 16 + "-01", "tracestate": "x=1"}, set()),
        ({"x-session-id": "conversation-7"}, {"x-session-id"}),
        ({"x-session-id": "two words"}, {"x-session-id"}),
        ({"x-session-id": "x" * 513}, set()),
        ({"x-session-id": "caf\u00e9"}, set()),
        ({"x-session-id": "conversation-7", "connection": "X-Session-ID"}, set()),
    ],
)
@on_uvloop
async def test_what_goes_on_to_workers(headers: dict[str, str], passed: set[str]) -> None:
    async with running() as s:
        assert (await s.post(headers=headers)).status == 200
        for seen in (*s.prefill[0].generated, *s.decode[0].generated):
            own = {"host", "content-type", "x-request-id", "content-length"}
            assert seen.headers.keys() - own == passed
            assert all(seen.headers[name] == headers[name] for name in passed)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@on_uvloop
async def test_no_field_names_a_worker(path: str) -> None:
    body = CHAT if "chat" in path else ASK
    async with running() as s:
        for field in ("kv_transfer_params", "ec_transfer_params", "eldr_lease", "eldr_counts", "eldr_record"):
            value = {"remote_host": "169.254.169.254", "remote_port": 80, "do_remote_prefill": True}
            assert (await s.post({**body, field: value}, path)).status == 400
            assert (await s.post({**body, "vllm_xargs": {field: value}}, path)).status == 400
        assert s.prefill[0].generated == s.decode[0].generated == []


@on_uvloop
async def test_a_workers_headers_are_its_own_business() -> None:
    async def talkative(
        worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        secrets = "server: vllm\r\nset-cookie: a=b\r\nx-internal: 10.0.0.7\r\naccess-control-allow-origin: *\r\n"
        await reply(writer, 400, b"<script>", f"content-type: text/html\r\n{secrets}")

    async with running() as s:
        s.decode[0].behaviour = talkative
        answer = await s.post()
        shown = {name.lower() for name in answer.headers}
        assert shown == {"content-type", "content-length", "date", "x-request-id", "x-content-type-options"}
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["content-type"] == "application/octet-stream"
