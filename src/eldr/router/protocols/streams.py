"""What the events of a streamed answer mean, for each path that can be streamed.

To add a path, add its row to `FORMS`. The rows follow what vLLM 0.32 sends (vllm/entrypoints/openai/*/serving.py,
anthropic/serving.py, openai/responses/api_router.py) and what the clients of each API accept.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any, Final

import orjson

from eldr.event_stream import Event
from eldr.router.http.errors import MESSAGES_TYPES, ApiError
from eldr.router.protocols.openai import CHAT, COMPLETIONS, MESSAGES, RESPONSES

# The start of an error whose event is too long to be kept whole.
ERROR_START: Final = re.compile(rb'\s*\{\s*"error"\s*:\s*[{"]')
USAGE: Final = re.compile(rb'"(?:completion|output)_tokens":\s*(\d{1,9})')
# The statuses of the errors of the messages API that are not the server's.
MESSAGES_STATUSES: Final = {name: status for status, name in MESSAGES_TYPES.items()}
# vLLM makes a stream of messages from one of chat. It cannot read an error of the latter, and sends an internal_error,
# whose message shows the end of what it could not read, and there the status.
WRAPPED_STATUS: Final = re.compile(r"'code': (4\d\d)\}\}, input_type=dict")
RESPONSES_OPENING: Final = frozenset((b"response.created", b"response.queued", b"response.in_progress"))


class StreamForm:
    """How the streams of one path end, fail and count. This class is the form of completions.

    opening: how many events come before the first token.
    """

    def __init__(self, opening: int = 0) -> None:
        self.opening = opening

    def is_end(self, event: Event) -> bool:
        """Whether the stream is complete with this event."""
        return event.data == b"[DONE]"

    def is_opening(self, event: Event) -> bool:
        """Whether an event says no more than that the request was accepted. It waits for the next one."""
        return False

    def is_token(self, event: Event) -> bool:
        """Whether an event that is not the end counts as a token, if it does not belong to the opening."""
        return True

    def error_status(self, data: bytes, whole: bool = True) -> int:
        """The HTTP status that an event reports as an error. 0 if it reports none.

        data: the event's data. whole: False if there is more of it. Such a long error repeats what the client sent, and
        counts as the client's.
        """
        if not whole:
            return 400 if ERROR_START.match(data) else 0
        # A quotation mark inside a JSON string is escaped, so few tokens pass. `in` would raise an error and catch it,
        # because CPython takes the left side for a number first.
        if data.find(b'"error"') < 0:
            return 0
        try:
            fields = orjson.loads(data)
        except orjson.JSONDecodeError:
            return 500 if ERROR_START.match(data) else 0
        return self._status(fields) if isinstance(fields, dict) else 0

    def _status(self, fields: dict[str, Any]) -> int:
        error = fields.get("error")
        if error is None:
            return 0
        code = error.get("code") if isinstance(error, dict) else None
        return code if type(code) is int and 400 <= code < 600 else 500

    def error_event(self, error: ApiError) -> bytes:
        """The event that reports `error` to the client."""
        return b"data: %b\n\n" % error.body()


class TypedForm(StreamForm):
    """The form of an API whose events have types. It has no [DONE]."""

    def __init__(self, ends: Collection[bytes], tokens: Collection[bytes]) -> None:
        super().__init__()
        self._ends = frozenset(ends)
        self._tokens = frozenset(tokens)

    def is_end(self, event: Event) -> bool:
        return event.type in self._ends

    def is_token(self, event: Event) -> bool:
        return event.type in self._tokens


class Messages(TypedForm):
    """/v1/messages of Anthropic's API. An error is the last event."""

    def _status(self, fields: dict[str, Any]) -> int:
        error = fields.get("error")
        if fields.get("type") != "error":
            return 0
        if not isinstance(error, dict):
            return 500
        wrapped = WRAPPED_STATUS.search(str(error.get("message")))
        return int(wrapped[1]) if wrapped else MESSAGES_STATUSES.get(str(error.get("type")), 500)

    def error_event(self, error: ApiError) -> bytes:
        return b"event: error\ndata: %b\n\n" % error.messages_body()


class Responses(TypedForm):
    """/v1/responses of the OpenAI API. Every response has a field `error`, which is null unless it failed."""

    def is_opening(self, event: Event) -> bool:
        """vLLM sends these before its engine has done anything, so a failure after them can still be repaired."""
        return event.type in RESPONSES_OPENING

    def _status(self, fields: dict[str, Any]) -> int:
        return 500 if fields.get("type") in ("error", "response.failed") else 0

    def error_event(self, error: ApiError) -> bytes:
        body = {"type": "error", "code": error.type, "message": error.message, "param": error.param}
        return b"event: error\ndata: %b\n\n" % orjson.dumps(body)


FORMS: Final[dict[bytes, StreamForm]] = {
    COMPLETIONS: StreamForm(),
    CHAT: StreamForm(opening=1),  # the role
    MESSAGES: Messages(ends=(b"message_stop", b"error"), tokens=(b"content_block_delta",)),
    RESPONSES: Responses(
        ends=(b"response.completed", b"response.incomplete", b"response.failed", b"error"),
        tokens=(
            b"response.output_text.delta",
            b"response.reasoning_text.delta",
            b"response.function_call_arguments.delta",
        ),
    ),
}


def usage_tokens(data: bytes) -> int:
    """The number of generated tokens that an event states in its usage. 0 if it states none."""
    found = USAGE.search(data) if data.find(b'_tokens"') >= 0 else None
    return int(found[1]) if found else 0
