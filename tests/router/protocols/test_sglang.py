"""The bodies of SGLang's legs, and the names of their answers."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eldr.kernels import JsonNames, JsonObject
from eldr.router.config.endpoint import Role
from eldr.router.fleet.workers import Worker
from eldr.router.protocols.openai import CHAT, COMPLETIONS, ENDPOINTS, RESPONSES
from eldr.router.protocols.sglang import Sglang

PROTOCOL = Sglang()
PATHS = (COMPLETIONS, CHAT, RESPONSES)
MEMBERS = ("stream", "stream_options", "rid", "bootstrap_room", "model", "n", "temperature", "max_tokens")
NAMES = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=40)


def prefill(url: str) -> Worker:
    return Worker(url, "prefill", 1, bootstrap_port=8998)


def body_of(path: bytes, text: bytes) -> JsonObject:
    return JsonObject(text, JsonNames(ENDPOINTS[path].members | PROTOCOL.members | PROTOCOL.reserved))


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("http://p0:30000", "p0"),
        ("https://10.0.0.1:30000/behind/a/gateway", "10.0.0.1"),
        ("http://[fd00::1]:30000", "fd00::1"),
    ],
)
def test_blocks_are_asked_for_at_the_host_of_the_prefill_worker(url: str, host: str) -> None:
    members = json.loads(b"{%b}" % PROTOCOL.rendezvous(prefill(url)))
    assert members.pop("bootstrap_room") in range(1, 2**63)
    assert members == {"bootstrap_host": host, "bootstrap_port": 8998}


def test_rooms_are_spread_over_63_bits() -> None:
    rooms = {json.loads(b"{%b}" % PROTOCOL.rendezvous(prefill("http://p:1")))["bootstrap_room"] for _ in range(2000)}
    assert len(rooms) == 2000
    assert all(0.4 < sum(room >> bit & 1 for room in rooms) / 2000 < 0.6 for bit in range(63))


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(PATHS),
    st.sampled_from(("prefill", "decode")),
    NAMES,
    st.dictionaries(
        st.sampled_from(
            ("stream", "stream_options", "rid", "bootstrap_room", "model", "n", "temperature", "max_tokens")
        ),
        st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=5),
    ),
)
def test_a_leg_has_the_clients_members_and_the_routers(
    path: bytes, role: Role, name: str, given_members: dict[str, Any]
) -> None:
    met = PROTOCOL.rendezvous(prefill("http://p:1"))
    raw = orjson.dumps(given_members)
    leg = json.loads(PROTOCOL.leg_body(ENDPOINTS[path], body_of(path, raw), role, met, name))
    key = "request_id" if path == RESPONSES else "rid"
    assert PROTOCOL.is_named_after(leg[key], name)
    assert PROTOCOL.event_is_named_after(b'{"id": %b, "choices": []}' % orjson.dumps(leg[key]), name)
    kept = {k: v for k, v in given_members.items() if k not in ("rid", "bootstrap_room")}
    if role == "prefill":
        kept = {k: v for k, v in kept.items() if k not in ("stream", "stream_options")}
    assert leg == kept | json.loads(b"{%b}" % met) | {key: leg[key]}


@given(NAMES, NAMES)
def test_an_answer_is_not_named_after_another_leg(one: str, other: str) -> None:
    body = body_of(COMPLETIONS, b"{}")
    name = json.loads(PROTOCOL.leg_body(ENDPOINTS[COMPLETIONS], body, "decode", b'"bootstrap_room":1', one))["rid"]
    if other not in (one, f"resp_{one}"):
        assert not PROTOCOL.is_named_after(name, other)
        assert not PROTOCOL.event_is_named_after(b'{"id":%b}' % orjson.dumps(name), other)
    assert not PROTOCOL.is_named_after(None, one)
    assert not PROTOCOL.is_named_after("\udc80", one)
    for leg in (f"{one}-prefill-1", f"{one}-decode-2"):
        name = json.loads(PROTOCOL.leg_body(ENDPOINTS[COMPLETIONS], body, "decode", b'"bootstrap_room":1', leg))["rid"]
        assert PROTOCOL.is_named_after(name, leg)
        assert not PROTOCOL.is_named_after(name, one)
