"""The OpenAI API of clients: what the members of the bodies of each endpoint mean, and what they ask for."""

from __future__ import annotations

import re
from typing import Any

import orjson

from eldr.kernels import NO_OBJECT, JsonTextError
from eldr.router.http.errors import ApiError
from eldr.router.protocols.json_object import ARRAY, OBJECT, QUOTE, JsonObject, Value, utf8
from eldr.router.protocols.lenient import boolean, whole_number

# Names that begin so are the router's own.
OWN = "eldr_"
# The largest limit on tokens that means anything. JSON's numbers have no end.
MOST_TOKENS = 2**53

COMMON = ("model", "priority", "request_id", "stream", "stream_options", "vllm_xargs")
NOTHING = re.compile(rb'(?:null|""|\[[ \t\r\n]*\])\Z')
LONG_BYTES = len(b"null")
STREAM_OPTIONS = frozenset(("include_usage", "continuous_usage_stats"))


class Endpoint:
    """An endpoint that generates text, and what the members of its bodies mean.

    A new endpoint is a row of ENDPOINTS. Of its bodies, only members that are named here or by the leg protocol are
    looked at.

    path: as in the request line.
    input: the member with the prompt.
    texts: whether a string there is a prompt.
    messages: whether an array there has messages. Otherwise it has prompts, or the token ids of one.
    limits: the members that limit the generated tokens. The first that is given counts.
    default_limit: the limit if none is given. None for as many as there is room for.
    output: the member of an answer that shows that it is one, an array.
    extra_events: how many events of a stream are no tokens.
    members: all members that matter: the above, those that matter for every endpoint, and those that matter here alone.
    """

    def __init__(
        self,
        path: bytes,
        *,
        input: str,
        texts: bool,
        messages: bool,
        limits: tuple[str, ...],
        default_limit: int | None,
        others: tuple[str, ...],
        output: str,
        extra_events: int,
    ) -> None:
        self.path = path
        self.input = input
        self.texts = texts
        self.messages = messages
        self.limits = limits
        self.default_limit = default_limit
        self.output = output
        self.extra_events = extra_events
        self.members = frozenset((*COMMON, input, *limits, *others))


COMPLETIONS = b"/v1/completions"
CHAT = b"/v1/chat/completions"

ENDPOINTS = {
    endpoint.path: endpoint
    for endpoint in (
        Endpoint(
            COMPLETIONS,
            input="prompt",
            texts=True,
            messages=False,
            limits=("max_tokens",),
            default_limit=16,
            others=("prompt_embeds", "suffix"),
            output="choices",
            extra_events=1,  # [DONE]
        ),
        Endpoint(
            CHAT,
            input="messages",
            texts=False,
            messages=True,
            limits=("max_completion_tokens", "max_tokens"),
            default_limit=None,
            others=("return_prompt_text",),
            output="choices",
            extra_events=2,  # the one that opens the stream as well
        ),
    )
}


def read_body(endpoint: Endpoint, raw: bytes, members: frozenset[str], reserved: frozenset[str]) -> JsonObject:
    """Return the body of a request to `endpoint`.

    members: names that the leg protocol wants to know besides the endpoint's.
    reserved: fields that only the router may send, besides those that start with `eldr_`. Null is as good as nothing.
    Raises ApiError 400 for a body that is not a JSON object, contains such fields, or has no prompt.
    """
    try:
        text = utf8(raw)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the request body is not valid JSON: it is not {error.encoding}") from None
    body = _object_of(text, members, OWN)
    _refuse_router_fields(body, reserved)
    _check_input(endpoint, body)
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


def _object_of(text: bytes, members: frozenset[str], prefix: str = "") -> JsonObject:
    try:
        return JsonObject(text, members, prefix)
    except JsonTextError as error:
        if error.fault == NO_OBJECT:
            raise ApiError(400, "the request body must be a JSON object") from None
        raise ApiError(400, f"the request body is not valid JSON: {error}") from None


def _refuse_router_fields(body: JsonObject, reserved: frozenset[str]) -> None:
    text = body.text
    for name, _, value, end, _ in body.members:
        if name.startswith(OWN):
            _refuse(name)
        elif name in reserved:
            if text[value:end] != b"null":
                _refuse(name)
        elif name == "vllm_xargs" and text[value] == OBJECT:
            for inner, _, _, _, _ in _object_of(text[value:end], reserved, OWN).members:
                _refuse(f"vllm_xargs.{inner}")


def _refuse(name: str) -> None:
    raise ApiError(400, f"{name} is set by the router, not by a client", param=name)


def _check_input(endpoint: Endpoint, body: JsonObject) -> None:
    if _is_given(body, endpoint.input):
        start, _ = body.span(endpoint.input) or (0, 0)
        first = body.text[start]
        if first == ARRAY or not endpoint.messages or (endpoint.texts and first == QUOTE):
            return
    elif not endpoint.messages and _is_given(body, "prompt_embeds"):
        return
    what = "a non-empty array" if endpoint.messages else "given and not be empty"
    raise ApiError(400, f"{endpoint.input} must be {what}", param=endpoint.input)


def _is_given(body: JsonObject, name: str) -> bool:
    """Whether a member is there and not null, and no empty string or array."""
    span = body.span(name)
    if span is None:
        return False
    start, end = span
    if end - start > LONG_BYTES and body.text[start + 1] not in b" \t\r\n]":
        return True
    return NOTHING.match(body.text, start, end) is None


def model(body: JsonObject) -> str | None:
    """The name of the model. None if the client leaves it to the worker. Raises ApiError 400."""
    name = body.get("model")
    if name is None:
        return None
    if not isinstance(name, str):
        raise ApiError(400, "model must be a string", param="model")
    try:
        name.encode()
    except UnicodeEncodeError:  # no log or trace could repeat it
        raise ApiError(404, f"The model `{name}` does not exist.", param="model") from None
    return name


def max_tokens(endpoint: Endpoint, body: JsonObject) -> int | None:
    """The client's limit on generated tokens. None if there is none, or none that makes sense."""
    for name in endpoint.limits:
        value = body.get(name)
        if value is not None:
            limit = whole_number(value)
            return limit if limit is not None and 0 <= limit <= MOST_TOKENS else None
    return None


def stream_options(body: JsonObject) -> JsonObject | None:
    """What a client wants of a stream. None if it does not say. Raises ApiError 400."""
    raw = body.raw("stream_options")
    return _object_of(raw, STREAM_OPTIONS) if raw is not None and raw[0] == OBJECT else None


def wants_usage(body: JsonObject) -> bool:
    """Whether a stream should end with the usage."""
    options = stream_options(body)
    return options is not None and boolean(options.get("include_usage")) is True


def wants_stream(body: JsonObject) -> bool | None:
    """Whether the answer should be streamed. None for a value that is not a boolean, which a worker will refuse."""
    value: Value = body.get("stream")
    return False if value is None else boolean(value)
