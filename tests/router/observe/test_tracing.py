"""OpenTelemetry traces of requests, and the trace context that workers get."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any

import pytest
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from eldr.router.observe.tracing import Tracing
from tests.router.fake_worker import FakeWorker, Seen
from tests.router.harness import ASK, Setup, on_uvloop, running

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
SAMPLED, UNSAMPLED = f"00-{TRACE}-{PARENT}-01", f"00-{TRACE}-{PARENT}-00"


def traced(exporter: InMemorySpanExporter, ratio: float) -> Callable[..., Any]:
    def prepare(s: Setup) -> None:
        s.router.services.intake.tracing = Tracing("http://127.0.0.1:9/", ratio, exporter)

    return prepare


async def spans_of(s: Setup, exporter: InMemorySpanExporter) -> Any:
    """The spans of all requests so far, by name."""
    await asyncio.to_thread(s.router.services.intake.tracing.close)
    return {span.name: span for span in exporter.get_finished_spans()}


@on_uvloop
async def test_a_sampled_request_has_a_span_for_each_leg() -> None:
    exporter = InMemorySpanExporter()
    async with running(prepare=traced(exporter, 0.0)) as s:
        headers = {"traceparent": SAMPLED, "tracestate": "a=b", "x-request-id": "r1"}
        assert (await s.post({**ASK, "stream": True}, headers=headers)).status == 200
        spans = await spans_of(s, exporter)
        whole = spans["POST /v1/completions"]
        assert spans.keys() == {"POST /v1/completions", "queue", "prefill", "decode"}
        assert format(whole.context.trace_id, "032x") == TRACE
        assert format(whole.parent.span_id, "016x") == PARENT
        assert whole.attributes["http.response.status_code"] == 200
        assert whole.attributes["eldr.request_id"] == "r1"
        assert whole.attributes["eldr.decode"] == s.decode[0].url
        assert whole.attributes["gen_ai.request.model"] == "tiny"
        for name in ("queue", "prefill", "decode"):
            assert spans[name].parent.span_id == whole.context.span_id
            assert whole.start_time <= spans[name].start_time <= spans[name].end_time <= whole.end_time
        assert spans["prefill"].attributes["server.address"] == s.prefill[0].url
        for seen in (*s.prefill[0].generated, *s.decode[0].generated):
            own = format(whole.context.span_id, "016x")
            assert seen.headers["traceparent"] == f"00-{TRACE}-{own}-01"
            assert seen.headers["tracestate"] == "a=b"


@pytest.mark.parametrize(
    ("ratio", "sent", "spans", "passed"),
    [
        (1.0, UNSAMPLED, 0, UNSAMPLED),
        (0.0, None, 0, None),
        (1.0, None, 4, r"00-[0-9a-f]{32}-[0-9a-f]{16}-01"),
        (0.0, "01" + UNSAMPLED[2:] + "-more", 0, UNSAMPLED),
        (0.0, "01" + SAMPLED[2:] + "-more", 4, rf"00-{TRACE}-(?!{PARENT})[0-9a-f]{{16}}-01"),
        (0.0, "ff" + SAMPLED[2:], 0, None),
        (1.0, "ff" + SAMPLED[2:], 4, rf"00-(?!{TRACE})[0-9a-f]{{32}}-[0-9a-f]{{16}}-01"),
    ],
)
@on_uvloop
async def test_sampling(ratio: float, sent: str | None, spans: int, passed: str | None) -> None:
    exporter = InMemorySpanExporter()
    async with running(prepare=traced(exporter, ratio)) as s:
        await s.post(headers={} if sent is None else {"traceparent": sent})
        assert len(await spans_of(s, exporter)) == spans
        for seen in (*s.prefill[0].generated, *s.decode[0].generated):
            got = seen.headers.get("traceparent")
            assert (got is None) if passed is None else re.fullmatch(passed, str(got))


@on_uvloop
async def test_failures_are_marked_and_say_nothing_of_the_prompt() -> None:
    async def fails(worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    exporter = InMemorySpanExporter()
    async with running(prepare=traced(exporter, 1.0), prefill=2) as s:
        for worker in s.prefill:
            worker.behaviour = fails
        assert (await s.post({**ASK, "prompt": "private"})).status == 502
        await asyncio.to_thread(s.router.services.intake.tracing.close)
        spans = exporter.get_finished_spans()
        legs = [span for span in spans if span.name == "prefill"]
        assert len(legs) == sum(len(worker.generated) for worker in s.prefill) > 1
        assert {(span.attributes or {})["server.address"] for span in legs} == {worker.url for worker in s.prefill}
        whole = next(span for span in spans if span.name.startswith("POST"))
        assert all(span.status.status_code is StatusCode.ERROR for span in (*legs, whole))
        assert "private" not in "".join(span.to_json() for span in spans)


@on_uvloop
async def test_a_collector_gets_the_spans() -> None:
    got = []

    async def collect(request: web.Request) -> web.Response:
        got.append(ExportTraceServiceRequest.FromString(await request.read()))
        return web.Response()

    collector = web.Application()
    collector.router.add_post("/v1/traces", collect)
    runner = web.AppRunner(collector)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    async with running(otel_endpoint=f"http://127.0.0.1:{port}/v1/traces", otel_sampling=1.0) as s:
        assert (await s.post()).status == 200
    await runner.cleanup()  # the router has stopped: everything is sent
    (resource,) = got[0].resource_spans
    assert ("service.name", "eldr") in [(pair.key, pair.value.string_value) for pair in resource.resource.attributes]
    assert {span.name for span in resource.scope_spans[0].spans} == {
        "POST /v1/completions", "queue", "prefill", "decode",
    }  # fmt: skip
