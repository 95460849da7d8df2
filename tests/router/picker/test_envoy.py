"""The picker behind a real Envoy with the example's configuration. Without one these tests are skipped."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest

from eldr.demo.gateway import Gateway as DemoGateway
from eldr.demo.gateway import GatewayError, envoy_config, running_gateway
from eldr.demo.ports import free_ports
from eldr.demo.processes import Workers
from tests.router.fake_worker import FakeWorker
from tests.router.harness import Scripted, preferring, until
from tests.router.picker.client import ASK, Gateway, endpoint, picking
from tests.router.picker.envoy import EXAMPLE, Envoy, envoy, program
from tests.router.picker.test_choice import all_over, running_at, workers

STREAM = {**ASK, "stream": True}
INDENT = "\n                        "
DUPLEX = {
    INDENT + "request_body_mode: BUFFERED": INDENT
    + "request_body_mode: FULL_DUPLEX_STREAMED"
    + INDENT
    + "request_trailer_mode: SEND"
}
RESPONSES_TOO = {**DUPLEX, "response_body_mode: NONE": "response_body_mode: FULL_DUPLEX_STREAMED"}
CIRCUIT_BREAKERS = """
      circuit_breakers:
        thresholds:
          - max_connections: 65536
            max_pending_requests: 65536
            max_requests: 65536
"""
EXT_PROC = "                  - name: envoy.filters.http.ext_proc\n"
SUBSET = """\
                  - name: envoy.filters.http.set_metadata
                    typed_config:
                      "@type": type.googleapis.com/envoy.extensions.filters.http.set_metadata.v3.Config
                      metadata:
                        - metadata_namespace: envoy.lb.subset_hint
                          value: { x-gateway-destination-endpoint-subset: [ "%s" ] }
"""


@pytest.fixture(autouse=True)
def needs_envoy() -> None:
    program()


def port_of(worker: FakeWorker) -> int:
    return int(worker.url.rpartition(":")[2])


@asynccontextmanager
async def behind_envoy(
    folder: Path, changes: dict[str, str] | None = None, **settings: Any
) -> AsyncIterator[tuple[Gateway, Envoy]]:
    """A picker with fake workers, and an Envoy that asks it."""
    async with picking(**settings) as gateway:
        setup = gateway.setup
        ports = [port_of(worker) for worker in (*setup.prefill, *setup.decode, *setup.aggregated)]
        async with envoy(folder, setup.router.grpc_port, ports, changes) as one:
            await answering(one)
            yield gateway, one


async def answering(one: Envoy) -> None:
    """Wait until Envoy has found the picker healthy, so that requests get through."""
    async with asyncio.timeout(20):
        while True:
            async with one.session.get(one.url + "/v1/models") as answer:
                if answer.status == 200:
                    return
            await asyncio.sleep(0.05)


async def post(one: Envoy, body: object = ASK, **headers: str) -> tuple[int, bytes]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    async with one.session.post(one.url + "/v1/completions", json=body, headers=named) as answer:
        return answer.status, await answer.read()


def completions(worker: FakeWorker) -> list[Any]:
    return [seen for seen in worker.seen if seen.path == "/v1/completions"]


@pytest.mark.parametrize("mode", [{}, DUPLEX, RESPONSES_TOO], ids=["buffered", "duplex", "responses too"])
async def test_requests_go_where_the_policy_says(tmp_path: Path, mode: dict[str, str]) -> None:
    policy = Scripted()
    async with behind_envoy(tmp_path, mode, aggregated=3, policy=policy) as (g, one):
        for worker in (g.setup.aggregated[2], g.setup.aggregated[0]):
            policy.rule = preferring(worker)
            status, body = await post(one)
            assert (status, json.loads(body)["choices"][0]["text"]) == (200, "abcd")
            status, body = await post(one, STREAM)
            assert status == 200
            assert body.endswith(b"data: [DONE]\n\n")
            first, second = completions(worker)
            assert (first.body, second.body) == (ASK, STREAM)
            assert first.headers["x-gateway-destination-endpoint"].split(",")[0] == endpoint(worker)
        await all_over(g)


@pytest.mark.parametrize("mode", [{}, DUPLEX], ids=["buffered", "duplex"])
async def test_a_long_body_arrives_whole(tmp_path: Path, mode: dict[str, str]) -> None:
    async with behind_envoy(tmp_path, mode, aggregated=1) as (g, one):
        body = {**ASK, "prompt": "word " * 40_000}
        status, _ = await post(one, body)
        assert status == 200
        assert completions(g.setup.aggregated[0])[0].body == body
        await all_over(g)


@pytest.mark.parametrize("mode", [{}, DUPLEX], ids=["buffered", "duplex"])
async def test_the_decode_phase_of_llm_ds_coordinator(tmp_path: Path, mode: dict[str, str]) -> None:
    policy = Scripted()
    async with behind_envoy(tmp_path, mode, prefill=1, decode=2, policy=policy) as (g, one):
        policy.rule = preferring(g.setup.decode[1])
        ask = {**ASK, "max_tokens": 1, "kv_transfer_params": {"do_remote_decode": True, "do_remote_prefill": False}}
        status, answer = await post(one, ask, EPP_Profile="prefill")
        assert status == 200
        params = json.loads(answer)["kv_transfer_params"]
        assert "eldr_counts" in params
        status, _ = await post(one, {**ASK, "kv_transfer_params": params}, EPP_Profile="decode")
        assert status == 200
        (request, _), *others = policy.asked
        assert request.counts is not None
        assert not others
        (sent,) = completions(g.setup.decode[1])
        assert "eldr_counts" not in sent.body["kv_transfer_params"]
        assert sent.body["kv_transfer_params"]["remote_block_ids"] == params["remote_block_ids"]
        await all_over(g)


async def test_the_sidecar_is_told_where_to_prefill(tmp_path: Path) -> None:
    async with behind_envoy(tmp_path, prefill=2, decode=2, phase="pair") as (g, one):
        status, _ = await post(one, x_prefiller_host_port="10.6.6.6:6")
        assert status == 200
        (sent,) = [seen for worker in g.setup.decode for seen in completions(worker)]
        assert sent.headers["x-prefiller-host-port"] in workers(g, "prefill")
        await all_over(g)


async def test_a_subset_in_metadata_is_obeyed(tmp_path: Path) -> None:
    async with picking(aggregated=3) as g:
        allowed = g.setup.aggregated[1]
        changes = {EXT_PROC: SUBSET % endpoint(allowed) + EXT_PROC}
        ports = [port_of(worker) for worker in g.setup.aggregated]
        async with envoy(tmp_path, g.setup.router.grpc_port, ports, changes) as one:
            await answering(one)
            for _ in range(5):
                assert (await post(one))[0] == 200
            assert len(completions(allowed)) == 5


async def test_refusals_reach_the_client(tmp_path: Path) -> None:
    async with behind_envoy(tmp_path, aggregated=1, max_inflight=1, max_queued=0) as (g, one):
        g.setup.aggregated[0].token_gap_s = 0.2
        first = asyncio.create_task(post(one, STREAM))
        await until(lambda: running_at(g, g.setup.aggregated[0]), "the first runs")
        async with one.session.post(one.url + "/v1/completions", json=ASK) as answer:
            assert answer.status == 429
            assert int(answer.headers["retry-after"]) >= 1
            assert (await answer.json())["error"]["type"] == "RateLimitError"
        status, body = await post(one, {**ASK, "model": "nobodys"})
        assert status == 404
        assert b"nobodys" in body
        assert (await first)[0] == 200
        await all_over(g)


async def test_a_client_that_leaves_frees_its_slot(tmp_path: Path) -> None:
    async with behind_envoy(tmp_path, aggregated=1) as (g, one):
        worker = g.setup.aggregated[0]
        worker.token_gap_s = 5
        async with one.session.post(one.url + "/v1/completions", json=STREAM) as answer:
            assert answer.status == 200
            assert running_at(g, worker) == 1
        await all_over(g)
        await until(lambda: completions(worker)[0].aborted, "the worker hears of it")


async def test_a_client_that_leaves_the_queue_takes_no_turn(tmp_path: Path) -> None:
    async with behind_envoy(tmp_path, aggregated=1, max_inflight=1) as (g, one):
        worker = g.setup.aggregated[0]
        worker.token_gap_s = 5
        first = asyncio.create_task(post(one, STREAM))
        await until(lambda: running_at(g, worker), "the first runs")
        second = asyncio.create_task(post(one, STREAM))
        services = g.setup.router.services
        await until(lambda: services.admission.queued, "the second waits")
        second.cancel()
        await until(lambda: not services.admission.queued, "its turn is given up")
        assert services.metrics.disconnects == 1
        first.cancel()
        await all_over(g)
        await asyncio.gather(first, second, return_exceptions=True)


async def test_a_full_circuit_breaker_is_no_fault_of_a_worker(tmp_path: Path) -> None:
    limits = "are the limits here." + CIRCUIT_BREAKERS
    one_at_once = {limits: limits.replace("max_requests: 65536", "max_requests: 1")}
    async with behind_envoy(tmp_path, one_at_once, aggregated=2, eject_failures=1) as (g, one):
        for worker in g.setup.aggregated:
            worker.token_gap_s = 5
        first = asyncio.create_task(post(one, STREAM))
        await until(lambda: any(map(completions, g.setup.aggregated)), "the first runs")
        assert [(await post(one))[0] for _ in range(3)] == [503] * 3
        assert not any(worker.ejected for worker in workers(g).values())
        first.cancel()
        await all_over(g)
        await asyncio.gather(first, return_exceptions=True)


async def test_a_worker_that_accepts_nothing_is_passed_over(tmp_path: Path) -> None:
    policy = Scripted()
    async with behind_envoy(tmp_path, aggregated=2, policy=policy, health_interval_s=60) as (g, one):
        first, second = g.setup.aggregated
        policy.rule = preferring(first)
        await first.stop()
        second.tokens, second.token_gap_s = ["x"] * 2000, 0.02
        answer = await one.session.post(one.url + "/v1/completions", json={**STREAM, "max_tokens": 2000})
        assert answer.status == 200
        assert len(completions(second)) == 1
        await until(lambda: (running_at(g, first), running_at(g, second)) == (0, 1), "Envoy says who serves it")
        assert await g.setup.metric("eldr_worker_failures_total", worker=first.url, reason="refused") == 1
        answer.close()
        await all_over(g)


async def test_envoy_killed_and_started_again_leaves_nothing_behind(tmp_path: Path) -> None:
    async with behind_envoy(tmp_path, aggregated=2) as (g, one):
        for worker in g.setup.aggregated:
            worker.token_gap_s = 5
        asked = [asyncio.create_task(post(one, STREAM)) for _ in range(20)]
        await until(lambda: g.setup.router.services.admission.admitted == 20, "all run")
        await one.kill()
        await all_over(g)
        await asyncio.gather(*asked, return_exceptions=True)
        for worker in g.setup.aggregated:
            worker.token_gap_s = 0
        await one.start()
        await answering(one)
        assert (await post(one))[0] == 200
        await all_over(g)


@asynccontextmanager
async def picker_process(grpc_port: int, urls: list[str]) -> AsyncIterator[asyncio.subprocess.Process]:
    """`eldr epp` as a process of its own, which says when it picks."""
    workers = [flag for url in urls for flag in ("--worker", url)]
    flags = ("-m", "eldr", "epp", "--grpc-listen", f"127.0.0.1:{grpc_port}", "--port", "0", *workers)
    process = await asyncio.create_subprocess_exec(sys.executable, *flags, stderr=subprocess.PIPE)
    try:
        assert process.stderr is not None
        async with asyncio.timeout(30):
            await process.stderr.readuntil(b"eldr: picking on")
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_a_picker_killed_and_started_again_under_load(tmp_path: Path) -> None:
    """With failure_mode_allow and BUFFERED, Envoy balances by itself meanwhile, and no request fails."""
    (grpc_port,) = free_ports(1)
    fakes = [await FakeWorker("plain").start() for _ in range(2)]
    for worker in fakes:
        worker.token_gap_s = 0.01
    urls = [worker.url for worker in fakes]
    done: list[int] = []
    stop = asyncio.Event()

    async def ask(one: Envoy) -> None:
        while not stop.is_set():
            try:
                done.append((await post(one, STREAM))[0])
            except aiohttp.ClientError:
                done.append(0)

    async with envoy(tmp_path, grpc_port, [port_of(worker) for worker in fakes]) as one:
        clients: list[asyncio.Task[None]] = []
        for number in (signal.SIGKILL, signal.SIGTERM, None):
            async with picker_process(grpc_port, urls) as process:
                await answering(one)
                clients = clients or [asyncio.create_task(ask(one)) for _ in range(8)]
                before = len(done)
                await until(lambda before=before: len(done) > before + 50, "requests are answered")  # type: ignore[misc]
                if number is not None:
                    process.send_signal(number)
                    before = len(done)
                    await until(lambda before=before: len(done) > before + 50, "and without a picker")  # type: ignore[misc]
        stop.set()
        await asyncio.gather(*clients)
    for worker in fakes:
        await worker.stop()
    failed = [status for status in done if status != 200]
    assert not failed


async def test_the_gateway_of_the_demo(tmp_path: Path) -> None:
    """Picker, Envoy and the coordinator's stand-in, as `make demo-gateway` starts them, here with fake workers."""
    prefill, *decode = [await FakeWorker(role).start() for role in ("prefill", "decode", "decode")]

    def process(worker: FakeWorker) -> Any:
        return SimpleNamespace(url=worker.url, spec=SimpleNamespace(port=port_of(worker)))

    fleet = Workers(process(prefill), process(prefill), [process(worker) for worker in decode])
    gateway = DemoGateway(Path(program()), EXAMPLE)
    try:
        async with (
            running_gateway(gateway, fleet, ["--policy", "rr"], tmp_path / "picker.log") as url,
            aiohttp.ClientSession() as session,
        ):
            for _ in range(2):
                async with session.post(f"{url}/v1/completions", json=STREAM) as answer:
                    assert answer.status == 200
                    assert (await answer.read()).endswith(b"data: [DONE]\n\n")
        assert [seen.body["max_tokens"] for seen in completions(prefill)] == [1, 1]
        for worker in decode:
            (sent,) = completions(worker)
            assert sent.body["stream"] is True
            assert sent.body["kv_transfer_params"]["do_remote_prefill"] is True
            assert "eldr_counts" not in sent.body["kv_transfer_params"]
    finally:
        for worker in (prefill, *decode):
            await worker.stop()


def test_another_configuration_than_the_example_is_not_adapted() -> None:
    with pytest.raises(GatewayError, match="has not once"):
        envoy_config("static_resources: {}", 1, 2, [3])
