"""Which workers a pod has, and what a pool selects, whatever is said of them."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eldr.router.config.endpoint import worker_url
from eldr.router.config.kubernetes import KubernetesAddress, kubernetes_address
from eldr.router.fleet.discovery.pods import Pool, pod_urls, pool_of
from tests.router.fake_apiserver import pod, pool

ADDRESS = kubernetes_address("k8s+http://moe?selector=a&port=http")
DP = kubernetes_address("k8s+http://moe?selector=a&port=http#dp=2")
READY = pod("p", "10.0.0.1", {}, {"metrics": 9090, "http": 8200})


def urls(found: Any, address: KubernetesAddress, *ports: str) -> set[str]:
    """Its workers, of a pod that gets requests."""
    known = pod_urls(found, address, ports)
    assert known is not None
    return set(known)


def changed(*path: str | int, to: Any) -> dict[str, Any]:
    """A ready pod, but for the value at a path. None removes it."""
    found = deepcopy(READY)
    at: Any = found
    for key in path[:-1]:
        at = at[key]
    if to is None:
        del at[path[-1]]
    else:
        at[path[-1]] = to
    return found


def test_a_ready_pod() -> None:
    assert urls(READY, ADDRESS, "http") == {"http://10.0.0.1:8200"}
    assert urls(READY, ADDRESS, "9000", "http") == {"http://10.0.0.1:9000", "http://10.0.0.1:8200"}
    assert urls(READY, DP, "http") == {"http://10.0.0.1:8200#rank=0", "http://10.0.0.1:8200#rank=1"}
    assert urls(READY, ADDRESS, "grpc") == set()


def test_sidecars_have_ports_too() -> None:
    found = changed("spec", "initContainers", to=[{"ports": [{"name": "proxy", "containerPort": 8000}]}])
    assert urls(found, ADDRESS, "proxy") == {"http://10.0.0.1:8000"}


@pytest.mark.parametrize(
    "found",
    [
        changed("metadata", "deletionTimestamp", to="2026-11-30T03:00:00Z"),
        changed("status", "phase", to="Pending"),
        changed("status", "phase", to="Succeeded"),
        changed("status", "phase", to="Failed"),
        changed("status", "phase", to="Unknown"),
        changed("status", "podIP", to=None),
        changed("status", "podIP", to=""),
        changed("status", "podIP", to="10.0.0.1@evil.example/"),
        changed("status", "podIP", to="fe80::1%eth0"),
        changed("status", "conditions", to=None),
        changed("status", "conditions", to=[{"type": "Ready", "status": "Unknown"}]),
        changed("status", "conditions", to=[{"type": "ContainersReady", "status": "True"}]),
        changed("status", to="Running"),
        None,
        [],
    ],
)
def test_pods_that_get_no_requests(found: Any) -> None:
    assert pod_urls(found, ADDRESS, ("http",)) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)
PATHS: list[tuple[str | int, ...]] = [
    ("metadata",), ("status",), ("spec",), ("status", "conditions"), ("status", "conditions", 0), ("status", "podIP"),
    ("spec", "containers"), ("spec", "containers", 0), ("spec", "containers", 0, "ports"),
    ("spec", "containers", 0, "ports", 1), ("spec", "containers", 0, "ports", 1, "containerPort"),
]  # fmt: skip


@given(st.sampled_from(PATHS), JSON)
def test_nothing_that_is_said_of_a_pod_makes_a_wrong_url(path: tuple[str | int, ...], value: Any) -> None:
    found = changed(*path, to=value)
    for url in pod_urls(found, ADDRESS, ("http",)) or ():
        assert worker_url(url) == url


def test_a_pool() -> None:
    assert pool_of(pool("x", {"b": "2", "a.example/c": ""}, 8000, 8001)) == Pool("a.example/c=,b=2", ("8000", "8001"))


@pytest.mark.parametrize(
    "spec",
    [
        {"selector": {}},
        {"selector": {"matchLabels": {}}},
        {"selector": {"matchLabels": {"a": "b,c=d"}}},
        {"selector": {"matchLabels": ["a"]}},
        {"targetPorts": []},
        {"targetPorts": [{"number": 0}, {"number": True}, {"number": "8000"}, 8000]},
    ],
)
def test_pools_that_cannot_be_followed(spec: dict[str, Any]) -> None:
    found = pool("x", {"a": "b"}, 8000)
    found["spec"] |= spec
    assert pool_of(found) is None


@given(JSON)
def test_nothing_that_is_said_of_a_pool_fails(value: Any) -> None:
    for found in (value, {"spec": value}, {"spec": {"selector": value, "targetPorts": value}}):
        assert pool_of(found) is None
