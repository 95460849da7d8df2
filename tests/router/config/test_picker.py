"""The settings of an endpoint picker: its own, those of a router, and those that mean nothing to it."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from eldr.cli import epp
from eldr.router.config.picker import PickerConfig
from eldr.router.config.settings import ConfigError, RouterConfig
from eldr.settings import given, settings_of

PAGE = Path(__file__).parents[3] / "docs" / "gateway.md"
OWN = {"grpc_listen", "phase", "fallbacks"}
# They are about a router's own legs, and about clients that speak to it.
WITHOUT = {
    "api_key_file", "allowed_origins", "request_timeout_s", "prefill_timeout_s", "decode_first_byte_timeout_s",
    "decode_idle_timeout_s", "decode_answer_timeout_s", "stream_keepalive_s", "retries", "retry_ratio", "retry_burst",
    "otel_endpoint", "otel_sampling", "routed_experts_share", "processes",
}  # fmt: skip


def test_it_has_a_routers_settings_but_for_those_that_mean_nothing_to_it() -> None:
    routers = {one.key for one in settings_of(RouterConfig)}
    assert {one.key for one in settings_of(PickerConfig)} == routers - WITHOUT | OWN


@pytest.mark.parametrize("key", sorted(WITHOUT))
def test_what_means_nothing_to_it_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown key '{key}'"):
        PickerConfig.of(worker=["http://10.0.0.1:1"], **{key: "1"})


def test_every_key_and_every_flag() -> None:
    parser = argparse.ArgumentParser()
    epp.add_arguments(parser)
    text = "--worker http://10.0.0.1:1 --grpc-listen [::1]:9002 --phase pair --fallbacks 3 --policy rr --port 0"
    flags = given(parser.parse_args(text.split()), PickerConfig)
    config = PickerConfig.of(**flags)
    assert (config.picker.grpc_listen, config.picker.phase, config.picker.fallbacks) == ("[::1]:9002", "pair", 3)
    assert (config.placement.policy, config.listen.port) == ("rr", 0)
    known = {one.flag for one in settings_of(PickerConfig) if one.flag}
    assert known == set(re.findall(r"--[a-z-]+", parser.format_usage())) - {"--config"}


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({}, "no workers are given"),
        ({"worker": ["http://worker:8000"]}, "not its name"),
        ({"decode": ["http://10.0.0.1:8000/path"]}, "does not change paths"),
        ({"decode": ["http://10.0.0.1:8000#rank=1"]}, "not ranks"),
        ({"decode": ["dns+http://decode:8000/path"]}, "does not change paths"),
        ({"decode": ["k8s+http://?selector=app=a&port=8000&path=/path"]}, "does not change paths"),
        ({"decode": ["k8s+http://?selector=app=a&port=8000#dp=2"]}, "not ranks"),
        ({"worker": ["http://10.0.0.1:1"], "grpc_listen": "9002"}, "grpc_listen"),
        ({"worker": ["http://10.0.0.1:1"], "phase": "both"}, "phase"),
        ({"worker": ["http://10.0.0.1:1"], "fallbacks": 17}, "fallbacks"),
    ],
)
def test_what_no_gateway_could_use_is_refused(settings: dict[str, object], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        PickerConfig.of(**settings)


def test_workers_that_are_found_have_addresses() -> None:
    found = ["dns+http://decode:8000", "k8s+http://serving/inferencepools/qwen3", "k8s+http://?selector=a=b&port=http"]
    assert PickerConfig.of(decode=found).workers.decode == tuple(found)


@pytest.mark.parametrize("leg", ["prefill", "decode"])
def test_one_leg_alone_will_do(leg: str) -> None:
    assert PickerConfig.of(**{leg: ["http://[fd00::1]:8000"]}).workers.endpoints


def test_the_page_lists_its_own() -> None:
    part = PAGE.read_text().partition("<!-- settings -->")[2].partition("<!-- /settings -->")[0]
    assert set(re.findall(r"^\| `([a-z_]+)`", part, re.MULTILINE)) == OWN
