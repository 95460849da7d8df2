"""Transfer parameters in answers."""

from __future__ import annotations

import json

import pytest

from eldr.router.protocols.vllm_nixl import VllmNixl


@pytest.mark.parametrize("raw", [b'{"a":1}', b'["kv"]', b'{"text":"kv_transfer_params","kv_transfer_params":null}'])
def test_an_answer_without_transfer_parameters_is_left_as_it_is(raw: bytes) -> None:
    assert json.loads(VllmNixl().for_client(raw)) == json.loads(raw)


@pytest.mark.parametrize("colon", [b":", b" : "])
@pytest.mark.parametrize("key", [b"kv_transfer_params", b"ec_transfer_params"])
def test_transfer_parameters_are_taken_out(key: bytes, colon: bytes) -> None:
    raw = b'{"text":"x","%b"%b{"remote_host":"10.0.0.1"}}' % (key, colon)
    assert json.loads(VllmNixl().for_client(raw)) == {"text": "x", key.decode(): None}
