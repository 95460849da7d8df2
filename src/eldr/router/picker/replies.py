"""What the picker answers to Envoy's messages, as bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from eldr.router.http.errors import ApiError
from eldr.router.picker.endpoints import DESTINATION, DESTINATION_NAMESPACE
from eldr.router.picker.messages_pb2 import (
    BodyResponse,
    CommonResponse,
    HeadersResponse,
    HeaderValueOption,
    HttpStatus,
    ImmediateResponse,
    ProcessingMode,
    ProcessingResponse,
    StreamedBodyResponse,
    TrailersResponse,
)

OVERWRITE: Final = HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD
# llm-d's sidecar reads there where it may compute the prompt.
PREFILLER: Final = "x-prefiller-host-port"
# A message to Envoy holds no more of a body: what it buffers of a stream is limited, by default to 1 MiB.
PIECE_BYTES: Final = 64 * 1024

REQUEST_BODY_SEEN: Final = ProcessingResponse(request_body=BodyResponse()).SerializeToString()
REQUEST_TRAILERS_SEEN: Final = ProcessingResponse(request_trailers=TrailersResponse()).SerializeToString()
RESPONSE_HEADERS_SEEN: Final = ProcessingResponse(response_headers=HeadersResponse()).SerializeToString()
RESPONSE_BODY_SEEN: Final = ProcessingResponse(response_body=BodyResponse()).SerializeToString()
RESPONSE_TRAILERS_SEEN: Final = ProcessingResponse(response_trailers=TrailersResponse()).SerializeToString()


def quiet_mode(request_body_mode: ProcessingMode.BodySendMode) -> ProcessingMode:
    """The mode in which Envoy tells how an answer begins and ends, and nothing in between. It may be overridden so."""
    return ProcessingMode(
        request_header_mode=ProcessingMode.SEND,
        request_body_mode=request_body_mode,
        response_header_mode=ProcessingMode.SEND,
        response_body_mode=ProcessingMode.NONE,
        response_trailer_mode=ProcessingMode.SEND,
    )


# The answer to the headers in front of a body that is buffered.
BODY_AWAITED: Final = ProcessingResponse(
    request_headers=HeadersResponse(), mode_override=quiet_mode(ProcessingMode.BUFFERED)
).SerializeToString()


class Destination:
    """Where a request goes.

    endpoints: ip:port of the worker, and of others to try after it, in order.
    prefiller: ip:port of the worker that computes the prompt before. Empty if none does.
    body: what the worker gets instead of the client's body. None for that body as it is.
    """

    __slots__ = ("body", "endpoints", "prefiller")

    def __init__(self, endpoints: Sequence[str], prefiller: str = "", body: bytes | None = None) -> None:
        self.endpoints = endpoints
        self.prefiller = prefiller
        self.body = body


def picked(destination: Destination, in_body: bool, override: ProcessingMode | None) -> bytes:
    """The message that names the destination.

    in_body: whether it answers a buffered body, and then has the body to send, or the headers.
    override: the mode that Envoy is asked to use from now on.
    """
    message = ProcessingResponse()
    common = message.request_body.response if in_body else message.request_headers.response
    common.clear_route_cache = True
    value = ",".join(destination.endpoints)
    _set(common, DESTINATION, value)
    message.dynamic_metadata.fields[DESTINATION_NAMESPACE].struct_value.fields[DESTINATION].string_value = value
    if destination.prefiller:
        _set(common, PREFILLER, destination.prefiller)
    else:
        common.header_mutation.remove_headers.append(PREFILLER)
    if in_body and destination.body is not None:
        common.body_mutation.body = destination.body
        # Envoy fails a request whose length is not that of its new body.
        _set(common, "content-length", str(len(destination.body)))
    if override is not None:
        message.mode_override.CopyFrom(override)
    return message.SerializeToString()


def _set(common: CommonResponse, name: str, value: str) -> None:
    option = common.header_mutation.set_headers.add(append_action=OVERWRITE)
    option.header.key = name
    option.header.raw_value = value.encode()


def streamed_request(pieces: Iterable[bytes], end: bool) -> Iterator[bytes]:
    """The messages that give Envoy the body of a request. end: whether the request ends with it."""
    for piece, last in _cut(pieces):
        message = ProcessingResponse()
        message.request_body.response.body_mutation.streamed_response.CopyFrom(
            StreamedBodyResponse(body=piece, end_of_stream=end and last)
        )
        yield message.SerializeToString()


def streamed_response(body: bytes, end: bool) -> Iterator[bytes]:
    """The messages that give Envoy a piece of an answer back. end: whether it is the last."""
    for piece, last in _cut((body,)):
        message = ProcessingResponse()
        message.response_body.response.body_mutation.streamed_response.CopyFrom(
            StreamedBodyResponse(body=piece, end_of_stream=end and last)
        )
        yield message.SerializeToString()


def refused(error: ApiError, path: bytes) -> bytes:
    """The message that makes Envoy answer with an error, and send the request nowhere."""
    answer = ImmediateResponse(status=HttpStatus(code=error.status), body=error.body_for(path), details="eldr_epp")
    retry_after = {} if error.retry_after_s is None else {"retry-after": str(error.retry_after_s)}
    for name, value in {"content-type": "application/json", **retry_after}.items():
        option = answer.headers.set_headers.add(append_action=OVERWRITE)
        option.header.key = name
        option.header.raw_value = value.encode()
    return ProcessingResponse(immediate_response=answer).SerializeToString()


def _cut(pieces: Iterable[bytes]) -> Iterator[tuple[bytes, bool]]:
    """Pieces of no more than PIECE_BYTES, and whether each is the last. There is at least one, which may be empty."""
    held: bytes | None = None
    for piece in pieces:
        for start in range(0, len(piece), PIECE_BYTES):
            if held is not None:
                yield held, False
            held = piece[start : start + PIECE_BYTES]
    yield held or b"", True
