"""Discovery in Kubernetes, against a fake API server that behaves and misbehaves."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from eldr.router.app import Router
from eldr.router.config.endpoint import Endpoint, Endpoints
from eldr.router.config.kubernetes import kubernetes_address
from eldr.router.config.settings import ConfigError, RouterConfig
from eldr.router.fleet.discovery import kubernetes, kubernetes_api, kubernetes_watch
from eldr.router.fleet.discovery.kubernetes import KubernetesSource
from tests.router.certificates import certificate
from tests.router.fake_apiserver import (
    PODS,
    POOLS,
    RECORDED,
    Answer,
    Asked,
    FakeApiserver,
    FakePods,
    begin_lines,
    line,
    piece,
    pod,
    pool,
    send,
    set_ready,
)
from tests.router.harness import Scripted, Setup, on_uvloop, until
from tests.router.pods_under_load import no_stream_breaks

MOE = PODS.format("moe")
DECODE = {"role": "decode"}
ADDRESS = "k8s+http://moe?selector=role=decode&port=8200"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries follow failures at once."""
    monkeypatch.setattr(kubernetes_watch, "LEAST_WAIT_S", 0.01)
    monkeypatch.setattr(kubernetes_watch, "MOST_WAIT_S", 0.05)


class Heard:
    """What a source said: every list, and the last."""

    def __init__(self) -> None:
        self.lists: list[Endpoints] = []

    @property
    def urls(self) -> set[str]:
        return {endpoint.url for endpoint in self.lists[-1]} if self.lists else {"nothing yet"}

    async def is_(self, *hosts: str) -> None:
        """Wait until the workers are these: hosts at port 8200, or whole URLs."""
        urls = {host if "://" in host else f"http://{host}:8200" for host in hosts}
        await until(lambda: self.urls == urls, f"{urls} are the workers")


@asynccontextmanager
async def following(
    server: FakeApiserver, address: str = ADDRESS, account: Path = Path("/no/account"), relist_s: float = 30.0
) -> AsyncIterator[Heard]:
    source = KubernetesSource(kubernetes_address(address), "decode", server.url, account, relist_s)
    heard = Heard()

    async def listen() -> None:
        async for endpoints in source.watch():
            heard.lists.append(endpoints)
        raise AssertionError("it must never end")

    task = asyncio.create_task(listen())
    try:
        await until(lambda: heard.lists or task.done(), "the first list")
        yield heard
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await server.stop()


async def serving(*ips: str, **options: Any) -> FakeApiserver:
    """A server with a ready pod of the selected labels at each address, named after it."""
    server = await FakeApiserver(**options).start()
    for ip in ips:
        await server.put(MOE, pod(f"at-{ip}", ip, DECODE))
    return server


# What pods do.


@on_uvloop
async def test_pods_join_and_leave_as_they_live() -> None:
    server = await serving("10.0.0.1")
    await server.put(MOE, pod("prefill", "10.0.9.9", {"role": "prefill"}))
    async with following(server) as heard:
        assert heard.lists == [frozenset({Endpoint("http://10.0.0.1:8200", "decode")})]
        new = pod("new", "10.0.0.2", DECODE, ready=False)
        new["status"]["phase"] = "Pending"
        del new["status"]["podIP"], new["status"]["podIPs"]
        await server.put(MOE, new)
        await server.put(MOE, pod("new", "10.0.0.2", DECODE, ready=False))
        await server.put(MOE, pod("new", "10.0.0.2", DECODE))
        await heard.is_("10.0.0.1", "10.0.0.2")
        assert len(heard.lists) == 2, "a pod that is not ready is none"
        unready = server.get(MOE, "new")
        set_ready(unready, False)
        await server.put(MOE, unready)
        await heard.is_("10.0.0.1")
        await server.put(MOE, pod("new", "10.0.0.2", DECODE))
        await heard.is_("10.0.0.1", "10.0.0.2")
        ending = server.get(MOE, "at-10.0.0.1")
        ending["metadata"] |= RECORDED["ending"]
        await server.put(MOE, ending)
        await heard.is_("10.0.0.2")
        await server.remove(MOE, "at-10.0.0.1")
        relabelled = server.get(MOE, "new")
        relabelled["metadata"]["labels"] = {"role": "none"}
        await server.put(MOE, relabelled)
        await heard.is_()
        assert len(server.lists) == 1
        asked = server.watches[0].query
        assert asked["labelSelector"] == "role=decode"
        assert asked["allowWatchBookmarks"] == "true"
        assert 24 <= int(asked["timeoutSeconds"]) <= 36


@on_uvloop
async def test_every_port_is_a_worker_and_names_are_looked_up() -> None:
    server = await serving()
    await server.put(MOE, pod("two", "10.0.0.1", DECODE, {"rank0": 8100, "rank1": 8101}))
    await server.put(MOE, pod("one", "fd00::7", DECODE, {"rank0": 9000}))
    await server.put(MOE, pod("none", "10.0.0.3", DECODE))
    address = "k8s+https://moe?selector=role=decode&port=rank0&port=rank1&path=/vllm"
    async with following(server, address) as heard:
        assert heard.urls == {
            "https://10.0.0.1:8100/vllm",
            "https://10.0.0.1:8101/vllm",
            "https://[fd00::7]:9000/vllm",
        }


@on_uvloop
async def test_pods_on_one_address_are_one_worker(caplog: pytest.LogCaptureFixture) -> None:
    """As with hostNetwork, while a new pod takes over from one that ends."""
    server = await serving("10.0.0.1")
    await server.put(MOE, pod("successor", "10.0.0.1", DECODE))
    async with following(server) as heard:
        assert heard.urls == {"http://10.0.0.1:8200"}
        await server.remove(MOE, "at-10.0.0.1")
        await server.put(MOE, pod("other", "10.0.0.2", DECODE))
        await heard.is_("10.0.0.1", "10.0.0.2")
        assert len(heard.lists) == 2
        await server.remove(MOE, "successor")
        await heard.is_("10.0.0.2")


@on_uvloop
async def test_thousands_of_pods_come_in_pages() -> None:
    server = await serving()
    for number in range(1000):
        await server.put(MOE, pod(f"p{number}", f"10.1.{number // 250}.{number % 250}", DECODE))
    async with following(server) as heard:
        assert len(heard.urls) == 1000
        assert len(server.lists) == 10
        for number in range(1000):
            await server.remove(MOE, f"p{number}")
        await heard.is_()
        assert len(heard.lists) < 500, "changes that come together are told together"


# Watching.


@on_uvloop
async def test_a_broken_watch_goes_on_from_where_it_was() -> None:
    server = await serving("10.0.0.1")
    async with following(server) as heard:
        await until(lambda: server.watches, "it watches")
        await server.put(MOE, pod("b", "10.0.0.2", DECODE))
        await heard.is_("10.0.0.1", "10.0.0.2")
        await server.bookmark(MOE)
        version = server.version
        await asyncio.sleep(0.05)
        await server.disconnect()
        await until(lambda: len(server.watches) > 1, "it watches again")
        assert server.watches[-1].query["resourceVersion"] == str(version)
        await server.put(MOE, pod("c", "10.0.0.3", DECODE))
        await heard.is_("10.0.0.1", "10.0.0.2", "10.0.0.3")
        assert len(server.lists) == 1
        assert len(heard.lists) == 3


@on_uvloop
async def test_an_event_cut_in_the_middle_is_heard_once_and_whole() -> None:
    server = await serving("10.0.0.1")
    event = json.dumps({"type": "ADDED", "object": pod("b", "10.0.0.2", DECODE)}).encode() + b"\n"

    async def cut(server: FakeApiserver, asked: Asked, writer: asyncio.StreamWriter) -> None:
        await begin_lines(writer)
        await piece(writer, event[: len(event) // 2])
        await server.put(MOE, pod("b", "10.0.0.2", DECODE))
        raise ConnectionResetError

    server.instead = [None, cut]
    async with following(server) as heard:
        await heard.is_("10.0.0.1", "10.0.0.2")
        assert len(server.lists) == 1
        assert len(heard.lists) == 2


@on_uvloop
async def test_events_that_come_in_pieces_are_put_together() -> None:
    server = await serving("10.0.0.1")

    async def pieces(server: FakeApiserver, asked: Asked, writer: asyncio.StreamWriter) -> None:
        await begin_lines(writer)
        for number in (2, 3):
            found = pod(f"p{number}", f"10.0.0.{number}", DECODE)
            found["metadata"]["resourceVersion"] = str(5000 + number)
            data = json.dumps({"type": "ADDED", "object": found}).encode() + b"\n"
            for at in range(0, len(data), 100):
                await piece(writer, data[at : at + 100])
                await asyncio.sleep(0)
        await asyncio.sleep(3600)

    server.instead = [None, pieces]
    async with following(server) as heard:
        await heard.is_("10.0.0.1", "10.0.0.2", "10.0.0.3")


async def gone_as_status(server: FakeApiserver, asked: Asked, writer: asyncio.StreamWriter) -> None:
    await server.refuse(writer, "gone")


@pytest.mark.parametrize("how", ["event", "status"])
@on_uvloop
async def test_what_was_forgotten_is_listed_anew(how: str, caplog: pytest.LogCaptureFixture) -> None:
    server = await serving("10.0.0.1")
    async with following(server) as heard:
        await until(lambda: server.watches, "it watches")
        await server.stop()
        await server.put(MOE, pod("b", "10.0.0.2", DECODE))
        await server.remove(MOE, "at-10.0.0.1")
        server.compact()
        caplog.clear()
        server.instead = [gone_as_status] if how == "status" else []
        await server.start()
        await heard.is_("10.0.0.2")
        assert len(server.lists) == 2
        assert len(heard.lists) == 2
    assert "410" not in caplog.text, "which is nothing to worry about"


@on_uvloop
async def test_the_next_list_finds_what_the_watch_missed() -> None:
    server = await serving("10.0.0.1")
    async with following(server, relist_s=0.5) as heard:
        server.lost = True
        await server.put(MOE, pod("b", "10.0.0.2", DECODE))
        await server.remove(MOE, "at-10.0.0.1")
        await heard.is_("10.0.0.2")
        assert len(heard.lists) == 2


# An API server that fails.


def says(status: int, body: bytes, headers: str = "") -> Answer:
    async def answer(server: FakeApiserver, asked: Asked, writer: asyncio.StreamWriter) -> None:
        await send(writer, status, body, headers)

    return answer


async def hang(server: FakeApiserver, asked: Asked, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(3600)


async def hang_midway(server: FakeApiserver, asked: Asked, writer: asyncio.StreamWriter) -> None:
    await begin_lines(writer)
    await piece(writer, b'{"type": "ADD')
    await asyncio.sleep(3600)


async def close(server: FakeApiserver, asked: Asked, writer: asyncio.StreamWriter) -> None:
    raise ConnectionResetError


async def long_without_end(server: FakeApiserver, asked: Asked, writer: asyncio.StreamWriter) -> None:
    await begin_lines(writer)
    while True:
        await piece(writer, b" " * 2**20)


async def empty_watch(server: FakeApiserver, asked: Asked, writer: asyncio.StreamWriter) -> None:
    await begin_lines(writer)
    writer.write(b"0\r\n\r\n")


def watched(*events: object) -> Answer:
    async def answer(server: FakeApiserver, asked: Asked, writer: asyncio.StreamWriter) -> None:
        await begin_lines(writer)
        for event in events:
            if isinstance(event, bytes):
                await piece(writer, event)
            else:
                await line(writer, event)
        await asyncio.sleep(3600)

    return answer


LISTS = {
    "500": says(500, b"{}"),
    "503 without a body": says(503, b""),
    "429": says(429, b"{}", "retry-after: 0\r\n"),
    "429 until next year": says(429, b"{}", "retry-after: 31536000\r\n"),
    "a redirect": says(302, b"", "location: http://127.0.0.1:1/\r\n"),
    "no JSON": says(200, b"<html>"),
    "deep JSON": says(200, b"[" * 100_000),
    "not a list": says(200, b"[]"),
    "no version": says(200, b'{"items": []}'),
    "items that are none": says(200, b'{"items": {"a": 1}, "metadata": {"resourceVersion": "1"}}'),
    "compressed, which nobody asked for": says(
        200,
        gzip.compress(b'{"items": [], "metadata": {"resourceVersion": "1"}}'),
        "content-encoding: gzip\r\n",
    ),
    "too much": long_without_end,
    "hangs": hang,
    "hangs in its middle": hang_midway,
    "closes": close,
    "not HTTP": lambda server, asked, writer: piece(writer, b"SSH-2.0\r\n\r\n"),
}
WATCHES = {
    "500": says(500, b"{}"),
    "429": says(429, b"{}"),
    "404": says(404, b"{}"),
    "no JSON": watched(b"<html>\n"),
    "no event": watched({"kind": "Pod"}),
    "an unknown event": watched({"type": "RENAMED", "object": pod("x", "10.0.0.9", DECODE)}),
    "no version": watched({"type": "ADDED", "object": {"metadata": {"name": "x"}}}),
    "an error without a code": watched({"type": "ERROR", "object": None}),
    "an error": watched({"type": "ERROR", "object": {"code": 500, "message": "storage\x1b[31m is\nlost"}}),
    "a line without end": long_without_end,
    "hangs": hang,
    "closes": close,
    "ends at once": empty_watch,
}
# Those that say nothing of what was heard before, so that the next watch goes on from there.
RESUMED = {"500", "429", "hangs", "closes", "ends at once"}


@pytest.mark.parametrize("how", LISTS)
@on_uvloop
async def test_a_list_that_fails_keeps_the_last_one(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((kubernetes_api, "ANSWER_TIMEOUT_S"), (kubernetes_api, "PAGE_TIMEOUT_S")):
        monkeypatch.setattr(module, name, 0.3)
    monkeypatch.setattr(kubernetes_api, "MOST_PAGE_BYTES", 2**21)
    monkeypatch.setattr(kubernetes_watch, "MOST_RETRY_AFTER_S", 0.1)
    server = await serving("10.0.0.1")
    async with following(server, relist_s=0.5) as heard:
        await until(lambda: server.watches, "it watches")
        server.lost = True
        await server.put(MOE, pod("b", "10.0.0.2", DECODE))
        server.instead = [LISTS[how]] * 2
        await heard.is_("10.0.0.1", "10.0.0.2")
        assert not server.instead
        assert len(heard.lists) == 2


@pytest.mark.parametrize("how", WATCHES)
@on_uvloop
async def test_a_watch_that_fails_keeps_the_last_list(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubernetes_api, "ANSWER_TIMEOUT_S", 0.3)
    monkeypatch.setattr(kubernetes_api, "MOST_LINE_BYTES", 2**21)
    server = await serving("10.0.0.1")
    server.instead = [None, WATCHES[how]]
    async with following(server) as heard:
        await until(lambda: len(server.watches) > 1, "it watches again")
        await server.put(MOE, pod("b", "10.0.0.2", DECODE))
        await heard.is_("10.0.0.1", "10.0.0.2")
        assert len(heard.lists) == 2
        assert len(server.lists) == (1 if how in RESUMED else 2)


@on_uvloop
async def test_a_list_without_an_end_is_given_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kubernetes_watch, "MOST_PAGES", 20)
    page = {"items": [pod("x", "10.0.0.9", DECODE)], "metadata": {"resourceVersion": "1", "continue": "on"}}
    server = await serving("10.0.0.1")
    server.instead = [says(200, json.dumps(page).encode())] * 20
    async with following(server) as heard:
        await heard.is_("10.0.0.1")
    assert "has no end after 20 pages" in caplog.text


@on_uvloop
async def test_nobody_is_sent_elsewhere() -> None:
    other = await serving("10.6.6.6")
    server = await serving("10.0.0.1")
    server.instead = [says(307, b"", f"location: {other.url}{MOE}\r\n")]
    async with following(server) as heard:
        await heard.is_("10.0.0.1")
        assert not other.asked
    await other.stop()


@on_uvloop
async def test_events_before_one_that_lies_count() -> None:
    server = await serving("10.0.0.1")
    await server.put(MOE, before := pod("b", "10.0.0.2", DECODE))
    both = json.dumps({"type": "DELETED", "object": before}).encode() + b"\n{}\n"
    server.instead = [None, watched(both), hang]
    async with following(server) as heard:
        await heard.is_("10.0.0.1")


@on_uvloop
async def test_a_server_that_is_down_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "eldr.router")
    server = await serving("10.0.0.1")
    await server.stop()
    async with following(server) as heard:
        assert heard.lists == [frozenset()]
        await asyncio.sleep(0.2)
        await server.start()
        await heard.is_("10.0.0.1")
        await until(lambda: "pods in namespace moe are followed again" in caplog.text, "it is said")
    assert caplog.text.count("the workers stay as they are") == 1, "a failure that lasts is told once"


@on_uvloop
async def test_a_server_that_hangs_at_first_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kubernetes, "FIRST_S", 0.1)
    monkeypatch.setattr(kubernetes_api, "ANSWER_TIMEOUT_S", 0.5)
    server = await serving("10.0.0.1")
    server.instead = [hang]
    async with following(server) as heard:
        assert heard.lists == [frozenset()]
        assert "the router starts without its workers" in caplog.text
        await heard.is_("10.0.0.1")
        assert "it does not answer in time" in caplog.text


@on_uvloop
async def test_failures_are_followed_by_longer_and_longer_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[float, float]] = []

    def at_once(least: float, most: float) -> float:
        drawn.append((least, most))
        return 0.0

    monkeypatch.setattr(kubernetes_watch, "LEAST_WAIT_S", 0.25)
    monkeypatch.setattr(kubernetes_watch, "MOST_WAIT_S", 15.0)
    monkeypatch.setattr("random.uniform", at_once)
    server = await serving("10.0.0.1")
    server.instead = [says(500, b"{}")] * 1000
    async with following(server):
        await until(lambda: len(drawn) >= 9, "it fails again and again")
    assert drawn[:9] == [(most / 2, most) for most in (0.25, 0.5, 1, 2, 4, 8, 15, 15, 15)]


# Credentials.


def account(folder: Path, token: str, ca: Path | None, namespace: str = "moe") -> Path:
    """A mounted service account."""
    (folder / "token").write_text(token)
    (folder / "namespace").write_text(namespace)
    if ca is not None:
        (folder / "ca.crt").write_bytes(ca.read_bytes())
    return folder


def tls(folder: Path, name: str = "server") -> tuple[ssl.SSLContext, Path]:
    cert, key = certificate(folder, name)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    return context, cert


@on_uvloop
async def test_a_token_that_was_replaced_is_read_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    context, cert = tls(tmp_path)
    server = await serving("10.0.0.1", ssl_context=context, tokens={"first"})
    async with following(server, account=account(tmp_path, "first\n", cert)) as heard:
        assert heard.urls == {"http://10.0.0.1:8200"}
        server.tokens = {"second"}
        await server.put(MOE, pod("b", "10.0.0.2", DECODE))
        await server.disconnect()
        await until(lambda: f"does not accept the token in {tmp_path}" in caplog.text, "it is said")
        assert heard.urls >= {"http://10.0.0.1:8200"}
        (tmp_path / "token").write_text("second")
        await heard.is_("10.0.0.1", "10.0.0.2")
        (tmp_path / "token").write_text("two\nlines")
        await server.disconnect()
        await until(lambda: "expected one line with a key" in caplog.text, "it is said")
        (tmp_path / "token").write_text("second")
        await server.put(MOE, pod("c", "10.0.0.3", DECODE))
        await heard.is_("10.0.0.1", "10.0.0.2", "10.0.0.3")


@on_uvloop
async def test_the_server_must_show_a_certificate_of_the_account_s_ca(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    context, cert = tls(tmp_path)
    _, other = tls(tmp_path, "other")
    server = await serving("10.0.0.1", ssl_context=context)
    async with following(server, account=account(tmp_path, "token", other)) as heard:
        assert heard.lists == [frozenset()]
        assert "certificate" in caplog.text
        assert not server.asked
        (tmp_path / "ca.crt").write_bytes(cert.read_bytes())
        await heard.is_("10.0.0.1")


@on_uvloop
async def test_no_token_travels_unencrypted(tmp_path: Path) -> None:
    server = await serving("10.0.0.1")
    async with following(server, account=account(tmp_path, "secret", None)):
        assert all("authorization" not in asked.headers for asked in server.asked)


@pytest.mark.parametrize("verb", ["list", "watch"])
@on_uvloop
async def test_a_missing_role_is_named(verb: str, caplog: pytest.LogCaptureFixture) -> None:
    server = await serving("10.0.0.1", forbidden={(verb, "pods")})
    async with following(server) as heard:
        await until(lambda: "cannot be followed" in caplog.text, "it is said")
        assert 'rule apiGroups: [""], resources: ["pods"], verbs: ["list", "watch"]' in caplog.text
        assert f'cannot {verb} resource "pods"' in caplog.text
        await server.put(MOE, pod("b", "10.0.0.2", DECODE))
        if verb == "watch":
            await heard.is_("10.0.0.1", "10.0.0.2")  # by lists alone
        server.forbidden.clear()
        await server.put(MOE, pod("c", "10.0.0.3", DECODE))
        await heard.is_("10.0.0.1", "10.0.0.2", "10.0.0.3")


# InferencePools.

POOL = POOLS.format("moe")


@on_uvloop
async def test_a_pool_is_followed_as_it_changes(caplog: pytest.LogCaptureFixture) -> None:
    server = await serving("10.0.0.1")
    await server.put(MOE, pod("other", "10.0.0.2", {"role": "other", "team": "a"}))
    await server.put(MOE, pod("third", "10.0.0.3", {"role": "other", "team": "b"}))
    await server.put(POOL, pool("another", {"team": "b"}, 1))
    async with following(server, "k8s+http://moe/inferencepools/qwen") as heard:
        assert heard.lists == [frozenset()]
        assert "no InferencePool qwen" in caplog.text
        await server.put(POOL, pool("qwen", DECODE, 8200))
        await heard.is_("10.0.0.1")
        await server.put(POOL, pool("qwen", {"role": "other"}, 8200, 8201))
        await heard.is_(*(f"http://10.0.0.{host}:{port}" for host in (2, 3) for port in (8200, 8201)))
        await server.put(POOL, pool("qwen", {"role": "other", "team": "a"}, 8200))
        await heard.is_("10.0.0.2")
        await server.remove(POOL, "qwen")
        await server.put(MOE, pod("late", "10.0.0.4", {"role": "other", "team": "a"}))
        await heard.is_("10.0.0.2", "10.0.0.4")
        assert frozenset() not in heard.lists[1:]


@on_uvloop
async def test_an_address_narrows_a_pool_and_names_other_ports() -> None:
    server = await serving("10.0.0.1")
    await server.put(MOE, pod("a", "10.0.0.2", {"model": "qwen", "role": "prefill"}))
    await server.put(MOE, pod("b", "10.0.0.3", {"model": "qwen", "role": "decode"}))
    await server.put(POOL, pool("qwen", {"model": "qwen"}, 8000))
    async with following(server, "k8s+http://moe/inferencepools/qwen?selector=role=decode&port=8200") as heard:
        await heard.is_("10.0.0.3")


@on_uvloop
async def test_a_cluster_without_pools_says_so(caplog: pytest.LogCaptureFixture) -> None:
    server = await serving()
    server.instead = [says(404, b"404 page not found")]
    async with following(server, "k8s+http://moe/inferencepools/qwen"):
        assert "the cluster does not know inferencepools.inference.networking.k8s.io/v1" in caplog.text


# Where the API is.


def test_outside_of_a_cluster_an_address_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    router = Router(RouterConfig.of(worker=(ADDRESS,), port=0), lambda group: Scripted())
    with pytest.raises(ConfigError, match="this is no pod of a cluster; give its address as kubernetes_api"):
        asyncio.run(router.start())


@on_uvloop
async def test_inside_a_cluster_the_pod_knows_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context, cert = tls(tmp_path)
    server = await serving("10.0.0.1", ssl_context=context, tokens={"mine"})
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", server.url.rsplit(":", 1)[1])
    folder = account(tmp_path, "mine", cert)
    address = kubernetes_address("k8s+http://?selector=role=decode&port=8200")
    snapshots = KubernetesSource(address, "decode", None, folder, 30).watch()
    assert {endpoint.url for endpoint in await anext(snapshots)} == {"http://10.0.0.1:8200"}
    await snapshots.aclose()  # type: ignore[attr-defined]
    await server.stop()
    (folder / "namespace").unlink()
    with pytest.raises(ConfigError, match="an address without a namespace means the router's own"):
        KubernetesSource(address, "decode", None, folder, 30)


# The whole router.


@on_uvloop
async def test_no_stream_breaks_while_pods_come_and_go() -> None:
    server = await FakeApiserver().start()
    try:
        await no_stream_breaks(FakePods(server), Path("/no/account"))
    finally:
        await server.stop()


@on_uvloop
async def test_other_addresses_need_a_new_process(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server = await serving()
    file = tmp_path / "eldr.toml"
    file.write_text(f'worker = ["{ADDRESS}"]')
    load = partial(RouterConfig.load, file, {"port": 0, "kubernetes_api": server.url})
    router = Router(load(), lambda group: Scripted(), (file, load))
    await router.start()
    try:
        file.write_text(f'worker = ["{ADDRESS.replace("moe", "other")}"]')
        router.reload()
        await until(lambda: "needs a new process" in caplog.text, "it is said")
        assert "dns+ and k8s+ addresses" in caplog.text
    finally:
        await router.stop(0)
        await server.stop()


@on_uvloop
async def test_failures_are_counted() -> None:
    server = await serving()
    router = Router(RouterConfig.of(worker=(ADDRESS,), port=0, kubernetes_api=server.url), lambda group: Scripted())
    await router.start()
    try:
        async with aiohttp.ClientSession() as session:
            setup = Setup(router, [], [], [], session)
            assert await setup.metric("eldr_discovery_failures_total") == 0
            server.forbidden = {("list", "pods"), ("watch", "pods")}
            await server.disconnect()
            await until(lambda: len(server.asked) > 5, "it tries again")
            assert await setup.metric("eldr_discovery_failures_total", source="kubernetes") > 0
            assert await setup.metric("eldr_discovery_failures_total", source="dns") == 0
    finally:
        await router.stop(0)
        await server.stop()
