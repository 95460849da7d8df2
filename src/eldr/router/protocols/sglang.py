"""SGLang's prefill/decode disaggregation: both legs at once, which meet in a room.

The decode worker asks the bootstrap server of the prefill worker (`bootstrap_host`, `bootstrap_port`) for its peers,
and tells it where the blocks of the request with this number (`bootstrap_room`) should go. The prefill worker sends
them there and then answers. What is said here follows SGLang 0.5.23 (sglang/srt/entrypoints, managers/io_struct.py,
managers/tokenizer_manager.py, disaggregation/), and its gateway (sgl-model-gateway/src/routers/http/pd_router.rs).
"""

from __future__ import annotations

import re
import secrets
from typing import ClassVar, Final
from urllib.parse import urlsplit

import orjson

from eldr.kernels import JsonNames, JsonObject
from eldr.router.config.endpoint import Role
from eldr.router.fleet.workers import Worker
from eldr.router.http.errors import ApiError
from eldr.router.protocols.base import ConcurrentLegs
from eldr.router.protocols.lenient import is_true
from eldr.router.protocols.openai import ANSWER, MESSAGES, RESPONSES, Endpoint

# Fields that name hosts, rooms or ranks of workers (PDRoutingFields and GenerateReqInput). Only the router may send
# them: a room is where the KV cache of a prompt is handed out, and a rank would contradict the one that it implies.
ROUTING_FIELDS: Final = (
    "bootstrap_host",
    "bootstrap_port",
    "bootstrap_room",
    "bootstrap_pair_key",
    "routed_dp_rank",
    "data_parallel_rank",
    "disagg_prefill_dp_rank",
)
# What the prefill leg goes without: its answer is read by nobody but the router. The prefill worker generates one token
# whatever the limits say.
NOT_FOR_PREFILL: Final = ("stream", "stream_options")
# The field that names a request inside the engine, and its answer. For responses it has another name.
NAME: Final = "rid"
RESPONSES_NAME: Final = "request_id"
# Rooms are signed 64-bit integers there, and 0 means none. The prompts of one request have consecutive ones.
ROOMS: Final = 2**63 - 2**32
# Two requests with one name at the same time are refused, and clients may send one X-Request-Id twice.
UNIQUE_BYTES: Final = 8
REST_OF_NAME: Final = re.compile(rb'-[0-9a-f]{16}(_[0-9]+)?"')


class Sglang(ConcurrentLegs):
    """The decode worker is told the room in which the prefill worker waits for it."""

    reserved: ClassVar[frozenset[str]] = frozenset(ROUTING_FIELDS)
    members: ClassVar[frozenset[str]] = frozenset((NAME, "n", "echo", "logprobs", *NOT_FOR_PREFILL))
    answer_names: ClassVar[JsonNames] = JsonNames(ANSWER)

    def __init__(self) -> None:
        self._not_for_decode = frozenset((NAME, RESPONSES_NAME, *ROUTING_FIELDS))
        self._not_for_prefill = self._not_for_decode | frozenset(NOT_FOR_PREFILL)

    def refuse_early(self, endpoint: Endpoint, body: JsonObject, max_model_len: int | None) -> None:
        """Raise ApiError for what a pair of workers does not finish. All else both refuse at once, in their words."""
        if endpoint.path == MESSAGES:
            raise ApiError(501, "SGLang's prefill and decode workers do not serve /v1/messages; use chat completions")
        if not endpoint.choices:
            return
        samples = body.get("n")
        if samples is not None and samples != 1:
            # They would share one room, after a first request to fill the prefix cache had used it up.
            raise ApiError(400, "n must be 1, because SGLang's workers transfer a prompt once", param="n")
        if is_true(body.get("echo")) and body.get("logprobs") is not None:
            raise ApiError(400, "echo with logprobs needs the prompt's, which SGLang's decode workers do not have")

    def rendezvous(self, prefill: Worker) -> bytes:
        host = orjson.dumps(urlsplit(prefill.url).hostname)
        room = 1 + secrets.randbelow(ROOMS)
        return b'"bootstrap_host":%b,"bootstrap_port":%d,"bootstrap_room":%d' % (host, prefill.bootstrap_port, room)

    def leg_body(self, endpoint: Endpoint, body: JsonObject, role: Role, rendezvous: bytes, leg_name: str) -> bytes:
        owned = self._not_for_decode if role == "decode" else self._not_for_prefill
        return body.spliced(owned, b"%b,%b" % (_named(endpoint, leg_name), rendezvous))

    def whole_body(self, endpoint: Endpoint, body: JsonObject, record: bool, leg_name: str) -> bytes:
        return body.spliced(self._not_for_decode, _named(endpoint, leg_name))

    def is_transfers(self, report: bytes) -> bool:
        """Both sides name the room if the handshake or the transfer failed (disaggregation/prefill.py, decode.py)."""
        return b"bootstrap_room" in report

    def is_named_after(self, name: object, leg_name: str) -> bool:
        """The id of an answer is the name in the body, for several prompts with the number of the first behind it."""
        return isinstance(name, str) and name.isascii() and self.event_is_named_after(orjson.dumps(name), leg_name)

    def event_is_named_after(self, start: bytes, leg_name: str) -> bool:
        name = orjson.dumps(leg_name)[1:-1]
        return _has_name(start, b'"' + name) or _has_name(start, b'"resp_' + name)

    def for_client(self, answer: bytes, members: JsonObject | None) -> bytes:
        """SGLang says nothing about transfers."""
        return answer


def _named(endpoint: Endpoint, leg_name: str) -> bytes:
    """The member that names the request."""
    unique = f"{leg_name}-{secrets.token_hex(UNIQUE_BYTES)}"
    if endpoint.path == RESPONSES:
        return b'"%b":%b' % (RESPONSES_NAME.encode(), orjson.dumps(f"resp_{unique}"))
    return b'"%b":%b' % (NAME.encode(), orjson.dumps(unique))


def _has_name(text: bytes, name: bytes) -> bool:
    """Whether this name is there with its random part."""
    at = text.find(name)
    while at >= 0:
        if REST_OF_NAME.match(text, at + len(name)) is not None:
            return True
        at = text.find(name, at + 1)
    return False
