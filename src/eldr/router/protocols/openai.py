"""The APIs of clients, OpenAI's and Anthropic's: what the members of each endpoint's bodies mean and ask for."""

from __future__ import annotations

import re
from typing import Any

import orjson

from eldr.kernels import NO_OBJECT, JsonNames, JsonObject, JsonTextError
from eldr.router.http.errors import ApiError
from eldr.router.protocols.json_text import ARRAY, OBJECT, QUOTE, utf8
from eldr.router.protocols.lenient import boolean, whole_number

# Names that begin so are the router's own.
OWN = "eldr_"
# The largest limit on tokens that means anything. JSON's numbers have no end.
MOST_TOKENS = 2**53

COMMON = ("model", "priority", "request_id", "stream", "stream_options", "vllm_xargs")
NOTHING = re.compile(rb'(?:null|""|\[[ \t\r\n]*\])\Z')
LONG_BYTES = len(b"null")
# The numbers of prompt tokens in a usage: one of all, or those read from the cache, written to it, and neither.
PROMPT_USAGE = ("prompt_tokens", "input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
# Those of generated tokens.
GENERATED_USAGE = ("completion_tokens", "output_tokens")
USAGE = JsonNames((*PROMPT_USAGE, *GENERATED_USAGE))
STREAM_OPTIONS = JsonNames(("include_usage", "continuous_usage_stats"))


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
    system: the member with the instructions that many prompts share, besides those among the messages. Empty if none.
    state: members that refer to what one worker stores, with the status of their refusal.
    never_null: members that may be left out, but not null.
    choices: whether the body is one of vLLM's own, whose members about sampling and streams other APIs do not have.
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
        output: str = "choices",
        system: str = "",
        state: tuple[tuple[str, int], ...] = (),
        never_null: tuple[str, ...] = (),
    ) -> None:
        self.path = path
        self.input = input
        self.texts = texts
        self.messages = messages
        self.limits = limits
        self.default_limit = default_limit
        self.output = output
        self.system = system
        self.state = state
        self.never_null = never_null
        self.choices = output == "choices"
        names = (*COMMON, input, *limits, *others, *(name for name, _ in state))
        self.members = frozenset((*names, system) if system else names)


COMPLETIONS = b"/v1/completions"
CHAT = b"/v1/chat/completions"
RESPONSES = b"/v1/responses"
MESSAGES = b"/v1/messages"

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
        ),
        Endpoint(
            CHAT,
            input="messages",
            texts=False,
            messages=True,
            limits=("max_completion_tokens", "max_tokens"),
            default_limit=None,
            others=("return_prompt_text",),
        ),
        Endpoint(
            RESPONSES,
            input="input",
            texts=True,
            messages=True,
            limits=("max_output_tokens",),
            default_limit=None,
            others=("tools", "truncation", "previous_input_messages", "store", "enable_response_messages"),
            output="output",
            system="instructions",
            state=(("background", 400), ("previous_response_id", 404)),
            # vLLM 0.32 reads these nulls and fails at its answer, which has them again. If that is a stream, its
            # connection breaks, and the worker would be blamed.
            never_null=("background", "truncation"),
        ),
        Endpoint(
            MESSAGES,
            input="messages",
            texts=False,
            messages=True,
            limits=("max_tokens",),
            default_limit=None,
            others=("thinking", "tool_choice"),
            output="content",
            system="system",
        ),
    )
}

# The members of an answer that tell what it is. The outputs are those of any endpoint.
ANSWER = ("error", "id", "usage", *(endpoint.output for endpoint in ENDPOINTS.values()))


def body_names(members: frozenset[str]) -> JsonNames:
    """The names to look for in a client's body: these, and all that are the router's own."""
    return JsonNames(members, OWN)


def read_body(endpoint: Endpoint, raw: bytes, names: JsonNames, reserved: JsonNames) -> JsonObject:
    """Return the body of a request to `endpoint`.

    names: `body_names` of what matters to the endpoint and to the leg protocol.
    Raises ApiError 400 like `read_object`, and for a body without a prompt or with a null that no worker answers.
    Raises 400 or 404 for one that needs what a worker stored.
    """
    body = read_object(raw, names, reserved)
    _check_input(endpoint, body)
    for name in endpoint.never_null:
        if name in body and body.get(name) is None:
            raise ApiError(400, f"{name} must not be null", param=name)
    for name, status in endpoint.state:
        # A worker may store a response, but the next request reaches another one.
        value = body.get(name)
        if value is not None and boolean(value) is not False:
            raise ApiError(status, f"{name} needs a stored response, but responses are not stored", param=name)
    return body


def read_object(raw: bytes, names: JsonNames, reserved: JsonNames) -> JsonObject:
    """Return a client's body.

    names: `body_names` of what matters.
    reserved: `body_names` of fields that only the router may send. Of those that have no `eldr_`, null is nothing.
    Raises ApiError 400 for a body that is not a JSON object or contains such fields.
    """
    body = object_of(text_of(raw), names)
    _refuse_router_fields(body, reserved)
    return body


def text_of(raw: bytes) -> bytes:
    """Return a client's body as UTF-8. Raises ApiError 400."""
    try:
        return utf8(raw)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the request body is not valid JSON: it is not {error.encoding}") from None


def json_object(raw: bytes) -> dict[str, Any]:
    """Parse a request body that must be a JSON object. Raises ApiError 400."""
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise ApiError(400, f"the request body is not valid JSON: {error}") from None
    if not isinstance(body, dict):
        raise ApiError(400, "the request body must be a JSON object")
    return body


def object_of(text: bytes, names: JsonNames, start: int = 0, end: int | None = None) -> JsonObject:
    """Return a client's body, or the object in it that is text[start:end]. Raises ApiError 400."""
    try:
        return JsonObject(text, names, start, end)
    except JsonTextError as error:
        if error.fault == NO_OBJECT:
            raise ApiError(400, "the request body must be a JSON object") from None
        raise ApiError(400, f"the request body is not valid JSON: {error}") from None


def _refuse_router_fields(body: JsonObject, reserved: JsonNames) -> None:
    if "vllm_xargs" not in body and not body.has_any(reserved):
        return
    text, theirs = body.text, reserved.names
    for name, value, end in body.members:
        if name.startswith(OWN):
            _refuse(name)
        elif name in theirs:
            if text[value:end] != b"null":
                _refuse(name)
        elif name == "vllm_xargs" and text[value] == OBJECT:
            for inner, _, _ in object_of(text, reserved, value, end).members:
                _refuse(f"vllm_xargs.{inner}")


def _refuse(name: str) -> None:
    raise ApiError(400, f"{name} is set by the router, not by a client", param=name)


def _check_input(endpoint: Endpoint, body: JsonObject) -> None:
    start, _ = body.span(endpoint.input) or (0, 0)
    if endpoint.texts and endpoint.messages and body.text[start] == QUOTE:
        return  # a message, which may be empty
    if _is_given(body, endpoint.input):
        first = body.text[start]
        if first == ARRAY or not endpoint.messages:
            return
    elif not endpoint.messages and _is_given(body, "prompt_embeds"):
        return
    if not endpoint.messages:  # in vLLM's words
        raise ApiError(400, "Either prompt or prompt_embeds must be provided and non-empty.", param=endpoint.input)
    what = "text or a non-empty array" if endpoint.texts else "a non-empty array"
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


def prompt_tokens(usage: JsonObject) -> int:
    """How many tokens a prompt had, by a `usage` in which USAGE was looked for. 0 if it states none."""
    tokens = 0
    for name in PROMPT_USAGE:
        stated = usage.get(name)
        if type(stated) is int and stated > 0:
            tokens += stated
    return tokens


def generated_tokens(usage: JsonObject | None) -> int | None:
    """How many tokens were generated, by a `usage` in which USAGE was looked for. None if it does not say."""
    for name in GENERATED_USAGE:
        stated = None if usage is None else usage.get(name)
        if type(stated) is int and stated >= 0:
            return stated
    return None


def stream_options(body: JsonObject) -> JsonObject | None:
    """What a client wants of a stream. None if it does not say. Raises ApiError 400."""
    span = body.span("stream_options")
    if span is None or body.text[span[0]] != OBJECT:
        return None
    return object_of(body.text, STREAM_OPTIONS, *span)


def wants_usage(body: JsonObject) -> bool:
    """Whether a stream should end with the usage."""
    options = stream_options(body)
    return options is not None and boolean(options.get("include_usage")) is True


def wants_stream(body: JsonObject) -> bool | None:
    """Whether the answer should be streamed. None for a value that is not a boolean, which a worker will refuse."""
    value = body.get("stream")
    return False if value is None else boolean(value)
