from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from tests.kubernetes.cluster import BUILT, Cluster


@pytest.fixture(scope="session")
def apiserver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A real API server with a namespace and a service account, for all tests."""
    if not (BUILT / "kube-apiserver").exists():
        pytest.skip("there is no kube-apiserver: `make test-kubernetes` builds one in 15 minutes, on Debian 12")
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))

    async def start() -> None:
        await cluster.start()
        await cluster.prepare()
        await cluster.define_pools()

    try:
        asyncio.run(start())
        yield cluster
    finally:
        cluster.stop()
