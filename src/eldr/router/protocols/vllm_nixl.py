"""vLLM's hand-off over NIXL: first the prefill, then the decode with the addresses of its blocks.

Both legs get the client's own bytes. Only the members that are the router's are taken out and put in. What is said of
members follows vLLM 0.30 to 0.32 (vllm/entrypoints/openai/*/protocol.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import orjson

from eldr.kernels import NO_OBJECT, JsonTextError, json_elements, json_known_parts
from eldr.router.fleet.workers import Worker
from eldr.router.protocols.base import LegProtocol
from eldr.router.protocols.handoff import HandOff
from eldr.router.protocols.json_object import ARRAY, QUOTE, JsonObject, Value, inner_object
from eldr.router.protocols.lenient import is_true, whole_number
from eldr.router.protocols.openai import ENDPOINTS, Endpoint
from eldr.router.protocols.vllm_refusals import PROMPT_IN_ANSWER, refuse_early

# Fields that name hosts, blocks or caches of other workers. Only the router may send them.
TRANSFER_FIELDS = ("kv_transfer_params", "ec_transfer_params")

# What a prefill leg must not say. It generates one token for nobody, and not as a stream. min_tokens would exceed that
# token, vLLM refuses stream_options without a stream, and the answer must not repeat the prompt. All else stays as the
# client wrote it: a template may render it, it takes the time of one token, and a value that vLLM refuses is refused
# before anything is computed.
NOT_FOR_PREFILL = ("stream", "stream_options", "min_tokens", *PROMPT_IN_ANSWER)

TEXT_PARTS = frozenset(("text", "input_text", "output_text", "refusal", "thinking"))

WhyWhole = tuple[str, str, Callable[[Value], bool]]


def _is_given(value: Value) -> bool:
    return value is not None


def _is_not_one(value: Value) -> bool:
    return value is not None and value != 1


def _is_minus_one(value: Value) -> bool:
    return whole_number(value) == -1


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
# Members that one endpoint alone knows are looked for only there.
ENDPOINTS_OWN = frozenset(("prompt_embeds", "suffix", "return_prompt_text"))
HANDOFF = frozenset(("do_remote_prefill", "remote_request_id", "eldr_counts", "eldr_lease", "eldr_record"))
RECORD = frozenset(("eldr_counts", "eldr_decode_experts"))
USAGE = frozenset(("prompt_tokens",))


def _prefill_members(endpoint: Endpoint, record: bool) -> bytes:
    """The router's own members of a prefill leg's body."""
    one_token = b"".join(b'"%b":1,' % limit.encode() for limit in endpoint.limits)
    params = b'{"do_remote_decode":true,"do_remote_prefill":false%b}' % (b',"eldr_record":true' if record else b"")
    return b'%b"stream":false,"kv_transfer_params":%b' % (one_token, params)


class VllmNixl(LegProtocol):
    """The prefill worker keeps the blocks for the time of a lease, and the decode worker pulls them once."""

    reserved: ClassVar[frozenset[str]] = frozenset(TRANSFER_FIELDS)
    members: ClassVar[frozenset[str]] = (
        frozenset((*TRANSFER_FIELDS, *NOT_FOR_PREFILL, *(name for name, _, _ in WHOLE))) - ENDPOINTS_OWN
    )
    answer_members: ClassVar[frozenset[str]] = frozenset((*TRANSFER_FIELDS, "usage"))

    def __init__(self) -> None:
        # A request id would be another leg's: the legs have theirs in a header.
        self._not_for_decode = frozenset((*TRANSFER_FIELDS, "request_id"))
        self._not_for_prefill = {
            path: frozenset((*self._not_for_decode, *NOT_FOR_PREFILL, *endpoint.limits))
            for path, endpoint in ENDPOINTS.items()
        }
        self._prefill_members = {
            (path, record): _prefill_members(endpoint, record)
            for path, endpoint in ENDPOINTS.items()
            for record in (False, True)
        }

    def why_whole(self, endpoint: Endpoint, body: JsonObject) -> str | None:
        for name, label, keeps_whole in WHOLE:
            if name in body and keeps_whole(body.get(name)):
                return label
        span = body.span(endpoint.input)
        if span is None or body.text[span[0]] != ARRAY:
            return None
        start, end = span
        if endpoint.messages:
            return None if json_known_parts(body.text, start, end, TEXT_PARTS) else "multimodal"
        first = json_elements(body.text, start, end, 2)
        return "prompt_list" if len(first) > 1 and body.text[first[0][0]] in (QUOTE, ARRAY) else None

    def refuse_early(self, endpoint: Endpoint, body: JsonObject, max_model_len: int | None) -> None:
        refuse_early(endpoint, body, max_model_len)

    def prefill_body(self, endpoint: Endpoint, body: JsonObject, record: bool) -> bytes:
        return body.spliced(self._not_for_prefill[endpoint.path], self._prefill_members[endpoint.path, record])

    def read_handoff(self, answer: JsonObject, source: Worker, sent_s: float) -> HandOff | None:
        params = inner_object(answer.raw("kv_transfer_params"), HANDOFF)
        if params is None or params.raw("do_remote_prefill") != b"true":
            return None
        usage = inner_object(answer.raw("usage"), USAGE)
        tokens = None if usage is None else usage.get("prompt_tokens")
        return HandOff(params, source, params.get("remote_request_id"), tokens if type(tokens) is int else 0, sent_s)

    def decode_body(self, body: JsonObject, handoff: HandOff | None, record: bool) -> bytes:
        if handoff is not None:
            return body.spliced(self._not_for_decode, b'"kv_transfer_params":%b' % handoff.spend(record))
        return body.spliced(self._not_for_decode, b'"kv_transfer_params":{"eldr_record":true}' if record else b"")

    def is_named_after(self, name: object, leg_name: str) -> bool:
        """vLLM appends the X-Request-Id that it got to its own prefix."""
        return isinstance(name, str) and name.endswith("-" + leg_name)

    def event_is_named_after(self, start: bytes, leg_name: str) -> bool:
        return b"-" + orjson.dumps(leg_name)[1:] in start

    def handoff_is_named_after(self, handoff: HandOff, leg_name: str) -> bool:
        """vLLM's internal id is the id of the answer followed by a random part."""
        return isinstance(handoff.name, str) and f"-{leg_name}-" in handoff.name

    def for_client(self, answer: bytes) -> bytes:
        """The answer of a plain worker has transfer parameters of null."""
        # A quotation mark inside a JSON string is escaped, so this can only be a key with the value null.
        if answer.count(b"_transfer_params") == answer.count(b'_transfer_params":null'):
            return answer
        try:
            fields = JsonObject(answer, self.answer_members)
        except JsonTextError as error:
            if error.fault == NO_OBJECT:
                return answer
            raise
        nulls = b",".join(b'"%b":null' % name.encode() for name in TRANSFER_FIELDS if name in fields)
        return fields.spliced(self.reserved, nulls)

    def recorded(self, answer: bytes, handoff: HandOff | None) -> bytes:
        fields = JsonObject(answer, self.answer_members)
        params = inner_object(fields.raw("kv_transfer_params"), RECORD)
        experts = None if params is None else params.raw("eldr_decode_experts")
        if handoff is not None:
            counts: bytes | None = orjson.dumps(handoff.counts_wire)
        else:
            counts = None if params is None else params.raw("eldr_counts")
        record = b'{"counts":%b,"decode_experts":%b}' % (counts or b"null", experts or b"null")
        return fields.spliced(self.reserved, b'"kv_transfer_params":null,"eldr_record":%b' % record)
