"""Discovery against a real kube-apiserver: what it says of pods, whom it lets in, and what it forgets."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from eldr.router.config.endpoint import Endpoints
from eldr.router.config.kubernetes import kubernetes_address
from eldr.router.fleet.discovery.kubernetes import KubernetesSource
from tests.kubernetes.cluster import POOLS, Cluster
from tests.router.harness import on_uvloop, until
from tests.router.pods_under_load import no_stream_breaks

ADDRESS = "k8s+http://?selector=role=decode&port=http"


class Heard:
    """What a source said last, and how often it said something."""

    def __init__(self) -> None:
        self.lists: list[Endpoints] = []

    async def is_(self, *hosts: str) -> None:
        urls = {f"http://{host}:8200" for host in hosts}
        await until(lambda: self.lists and {each.url for each in self.lists[-1]} == urls, f"{urls} are the workers")


@asynccontextmanager
async def following(
    cluster: Cluster, account: Path, address: str = ADDRESS, relist_s: float = 300
) -> AsyncIterator[Heard]:
    heard = Heard()

    async def listen() -> None:
        source = KubernetesSource(kubernetes_address(address), "decode", cluster.url, account, relist_s)
        async for endpoints in source.watch():
            heard.lists.append(endpoints)

    task = asyncio.create_task(listen())
    try:
        yield heard
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await cluster.clear()


@on_uvloop
async def test_pods_are_followed_from_creation_to_deletion(apiserver: Cluster, tmp_path: Path) -> None:
    await apiserver.allow("pods")
    account = await apiserver.account(tmp_path / "account", "life")
    await apiserver.create("a", "decode", "10.0.0.1", 8200)
    await apiserver.create("p", "prefill", "10.0.9.9", 8200)
    async with following(apiserver, account) as heard:
        await heard.is_("10.0.0.1")
        await apiserver.create("b", "decode", "fd00::2", 8200, ready=False)
        await apiserver.set_ready("b", True)
        await heard.is_("10.0.0.1", "[fd00::2]")
        assert len(heard.lists) == 2
        await apiserver.set_ready("b", False)
        await heard.is_("10.0.0.1")
        await apiserver.set_ready("b", True)
        await heard.is_("10.0.0.1", "[fd00::2]")
        await apiserver.delete("a")  # it has a node, whose kubelet lets it end
        await heard.is_("[fd00::2]")
        assert (await apiserver.ask("GET", "/api/v1/namespaces/moe/pods/a"))["metadata"]["deletionTimestamp"]
        await apiserver.finish("a")
        await apiserver.create("a", "decode", "10.0.0.1", 8200)
        await heard.is_("10.0.0.1", "[fd00::2]")
        await apiserver.ask("PATCH", "/api/v1/namespaces/moe/pods/a", {"metadata": {"labels": {"role": "none"}}})
        await heard.is_("[fd00::2]")


@on_uvloop
async def test_hundreds_of_pods_come_in_pages(apiserver: Cluster, tmp_path: Path) -> None:
    await apiserver.allow("pods")
    account = await apiserver.account(tmp_path / "account", "pages")
    hosts = [f"10.0.{n // 200}.{n % 200}" for n in range(430)]
    for at in range(0, len(hosts), 43):
        await asyncio.gather(
            *(apiserver.create(f"p{host}", "decode", host, 8200) for host in hosts[at : at + 43])
        )  # fmt: skip
    async with following(apiserver, account) as heard:
        await heard.is_(*hosts)
        assert len(heard.lists) == 1


@on_uvloop
async def test_a_role_that_is_missing_or_taken_away(
    apiserver: Cluster, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "eldr.router")
    await apiserver.allow()
    account = await apiserver.account(tmp_path / "account", "role")
    await apiserver.create("a", "decode", "10.0.0.1", 8200)
    async with following(apiserver, account, relist_s=1) as heard:
        await heard.is_()
        assert 'cannot list resource "pods"' in caplog.text
        assert 'rule apiGroups: [""], resources: ["pods"], verbs: ["list", "watch"]' in caplog.text
        await apiserver.allow("pods")
        await heard.is_("10.0.0.1")
        await until(lambda: "followed again" in caplog.text, "it is said")
        caplog.clear()
        await apiserver.allow()
        await until(lambda: "cannot be followed" in caplog.text, "it is said")
        await apiserver.create("b", "decode", "10.0.0.2", 8200)
        await asyncio.sleep(1)
        await heard.is_("10.0.0.1")
        await apiserver.allow("pods")
        await heard.is_("10.0.0.1", "10.0.0.2")


@on_uvloop
async def test_a_token_that_is_replaced(apiserver: Cluster, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The server remembers a valid token for ten seconds."""
    await apiserver.allow("pods")
    account = await apiserver.account(tmp_path / "account", "first")
    await apiserver.create("a", "decode", "10.0.0.1", 8200)
    async with following(apiserver, account, relist_s=1) as heard:
        await heard.is_("10.0.0.1")
        await apiserver.ask("DELETE", "/api/v1/namespaces/moe/secrets/first")
        await until(lambda: "does not accept the token" in caplog.text, "it is said")
        await apiserver.create("b", "decode", "10.0.0.2", 8200)
        (account / "token").write_text(await apiserver.token("second"))
        await heard.is_("10.0.0.1", "10.0.0.2")


@on_uvloop
async def test_a_server_that_restarts_has_forgotten_what_happened(
    apiserver: Cluster, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await apiserver.allow("pods")
    account = await apiserver.account(tmp_path / "account", "restart")
    await apiserver.create("a", "decode", "10.0.0.1", 8200)
    await apiserver.create("b", "decode", "10.0.0.2", 8200)
    async with following(apiserver, account) as heard:
        await heard.is_("10.0.0.1", "10.0.0.2")
        await apiserver.restart_apiserver()
        await apiserver.finish("a")
        await heard.is_("10.0.0.2")
        assert len(heard.lists) == 2


@on_uvloop
async def test_an_inference_pool(apiserver: Cluster, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    await apiserver.allow("pods")
    account = await apiserver.account(tmp_path / "account", "pool")
    await apiserver.create("a", "decode", "10.0.0.1", 8200)
    await apiserver.create("b", "prefill", "10.0.0.2", 8200)
    async with following(apiserver, account, "k8s+http://moe/inferencepools/qwen") as heard:
        await heard.is_()
        assert 'resources: ["inferencepools"]' in caplog.text
        await apiserver.allow("pods", "pools")
        spec = {"selector": {"matchLabels": {"role": "decode"}}, "targetPorts": [{"number": 8200}]}
        kind = {"apiVersion": "inference.networking.k8s.io/v1", "kind": "InferencePool"}
        await apiserver.ask("POST", POOLS, {**kind, "metadata": {"name": "qwen"}, "spec": spec})
        await heard.is_("10.0.0.1")
        spec = {"selector": {"matchLabels": {"role": "prefill"}}}
        await apiserver.ask("PATCH", f"{POOLS}/qwen", {"spec": spec})
        await heard.is_("10.0.0.2")
        await apiserver.ask("DELETE", f"{POOLS}/qwen")


@on_uvloop
async def test_no_stream_breaks_while_pods_come_and_go(apiserver: Cluster, tmp_path: Path) -> None:
    await apiserver.allow("pods")
    account = await apiserver.account(tmp_path / "account", "load")
    try:
        await no_stream_breaks(apiserver, account)
    finally:
        await apiserver.clear()
