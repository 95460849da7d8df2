"""What the router counts, and that the dashboard asks for nothing else."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import Metric

from eldr.policies.expected_union import ExpectedUnion
from eldr.router.api.metrics import FAILURES, FRESH_BURST, FRESH_PER_S, RouterCollector
from eldr.router.config.endpoint import Role
from eldr.router.config.picker import PickerConfig
from eldr.router.config.settings import RouterConfig
from eldr.router.fleet.load_watch import parse_steps
from eldr.router.http.client import ExchangeError, UpstreamError
from eldr.router.request import verdict  # noqa: F401  # defines an ExchangeError
from tests.router.fake_worker import FakeWorker, Seen, counts_wire, reply
from tests.router.harness import ASK, on_uvloop, running, until

DASHBOARD = Path(__file__).parents[3] / "dashboards" / "eldr.json"
ALERTS = DASHBOARD.with_name("alerts.yml")
OPENMETRICS_TYPE = "application/openmetrics-text; version=1.0.0; charset=utf-8; escaping=underscores"
NAME = re.compile(r"\b(?:eldr|process)_[a-z0-9_]+")


@on_uvloop
async def test_gaps_between_the_pieces_of_a_stream_are_counted() -> None:
    async with running() as s:
        s.decode[0].token_gap_s = 0.2
        await s.post({**ASK, "stream": True})  # four tokens: three gaps
        name = "eldr_inter_token_latency_seconds"
        assert await s.metric(name + "_count") == 3
        assert await s.metric(name + "_bucket", le="+Inf") == 3
        assert await s.metric(name + "_sum") > 0
        tpot_s = await s.metric("eldr_worker_time_per_output_token_seconds", worker=s.decode[0].url)
        assert tpot_s == pytest.approx(await s.metric(name + "_sum") / 3)


@on_uvloop
async def test_signature_coverage_can_be_told() -> None:
    async with running() as s:
        await s.post()
        s.prefill[0].counts = None
        await s.post()
        await s.post()
        assert await s.metric("eldr_handoffs_total") == 3
        assert await s.metric("eldr_counts_errors_total") == 2


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("", "text/plain; version=0.0.4; charset=utf-8"),
        ("text/plain; version=77; escaping=x, */*", "text/plain; version=0.0.4; charset=utf-8"),
        # As Prometheus 2.42 asks, and somebody who wants to be repeated.
        (
            "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
            "text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
            OPENMETRICS_TYPE,
        ),
        ("application/openmetrics-text; version=77", OPENMETRICS_TYPE),
    ],
)
@on_uvloop
async def test_the_form_of_metrics_is_one_of_two(accept: str, content_type: str) -> None:
    async with running() as s:
        answer = await s.get("/metrics", {"accept": accept})
        assert answer.headers["content-type"] == content_type
        assert answer.body.endswith(b"# EOF\n") == content_type.startswith("application/openmetrics")


@on_uvloop
async def test_whoever_asks_for_metrics_all_the_time_does_not_stop_the_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s, collected = 100.0, 0
    monkeypatch.setattr("eldr.router.api.metrics.time", SimpleNamespace(monotonic=lambda: now_s))

    def collect(self: RouterCollector) -> Iterator[Metric]:
        nonlocal collected
        collected += 1
        return iter(())

    monkeypatch.setattr(RouterCollector, "collect", collect)
    async with running() as s:
        answers = await asyncio.gather(*(s.get("/metrics") for _ in range(1000)))
        assert {answer.status for answer in answers} == {200}
        assert collected == FRESH_BURST
        now_s += 1.5 / FRESH_PER_S
        for _ in range(2):
            await s.get("/metrics")
            assert collected == FRESH_BURST + 1


@pytest.mark.parametrize("error", [*UpstreamError.__subclasses__(), *ExchangeError.__subclasses__()])
def test_every_reason_of_a_failure_is_exposed(error: type[Any]) -> None:
    assert error.reason in FAILURES


def exposition(total: float, steps: float) -> str:
    name = "vllm:eldr_active_experts"
    lines = [f'{name}_bucket{{engine="0",le="+Inf"}} {steps}', f'{name}_sum{{engine="0",model_name="m"}} {total}']
    return "\n".join([*lines, f'{name}_count{{engine="0",model_name="m"}} {steps}', ""])


@on_uvloop
async def test_measured_active_experts_are_the_mean_since_the_last_look() -> None:
    async with running(load_interval_s=0.05) as s:
        url, worker = s.decode[0].url, s.router.services.fleet.workers("decode")[s.decode[0].url]
        s.decode[0].metrics = exposition(800.0, 100.0)
        await until(lambda: worker.active_experts == 8.0, "the first look")
        assert await s.metric("eldr_active_experts", worker=url) in (0.0, 8.0)  # none while nothing runs
        s.decode[0].metrics = exposition(800.0 + 50 * 12.0, 150.0)
        await until(lambda: worker.active_experts == 12.0, "the second look")
        s.decode[0].metrics = exposition(30.0, 10.0)  # a new engine
        await until(lambda: worker.active_experts is None, "nothing is told of two engines at once")
        s.decode[0].metrics = exposition(30.0 + 20.0, 20.0)
        await until(lambda: worker.active_experts == 2.0, "the new engine")


@pytest.mark.parametrize("text", [b"", b"vllm:eldr_active_experts_sum{} 3\n", b"vllm:eldr_active_experts_count{} x\n"])
def test_metrics_without_active_experts(text: bytes) -> None:
    assert parse_steps(text, 0) is None


@on_uvloop
async def test_expected_active_experts_follow_the_running_requests() -> None:
    async with running(policy=ExpectedUnion(), decode=1) as s:
        s.prefill[0].counts = counts_wire(4)  # every token chose experts 0 and 1
        seen = []

        async def look(
            worker: FakeWorker, request: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
        ) -> None:
            seen.append(await s.metric("eldr_expected_active_experts", worker=s.decode[0].url))
            await worker.answer(request, writer)

        s.decode[0].behaviour = look
        await s.post()
        assert seen == [pytest.approx(2.0, abs=0.05)]
        assert await s.metric("eldr_expected_active_experts") == 0


@on_uvloop
async def test_faults_are_counted_from_zero() -> None:
    """A rate does not see the first count of a series that begins with it."""
    async with running(prefill=2) as s:
        text = (await s.get("/metrics")).body.decode()
        workers = {("prefill", worker.url) for worker in s.prefill} | {("decode", s.decode[0].url)}
    for name, labels in {
        "eldr_request_total": '{endpoint="/v1/completions",status="503"}',
        "eldr_queue_refusals_total": '{reason="full"}',
        "eldr_counts_errors_total": '{reason="missing"}',
        "eldr_retries_total": '{leg="decode",reason="timeout"}',
        "eldr_retries_denied_total": '{leg="prefill",reason="budget"}',
        "eldr_timeouts_total": '{leg="first_byte"}',
        "eldr_zone_refits_total": '{outcome="failed"}',
    }.items():
        assert f"\n{name}{labels} 0.0\n" in text
    for role, url in workers:
        for name, reason in (("eldr_worker_failures_total", "refused"), ("eldr_ejections_total", "consecutive")):
            assert f'\n{name}{{reason="{reason}",role="{role}",worker="{url}"}} 0.0\n' in text


@on_uvloop
async def test_a_worker_that_has_left_is_no_longer_counted() -> None:
    """Else a fleet whose workers come and go makes /metrics longer for ever."""
    async with running(prefill=2, retries=1) as s:
        leaving = s.prefill[0].url

        async def fails(
            worker: FakeWorker, request: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
        ) -> None:
            await reply(writer, 500, b"{}")

        for worker in s.prefill:
            worker.behaviour = fails
        await s.post()
        assert await s.metric("eldr_worker_failures_total", worker=leaving, reason="status") == 1
        s.router.membership.drain(s.router.membership.worker(leaving, "prefill"), 0)
        await until(lambda: leaving not in s.router.services.fleet.workers("prefill"), "the worker leaves")
        text = (await s.get("/metrics")).body.decode()
        assert leaving not in text
        assert s.prefill[1].url in text
        assert leaving not in {url for _, url, _ in s.router.services.metrics.failures}


def test_the_dashboard_asks_for_nothing_when_it_is_imported() -> None:
    """Inputs are filled in by the form for imports alone, which a provisioned dashboard never meets."""
    dashboard = json.loads(DASHBOARD.read_text())
    assert "__inputs" not in dashboard
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert set(re.findall(r"\$\{(\w+)\}", DASHBOARD.read_text())) <= variables


@on_uvloop
async def test_every_metric_of_the_dashboard_and_the_alerts_exists() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    asked += [variable["definition"] for variable in dashboard["templating"]["list"] if variable["type"] == "query"]
    asked += re.findall(r"^ +expr: (.*(?:\n {10,}.*)*)", ALERTS.read_text(), re.MULTILINE)
    assert len(asked) > 50
    async with running(policy=ExpectedUnion()) as s:
        await s.post()
        text = (await s.get("/metrics")).body.decode()
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    suffixes = {"histogram": ("_bucket", "_sum", "_count")}
    exported = {name + suffix for name, kind in kinds.items() for suffix in suffixes.get(kind, ("",))}
    for expression in asked:
        assert set(NAME.findall(expression)) <= exported, expression
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))


def needed(config: RouterConfig, *present: Role) -> set[str]:
    return set(config.needed_roles(present))


def test_roles_that_requests_need() -> None:
    url, names = ("http://127.0.0.1:1",), ("dns+http://w:8000",)
    admin: dict[str, Any] = {"admin_listen": "127.0.0.1:0", "admin_key_file": Path("key")}
    assert needed(RouterConfig.of(prefill=url, decode=url)) == {"prefill", "decode"}
    assert needed(RouterConfig.of(worker=names)) == {"aggregated"}
    assert needed(RouterConfig.of(worker=names, **admin), "decode") == {"aggregated", "decode", "prefill"}
    assert needed(RouterConfig.of(**admin)) == {"prefill", "decode"}
    assert needed(RouterConfig.of(**admin), "aggregated") == {"aggregated"}
    assert needed(PickerConfig.of(decode=names)) == {"decode"}
    assert needed(PickerConfig.of(decode=names, prefill=names)) == {"prefill", "decode"}
    assert needed(PickerConfig.of(decode=names), "prefill") == {"prefill", "decode"}
    for phase, roles in (("decode", {"decode"}), ("prefill", {"prefill"}), ("pair", {"prefill", "decode"})):
        assert needed(PickerConfig.of(phase=phase, **admin)) == roles


@on_uvloop
async def test_roles_are_needed_as_long_as_a_worker_may_come_back() -> None:
    async with running(prefill=1, decode=1) as s:
        wanted = {"prefill": 1, "decode": 1, "aggregated": 0}
        assert {role: await s.metric("eldr_role_needed", role=role) for role in wanted} == wanted
