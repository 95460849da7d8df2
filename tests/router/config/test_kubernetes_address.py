"""Addresses of pods: what they mean, their normal form, and those that are refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eldr.router.config.endpoint import UrlError, worker_url
from eldr.router.config.kubernetes import KubernetesAddress, kubernetes_address
from eldr.router.config.settings import ConfigError, RouterConfig

LABELS = st.text("abcdefghijklmnopqrstuvwxyz0123456789", min_size=1, max_size=20)
KEYS = LABELS | st.builds("{}.example/{}".format, LABELS, LABELS)
REQUIREMENTS = (
    KEYS
    | KEYS.map("!{}".format)
    | st.builds("{}{}{}".format, KEYS, st.sampled_from(["=", "==", "!=", " = "]), LABELS | st.just(""))
    | st.builds("{} {} ({}, {})".format, KEYS, st.sampled_from(["in", "notin"]), LABELS, LABELS)
)
PORTS = st.integers(1, 65535).map(str) | LABELS.filter(lambda text: not text.isdecimal() and len(text) < 15)
PATHS = st.lists(st.text("abz09._~!$&'()*+,;=:@-", min_size=1), max_size=3).map(
    lambda parts: "".join(f"/{part}" for part in parts if part not in (".", ".."))
)
ADDRESSES = st.builds(
    KubernetesAddress,
    scheme=st.sampled_from(["http", "https"]),
    namespace=st.just("") | LABELS,
    selector=st.lists(REQUIREMENTS, min_size=1, max_size=3).map(",".join),
    ports=st.lists(PORTS, min_size=1, max_size=3, unique=True).map(tuple),
    pool=st.just("") | LABELS,
    path=PATHS,
    ranks=st.just(0) | st.integers(1, 9999),
)


@given(ADDRESSES)
def test_the_normal_form_means_the_same(address: KubernetesAddress) -> None:
    assert kubernetes_address(str(address)) == address


@given(ADDRESSES, st.ip_addresses(), st.integers(1, 65535))
def test_its_workers_have_urls_in_normal_form(address: KubernetesAddress, host: object, port: int) -> None:
    urls = address.worker_urls(str(host), port)
    assert len(urls) == max(address.ranks, 1)
    if not address.path.endswith("/v1") and address.ranks < 50:
        assert {worker_url(url) for url in urls} == urls


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        (
            "k8s+http://moe?selector=role=decode,app=vllm&port=8200",
            KubernetesAddress("http", "moe", "role=decode,app=vllm", ("8200",), "", "", 0),
        ),
        (
            "k8s+https://?selector=tier%20in%20(a,%20b),!old&port=http&port=8201&path=/vllm/",
            KubernetesAddress("https", "", "tier in (a, b),!old", ("http", "8201"), "", "/vllm", 0),
        ),
        (
            "k8s+http://moe/inferencepools/qwen-3.a",
            KubernetesAddress("http", "moe", "", (), "qwen-3.a", "", 0),
        ),
        (
            "k8s+http:///inferencepools/qwen?selector=llm-d.ai/role=prefill&port=8200#dp=4",
            KubernetesAddress("http", "", "llm-d.ai/role=prefill", ("8200",), "qwen", "", 4),
        ),
    ],
)
def test_addresses(text: str, meant: KubernetesAddress) -> None:
    assert kubernetes_address(text) == meant


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("k8s+http://", "no selector"),
        ("k8s+moe?selector=a&port=1", "no address of pods"),
        ("k8s+ftp://moe?selector=a&port=1", "no address of pods"),
        ("k8s+http://moe?port=1", "no selector"),
        ("k8s+http://moe?selector=a", "no port"),
        ("k8s+http://moe:80?selector=a&port=1", "no namespace"),
        ("k8s+http://Moe?selector=a&port=1", "no namespace"),
        ("k8s+http://moe/pools/x", "not /inferencepools/NAME"),
        ("k8s+http://moe/inferencepools/", "not /inferencepools/NAME"),
        ("k8s+http://moe/inferencepools/a/b", "not /inferencepools/NAME"),
        ("k8s+http://moe?selector=,&port=1", "no label selector"),
        ("k8s+http://moe?selector=a=b=c&port=1", "no label selector"),
        ("k8s+http://moe?selector=&port=1", "no label selector"),
        ("k8s+http://moe?selector=a%26b&port=1", "no label selector"),
        ("k8s+http://moe?selector=a&port=0", "no port"),
        ("k8s+http://moe?selector=a&port=65536", "no port"),
        ("k8s+http://moe?selector=a&port=HTTP", "no port"),
        ("k8s+http://moe?selector=a&port=1&port=1", "there twice"),
        ("k8s+http://moe?selector=a&selector=b&port=1", "there twice"),
        ("k8s+http://moe?selector=a&port=1&weight=2", "no part of an address"),
        ("k8s+http://moe?selector=a&port=1&path=vllm", "does not begin with /"),
        ("k8s+http://moe?selector=a&port=1&path=/..", "not a worker's URL"),
        ("k8s+http://moe?selector=a&port=1&path=/v1", "leave out /v1"),
        ("k8s+http://moe?selector=a&port=1&&", "cannot be read"),
        ("k8s+http://moe?selector=a&port=1#rank=1", "not dp=N"),
        ("k8s+http://moe?selector=a&port=1#", "not dp=N"),
    ],
)
def test_addresses_that_are_refused(text: str, problem: str) -> None:
    with pytest.raises(UrlError, match=problem):
        kubernetes_address(text)
    with pytest.raises(ConfigError, match=f"worker.*{problem}"):
        RouterConfig.of(worker=(text,))


@given(st.text())
def test_any_text_is_an_address_or_refused(text: str) -> None:
    try:
        address = kubernetes_address(f"k8s+{text}")
    except UrlError:
        return
    assert kubernetes_address(str(address)) == address


def test_the_same_pods_twice_are_a_mistake() -> None:
    with pytest.raises(ConfigError, match="twice"):
        RouterConfig.of(worker=("k8s+http://moe?selector=a&port=1", "k8s+http://moe?port=1&selector=a"))


@pytest.mark.parametrize("url", ["127.0.0.1:8001", "http://a/x?y", "http://a#rank=1", 3, ""])
def test_an_address_of_the_api_is_a_url(url: object) -> None:
    with pytest.raises(ConfigError, match="kubernetes_api"):
        RouterConfig.of(worker=("http://w:1",), kubernetes_api=url)
