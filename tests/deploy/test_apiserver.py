"""The chart's objects at a real kube-apiserver, where `make test-kubernetes` has built one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from tests.deploy.cases import CASES
from tests.deploy.charts import EXAMPLES, Manifest, needs_helm, of_kind, parse, render
from tests.kubernetes import cluster
from tests.router.harness import on_uvloop

pytestmark = needs_helm
# The server is of Kubernetes 1.20. Newer kinds are left out, and newer fields it drops.
PATHS = {
    "v1": "/api/v1",
    "apps/v1": "/apis/apps/v1",
    "networking.k8s.io/v1": "/apis/networking.k8s.io/v1",
    "rbac.authorization.k8s.io/v1": "/apis/rbac.authorization.k8s.io/v1",
}
PLURALS = {"NetworkPolicy": "networkpolicies"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if not (cluster.BUILT / "kube-apiserver").exists():
        pytest.skip("there is no kube-apiserver: `make test-kubernetes` builds one")
    server = cluster.Cluster(tmp_path_factory.mktemp("cluster"))

    async def start() -> None:
        await server.start()
        for namespace in ("serving", "workers"):
            await server.ask("POST", "/api/v1/namespaces", {"metadata": {"name": namespace}})

    try:
        asyncio.run(start())
        yield server
    finally:
        server.stop()


def path_of(manifest: Manifest) -> str:
    kind = manifest["kind"]
    namespace = manifest["metadata"].get("namespace", "serving")
    return f"{PATHS[manifest['apiVersion']]}/namespaces/{namespace}/{PLURALS.get(kind, kind.lower() + 's')}"


@on_uvloop
async def test_it_takes_every_object(server: Any) -> None:
    manifests = [manifest for values in CASES.values() for manifest in render(values)]
    manifests += parse((EXAMPLES / "vllm-prefill-decode.yaml").read_text())
    taken = set()
    for manifest in manifests:
        if manifest["apiVersion"] in PATHS:
            await server.ask("POST", path_of(manifest) + "?dryRun=All", manifest)
            taken.add(manifest["kind"])
    assert taken == {
        "ConfigMap", "Deployment", "NetworkPolicy", "Role", "RoleBinding", "Service", "ServiceAccount", "StatefulSet"
    }  # fmt: skip


@on_uvloop
async def test_it_refuses_what_is_wrong(server: Any) -> None:
    service = of_kind(render(CASES["default"]), "Service")["eldr"]
    service["spec"]["ports"][0]["targetPort"] = "no name for a port"
    with pytest.raises(cluster.RefusedError, match="targetPort"):
        await server.ask("POST", path_of(service) + "?dryRun=All", service)


@on_uvloop
async def test_the_account_may_list_and_watch_pods_there_and_nothing_else(server: Any) -> None:
    for kind in ("ServiceAccount", "Role", "RoleBinding"):
        for manifest in of_kind(render(CASES["everything"]), kind).values():
            await server.ask("POST", path_of(manifest), manifest)
    account = "/api/v1/namespaces/serving/serviceaccounts/eldr/token"
    asked = {"spec": {"audiences": ["https://tests"], "expirationSeconds": 3600}}
    token = (await server.ask("POST", account, asked))["status"]["token"]
    pods = "/api/v1/namespaces/workers/pods"
    assert (await server.ask("GET", pods, token=token))["items"] == []
    await server.ask("GET", pods + "?watch=1&timeoutSeconds=1", token=token)
    pod = {"metadata": {"name": "a"}, "spec": {"containers": [{"name": "a", "image": "a"}]}}
    for method, path, body in (
        ("GET", "/api/v1/namespaces/serving/pods", None),
        ("GET", "/api/v1/pods", None),
        ("GET", "/api/v1/namespaces/workers/secrets", None),
        ("GET", "/api/v1/namespaces/workers/services", None),
        ("POST", pods, pod),
        ("DELETE", pods + "/a", None),
    ):
        with pytest.raises(cluster.RefusedError, match="forbidden"):
            await server.ask(method, path, body, token=token)
