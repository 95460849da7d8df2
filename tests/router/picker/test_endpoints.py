"""Workers and subsets as gateways write them."""

from __future__ import annotations

from typing import Any

import pytest

from eldr.router.fleet.workers import Fleet
from eldr.router.picker.endpoints import endpoint_of, served_by, subset_of, urls_in
from eldr.router.picker.messages_pb2 import Metadata


@pytest.mark.parametrize(
    ("url", "endpoint"),
    [
        ("http://10.0.0.1:8000", "10.0.0.1:8000"),
        ("http://10.0.0.1", "10.0.0.1:80"),
        ("https://10.0.0.1", "10.0.0.1:443"),
        ("http://[fd00::1]:8000", "[fd00::1]:8000"),
        ("http://[FD00:0:0:0::0A01]:8000", "[fd00::a01]:8000"),
    ],
)
def test_endpoints_have_an_address_and_a_port(url: str, endpoint: str) -> None:
    assert endpoint_of(url) == endpoint


def metadata(namespace: str, key: str, value: Any) -> Metadata:
    found = Metadata()
    fields = found.filter_metadata[namespace].fields
    if isinstance(value, str):
        fields[key].string_value = value
    elif isinstance(value, list):
        fields[key].list_value.extend(value)
    else:
        fields[key].number_value = value
    return found


@pytest.mark.parametrize(
    ("value", "subset"),
    [
        ("10.0.0.1:1", {"10.0.0.1:1"}),
        ("10.0.0.1:1,10.0.0.2:1", {"10.0.0.1:1", "10.0.0.2:1"}),
        (" 10.0.0.1:1 , 10.0.0.2:1,", {"10.0.0.1:1", "10.0.0.2:1"}),
        (["10.0.0.1:1", "10.0.0.2:1"], {"10.0.0.1:1", "10.0.0.2:1"}),
        ([], set()),
        ("", set()),
        ([3, "10.0.0.1:1"], {"10.0.0.1:1"}),
        (3.5, set()),
    ],
)
def test_subsets_are_texts_or_lists(value: Any, subset: set[str]) -> None:
    found = metadata("envoy.lb.subset_hint", "x-gateway-destination-endpoint-subset", value)
    assert subset_of(found) == frozenset(subset)


@pytest.mark.parametrize(
    ("namespace", "key"),
    [("envoy.lb", "x-gateway-destination-endpoint-subset"), ("envoy.lb.subset_hint", "another-key")],
)
def test_other_metadata_is_no_subset(namespace: str, key: str) -> None:
    assert subset_of(metadata(namespace, key, "10.0.0.1:1")) is None
    assert subset_of(Metadata()) is None


def test_where_an_answer_comes_from() -> None:
    assert served_by(metadata("envoy.lb", "x-gateway-destination-endpoint-served", "10.0.0.1:1")) == "10.0.0.1:1"
    assert served_by(metadata("envoy.lb", "x-gateway-destination-endpoint-served", ["10.0.0.2:1"])) == "10.0.0.2:1"
    assert served_by(Metadata()) == ""


def test_endpoints_become_workers_of_any_role() -> None:
    fleet = Fleet()
    for url, role in (
        ("http://10.0.0.1:1", "prefill"),
        ("http://10.0.0.2:1", "decode"),
        ("http://10.0.0.2:2", "decode"),
        ("http://[fd00::1]:8000", "decode"),
    ):
        fleet.add(url, role, 1)  # type: ignore[arg-type]
    assert urls_in(fleet, {"10.0.0.1:1", "10.0.0.2:2"}) == {"http://10.0.0.1:1", "http://10.0.0.2:2"}
    assert urls_in(fleet, {"10.0.0.2"}) == {"http://10.0.0.2:1", "http://10.0.0.2:2"}
    for same in ("[fd00::1]:8000", "[fd00::1]", "fd00::1"):
        assert urls_in(fleet, {same}) == {"http://[fd00::1]:8000"}
    assert urls_in(fleet, {"10.0.0.9:1", "fd00::1:8000"}) == set()
