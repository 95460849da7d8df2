"""What Prometheus itself makes of the router's metrics, the alerts and the dashboard. Skipped where it is missing
(Debian and Ubuntu: apt-get install prometheus); test_router_metrics.py compares the names without it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from eldr.demo.ports import free_ports
from eldr.policies.expected_union import ExpectedUnion
from tests.router.fake_worker import FakeWorker, begin_stream, chunk, reply
from tests.router.harness import ASK, Setup, on_uvloop, running, until

ROOT = Path(__file__).parents[3]
ALERTS = ROOT / "dashboards" / "alerts.yml"
CONFIG = """
global: {{scrape_interval: 200ms, evaluation_interval: 200ms}}
rule_files: ["{alerts}"]
scrape_configs:
- job_name: eldr
  static_configs: [{{targets: ["127.0.0.1:{port}"]}}]
"""
STREAM = {**ASK, "stream": True}


def program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"no {name}: install Prometheus")
    return found


def promtool(*arguments: str, text: str | None = None) -> None:
    """Run promtool; what it says is the failure."""
    done = subprocess.run([program("promtool"), *arguments], input=text, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@on_uvloop
async def test_the_exposition_is_what_prometheus_wants() -> None:
    async with running(policy=ExpectedUnion()) as s:
        await s.post(STREAM)
        text = (await s.get("/metrics")).body.decode()
    promtool("check", "metrics", text=text)


def test_alerts_can_be_loaded() -> None:
    promtool("check", "rules", str(ALERTS))


def test_alerts_tell_what_they_should_and_nothing_else() -> None:
    promtool("test", "rules", str(Path(__file__).with_name("alerts_test.yml")))


@asynccontextmanager
async def scraped(s: Setup, folder: Path) -> AsyncIterator[str]:
    """A Prometheus that scrapes the router and evaluates the alerts; its URL."""
    port = free_ports(1)[0]
    config = folder / "prometheus.yml"
    config.write_text(CONFIG.format(port=s.router.port, alerts=ALERTS))
    process = await asyncio.create_subprocess_exec(
        program("prometheus"),
        f"--config.file={config}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        stderr=subprocess.DEVNULL,
    )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        await process.wait()


async def query(s: Setup, prometheus: str, expression: str) -> list[float]:
    """The values that an expression has now; none while Prometheus starts."""
    try:
        async with s.session.get(f"{prometheus}/api/v1/query", params={"query": expression}) as answer:
            found = json.loads(await answer.read())
    except OSError:
        return []
    assert found["status"] == "success", (expression, found)
    assert not found.get("warnings"), (expression, found)
    return [float(sample["value"][1]) for sample in found["data"]["result"]]


def expressions() -> Iterator[str]:
    dashboard = json.loads((ROOT / "dashboards" / "eldr.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            text = target["expr"].replace("$__rate_interval", "4s")
            yield text.replace("$job", ".*").replace("$instance", ".*")


async def all_sorts(s: Setup, round_number: int) -> None:
    """Requests that succeed, wait, are turned away, fail, break off, come too late, and lose their clients."""
    labels, steps = '{engine="0"}', 10.0 * (1 + round_number)
    for worker in s.decode:
        worker.metrics = (
            f"vllm:num_requests_waiting{labels} 0\nvllm:kv_cache_usage_perc{labels} 0.5\n"
            f"vllm:eldr_active_experts_sum{labels} {3 * steps}\nvllm:eldr_active_experts_count{labels} {steps}\n"
        )
        worker.behaviour = None
    await asyncio.gather(*(s.post(STREAM) for _ in range(9)))
    for behaviour in (fails, breaks_off, stands_still):
        for worker in s.decode:
            worker.behaviour = behaviour
        await s.post(headers={"x-request-timeout-ms": "50"} if behaviour is stands_still else None)
        with contextlib.suppress(OSError):  # the connection of a stream that broke closes
            await s.post(STREAM, headers={"x-request-timeout-ms": "100"} if behaviour is stands_still else None)
    _, writer = await asyncio.open_connection("127.0.0.1", s.router.port)
    body = json.dumps(STREAM).encode()
    writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
    await until(lambda: any(worker.running for worker in s.decode), "a request of a client that leaves")
    writer.close()


async def fails(worker: FakeWorker, request: object, reader: object, writer: asyncio.StreamWriter) -> None:
    await reply(writer, 500, b"{}")


async def breaks_off(worker: FakeWorker, request: object, reader: object, writer: asyncio.StreamWriter) -> None:
    await begin_stream(writer)
    await chunk(writer, b'data: {"choices": [{"text": "a"}]}\n\n')
    writer.transport.abort()


async def stands_still(worker: FakeWorker, request: object, reader: object, writer: asyncio.StreamWriter) -> None:
    await asyncio.Event().wait()


@on_uvloop
async def test_every_expression_of_the_dashboard_has_data(tmp_path: Path) -> None:
    program("prometheus")
    settings: dict[str, Any] = {"max_inflight": 2, "max_queued": 3, "retries": 1, "load_interval_s": 0.2}
    ejection: dict[str, Any] = {"eject_failures": 2, "eject_base_s": 0.1, "eject_max_s": 0.1}
    async with (
        running(policy=ExpectedUnion(), prefill=2, decode=2, **settings, **ejection) as s,
        scraped(s, tmp_path) as prometheus,
    ):
        missing = dict.fromkeys(expressions())
        assert len(missing) > 20
        for round_number in range(40):
            await all_sorts(s, round_number)
            for expression in list(missing):
                if any(math.isfinite(value) for value in await query(s, prometheus, expression)):
                    del missing[expression]
            if not missing:
                break
        assert not missing
        async with s.session.get(f"{prometheus}/api/v1/rules") as answer:
            groups = json.loads(await answer.read())["data"]["groups"]
        assert {rule["health"] for group in groups for rule in group["rules"]} == {"ok"}
