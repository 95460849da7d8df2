"""Turns the bytes of a request into a job for the router, or into the error that its client gets."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping

from eldr.kernels import JsonNames, JsonObject
from eldr.policies.base import DecodeRequest
from eldr.prompt.words import Words
from eldr.router.config.settings import RouterConfig
from eldr.router.fleet.groups import Served
from eldr.router.fleet.workers import Fleet
from eldr.router.http.admin_key import AdminKey
from eldr.router.http.body_memory import Hold
from eldr.router.http.errors import ApiError
from eldr.router.http.forwarding import client_authorization, session_line
from eldr.router.http.media_types import JSON, essence
from eldr.router.http.message import Request
from eldr.router.http.trace_context import trace_context, trace_lines
from eldr.router.observe.tracing import RequestTrace, Tracing
from eldr.router.placement.admission import PRIORITIES, Claim
from eldr.router.placement.prefixes import Prefix
from eldr.router.protocols import openai
from eldr.router.protocols.base import LegProtocol
from eldr.router.protocols.handoff import HandOff
from eldr.router.protocols.openai import Endpoint
from eldr.router.protocols.prompt_prefix import prompt_prefix
from eldr.router.protocols.prompt_start import prompt_start, system_start
from eldr.router.request.deadlines import Deadlines

MAX_ID_BYTES = 128
MAX_LABEL_BYTES = 64
# The cost of a request in the queue is its text at about four bytes per token, plus the tokens it asks for.
BYTES_PER_TOKEN = 4
UNSTATED_TOKENS = 256
# Why requests run whole whose prompts have something else than text.
NOT_TEXT = frozenset(("multimodal", "input_item", "prompt_embeds"))
# The body of a request that needs it no more.
NO_BODY = JsonObject(b"{}", JsonNames(()))

PRIORITY_NAMES = {name.encode(): number for number, name in enumerate(PRIORITIES)}

_decode_requests = itertools.count()


class Job:
    """One request for text after all checks. Its attributes are facts about the request, not its progress.

    endpoint: what the members of its body mean.
    model: the model that it asks for. None if it names none.
    body: what the client sent. NO_BODY once the answer streams.
    prompt_start: by it, requests with a common start find the same prefill worker. Empty if it runs whole.
    prefix: the same for an aggregated worker's cache. None until it is asked for, and once the answer streams.
    why_whole: why it cannot be handed off. None if it can.
    max_tokens: the client's limit. None if there is none.
    record: whether the client wants its experts recorded.
    leg_headers: header lines for both legs.
    authorization: header lines with the client's own keys, for workers that need no key of the router's.
    deadlines: when it must be answered.
    stream, wants_usage: whether the answer is streamed, and ends with the usage. stream is None for a value that is not
        a boolean, which a worker will refuse.
    claim: its claim on a turn in the queue.
    trace: None unless it is sampled.
    hold: counts the body in memory. None without one.
    """

    def __init__(
        self,
        *,
        request_id: str,
        endpoint: Endpoint,
        model: str | None,
        body: JsonObject,
        prompt_start: bytes,
        why_whole: str | None,
        record: bool,
        leg_headers: bytes,
        authorization: bytes,
        label: str | None,
        max_tokens: int | None,
        deadlines: Deadlines,
        claim: Claim,
        trace: RequestTrace | None,
        hold: Hold | None,
    ) -> None:
        self.request_id = request_id
        self.endpoint = endpoint
        self.path = endpoint.path
        self.model = model
        self.body = body
        self.prompt_start = prompt_start
        self.why_whole = why_whole
        self.prefix: Prefix | None = None
        self.record = record
        self.leg_headers = leg_headers
        self.authorization = authorization
        self.label = label
        self.max_tokens = max_tokens
        self.deadlines = deadlines
        self.stream = openai.wants_stream(body)
        self.wants_usage = openai.wants_usage(body)
        self.claim = claim
        self.trace = trace
        self.hold = hold

    def free_body(self) -> None:
        """Let go of the body. A thousand streams with long prompts would hold a gigabyte."""
        self.body = NO_BODY
        self.prefix = None
        if self.hold is not None:
            self.hold.release()

    def read_prefix(self, served: Served) -> Prefix:
        """Return the start of the prompt as an aggregated worker caches it."""
        if self.prefix is None:
            text, bytes_per_token, tokens = prompt_prefix(self.endpoint, self.body)
            if self.why_whole in NOT_TEXT:  # an image's tokens have nothing to do with its bytes
                text, tokens = b"", 0
            elif served.max_model_len is not None:
                tokens = min(tokens, served.max_model_len)
            self.prefix = Prefix(text, bytes_per_token, tokens, served.name if served.adapter else "")
        return self.prefix

    def decode_request(self, handoff: HandOff | None, words: Words | None, prefix: Prefix | None) -> DecodeRequest:
        """Return what the policy may know. A client may use an id twice at once, but policies need unique ids.

        words: those of the prompt, if they were looked at.
        prefix: the start of the prompt, if the chosen worker computes it.
        """
        prompt_tokens = 0 if handoff is None else handoff.prompt_tokens
        if prefix is not None:
            prompt_tokens = prefix.prompt_tokens
        return DecodeRequest(
            f"{self.request_id}/{next(_decode_requests)}",
            prompt_tokens,
            None if handoff is None else handoff.counts,
            self.label,
            self.max_tokens,
            None if handoff is None else handoff.counts_wire,
            words,
            prefix is not None,
        )


def request_id(request: Request) -> str:
    """Return the client's X-Request-Id if it is valid in a header, otherwise a random id. vLLM's answer ids show it."""
    chosen = request.headers.get(b"x-request-id")
    return (_visible(chosen, MAX_ID_BYTES) if chosen else None) or f"{random.getrandbits(128):032x}"


def id_line(request_id: str) -> bytes:
    """The header line of a request's id, towards workers and clients."""
    return b"x-request-id: %b\r\n" % request_id.encode()


def _require_json(headers: Mapping[bytes, bytes]) -> None:
    """Raise ApiError 415 unless the body is said to be JSON that is not compressed."""
    if essence(headers.get(b"content-type", b"")) != JSON:
        raise ApiError(415, "Content-Type must be application/json")


class Intake:
    """Checks incoming requests and turns them into jobs. tracing: None if no traces are made."""

    def __init__(
        self,
        config: RouterConfig,
        fleet: Fleet,
        protocol: LegProtocol,
        admin_key: AdminKey,
        tracing: Tracing | None,
    ) -> None:
        self._timeouts = config.timeouts
        self._placement = config.placement
        self._fleet = fleet
        self._protocol = protocol
        self._admin_key = admin_key
        self.tracing = tracing
        client_header = config.listen.client_header
        self._names = {
            path: openai.body_names(endpoint.members | protocol.members | protocol.reserved)
            for path, endpoint in openai.ENDPOINTS.items()
        }
        self._reserved = openai.body_names(protocol.reserved)
        self._plain_names = openai.body_names(frozenset(("model", "priority", "vllm_xargs")) | protocol.reserved)
        self._client_header = None if client_header is None else client_header.lower().encode()

    def read(self, request: Request) -> JsonObject:
        """Return the body of a request that goes to one worker as it is. Raises ApiError."""
        _require_json(request.headers)
        return openai.read_object(request.body, self._plain_names, self._reserved)

    def take(self, request: Request, request_id: str) -> Job:
        """Return the job of a request. Raises ApiError."""
        headers = request.headers
        _require_json(headers)
        protocol, endpoint = self._protocol, openai.ENDPOINTS[request.path]
        body = openai.read_body(endpoint, request.body, self._names[request.path], self._reserved)
        in_body = body.get("request_id")
        if isinstance(in_body, str) and b"x-request-id" not in headers:
            request_id = _visible(in_body.encode("utf-8", "replace"), MAX_ID_BYTES) or request_id
        why_whole = protocol.why_whole(endpoint, body)
        record = self._wants_record(request, body)
        if record and not protocol.records:
            raise ApiError(400, "the experts of requests to these workers cannot be recorded")
        if record and why_whole is not None:
            raise ApiError(400, f"a request that is not handed off ({why_whole}) cannot be recorded")
        model = openai.model(body)
        start = b""
        served = self._fleet.served(model)
        if why_whole is None and (served is None or not served.group.aggregated):
            protocol.refuse_early(endpoint, body, None if served is None else served.max_model_len)
            start = self._prompt_start(endpoint, body)
        label = headers.get(b"x-eldr-label")
        max_tokens = openai.max_tokens(endpoint, body)
        trace = None if self.tracing is None else self.tracing.begin(request, request_id, model)
        return Job(
            request_id=request_id,
            endpoint=endpoint,
            model=model,
            body=body,
            prompt_start=start,
            why_whole=why_whole,
            record=record,
            leg_headers=b"content-type: application/json\r\n"
            + session_line(request)
            + (trace_lines(*trace_context(request)) if trace is None else trace.headers),
            trace=trace,
            hold=request.hold,
            authorization=client_authorization(request),
            label=_visible(label, MAX_LABEL_BYTES) if label else None,
            max_tokens=max_tokens,
            deadlines=Deadlines.of(headers, request.received_s, self._timeouts.request_timeout_s),
            claim=self.claim(request, body, max_tokens),
        )

    def take_leg(self, request: Request, request_id: str) -> Job:
        """Return the job of a request whose legs somebody else sends, so it may have what only a router sends.

        Its worker answers for what is wrong with it. Raises ApiError if it cannot be read.
        """
        protocol, endpoint = self._protocol, openai.ENDPOINTS[request.path]
        body = openai.object_of(openai.text_of(request.body), self._names[request.path])
        label = request.headers.get(b"x-eldr-label")
        max_tokens = openai.max_tokens(endpoint, body)
        return Job(
            request_id=request_id,
            endpoint=endpoint,
            model=openai.model(body),
            body=body,
            prompt_start=self._prompt_start(endpoint, body),
            why_whole=protocol.why_whole(endpoint, body),
            record=False,
            leg_headers=b"",
            authorization=b"",
            label=_visible(label, MAX_LABEL_BYTES) if label else None,
            max_tokens=max_tokens,
            deadlines=Deadlines.of(request.headers, request.received_s, self._timeouts.request_timeout_s),
            claim=self.claim(request, body, max_tokens),
            trace=None,
            hold=request.hold,
        )

    def _prompt_start(self, endpoint: Endpoint, body: JsonObject) -> bytes:
        at, end = body.span(endpoint.input) or (0, 0)
        start = prompt_start(endpoint, body.text, at, end, self._placement.prefix_window_bytes)
        system = body.span(endpoint.system) if endpoint.system else None
        return start if system is None else system_start(body.text, *system) + start

    def claim(self, request: Request, body: JsonObject, max_tokens: int | None) -> Claim:
        """Return whose turn the request takes, and its priority: from X-Eldr-Priority, else from vLLM's `priority`."""
        named = request.headers.get(b"x-eldr-priority")
        if named is not None:
            if named not in PRIORITY_NAMES:
                raise ApiError(400, f"X-Eldr-Priority must be one of {', '.join(PRIORITIES)}")
            priority = PRIORITY_NAMES[named]
        else:
            stated = body.get("priority")
            # vLLM serves lower numbers first, and 0 is its default.
            priority = 1 if type(stated) is not int or stated == 0 else 0 if stated < 0 else 2
        cost = len(request.body) // BYTES_PER_TOKEN + (UNSTATED_TOKENS if max_tokens is None else max_tokens)
        if self._client_header is not None:
            client = request.headers.get(self._client_header, b"")
        else:
            client = request.client.encode() or client_authorization(request)
        return Claim(client, priority, cost)

    def _wants_record(self, request: Request, body: JsonObject) -> bool:
        if request.headers.get(b"x-eldr-record") != b"1":
            return False
        if not self._admin_key.is_in(request.headers):
            raise ApiError(403, "recording needs the admin key as Authorization: Bearer KEY (see --admin-key-file)")
        if openai.wants_stream(body) is not False:
            raise ApiError(400, "recording needs stream: false", param="stream")
        return True


def _visible(value: bytes, most_bytes: int) -> str | None:
    if len(value) <= most_bytes and all(0x20 < byte < 0x7F for byte in value):
        return value.decode()
    return None
