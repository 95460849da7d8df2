"""Transfer parameters in answers."""

from __future__ import annotations

import json

import pytest

from eldr.kernels import JsonObject
from eldr.router.protocols.vllm_nixl import VllmNixl


def for_client(raw: bytes) -> bytes:
    """The answer as the client gets it, the same whether or not its members are known."""
    unknown = VllmNixl().for_client(raw, None)
    if raw.startswith(b"{"):
        assert VllmNixl().for_client(raw, JsonObject(raw, VllmNixl.answer_names)) == unknown
    return unknown


@pytest.mark.parametrize(
    "raw",
    [
        b'{"a":1}',
        b'["kv"]',
        b'["kv_transfer_params"]',
        b'{"text":"kv_transfer_params", "kv_transfer_params": null,"a":{"ec_transfer_params":1}}',
    ],
)
def test_an_answer_without_transfer_parameters_is_left_as_it_is(raw: bytes) -> None:
    assert for_client(raw) == raw


@pytest.mark.parametrize("colon", [b":", b" : "])
@pytest.mark.parametrize("key", [b"kv_transfer_params", b"ec_transfer_params"])
def test_transfer_parameters_are_taken_out(key: bytes, colon: bytes) -> None:
    raw = b'{"text":"x","%b"%b{"remote_host":"10.0.0.1"}}' % (key, colon)
    assert json.loads(for_client(raw)) == {"text": "x", key.decode(): None}
    twice = b'{"%b":{"remote_host":"10.0.0.1"},"%b":null}' % (key, key)
    assert for_client(twice) == b'{"%b":null}' % key
