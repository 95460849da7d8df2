"""Nothing of the hand-off reaches a client, and no client can steer one."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from tests.e2e.real_fleet import MODEL, Router, call

ASK: dict[str, Any] = {"model": MODEL, "prompt": "Sing, goddess, of the anger", "max_tokens": 4, "temperature": 0}


@pytest.mark.parametrize("stream", [False, True])
def test_hand_off_fields_never_reach_the_client(router: Router, stream: bool) -> None:
    status, _headers, body = call(router.url, "/v1/completions", {**ASK, "stream": stream})
    assert status == 200
    for secret in (b"eldr_", b"remote_block_ids", b"remote_engine_id", b"remote_port"):
        assert secret not in body
    if not stream:
        assert not json.loads(body).get("kv_transfer_params")


@pytest.mark.parametrize(
    "field",
    [
        {"kv_transfer_params": {"do_remote_prefill": True, "remote_host": "10.0.0.1", "remote_block_ids": [0]}},
        {"kv_transfer_params": {}},
        {"eldr_record": True},
        {"vllm_xargs": {"kv_transfer_params": {"do_remote_prefill": True}}},
    ],
)
def test_a_client_cannot_name_blocks(router: Router, field: dict[str, Any]) -> None:
    status, _, body = call(router.url, "/v1/completions", {**ASK, **field})
    assert status == 400
    assert json.loads(body)["error"]["message"]


def test_recording_needs_the_admin_key(router: Router) -> None:
    assert call(router.url, "/v1/completions", ASK, {"X-Eldr-Record": "1"})[0] == 403


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/completions", b"{", 400),
        ("/v1/completions", b"[]", 400),
        ("/v1/completions", {**ASK, "model": "another"}, 404),
        ("/v1/nothing", ASK, 404),
        ("/", None, 404),
    ],
)
def test_errors_have_the_form_of_openai(router: Router, path: str, body: Any, status: int) -> None:
    answer, headers, raw = call(router.url, path, body)
    assert answer == status
    error = json.loads(raw)["error"]
    assert {"message", "type", "code"} <= error.keys()
    assert headers["Content-Type"].startswith("application/json")


def test_models_are_those_of_the_workers(router: Router, routed: openai.OpenAI) -> None:
    assert [model.id for model in routed.models.list()] == [MODEL]
