"""What is fuzzed: every reader of bytes that somebody else wrote, and what must hold whatever the bytes are.

A target takes bytes and returns nothing. It raises AssertionError where a promise is broken, and anything else that it
raises is a failure as well: bad input has to end in the reader's own error.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import logging
import math
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h11
import numpy as np
import orjson

import eldr.kernels
import eldr.kernels._json
import eldr.kernels._words
from eldr.calibration import CalibrationError, load_calibration
from eldr.counts import CountsError, ExpertCounts, decode_counts, encode_counts
from eldr.event_stream import EventReader
from eldr.expert_rows import decode_rows, encode_rows
from eldr.kernels import NO_OBJECT, JsonNames, JsonObject, JsonTextError
from eldr.kernels._types import TOO_MANY_MEMBERS
from eldr.prompt.words import END_BYTES, END_TIMES, MOST_TEXT_BYTES, words_of_text
from eldr.router.config.endpoint import ROLES, UrlError, worker_urls
from eldr.router.config.kubernetes import kubernetes_address
from eldr.router.experts.base import MoeGeometry
from eldr.router.experts.connector_reports import read_batch, take_reports
from eldr.router.experts.expected import ExpectedReports
from eldr.router.experts.routed_experts import VllmRoutedExperts
from eldr.router.fleet.discovery import kubernetes_watch
from eldr.router.fleet.discovery.kubernetes_api import KubernetesApi, from_json
from eldr.router.fleet.discovery.kubernetes_watch import Collection, Resource
from eldr.router.fleet.discovery.pods import pod_urls, pool_of
from eldr.router.fleet.workers import Worker
from eldr.router.http.client import ExchangeError
from eldr.router.http.content_coding import DECODERS, PIECE_BYTES, BodyDecoder
from eldr.router.http.errors import ApiError
from eldr.router.observe.counters import Metrics
from eldr.router.peers.others import PEER_TIMEOUT_S
from eldr.router.protocols import openai
from eldr.router.protocols.prompt_prefix import prompt_prefix
from eldr.router.protocols.prompt_start import SYSTEM, prompt_start
from eldr.router.protocols.prompt_text import prompt_text, prompt_words
from eldr.router.protocols.sglang import Sglang
from eldr.router.protocols.streams import FORMS
from eldr.router.protocols.vllm_nixl import VllmNixl
from eldr.router.request.answer import DecodeAnswer, TokenTimes
from eldr.router.request.verdict import Names, check_first_event
from eldr.trace import TraceError, read_trace
from tests.router.memory import RUNNER, feed, hear, split
from tests.router.peers.network import URLS, Listener
from tests.router.picker.memory import CALL_OF_A_GATEWAY, converse
from tests.unit.events_by_the_standard import by_the_standard

HERE = Path(__file__).parent
SCRATCH = Path(tempfile.mkdtemp(prefix="eldr-fuzz-"))
# Behind these marks stand changes to the members of an archive, and the parts of a wire form: checksums and codings
# would otherwise stop most inputs at the door.
CHANGES = b"\xffchanges"
INSIDE = b"\xffinside"
MAX_DECODED_BYTES = 2**20
PODS = kubernetes_address("k8s+http://moe?selector=a&port=http&port=8200")


def http(data: bytes) -> None:
    """Requests of clients: the same however they are split, at most one refusal, the first one as h11 sees it."""
    whole = feed([data] if data else [])
    cuts = [byte * 7 for byte in data[:8]]
    assert feed(split(data, cuts)) == whole
    requests, errors, statuses = whole
    assert len(errors) <= 1
    assert len(statuses) <= len(requests) + 1
    if requests:
        seen = _first_by_h11(data)
        if seen is not None:
            method, target, body = seen
            assert method == requests[0][0]
            assert b"content-encoding" in data.lower() or body == requests[0][3]
            assert not target.startswith(b"/") or target.partition(b"?")[0] == requests[0][1]


def _first_by_h11(data: bytes) -> tuple[bytes, bytes, bytes] | None:
    """Method, target and body of the first request as another parser sees it; None if it wants none of it."""
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=2**20)
    try:
        connection.receive_data(data)
        request, body = connection.next_event(), b""
        if not isinstance(request, h11.Request):
            return None
        while isinstance(event := connection.next_event(), h11.Data):
            body += event.data
    except h11.RemoteProtocolError:
        return None
    return (request.method, request.target, body) if isinstance(event, h11.EndOfMessage) else None


def coding(data: bytes) -> None:
    """Compressed bodies: ApiError 400, or an end. The first byte chooses the coding."""
    if len(data) < 2:
        return
    decoder = BodyDecoder(list(DECODERS)[data[0] % len(DECODERS)], data[1:])
    decoded = 0
    with contextlib.suppress(ApiError):
        while not decoder.complete and decoded < MAX_DECODED_BYTES:
            piece = decoder.next_piece()
            assert len(piece) <= PIECE_BYTES
            decoded += len(piece)


def upstream(data: bytes) -> None:
    """Answers of workers: every exchange ends once, and a part is never taken for the whole."""
    heard, _ = hear([data] if data else [], lost=True)
    assert len(heard.ended) == 1
    again, _ = hear(split(data, [byte * 7 for byte in data[:8]]), lost=True)
    assert again.ended == heard.ended
    if heard.ended == ["done"]:
        assert (again.status, again.body) == (heard.status, heard.body)


class _Client:
    """Keeps what a stream sends to its client."""

    streaming = False

    def __init__(self) -> None:
        self.sent = b""
        self.ends: list[str] = []

    def begin_stream(self, content_type: bytes, extra: bytes) -> None:
        assert b"\r" not in content_type
        assert b"\n" not in content_type

    def write(self, data: bytes, framed: bytes | None = None) -> None:
        assert data
        self.sent += data

    def end_stream(self) -> None:
        self.ends.append("end")

    def break_stream(self) -> None:
        self.ends.append("break")


def sse(data: bytes) -> None:
    """Streams: the client gets every byte in order or none, and an end only where the worker sent one."""
    for pieces in ([data] if data else [], split(data, [byte * 7 for byte in data[:8]])):
        RUNNER.run(_stream(pieces))


def events(data: bytes) -> None:
    """Server-sent events: those of the standard, however the bytes are cut and however little is kept."""
    for keep_bytes in (4, 1024):
        expected = by_the_standard(data, keep_bytes)
        for pieces in (
            [data],
            split(data, [byte * 7 for byte in data[:8]]),
            [data[i : i + 1] for i in range(len(data))],
        ):
            reader = EventReader(keep_bytes)
            found = [(event.type, event.data, event.whole) for piece in pieces for event in reader.feed(piece)]
            assert found == expected


async def _stream(pieces: list[bytes]) -> None:
    data, client = b"".join(pieces), _Client()
    times = TokenTimes(Metrics(), 0.0, 1)
    answer = DecodeAnswer(
        client,  # type: ignore[arg-type]
        times,
        b"",
        FORMS[openai.CHAT],
        lambda event: check_first_event(event, FORMS[openai.CHAT], VllmNixl(), "leg", Names()),
        True,
    )
    answer.on_head(200, {b"content-type": b"text/event-stream"})
    try:
        for piece in pieces:
            answer.on_body(piece)
        answer.on_done()
    except ExchangeError as error:
        answer.on_failed(error)
    assert answer.finished.done()
    if not answer.begun:
        assert client.sent == b""
        assert isinstance(answer.failure, ExchangeError)
        return
    times.observe(answer.whole)
    assert client.sent.startswith(data)
    assert client.ends in (["end"], ["break"])
    if client.ends == ["end"]:
        assert client.sent == data
        assert b"[DONE]" in data
    assert 0 <= times.events <= data.count(b"\n") + data.count(b"\r") + 1


def counts(data: bytes) -> None:
    """Expert counts: CountsError, or counts that are consistent and survive the way there and back."""
    with contextlib.suppress(CountsError):
        found = decode_counts(_wire(data, ("layers", "experts", "top_k", "low_bits", "high_bits"), bytes))
        assert (found.counts.sum(axis=1, dtype=np.uint64) == found.prompt_tokens * found.top_k).all()
        assert (decode_counts(encode_counts(found)).counts == found.counts).all()


def rows(data: bytes) -> None:
    """Experts of generated tokens, the same."""
    with contextlib.suppress(CountsError):
        found = decode_rows(_wire(data, ("layers", "tokens", "top_k"), zlib.compress))
        assert found.ndim == 3
        if len(found):
            assert (decode_rows(encode_rows(found)) == found).all()


def reports(data: bytes) -> None:
    """A worker's reports: a refusal of the batch, or one outcome for each, and nothing believed that is not so."""
    heard = _Heard()
    metrics = Metrics()
    expected = ExpectedReports(heard, {"": MoeGeometry(2, 8, 2)}, metrics)
    for name in ("one", "two"):
        expected.expect(name, name + "/0", None, 100)
    outcomes: Counter[str] = Counter()
    try:
        batch = read_batch(data)
    except ApiError:
        return
    take_reports(batch, expected, outcomes)
    assert outcomes.total() == len(batch) == sum(metrics.expert_reports.values())
    assert len(set(heard.names)) == len(heard.names) == outcomes["accepted"]
    assert set(heard.names) <= {"one/0", "two/0"}


class _Heard:
    def __init__(self) -> None:
        self.names: list[str] = []

    def report(self, request_id: str, decode: ExpertCounts) -> None:
        assert decode.counts.shape == (2, 8)
        assert (decode.counts.sum(axis=1) == decode.prompt_tokens * 2).all()
        assert decode.prompt_tokens <= 100
        self.names.append(request_id)


CHOICES = JsonNames(("choices",))


def routed_experts(data: bytes) -> None:
    """A stock worker's answer: with its experts cut out it is still JSON, and only sound rows are counted."""
    engine = VllmRoutedExperts()
    try:
        answer = JsonObject(data, CHOICES)
    except JsonTextError:
        texts = [data, base64.b64encode(data)]  # the file itself
    else:
        span = answer.span("choices")
        if span is not None and data[span[0]] != ord("["):
            return
        kept, texts = engine.take(data, span)
        JsonObject(kept, JsonNames(()))
        assert (kept == data) == (not texts)
        assert engine.take(kept, JsonObject(kept, CHOICES).span("choices"))[1] == []
    for text in texts:
        with contextlib.suppress(CountsError):
            found = engine.decode(text, 3, 4, MoeGeometry(2, 8, 2))
            found.check()
            assert (found.layers, found.experts, found.prompt_tokens) == (2, 8, 3)


def handoff(data: bytes) -> None:
    """Answers of prefill workers: a hand-off or none, with a lease that is a number and can be sent on as JSON."""
    protocol = VllmNixl()
    try:
        answer = JsonObject(data, protocol.answer_names)
    except JsonTextError:
        return
    found = protocol.read_handoff(answer, Worker("http://p:1", "prefill", 1), 0.0)
    if found is not None:
        assert not math.isnan(found.left_s(1.0))
        params = _members(found.spend(record=False))
        assert "eldr_counts" not in [name for name, _ in params]
        assert [name for name, _ in params].count("eldr_lease") <= 1


def body(data: bytes) -> None:
    """Bodies of clients: ApiError, or requests to both legs without what only the router may say."""
    protocol = VllmNixl()
    reserved = openai.body_names(protocol.reserved)
    for endpoint in openai.ENDPOINTS.values():
        names = openai.body_names(endpoint.members | protocol.members)
        try:
            fields = openai.read_body(endpoint, data, names, reserved)
            why = protocol.why_whole(endpoint, fields)
            openai.wants_usage(fields)
            protocol.refuse_early(endpoint, fields, 100)
        except ApiError:
            continue
        start, end = fields.span(endpoint.input) or (0, 0)
        assert len(prompt_start(endpoint, fields.text, start, end, 64)) <= 64 + len(b"4294967295 ")
        assert why is None or why.isidentifier()
        sent = _members(fields.text)
        others = [name for name, _ in sent if name not in OWNED]
        prefill, decode = (
            _members(protocol.prefill_body(endpoint, fields, False, "leg")),
            _members(protocol.whole_body(endpoint, fields, False, "leg")),
        )
        assert [name for name, _ in prefill if name not in OWNED] == others
        mine = {"stream": False, "kv_transfer_params": {"do_remote_decode": True, "do_remote_prefill": False}}
        for name, value in {**dict.fromkeys(endpoint.limits, 1), **mine}.items():
            assert [given for key, given in prefill if key == name] == [value]
        kept = [each for each in sent if each[0] not in (*protocol.reserved, "request_id")]
        if endpoint.path == openai.RESPONSES:
            assert decode.pop()[0] == "request_id"
        assert repr(decode) == repr(kept)
        assert not any(name.startswith("eldr_") for name, _ in decode)
        limit = openai.max_tokens(endpoint, fields)
        assert limit is None or limit >= 0
    _pair_bodies(data)


def _pair_bodies(data: bytes) -> None:
    """The same for both legs at once: what says where they meet is there once, and from the router."""
    protocol = Sglang()
    met = protocol.rendezvous(Worker("http://p:1", "prefill", 1, bootstrap_port=8998))
    for endpoint in openai.ENDPOINTS.values():
        names = openai.body_names(endpoint.members | protocol.members | protocol.reserved)
        try:
            fields = openai.read_body(endpoint, data, names, openai.body_names(protocol.reserved))
            protocol.refuse_early(endpoint, fields, 100)
        except ApiError:
            continue
        name = "request_id" if endpoint.path == openai.RESPONSES else "rid"
        owned = {*protocol.reserved, "rid", "request_id"}
        for role in ROLES:
            left_out = owned if role == "decode" else owned | {"stream", "stream_options"}
            leg = _members(protocol.leg_body(endpoint, fields, role, met, "leg"))
            assert [key for key, _ in leg[-4:]] == [name, "bootstrap_host", "bootstrap_port", "bootstrap_room"]
            assert repr(leg[:-4]) == repr([each for each in _members(fields.text) if each[0] not in left_out])


def words(data: bytes) -> None:
    """Words of prompts: of every body that is taken, the same from both readers, and of no more than the end."""
    for endpoint in openai.ENDPOINTS.values():
        try:
            fields = openai.read_body(
                endpoint, data, openai.body_names(endpoint.members), openai.body_names(frozenset())
            )
        except ApiError:
            continue
        found = prompt_words(endpoint, fields)
        assert len(found) == len(found.counts) == len(set(found.buckets.tolist())) <= 2 * MOST_TEXT_BYTES
        text, span = prompt_text(endpoint, fields), fields.span(endpoint.input)
        if not text or span is None:
            continue
        assert text == eldr.kernels._words.json_texts(fields.text, *span, SYSTEM, MOST_TEXT_BYTES)
        again = eldr.kernels._words.text_words(text, END_BYTES, END_TIMES)
        assert (found.buckets.tolist(), found.counts.tolist()) == (again[0].tolist(), again[1].tolist())


# What the router takes out of a prefill's body, or puts into it.
OWNED = (
    *("stream", "stream_options", "min_tokens", "return_token_ids", "return_prompt_text", "request_id"),
    *("kv_transfer_params", "ec_transfer_params", "max_tokens", "max_completion_tokens"),
    *("max_output_tokens", "store", "enable_response_messages"),
)


def _members(text: bytes) -> list[tuple[str, Any]]:
    """The members of an object in their order, duplicates included."""
    found: list[tuple[str, Any]] = []

    def keep(members: list[tuple[str, Any]]) -> dict[str, Any]:
        found[:] = members  # the outermost object is the last one
        return dict(members)

    json.loads(text, object_pairs_hook=keep, parse_int=str)
    return [(name, int(value) if value == "1" else value) for name, value in found]


def json_text(data: bytes) -> None:
    """JSON: both readers take what CPython's json takes, and find the same members in it."""
    results: list[Any] = []
    for reader in (eldr.kernels, eldr.kernels._json):
        try:
            read = reader.JsonObject(data, reader.JsonNames(("a", "messages", ""), "eldr_"))
            results.append((read.members, read.spliced(frozenset(("a", "eldr_b")), b'"a":1')))
        except JsonTextError as error:
            results.append(error.fault if error.fault in (NO_OBJECT, TOO_MANY_MEMBERS) else 0)
    assert results[0] == results[1]
    try:
        value = json.loads(data.decode("utf-8", "surrogatepass"), parse_int=str)
    except ValueError:
        assert isinstance(results[0], int)
        return
    except RecursionError:
        return
    if not isinstance(value, dict):
        assert results[0] == NO_OBJECT
    elif results[0] != TOO_MANY_MEMBERS:
        found = {name: json.loads(data[start:end], parse_int=str) for name, start, end in results[0][0]}
        assert repr(found) == repr({name: value[name] for name in found})


def picker(data: bytes) -> None:
    """What a gateway sends a picker: every choice ends once, no body is kept, and cuts between bytes mean nothing.

    The first byte says whether all of HTTP/2 follows, or the messages of one call.
    """
    if data[:1] == b"2":
        pieces = split(data[1:], [byte * 11 for byte in data[1:6]])
    else:
        pieces = [CALL_OF_A_GATEWAY, *_frames_of_data(data[1:])]
    service, _ = RUNNER.run(converse([piece for piece in pieces if piece]))
    for choice in service.choices:
        assert choice.told in ([], ["ended"], ["answered", "ended"])
        assert choice.told[-1:] == ["ended"]
    assert not service.connections
    assert service.memory.held_bytes == 0


def leg(data: bytes) -> None:
    """Bodies of legs that somebody else sends: ApiError, or what a choice needs, and all members but eldr's pass."""
    protocol = VllmNixl()
    for endpoint in openai.ENDPOINTS.values():
        names = openai.body_names(endpoint.members | protocol.members | protocol.reserved)
        try:
            fields = openai.object_of(openai.text_of(data), names)
            why = protocol.why_whole(endpoint, fields)
            openai.model(fields)
        except ApiError:
            continue
        assert why is None or why.isidentifier()
        start, end = fields.span(endpoint.input) or (0, 0)
        assert len(prompt_start(endpoint, fields.text, start, end, 64)) <= 64 + len(b"4294967295 ")
        assert prompt_prefix(endpoint, fields).tokens >= 0
        prompt_words(endpoint, fields)
        found = protocol.handoff_in(fields)
        if found is None:
            continue
        assert not math.isnan(found.left_s(1.0))
        sent, passed_on = _members(fields.text), _members(protocol.passed_on(fields, found))
        kept = [each for each in sent if each[0] != "kv_transfer_params"]
        assert repr([each for each in passed_on if each[0] != "kv_transfer_params"]) == repr(kept)
        (params,) = [value for name, value in passed_on if name == "kv_transfer_params"]
        assert params["do_remote_prefill"] is True
        assert not {"eldr_counts", "eldr_record"} & params.keys()


def _frames_of_data(data: bytes) -> list[bytes]:
    """DATA frames of stream 1 (RFC 9113, section 6.1)."""
    pieces = [data[start : start + 1000] for start in range(0, len(data), 1000)]
    return [len(piece).to_bytes(3, "big") + b"\0\0\0\0\0\1" + piece for piece in pieces]


def urls(data: bytes) -> None:
    """Workers' URLs: UrlError, or URLs that name a host and nothing else, and stay what they are."""
    with contextlib.suppress(UrlError, UnicodeDecodeError):
        for url in worker_urls(data.decode()):
            assert worker_urls(url) == (url,)
            assert not set(url) & set(" \r\n\t?\\")
            assert not set(url.split("/")[2]) & set("@%")
            assert ".." not in url.split("/")


def kubernetes(data: bytes) -> None:
    """Lists and watches: ApiError, or workers with sound URLs. The first line is a list, and the others are events."""
    list_, *events = data.split(b"\n")
    asyncio.run(_follow(list_, [event for event in events if event]))


async def _follow(list_: bytes, events: list[bytes]) -> None:
    class Over(BaseException):
        """The input was read, or refused."""

    class Answers(KubernetesApi):
        async def get(self, session: Any, path: str, query: Any) -> Any:
            return from_json(list_)

        async def stream(self, session: Any, path: str, query: Any, hear: Callable[[list[bytes]], None]) -> None:
            hear([])
            hear(events)
            raise Over

    def failed() -> None:
        raise Over

    def changed(pods: dict[str, frozenset[str]]) -> None:
        for url in frozenset[str]().union(*pods.values()):
            assert worker_urls(url) == (url,)

    def read(found: Any) -> frozenset[str] | None:
        pool_of(found)
        return pod_urls(found, PODS, PODS.ports)

    def is_no_defect(record: logging.LogRecord) -> bool:
        assert record.levelno < logging.ERROR, record.getMessage()
        return False

    resource = Resource("", "pods", "moe")
    collection = Collection(Answers("http://api", Path()), resource, {}, read, changed, failed, 3600)
    kubernetes_watch.log.addFilter(is_no_defect)
    try:
        async with asyncio.timeout(0.01):
            await collection.follow(None)  # type: ignore[arg-type]
    except (Over, TimeoutError):
        pass
    finally:
        kubernetes_watch.log.removeFilter(is_no_defect)


def calibration(data: bytes) -> None:
    """Calibration files: CalibrationError, or a calibration that predicts numbers, can be saved and read again."""
    with contextlib.suppress(CalibrationError):
        found = load_calibration(_file(data, "calibration"))
        if found.prompts is not None:
            assert np.isfinite(found.prompts.predict(words_of_text(bytes(range(256))))).all()
        found.save(SCRATCH / "again.npz")
        load_calibration(SCRATCH / "again.npz")


def trace(data: bytes) -> None:
    """Trace files: TraceError, or a trace whose profiles can be taken."""
    with contextlib.suppress(TraceError):
        read_trace(_file(data, "trace")).decode_profiles()


def _wire(data: bytes, keys: tuple[str, ...], pack: Callable[[bytes], bytes]) -> object:
    """JSON; or, behind a mark, a wire form with these keys' values and data that can be unpacked."""
    if not data.startswith(INSIDE):
        return _json(data)
    given = data[len(INSIDE) :].ljust(8, b"\0")
    fields = dict(zip(keys, given, strict=False))
    prompt_tokens, dtype = int.from_bytes(given[5:7]), f"u{1 + given[5] % 2}"
    packed = base64.b64encode(pack(given[7:])).decode()
    return {"v": 2, **fields, "prompt_tokens": prompt_tokens, "dtype": dtype, "data": packed}


def _json(data: bytes) -> object:
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        return data


def _file(data: bytes, kind: str) -> Path:
    """A file of these bytes. Behind CHANGES, four bytes each change one byte of a member of the kind's first seed: the
    archive's own checksums then agree, and what is inside is tried."""
    path = SCRATCH / f"{kind}.npz"
    if not data.startswith(CHANGES):
        path.write_bytes(data)
        return path
    with zipfile.ZipFile(min((HERE / "corpus" / kind).glob("*.npz"))) as seed:
        members = {name: bytearray(seed.read(name)) for name in sorted(seed.namelist())}
    names = list(members)
    changes = data[len(CHANGES) :]
    for at in range(0, len(changes) - 3, 4):
        member = members[names[changes[at] % len(names)]]
        member[int.from_bytes(changes[at + 1 : at + 3]) % len(member)] = changes[at + 3]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, bytes(content))
    path.write_bytes(buffer.getvalue())
    return path


def peers(data: bytes) -> None:
    """Frames of other replicas, each after its length: counted or taken note of, and gone when their origins are."""
    listener = Listener(0, lambda origin: None, lambda origin: None)
    for url in URLS:
        listener.join(url)
    at, now_s = 0, 1.0
    while at + 2 <= len(data):
        length = int.from_bytes(data[at : at + 2], "little")
        listener.others.hear(data[at + 2 : at + 2 + length], now_s)
        at, now_s = at + 2 + length, now_s + 0.1
        told = Counter(url for url, _ in listener.policy.told)
        assert all(told[url] <= load for url, load in listener.load.items())  # some have no share
    for _ in range(3):
        now_s += PEER_TIMEOUT_S / 2 + 0.1
        listener.others.look(now_s)
    assert len(listener.others) == listener.elsewhere.running == len(listener.policy.told) == 0
    assert not any(listener.load.values())


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (
        *(http, coding, upstream, sse, events, body, words, json_text, urls),
        *(picker, leg, counts, rows, handoff, reports, routed_experts, kubernetes, calibration, trace, peers),
    )
}
