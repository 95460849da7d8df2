"""What ends a stream, what is an error and what is a token, on each path that can be streamed."""

from __future__ import annotations

import json

import pytest

from eldr.event_stream import EventReader
from eldr.router.http.errors import ApiError
from eldr.router.protocols.streams import FORMS, usage_tokens

# Events as vLLM 0.32 writes them: its serving.py of each path. With each, whether it ends the stream, whether it is a
# token, and the status that it reports.
Case = tuple[bytes, bool, bool, int]
OPENAI: list[Case] = [
    (b'data: {"id":"cmpl-1","choices":[{"index":0,"text":"a"}],"usage":null}', False, True, 0),
    (b'data: {"id":"cmpl-1","choices":[{"index":0,"text":"an \\"error\\": {"}]}', False, True, 0),
    (b'data: {"id":"cmpl-1","choices":[{"index":0,"text":"a"}],"error":null}', False, True, 0),
    (
        b'data: {"error": {"message": "died", "type": "InternalServerError", "param": null, "code": 500}}',
        False,
        True,
        500,
    ),
    (b'data: {"error": {"message": "bad", "type": "BadRequestError", "param": null, "code": 400}}', False, True, 400),
    (b'data:{"object":"chat.completion.chunk","error":{"message":"no code"}}', False, True, 500),
    (b'data: {"error":{"message":"a code of letters","code":"server_error"}}', False, True, 500),
    (b'data: {"error":"died"}', False, True, 500),
    (b'data: {"error": {"message": "cut', False, True, 500),
    (b'data: ["error"]', False, True, 0),
    (b"data: [DONE]", True, True, 0),
    (b"data:  [DONE]", False, True, 0),
]
# What vLLM 0.32 makes of an error of the chat stream that it converts.
WRAPPED = (
    b'event: error\ndata: {"type":"error","error":{"type":"internal_error","message":"2 validation errors for '
    b"ChatCompletionStreamResponse\\nmodel\\n  Field required [type=missing, input_value={'error': {'message': "
    b"'Gr...am': None, 'code': %d}}, input_type=dict]\\n    For further information visit https://errors.pydantic.dev"
    b'/2.14/v/missing"}}'
)
MESSAGES: list[Case] = [
    (b'event: message_start\ndata: {"type":"message_start","message":{"id":"chatcmpl-1"}}', False, False, 0),
    (b'event: content_block_start\ndata: {"index":0,"type":"content_block_start"}', False, False, 0),
    (b'event: content_block_delta\ndata: {"index":0,"type":"content_block_delta"}', False, True, 0),
    (b'event: message_delta\ndata: {"type":"message_delta","usage":{"output_tokens":4}}', False, False, 0),
    (b'event: message_stop\ndata: {"type":"message_stop"}', True, False, 0),
    (b'event: error\ndata: {"type":"error","error":{"type":"internal_error","message":"died"}}', True, False, 500),
    (b'event: error\ndata: {"type":"error","error":{"type":"invalid_request_error","message":"x"}}', True, False, 400),
    (WRAPPED % 400, True, False, 400),
    (WRAPPED % 500, True, False, 500),
    (b"data: [DONE]", False, False, 0),
]
RESPONSES: list[Case] = [
    (
        b'event: response.created\ndata: {"response":{"id":"resp_1","error":null},"type":"response.created"}',
        False,
        False,
        0,
    ),
    (b'event: response.output_text.delta\ndata: {"delta":"a","type":"response.output_text.delta"}', False, True, 0),
    (b'event: response.completed\ndata: {"response":{"error":null},"type":"response.completed"}', True, False, 0),
    (b'event: response.incomplete\ndata: {"response":{"error":null},"type":"response.incomplete"}', True, False, 0),
    (
        b'event: response.failed\ndata: {"response":{"error":{"code":"server_error"}},"type":"response.failed"}',
        True,
        False,
        500,
    ),
    (b'event: error\ndata: {"code":"x","message":"m","type":"error"}', True, False, 500),
]
CASES = {
    b"/v1/completions": OPENAI,
    b"/v1/chat/completions": OPENAI,
    b"/v1/messages": MESSAGES,
    b"/v1/responses": RESPONSES,
}


def test_every_path_is_tested() -> None:
    assert CASES.keys() == FORMS.keys()


@pytest.mark.parametrize(("path", "case"), [(path, case) for path, cases in CASES.items() for case in cases])
def test_what_an_event_means(path: bytes, case: Case) -> None:
    text, ends, is_token, status = case
    form = FORMS[path]
    (event,) = EventReader(1024).feed(text + b"\n\n")
    assert form.is_end(event) is ends
    assert ends or form.is_token(event) is is_token
    assert form.error_status(event.data) == status


@pytest.mark.parametrize(
    ("start", "status"),
    [
        (b'{"error":{"message":"xx', 400),
        (b' { "error" : "xx', 400),
        (b'{"error":null,"choices":[', 0),
        (b'{"id":"x', 0),
    ],
)
def test_an_error_that_is_too_long_is_the_clients(start: bytes, status: int) -> None:
    assert FORMS[b"/v1/completions"].error_status(start, whole=False) == status


@pytest.mark.parametrize("path", FORMS)
def test_an_error_of_the_router_reads_as_one(path: bytes) -> None:
    form = FORMS[path]
    for status in (400, 404, 422, 429, 500, 502, 503, 504):
        (event,) = EventReader(1024).feed(form.error_event(ApiError(status, "no\nworker")))
        assert form.error_status(event.data) >= (400 if path != b"/v1/responses" else 500)
        assert "no\nworker" in str(json.loads(event.data)).encode().decode("unicode_escape")
        assert event.type == (b"" if b"completions" in path else b"error")


def test_tokens_of_the_usage() -> None:
    assert usage_tokens(b'{"usage":{"prompt_tokens":9,"completion_tokens": 4}}') == 4
    assert usage_tokens(b'{"usage":{"input_tokens":9,"output_tokens":5,"output_tokens_details":{}}}') == 5
    assert usage_tokens(b'{"text":"\\"completion_tokens\\":4"}') == 0
