"""Envoy's external processing of one request: which message may come next, and what answers it.

A call of `Process` tells of one HTTP request and of its answer, in the order that `TRANSITIONS` allows. Envoy sends a
body in one of several modes (envoy/extensions/filters/http/ext_proc/v3/processing_mode.proto):

    FULL_DUPLEX_STREAMED  in pieces, none of which Envoy keeps. The headers are answered when the choice is made, and
                          all of the body is sent back after that. This is what GAIE and llm-d ask for.
    BUFFERED              whole, after the headers were answered. The choice comes with the answer to the body.
    all others            not before the headers are answered, so the choice is made without it.

That an answer ends is heard for nothing a token: with `response_body_mode: NONE` and `response_trailer_mode: SEND`,
Envoy sends nothing between its headers and its end. This mode is asked for where Envoy may grant it, by
`allow_mode_override` of the filter: not in FULL_DUPLEX_STREAMED.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from enum import Enum
from typing import Final, Protocol

from google.protobuf.message import DecodeError

from eldr.router.http.body_memory import BodyMemory, Hold
from eldr.router.http.errors import ApiError
from eldr.router.http.message import Request
from eldr.router.picker import replies
from eldr.router.picker.endpoints import served_by, subset_of
from eldr.router.picker.grpc import Call, GrpcError, Status
from eldr.router.picker.messages_pb2 import HttpBody, HttpHeaders, ProcessingMode, ProcessingRequest
from eldr.router.picker.replies import Destination

DUPLEX: Final = ProcessingMode.FULL_DUPLEX_STREAMED
BUFFERED: Final = ProcessingMode.BUFFERED
STATUS: Final = re.compile(rb"[1-9][0-9][0-9]")
# Envoy says so in an answer of its own, when its circuit breaker lets no more requests through.
ENVOY_OVERLOADED: Final = b"x-envoy-overloaded"
# The status of an answer that could not be read.
NO_STATUS: Final = 0


class State(Enum):
    """How far a request has come."""

    OPENED = "nothing is known of the request"
    RECEIVING = "its headers are known, and its body arrives"
    CHOOSING = "all is known that the choice waits for"
    PICKED = "it is on its way to a worker"
    ANSWERING = "the worker's answer has begun"
    OVER = "it has ended or was refused; what still comes is of no interest"


OPENED, RECEIVING, CHOOSING = State.OPENED, State.RECEIVING, State.CHOOSING
PICKED, ANSWERING, OVER = State.PICKED, State.ANSWERING, State.OVER

# What may come in each state. OVER takes anything: Envoy may have sent it before it knew.
TRANSITIONS: Final[dict[State, tuple[str, ...]]] = {
    OPENED: ("request_headers",),
    # Envoy may answer by itself at any time, and a worker before the end of what it answers.
    RECEIVING: ("request_body", "request_trailers", "response_headers"),
    CHOOSING: ("request_body", "request_trailers", "response_headers"),
    PICKED: ("request_body", "request_trailers", "response_headers"),
    ANSWERING: ("request_body", "request_trailers", "response_body", "response_trailers"),
}


class Choice(Protocol):
    """Chooses the worker of one request, and hears what becomes of it."""

    def answered(self, status: int, endpoint: str, reached: bool) -> None:
        """The answer has begun.

        endpoint: where it comes from, ip:port. Empty if nobody said.
        reached: whether the request may have reached a worker. It did not if Envoy had too many at once.
        """

    def ended(self) -> None:
        """The request is over. Nothing follows, and it is said once. Whether its client got all is not known: Envoy
        closes the call alike when an answer without trailers has ended and when the client has left.
        """


# Begins to choose: for a request with its body, among the endpoints of a subset if there is one.
Choose = Callable[["Conversation", Request, frozenset[str] | None], Choice]

# Hears of requests that are refused before the choice: the path, and the status.
Refused = Callable[[bytes, int], None]


class Conversation:
    """One call of `Process`.

    It has many attributes because the modes differ in what is owed to Envoy, and when.
    """

    def __init__(self, call: Call, choose: Choose, refused: Refused, most_body_bytes: int, memory: BodyMemory) -> None:
        self._call = call
        self._choose = choose
        self._refused = refused
        self._most_body_bytes = most_body_bytes
        self._hold = Hold(memory)
        self._part = Hold(memory)  # of a message that is not whole: a buffered body is one message
        self._memory = memory
        self._state = OPENED
        self._choice: Choice | None = None
        self._mode = DUPLEX
        self._response_mode = ProcessingMode.NONE
        self._request: Request | None = None
        self._subset: frozenset[str] | None = None
        self._pieces: list[bytes] = []
        self._has_body = False
        self._owes_body = False  # Envoy waits for an answer to a body
        self._owes_trailers = False

    @property
    def state(self) -> State:
        return self._state

    # Events of the call.

    def on_message(self, data: bytes) -> None:
        self._part.release()
        if self._state is OVER:
            return
        try:
            message = ProcessingRequest.FromString(data)
        except DecodeError:
            raise GrpcError(Status.INVALID_ARGUMENT, "no ProcessingRequest can be read") from None
        kind = message.WhichOneof("request")
        if kind is None or kind not in TRANSITIONS[self._state]:
            raise GrpcError(
                Status.INVALID_ARGUMENT, f"{kind or 'this message'} is not expected now: {self._state.value}"
            )
        if message.observability_mode:
            raise GrpcError(Status.FAILED_PRECONDITION, "a picker cannot work in observability_mode")
        HANDLERS[kind](self, message)

    def on_part(self, size: int) -> None:
        if self._state not in (OPENED, RECEIVING):  # what comes later passes through
            return
        more = size - self._part.size
        try:
            self._memory.admit_request(self._hold.size + self._part.size, more)
        except ApiError as error:
            self.refuse(error)
        else:
            self._part.add(more)

    def on_too_long(self) -> None:
        if self._state is RECEIVING:  # only a body is so long
            self.refuse(self._too_large())

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the request body exceeds {self._most_body_bytes} bytes")

    def on_end(self) -> None:
        """Envoy has nothing more to say: the answer has ended, its filter does not tell the end, or the client left."""
        self._end()
        self._call.end()

    def on_gone(self) -> None:
        self._end()

    # The request.

    def _on_request_headers(self, message: ProcessingRequest) -> None:
        if message.HasField("protocol_config"):
            self._mode = message.protocol_config.request_body_mode
            self._response_mode = message.protocol_config.response_body_mode
        self._subset = subset_of(message.metadata_context)
        headers = _headers(message.request_headers)
        path, _, query = headers.get(b":path", b"").partition(b"?")
        self._request = Request(headers.get(b":method", b""), path, headers, b"", query=query)
        self._has_body = not message.request_headers.end_of_stream
        if not self._has_body or self._mode not in (DUPLEX, BUFFERED):
            self._begin_choice()
            return
        self._state = RECEIVING
        if self._mode == BUFFERED:
            self._call.send(replies.BODY_AWAITED)

    def _on_request_body(self, message: ProcessingRequest) -> None:
        body = message.request_body
        if self._mode not in (DUPLEX, BUFFERED):
            self._call.send(replies.REQUEST_BODY_SEEN)
            return
        if self._state is not RECEIVING:
            raise GrpcError(Status.INVALID_ARGUMENT, "a body after its end")
        try:
            self._keep(body)
        except ApiError as error:
            self.refuse(error)
            return
        if self._mode == BUFFERED:
            self._owes_body = True
        if body.end_of_stream or self._mode == BUFFERED:
            self._begin_choice()

    def _keep(self, body: HttpBody) -> None:
        """Keep a piece of the body. Raises ApiError if there is no room."""
        size = len(body.body)
        if self._hold.size + size > self._most_body_bytes:
            raise self._too_large()
        self._memory.admit_request(self._hold.size, size)
        self._hold.add(size)
        self._pieces.append(body.body)

    def _on_request_trailers(self, message: ProcessingRequest) -> None:
        if self._owes_trailers:
            raise GrpcError(Status.INVALID_ARGUMENT, "trailers after trailers")
        if self._state in (PICKED, ANSWERING):
            self._call.send(replies.REQUEST_TRAILERS_SEEN)
            return
        self._owes_trailers = True
        if self._state is RECEIVING:
            self._begin_choice()

    def _begin_choice(self) -> None:
        request = self._request
        assert request is not None
        self._state = CHOOSING
        if len(self._pieces) > 1:  # in one piece alone, or a request that waits would hold its body twice
            self._pieces = [b"".join(self._pieces)]
        request.body = self._pieces[0] if self._pieces else b""
        request.hold = self._hold
        self._choice = self._choose(self, request, self._subset)
        self._subset = None

    # What the choice comes to.

    def picked(self, destination: Destination) -> None:
        """Tell Envoy where the request goes."""
        if self._state is not CHOOSING:
            return
        self._state = PICKED
        changed = destination.body
        # Envoy overrides no mode in answers to bodies, and none that has FULL_DUPLEX_STREAMED.
        override = None if self._owes_body or self._mode == DUPLEX else replies.quiet_mode(self._mode)
        send = self._call.send
        send(replies.picked(destination, self._owes_body, override))
        if self._has_body and self._mode == DUPLEX:
            pieces = self._pieces if changed is None else (changed,)
            for message in replies.streamed_request(pieces, end=not self._owes_trailers):
                send(message)
        if self._owes_trailers:
            self._owes_trailers = False
            send(replies.REQUEST_TRAILERS_SEEN)
        self._let_go()

    def refuse(self, error: ApiError) -> None:
        """Let Envoy answer the request with an error."""
        if self._state is OVER:
            return
        path = b"" if self._request is None else self._request.path
        if self._choice is None:
            self._refused(path, error.status)
        self._call.send(replies.refused(error, path))
        self._end()
        self._call.end()

    def leave(self) -> None:
        """Leave the rest of the request to Envoy, which goes on alone. It has been told where the request goes."""
        self._end()
        self._call.end()

    def _let_go(self) -> None:
        """Let go of the body. The memory of a thousand streams would otherwise hold all their prompts."""
        self._pieces = []
        self._request = None
        self._hold.release()
        self._part.release()

    # The answer.

    def _on_response_headers(self, message: ProcessingRequest) -> None:
        if self._state is not PICKED:  # Envoy itself has answered, and the request will go nowhere
            self._call.send(replies.RESPONSE_HEADERS_SEEN)
            self._end()
            return
        self._state = ANSWERING
        headers = _headers(message.response_headers)
        status = headers.get(b":status", b"")
        endpoint = served_by(message.metadata_context) if message.HasField("metadata_context") else ""
        if self._choice is not None:
            self._choice.answered(
                int(status) if STATUS.fullmatch(status) else NO_STATUS, endpoint, ENVOY_OVERLOADED not in headers
            )
        self._call.send(replies.RESPONSE_HEADERS_SEEN)
        if message.response_headers.end_of_stream:
            self._end()

    def _on_response_body(self, message: ProcessingRequest) -> None:
        body = message.response_body
        if self._response_mode == DUPLEX:
            for piece in replies.streamed_response(body.body, body.end_of_stream):
                self._call.send(piece)
        else:
            self._call.send(replies.RESPONSE_BODY_SEEN)
        if body.end_of_stream:
            self._end()

    def _on_response_trailers(self, message: ProcessingRequest) -> None:
        self._call.send(replies.RESPONSE_TRAILERS_SEEN)
        self._end()

    def _end(self) -> None:
        """The request is over, in whatever way, and this once."""
        if self._state is OVER:
            return
        self._state = OVER
        self._let_go()
        choice, self._choice = self._choice, None
        if choice is not None:
            choice.ended()


HANDLERS: Final[dict[str, Callable[[Conversation, ProcessingRequest], None]]] = {
    "request_headers": Conversation._on_request_headers,
    "request_body": Conversation._on_request_body,
    "request_trailers": Conversation._on_request_trailers,
    "response_headers": Conversation._on_response_headers,
    "response_body": Conversation._on_response_body,
    "response_trailers": Conversation._on_response_trailers,
}


def _headers(message: HttpHeaders) -> dict[bytes, bytes]:
    """Names in lower case, as Envoy sends them. The values of a repeated header are joined by commas."""
    headers: dict[bytes, bytes] = {}
    for header in message.headers.headers:
        name, value = header.key.encode(), header.raw_value or header.value.encode()
        headers[name] = headers[name] + b"," + value if name in headers else value
    return headers
