"""vLLM's hand-off over NIXL: first the prefill, then the decode with the addresses of its blocks.

Both legs get the client's own bytes. Only the members that are the router's are taken out and put in. What is said of
members follows vLLM 0.30 to 0.32 (vllm/entrypoints/openai/*/protocol.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import orjson

from eldr.kernels import (
    NO_OBJECT,
    JsonNames,
    JsonObject,
    JsonTextError,
    JsonValue,
    json_elements,
    json_known_parts,
)
from eldr.router.fleet.workers import Worker
from eldr.router.protocols.base import SequentialLegs
from eldr.router.protocols.handoff import HandOff
from eldr.router.protocols.json_text import ARRAY, OBJECT, QUOTE
from eldr.router.protocols.lenient import is_true, whole_number
from eldr.router.protocols.openai import (
    ANSWER,
    ENDPOINTS,
    MESSAGES,
    RESPONSES,
    USAGE,
    Endpoint,
    object_of,
    prompt_tokens,
)
from eldr.router.protocols.vllm_refusals import PROMPT_IN_ANSWER, refuse_early

# Fields that name hosts, blocks or caches of other workers. Only the router may send them.
TRANSFER_FIELDS = ("kv_transfer_params", "ec_transfer_params")
TRANSFER_PARAMS = frozenset(("kv_transfer_params",))

# Those of /v1/responses as well: the answer to a prefill is neither stored nor repeats the prompt.
RESPONSES_NOT_FOR_PREFILL = ("store", "enable_response_messages")
# What a prefill leg must not say. It generates one token for nobody, and not as a stream. min_tokens would exceed that
# token, vLLM refuses stream_options without a stream, and the answer must not repeat the prompt. All else stays as the
# client wrote it: a template may render it, it takes the time of one token, and a value that vLLM refuses is refused
# before anything is computed.
NOT_FOR_PREFILL = ("stream", "stream_options", "min_tokens", *PROMPT_IN_ANSWER)

# The parts of a message that are text, in any of the APIs.
TEXT_PARTS = frozenset(("text", "input_text", "output_text", "refusal", "thinking", "reasoning_text"))
# Parts of Anthropic's messages besides: calls, whose results may have parts of their own.
MESSAGES_PARTS = frozenset(
    (*TEXT_PARTS, "redacted_thinking", "tool_use", "tool_result", "tool_reference", "tool_addition", "tool_removal")
)
# The items of a response's input that are text, and those whose `output` may have parts.
OUTPUT_ITEMS = frozenset(("function_call_output", "custom_tool_call_output"))
TEXT_ITEMS = frozenset((None, "message", "function_call", "custom_tool_call", "reasoning", *OUTPUT_ITEMS))
# Tools that the client calls itself. For others vLLM may generate again and again, each time with the hand-off.
CLIENTS_TOOLS = frozenset(("function", "custom", "namespace"))

# The elements of arrays that are looked at here, one by one. Each takes microseconds, and a body can have millions.
# A request with more of them runs whole, which is always right.
MOST_ELEMENTS = 16384

WhyWhole = tuple[str, str, Callable[[JsonValue], bool]]


def _is_given(value: JsonValue) -> bool:
    return value is not None


def _is_not_one(value: JsonValue) -> bool:
    return value is not None and value != 1


def _is_minus_one(value: JsonValue) -> bool:
    return whole_number(value) == -1


def _truncates(value: JsonValue) -> bool:
    return value != "disabled"


# The members that keep a request whole, with the label of the reason and the values that do. A hand-off is one prompt's
# blocks, pulled once: several children of one request would pull them again after they were freed. Prompt logprobs need
# the prompt's forward pass on the worker that answers.
WHOLE: tuple[WhyWhole, ...] = (
    ("n", "n", _is_not_one),
    ("best_of", "best_of", _is_not_one),
    ("use_beam_search", "beam_search", is_true),
    ("echo", "echo", is_true),
    ("prompt_logprobs", "prompt_logprobs", _is_given),
    # Truncation to the context leaves room for max_tokens. The prefill changes max_tokens, and so the tokens.
    ("truncate_prompt_tokens", "truncate_to_context", _is_minus_one),
    # All of a vocabulary, twice: megabytes that nobody reads in the prefill worker's answer.
    ("logprobs", "all_logprobs", _is_minus_one),
    ("top_logprobs", "all_logprobs", _is_minus_one),
    # These two mean something for completions alone.
    ("prompt_embeds", "prompt_embeds", _is_given),
    ("suffix", "suffix", _is_given),
)
# The same for responses. In messages, vLLM ignores all of these members.
RESPONSES_WHOLE: tuple[WhyWhole, ...] = (
    ("top_logprobs", "all_logprobs", _is_minus_one),
    ("truncation", "truncate_to_context", _truncates),
    ("previous_input_messages", "previous_input_messages", _is_given),
)
MAY_KEEP_WHOLE = JsonNames([name for name, _, _ in (*WHOLE, *RESPONSES_WHOLE)])
# Members that one endpoint alone knows are looked for only there.
ENDPOINTS_OWN = frozenset(("prompt_embeds", "suffix", "return_prompt_text"))
HANDOFF = JsonNames(("do_remote_prefill", "remote_request_id", "eldr_counts", "eldr_lease", "eldr_record"))
RECORD = JsonNames(("eldr_counts", "eldr_decode_experts"))
TYPE = JsonNames(("type",))
CONTENT = JsonNames(("content",))
ITEM = JsonNames(("type", "output"))


def _prefill_members(endpoint: Endpoint, record: bool) -> bytes:
    """The router's own members of a prefill leg's body."""
    one_token = b"".join(b'"%b":1,' % limit.encode() for limit in endpoint.limits)
    params = b'{"do_remote_decode":true,"do_remote_prefill":false%b}' % (b',"eldr_record":true' if record else b"")
    store = b'"store":false,' if endpoint.path == RESPONSES else b""
    return b'%b%b"stream":false,"kv_transfer_params":%b' % (one_token, store, params)


def _request_id(endpoint: Endpoint, body: JsonObject, leg_name: str) -> bytes:
    """The member that names a response, with a comma before it. Empty for endpoints that read X-Request-Id.

    The id of a response is that member alone (responses/protocol.py). A client's own is kept as it is.
    """
    if endpoint.path != RESPONSES:
        return b""
    given = body.get("request_id")
    name = leg_name if isinstance(given, str) and given and leg_name.startswith(given) else "resp_" + leg_name
    return b',"request_id":' + orjson.dumps(name)


def _type_of(body: JsonObject) -> JsonValue:
    """The `type` of a part, an item or a tool. Not text, and so unknown, if it is neither absent nor a string."""
    kind = body.get("type")
    return kind if kind is None or isinstance(kind, str) else b""


class _Arrays:
    """Looks into the arrays of one body, and at no more than MOST_ELEMENTS of their elements in all."""

    def __init__(self) -> None:
        self._left = MOST_ELEMENTS

    def objects(self, text: bytes, start: int, end: int, wanted: JsonNames) -> list[JsonObject] | None:
        """The objects of an array. What is none is left out, because a worker refuses it.

        None if there are too many elements. Raises ApiError 400.
        """
        elements = json_elements(text, start, end, self._left + 1)
        self._left -= len(elements)
        if self._left < 0:
            return None
        return [object_of(text, wanted, at, behind) for at, behind in elements if text[at] == OBJECT]


def _are_clients_tools(body: JsonObject) -> bool:
    span = body.span("tools")
    if span is None or body.text[span[0]] != ARRAY:
        return True
    tools = _Arrays().objects(body.text, span[0], span[1], TYPE)
    return tools is not None and all(_type_of(tool) in CLIENTS_TOOLS for tool in tools)


def _why_response_whole(body: JsonObject, start: int, end: int) -> str | None:
    text, arrays = body.text, _Arrays()
    if not json_known_parts(text, start, end, TEXT_PARTS):
        return "multimodal"
    items = arrays.objects(text, start, end, ITEM)
    if items is None:
        return "input_item"
    for item in items:
        kind = _type_of(item)
        if kind not in TEXT_ITEMS:
            return "input_item"
        output = item.span("output")
        if kind in OUTPUT_ITEMS and output is not None and item.text[output[0]] == ARRAY:
            parts = arrays.objects(item.text, output[0], output[1], TYPE)
            if parts is None:
                return "multimodal"
            for part in parts:
                if _type_of(part) not in TEXT_PARTS:
                    return "multimodal"
    return None


def _is_messages_text(text: bytes, start: int, end: int) -> bool:
    """Whether no message has an image, not even in the result of a tool. False if that would take long to find out."""
    if not json_known_parts(text, start, end, MESSAGES_PARTS):
        return False
    if b"tool_result" not in text and b"\\u" not in text:
        return True
    messages = _Arrays().objects(text, start, end, CONTENT)
    if messages is None:
        return False
    for message in messages:
        start, end = message.span("content") or (0, 0)
        # A result is to its parts as a message is to its own.
        if message.text[start] == ARRAY and not json_known_parts(message.text, start, end, MESSAGES_PARTS):
            return False
    return True


class VllmNixl(SequentialLegs):
    """The prefill worker keeps the blocks for the time of a lease, and the decode worker pulls them once."""

    reserved: ClassVar[frozenset[str]] = frozenset(TRANSFER_FIELDS)
    members: ClassVar[frozenset[str]] = (
        frozenset((*TRANSFER_FIELDS, *NOT_FOR_PREFILL, *(name for name, _, _ in WHOLE))) - ENDPOINTS_OWN
    )
    answer_names: ClassVar[JsonNames] = JsonNames((*TRANSFER_FIELDS, *ANSWER))
    records: ClassVar[bool] = True

    def __init__(self) -> None:
        # A request id would be another leg's: the legs have theirs in a header.
        self._not_for_decode = frozenset((*TRANSFER_FIELDS, "request_id"))
        self._not_for_prefill = {
            path: frozenset((*self._not_for_decode, *NOT_FOR_PREFILL, *RESPONSES_NOT_FOR_PREFILL, *endpoint.limits))
            for path, endpoint in ENDPOINTS.items()
        }
        self._prefill_members = {
            (path, record): _prefill_members(endpoint, record)
            for path, endpoint in ENDPOINTS.items()
            for record in (False, True)
        }

    def why_whole(self, endpoint: Endpoint, body: JsonObject) -> str | None:
        if body.has_any(MAY_KEEP_WHOLE):
            rules = WHOLE if endpoint.choices else RESPONSES_WHOLE if endpoint.path == RESPONSES else ()
            for name, label, keeps_whole in rules:
                if name in body and keeps_whole(body.get(name)):
                    return label
        if endpoint.path == RESPONSES and not _are_clients_tools(body):
            return "builtin_tools"
        span = body.span(endpoint.input)
        if span is None or body.text[span[0]] != ARRAY:
            return None
        start, end = span
        if endpoint.path == RESPONSES:
            return _why_response_whole(body, start, end)
        if endpoint.path == MESSAGES:
            return None if _is_messages_text(body.text, start, end) else "multimodal"
        if endpoint.messages:
            return None if json_known_parts(body.text, start, end, TEXT_PARTS) else "multimodal"
        first = json_elements(body.text, start, end, 2)
        return "prompt_list" if len(first) > 1 and body.text[first[0][0]] in (QUOTE, ARRAY) else None

    def refuse_early(self, endpoint: Endpoint, body: JsonObject, max_model_len: int | None) -> None:
        refuse_early(endpoint, body, max_model_len)

    def prefill_body(self, endpoint: Endpoint, body: JsonObject, record: bool, leg_name: str) -> bytes:
        added = self._prefill_members[endpoint.path, record] + _request_id(endpoint, body, leg_name)
        return body.spliced(self._not_for_prefill[endpoint.path], added)

    def read_handoff(self, answer: JsonObject, source: Worker, sent_s: float) -> HandOff | None:
        params = answer.inner("kv_transfer_params", HANDOFF)
        if params is None or params.raw("do_remote_prefill") != b"true":
            return None
        usage = answer.inner("usage", USAGE)
        tokens = 0 if usage is None else prompt_tokens(usage)
        return HandOff(params, source, params.get("remote_request_id"), tokens, sent_s)

    def decode_body(self, endpoint: Endpoint, body: JsonObject, handoff: HandOff, record: bool, leg_name: str) -> bytes:
        named = _request_id(endpoint, body, leg_name)
        return body.spliced(self._not_for_decode, b'"kv_transfer_params":%b%b' % (handoff.spend(record), named))

    def handoff_in(self, body: JsonObject) -> HandOff | None:
        params = body.inner("kv_transfer_params", HANDOFF)
        if params is None or params.raw("do_remote_prefill") != b"true":
            return None
        handoff = HandOff(params, None, params.get("remote_request_id"), 0, None)
        if handoff.counts is not None:
            handoff.prompt_tokens = handoff.counts.prompt_tokens
        return handoff

    def passed_on(self, body: JsonObject, handoff: HandOff) -> bytes:
        return body.spliced(TRANSFER_PARAMS, b'"kv_transfer_params":' + handoff.spend(False))

    def whole_body(self, endpoint: Endpoint, body: JsonObject, record: bool, leg_name: str) -> bytes:
        named = _request_id(endpoint, body, leg_name)
        own = b'"kv_transfer_params":{"eldr_record":true}' if record else b""
        return body.spliced(self._not_for_decode, own + named if own else named[1:])

    def is_named_after(self, name: object, leg_name: str) -> bool:
        """vLLM appends the X-Request-Id that it got to its own prefix. Of responses, see `_request_id`."""
        return isinstance(name, str) and (name.endswith(("-" + leg_name, "_" + leg_name)) or name == leg_name)

    def event_is_named_after(self, start: bytes, leg_name: str) -> bool:
        quoted = orjson.dumps(leg_name)
        return (
            start.find(b"-" + quoted[1:]) >= 0
            or start.find(b"_" + quoted[1:]) >= 0
            or start.find(b'"id":' + quoted) >= 0
        )

    def handoff_is_named_after(self, handoff: HandOff, leg_name: str) -> bool:
        """vLLM's internal id is the id of the answer followed by a random part, for responses by their turn before."""
        name = handoff.name
        return isinstance(name, str) and (
            f"-{leg_name}-" in name or name.startswith((f"resp_{leg_name}_", f"{leg_name}_"))
        )

    def for_client(self, answer: bytes, members: JsonObject | None) -> bytes:
        if members is None:
            if b"_transfer_params" not in answer:
                return answer
            try:
                members = JsonObject(answer, self.answer_names)
            except JsonTextError as error:
                if error.fault == NO_OBJECT:
                    return answer
                raise
        for name, start, end in members.members:
            if name in self.reserved and answer[start:end] != b"null":  # those of a plain worker are null
                nulls = b",".join(b'"%b":null' % name.encode() for name in TRANSFER_FIELDS if name in members)
                return members.spliced(self.reserved, nulls)
        return answer

    def recorded(self, answer: JsonObject, handoff: HandOff | None) -> bytes:
        params = answer.inner("kv_transfer_params", RECORD)
        experts = None if params is None else params.raw("eldr_decode_experts")
        if handoff is not None:
            counts: bytes | None = orjson.dumps(handoff.counts_wire)
        else:
            counts = None if params is None else params.raw("eldr_counts")
        record = b'{"counts":%b,"decode_experts":%b}' % (counts or b"null", experts or b"null")
        return answer.spliced(self.reserved, b'"kv_transfer_params":null,"eldr_record":%b' % record)
