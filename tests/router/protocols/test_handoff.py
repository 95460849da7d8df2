"""The hand-off and its lease."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from eldr.kernels import JsonObject
from eldr.router.fleet.workers import Worker
from eldr.router.protocols.handoff import UNKNOWN_LEASE_S, HandOff, Lease
from eldr.router.protocols.vllm_nixl import VllmNixl
from tests.router.fake_worker import counts_wire


def read_handoff(value: object, sent_s: float) -> HandOff | None:
    protocol = VllmNixl()
    answer = JsonObject(json.dumps(value).encode(), protocol.answer_names)
    return protocol.read_handoff(answer, Worker("http://p:1", "prefill", 1), sent_s)


def answer(**params: Any) -> dict[str, Any]:
    return {"kv_transfer_params": {"do_remote_prefill": True, **params}, "usage": {"prompt_tokens": 4}}


@pytest.mark.parametrize("skew_s", [-3600.0, -1.0, 0.0, 1.0, 3600.0])
def test_a_lease_survives_any_clock(skew_s: float) -> None:
    sent_s, received_s, now_unix_s = 100.0, 102.0, 5000.0
    wire = {"left_s": 30.0, "unix_s": now_unix_s - 0.5 + skew_s}  # said half a second before it was received
    lease = Lease.from_wire(wire, sent_s, received_s, now_unix_s)
    assert lease is not None
    # Whatever the clock says, the answer is between zero and two seconds old.
    assert 28.0 <= lease.left_at(received_s) <= 30.0
    if skew_s == 0.0:
        assert lease.left_at(received_s) == pytest.approx(29.5)
    assert lease.left_at(received_s + 7) == pytest.approx(lease.left_at(received_s) - 7)


@pytest.mark.parametrize("wire", [None, 3, {}, {"left_s": "x", "unix_s": 1}, {"left_s": 1}])
def test_a_lease_that_is_not_stated_is_short(wire: Any) -> None:
    before_s = time.monotonic()
    handoff = read_handoff(answer(eldr_lease=wire), before_s)
    after_s = time.monotonic()
    assert handoff is not None
    assert handoff.lease is None
    assert handoff.left_s(after_s) <= UNKNOWN_LEASE_S <= handoff.left_s(before_s)
    assert "eldr_lease" not in json.loads(handoff.spend(record=False))


def test_a_handoff_can_be_spent_once() -> None:
    handoff = read_handoff(answer(eldr_counts=counts_wire(4), remote_block_ids=[1]), time.monotonic())
    assert handoff is not None
    assert handoff.counts is not None
    assert handoff.counts.prompt_tokens == 4
    assert json.loads(handoff.spend(record=True)) == {
        "do_remote_prefill": True,
        "remote_block_ids": [1],
        "eldr_record": True,
    }
    with pytest.raises(AssertionError):
        handoff.spend(record=False)


@pytest.mark.parametrize(
    "value",
    [{}, {"kv_transfer_params": []}, {"kv_transfer_params": None}, {"kv_transfer_params": {"do_remote_prefill": 1}}],
)
def test_an_answer_without_a_handoff(value: Any) -> None:
    assert read_handoff(value, 0.0) is None


def test_parameters_are_sent_on_as_they_were_written() -> None:
    params = b'{"do_remote_prefill": true, "remote_block_ids": [18446744073709551617], "x": 1e999, "eldr_lease": null}'
    protocol = VllmNixl()
    answer = JsonObject(b'{"kv_transfer_params":%b}' % params, protocol.answer_names)
    handoff = protocol.read_handoff(answer, Worker("http://p:1", "prefill", 1), 0.0)
    assert handoff is not None
    assert handoff.spend(record=False) == params.replace(b', "eldr_lease": null', b"")
