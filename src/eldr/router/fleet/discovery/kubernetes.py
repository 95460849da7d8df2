"""Kubernetes discovery: the ready pods that a label selector or an InferencePool selects."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import aiohttp

from eldr.router.config.endpoint import Endpoint, Endpoints, Role
from eldr.router.config.kubernetes import KubernetesAddress
from eldr.router.fleet.discovery.base import Failed, Source
from eldr.router.fleet.discovery.kubernetes_api import KubernetesApi, shown
from eldr.router.fleet.discovery.kubernetes_watch import Collection, Resource
from eldr.router.fleet.discovery.pods import Pool, member, pod_urls, pool_of

log = logging.getLogger("eldr.router")

# Of the Gateway API Inference Extension.
POOL_GROUP = "inference.networking.k8s.io"
# How long the router may wait at its start for the first list.
FIRST_S = 10.0

T = TypeVar("T")


class KubernetesSource(Source):
    """Follows the pods of an address. A failure keeps the last list.

    Pods that are not ready, or are about to end, are left out. So their workers drain, and a pod that is ready again is
    a worker again. Pods on one IP, as with hostNetwork, are one worker for each port.

    url, account: as for KubernetesApi. relist_s: as for Collection.
    Raises ConfigError if the API's address or the namespace is unknown.
    """

    name = "kubernetes"

    def __init__(
        self,
        address: KubernetesAddress,
        role: Role,
        url: str | None,
        account: Path | None,
        relist_s: float,
        failed: Failed = lambda source: None,
    ) -> None:
        self._address = address
        self._role: Role = role
        self._api = KubernetesApi(url, account)
        self._namespace = address.namespace or self._api.namespace
        self._relist_s = relist_s
        self._failed = failed
        self._latest: Endpoints = frozenset()
        self._news = asyncio.Event()
        self._portless_told = False

    async def watch(self) -> AsyncIterator[Endpoints]:
        following = asyncio.create_task(self._follow())
        try:
            try:
                async with asyncio.timeout(FIRST_S):
                    await self._news.wait()
            except TimeoutError:
                log.warning("%s: there is no list yet; the router starts without its workers", self._address)
            known: Endpoints | None = None
            while True:
                self._news.clear()
                if self._latest != known:
                    known = self._latest
                    yield known
                await self._news.wait()
        finally:
            following.cancel()

    async def _follow(self) -> None:
        async with self._api.session() as session:
            if self._address.pool:
                await self._follow_pool(session)
            else:
                await self._pods(self._address.selector, self._address.ports).follow(session)

    async def _follow_pool(self, session: aiohttp.ClientSession) -> None:
        """Follow the pool, and beside it the pods that it selects at the time."""
        pods: asyncio.Task[None] | None = None
        followed: Pool | None = None

        def changed(pools: dict[str, Pool]) -> None:
            nonlocal pods, followed
            pool = pools.get(self._address.pool)
            if pool is None:
                # Its pods may well go on serving, and are followed as it said last.
                log.warning(
                    "namespace %s has no InferencePool %s with a selector and ports; the workers stay as they are",
                    self._namespace,
                    self._address.pool,
                )
                self._news.set()
            elif pool != followed:
                followed = pool
                if pods is not None:
                    pods.cancel()
                selector = ",".join(filter(None, (pool.selector, self._address.selector)))
                pods = asyncio.create_task(self._pods(selector, self._address.ports or pool.ports).follow(session))

        resource = Resource(POOL_GROUP, "inferencepools", self._namespace)
        query = {"fieldSelector": f"metadata.name={self._address.pool}"}
        try:
            await self._collection(resource, query, pool_of, changed).follow(session)
        finally:
            if pods is not None:
                pods.cancel()

    def _pods(self, selector: str, ports: tuple[str, ...]) -> Collection[frozenset[str]]:
        resource = Resource("", "pods", self._namespace)
        return self._collection(resource, {"labelSelector": selector}, partial(self._urls, ports), self._found)

    def _collection(
        self,
        resource: Resource,
        query: dict[str, str],
        read: Callable[[Any], T | None],
        changed: Callable[[dict[str, T]], None],
    ) -> Collection[T]:
        return Collection(self._api, resource, query, read, changed, self._looked_in_vain, self._relist_s)

    def _urls(self, ports: tuple[str, ...], pod: Any) -> frozenset[str] | None:
        urls = pod_urls(pod, self._address, ports)
        if urls is not None and len(urls) < len(ports) * max(self._address.ranks, 1) and not self._portless_told:
            self._portless_told = True
            name = shown(str(member(pod, "metadata", "name")))
            log.warning("%s: pod %s does not declare each of the ports %s", self._address, name, ", ".join(ports))
        return urls or None

    def _looked_in_vain(self) -> None:
        self._failed(self.name)
        self._news.set()

    def _found(self, pods: dict[str, frozenset[str]]) -> None:
        self._latest = frozenset(Endpoint(url, self._role) for urls in pods.values() for url in urls)
        self._news.set()
