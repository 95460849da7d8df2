"""The OpenAI API of clients: bodies of /v1/completions and /v1/chat/completions, and what they ask for."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import orjson

from eldr.router.http.errors import ApiError

COMPLETIONS = b"/v1/completions"
CHAT = b"/v1/chat/completions"

# A token id in a JSON array takes about this many bytes of text.
BYTES_PER_TOKEN = 4


def parse_body(path: bytes, raw: bytes, reserved: Collection[str]) -> dict[str, Any]:
    """Parse the body as an object. Of duplicate keys the last one counts, for every reader.

    reserved: fields that only the router may send, besides those that start with `eldr_`.
    Raises ApiError 400 for a body that is not a JSON object, contains such fields, or has no prompt.
    """
    body = json_object(raw)
    refuse_router_fields(body, reserved)
    model(body)
    if path == CHAT:
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise ApiError(400, "messages must be a non-empty array", param="messages")
    elif not body.get("prompt") and not body.get("prompt_embeds"):
        raise ApiError(400, "prompt must be given and not be empty", param="prompt")
    return body


def json_object(raw: bytes) -> dict[str, Any]:
    """Parse a request body that must be a JSON object. Raises ApiError 400."""
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise ApiError(400, f"the request body is not valid JSON: {error}") from None
    if not isinstance(body, dict):
        raise ApiError(400, "the request body must be a JSON object")
    return body


def model(body: dict[str, Any]) -> str | None:
    """The model that a body names. None if it names none. Raises ApiError 400."""
    name = body.get("model")
    if name is not None and not isinstance(name, str):
        raise ApiError(400, "model must be a string", param="model")
    return name


def refuse_router_fields(body: dict[str, Any], reserved: Collection[str]) -> None:
    """Raise ApiError 400 for fields that only the router may send. reserved: see parse_body."""
    _refuse_router_fields(body, "", reserved)
    extra = body.get("vllm_xargs")
    if isinstance(extra, dict):
        _refuse_router_fields(extra, "vllm_xargs.", reserved)


def _refuse_router_fields(fields: dict[str, Any], where: str, reserved: Collection[str]) -> None:
    for key in fields:
        if key in reserved or key.startswith("eldr_"):
            raise ApiError(400, f"{where}{key} is set by the router, not by a client", param=f"{where}{key}")


def max_tokens(path: bytes, body: dict[str, Any]) -> int | None:
    """The client's limit on generated tokens. None if there is none."""
    value = body.get("max_completion_tokens") if path == CHAT else None
    if value is None:
        value = body.get("max_tokens")
    return value if type(value) is int else None


def wants_usage(body: dict[str, Any]) -> bool:
    """Whether a stream should end with the usage."""
    options = body.get("stream_options")
    return isinstance(options, dict) and bool(options.get("include_usage"))


def wants_stream(body: dict[str, Any]) -> bool | None:
    """Whether the answer should be streamed.

    None for a value that is not a boolean, which a worker may read either way.
    """
    stream = body.get("stream", False)
    return stream if isinstance(stream, bool) else None


def prompt_start(path: bytes, body: dict[str, Any], window_bytes: int) -> bytes:
    """Return the first `window_bytes` of the prompt, by which requests with the same start are recognised.

    For a chat request see `chat_start`.
    """
    if path == CHAT:
        return chat_start(body["messages"], window_bytes)
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
        prompt = prompt[0]
    if isinstance(prompt, str):
        # The first window_bytes bytes hold at most window_bytes characters.
        return prompt[:window_bytes].encode()[:window_bytes]
    if isinstance(prompt, list):
        return orjson.dumps(prompt[: max(1, window_bytes // BYTES_PER_TOKEN)])
    return orjson.dumps(prompt)


def chat_start(messages: list[Any], window_bytes: int) -> bytes:
    """Return the start of a conversation as canonical JSON: all leading system messages and `window_bytes` beyond them.

    Many conversations share a system prompt. With a window from the very start, a long system prompt would send them
    all to one worker. With this window, each worker caches the system prompt once, and conversations spread by what
    follows it.
    """
    leading = 0
    while leading < len(messages) and _is_system(messages[leading]):
        leading += 1
    start = orjson.dumps(messages[:leading], option=orjson.OPT_SORT_KEYS)
    rest = b""
    for message in messages[leading:]:
        rest += orjson.dumps(message, option=orjson.OPT_SORT_KEYS)
        if len(rest) >= window_bytes:
            break
    return start + rest[:window_bytes]


def _is_system(message: object) -> bool:
    return isinstance(message, dict) and message.get("role") in ("system", "developer")
