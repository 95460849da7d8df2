"""From a request's bytes to what the router does with it, or the error that its client gets."""

from __future__ import annotations

import itertools
import random
from typing import Any

from eldr.policies.base import DecodeRequest
from eldr.router.api.keys import is_admin
from eldr.router.http.errors import ApiError
from eldr.router.http.forwarding import client_authorization, trace_context, trace_lines
from eldr.router.http.message import Request
from eldr.router.observe.tracing import RequestTrace
from eldr.router.placement.admission import PRIORITIES, Claim
from eldr.router.protocols.handoff import HandOff
from eldr.router.request import openai
from eldr.router.request.deadlines import Deadlines
from eldr.router.request.services import Services

RETRY_AFTER_S = 2
MAX_ID_BYTES = 128
MAX_LABEL_BYTES = 64
# What a request is taken to cost in the queue: its text at about four bytes a token, and the tokens it asks for.
BYTES_PER_TOKEN = 4
UNSTATED_TOKENS = 256

PRIORITY_NAMES = {name.encode(): number for number, name in enumerate(PRIORITIES)}

_decode_requests = itertools.count()


class Job:
    """One completion or chat request, checked.

    body: what the client sent, less its request_id; empty once the answer streams. why_whole: why it cannot be handed
    off, None if it can.
    record: whether its experts are wanted. leg_headers: header lines for either leg. authorization: the client's own,
    for workers that have no key of the router's. deadlines: until when it must be answered.
    stream: whether the answer is to be streamed; None for what is no boolean, which a worker may read either way.
    claim: on a turn in the queue. trace: None unless it is sampled.
    """

    def __init__(
        self,
        *,
        request_id: str,
        path: bytes,
        body: dict[str, Any],
        why_whole: str | None,
        record: bool,
        leg_headers: bytes,
        authorization: bytes | None,
        label: str | None,
        deadlines: Deadlines,
        stream: bool | None,
        claim: Claim,
        trace: RequestTrace | None,
    ) -> None:
        self.request_id = request_id
        self.path = path
        self.body = body
        self.why_whole = why_whole
        self.record = record
        self.leg_headers = leg_headers
        self.authorization = authorization
        self.label = label
        self.deadlines = deadlines
        self.stream = stream
        self.claim = claim
        self.trace = trace

    def decode_request(self, handoff: HandOff | None) -> DecodeRequest:
        """What the policy may know. Clients may send an id twice at once, policies need unique ones."""
        return DecodeRequest(
            f"{self.request_id}/{next(_decode_requests)}",
            0 if handoff is None else handoff.prompt_tokens,
            None if handoff is None else handoff.counts,
            self.label,
            openai.max_tokens(self.path, self.body),
            None if handoff is None else handoff.counts_wire,
        )


def request_id(request: Request) -> str:
    """The client's X-Request-Id if it can stand in a header, else a random one. vLLM's answer ids show it."""
    chosen = request.headers.get(b"x-request-id")
    return (_visible(chosen, MAX_ID_BYTES) if chosen else None) or f"{random.getrandbits(128):032x}"


def take_in(request: Request, request_id: str, services: Services) -> Job:
    """The job that a request is. Raises ApiError."""
    headers = request.headers
    if headers.get(b"content-type", b"").partition(b";")[0].strip().lower() != b"application/json":
        raise ApiError(415, "Content-Type must be application/json")
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise ApiError(415, "a body with a Content-Encoding is not understood: send it as it is")
    body = openai.parse_body(request.path, request.body)
    in_body = body.pop("request_id", None)
    if isinstance(in_body, str) and b"x-request-id" not in headers:
        request_id = _visible(in_body.encode(), MAX_ID_BYTES) or request_id
    why_whole = openai.why_not_handed_off(request.path, body)
    record = _wants_record(request, body, services.admin_key)
    if record and why_whole is not None:
        raise ApiError(400, f"a request that is not handed off ({why_whole}) cannot be recorded")
    _check_fleet(body.get("model"), services)
    label = headers.get(b"x-eldr-label")
    trace = None if services.tracing is None else services.tracing.begin(request, request_id, body.get("model"))
    return Job(
        request_id=request_id,
        path=request.path,
        body=body,
        why_whole=why_whole,
        record=record,
        leg_headers=b"content-type: application/json\r\n"
        + (trace_lines(*trace_context(request)) if trace is None else trace.headers),
        trace=trace,
        # The admin key is for this router alone.
        authorization=None if record else client_authorization(request),
        label=_visible(label, MAX_LABEL_BYTES) if label else None,
        stream=_wants_stream(body),
        deadlines=Deadlines.of(headers, request.received_s, services.config.request_timeout_s),
        claim=_claim(request, body, services),
    )


def no_worker(role: str) -> ApiError:
    return ApiError(503, f"no {role} worker is available", retry_after_s=RETRY_AFTER_S)


def _visible(value: bytes, most_bytes: int) -> str | None:
    if len(value) <= most_bytes and all(0x20 < byte < 0x7F for byte in value):
        return value.decode()
    return None


def _claim(request: Request, body: dict[str, Any], services: Services) -> Claim:
    """Which client's turn this is, and how urgent: by header X-Eldr-Priority, else by vLLM's field `priority`."""
    named = request.headers.get(b"x-eldr-priority")
    if named is not None:
        if named not in PRIORITY_NAMES:
            raise ApiError(400, f"X-Eldr-Priority must be one of {', '.join(PRIORITIES)}")
        priority = PRIORITY_NAMES[named]
    else:
        stated = body.get("priority")
        # vLLM handles lower numbers first; 0 is its default.
        priority = 1 if type(stated) is not int or stated == 0 else 0 if stated < 0 else 2
    tokens = openai.max_tokens(request.path, body)
    cost = len(request.body) // BYTES_PER_TOKEN + (UNSTATED_TOKENS if tokens is None else tokens)
    if services.client_header is not None:
        client = request.headers.get(services.client_header, b"")
    else:
        client = request.client.encode() or request.headers.get(b"authorization", b"")
    return Claim(client, priority, cost)


def _wants_record(request: Request, body: dict[str, Any], admin_key: bytes | None) -> bool:
    if request.headers.get(b"x-eldr-record") != b"1":
        return False
    if not is_admin(request.headers.get(b"authorization"), admin_key):
        raise ApiError(403, "recording needs the admin key as Authorization: Bearer KEY (see --admin-key-file)")
    if body.get("stream"):
        raise ApiError(400, "recording needs stream: false", param="stream")
    return True


def _wants_stream(body: dict[str, Any]) -> bool | None:
    stream = body.get("stream", False)
    return stream if isinstance(stream, bool) else None


def _check_fleet(model: str | None, services: Services) -> None:
    if services.patience_s("decode") <= 0:
        raise no_worker("decode")
    if not services.fleet.any_available("decode"):
        return  # whoever comes back knows whether it serves the model
    if model and not services.fleet.serves(model):
        raise ApiError(404, f"The model `{model}` does not exist.", param="model")
