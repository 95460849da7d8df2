"""The HTTP layer towards clients, byte by byte."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eldr.router.http.body_memory import BodyMemory
from eldr.router.http.exchange import ClientExchange
from eldr.router.http.message import MAX_HEAD_BYTES, Request
from eldr.router.http.server import MAX_PIPELINED, WRITE_HIGH_BYTES, ClientConnection
from eldr.router.http.turns import Turns
from tests.router.harness import ASK, CHAT, on_uvloop, running, until
from tests.router.memory import LIMITS, Holding, MemoryTransport, Recorder, UnreadTransport, feed, split
from tests.router.wire import BODY, GET, POST, answers_in, exchange, post, status_of, wire_requests

SMUGGLED = b"GET /smuggled HTTP/1.1\r\nhost: x\r\n\r\n"

MALFORMED = {
    "both lengths": POST + b"content-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "both lengths, the other way": POST
    + b"transfer-encoding: chunked\r\ncontent-length: 4\r\n\r\n0\r\n\r\n"
    + SMUGGLED,
    "two lengths": POST + b"content-length: 3\r\ncontent-length: 40\r\n\r\n{}\n" + SMUGGLED,
    "two equal lengths": POST + b"content-length: 2\r\ncontent-length: 2\r\n\r\n{}" + SMUGGLED,
    "a list of lengths": POST + b"content-length: 2, 2\r\n\r\n{}",
    "a signed length": POST + b"content-length: +2\r\n\r\n{}",
    "a negative length": POST + b"content-length: -2\r\n\r\n{}",
    "a hexadecimal length": POST + b"content-length: 0x2\r\n\r\n{}",
    "a huge length": POST + b"content-length: 99999999999999999999999\r\n\r\n{}",
    "an unknown coding": POST + b"transfer-encoding: identity\r\n\r\n",
    "chunked not last": POST + b"transfer-encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
    "gzip and chunked": POST + b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "chunked twice": POST + b"transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked with a tab": POST + b"transfer-encoding:\x0bchunked\r\n\r\n0\r\n\r\n",
    "chunked in HTTP/1.0": POST.replace(b"/1.1", b"/1.0") + b"transfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "a space before the colon": POST + b"content-length : 2\r\n\r\n{}",
    "a folded header": POST + b"x-a: b\r\n c\r\ncontent-length: 2\r\n\r\n{}",
    "a null in a header": POST + b"x-a: b\x00c\r\ncontent-length: 2\r\n\r\n{}",
    "a bare CR in a header": POST + b"x-a: b\rc\r\ncontent-length: 2\r\n\r\n{}",
    "bare LF line ends": POST.replace(b"\r\n", b"\n") + b"content-length: 2\n\n{}",
    "a bad chunk size": POST + b"transfer-encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    "a huge chunk size": POST + b"transfer-encoding: chunked\r\n\r\nfffffffffffffffff\r\n{}\r\n0\r\n\r\n",
    "a chunk without its end": POST + b"transfer-encoding: chunked\r\n\r\n2\r\n{}x\r\n0\r\n\r\n",
    "no host": b"GET /health HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /health HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n",
    "two authorizations": b"GET /health HTTP/1.1\r\nhost: a\r\nauthorization: a\r\nauthorization: b\r\n\r\n",
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/0.9": b"GET /health\r\n\r\n",
    "TLS": bytes.fromhex("16030100a5010000a1030301020304050607"),
    "rubbish": b"\x00\x01\x02\x03\r\n\r\n",
    "a space in the target": b"GET /he alth HTTP/1.1\r\nhost: x\r\n\r\n",
    "CONNECT": b"CONNECT example.com:80 HTTP/1.1\r\nhost: x\r\n\r\n",
}


@pytest.fixture(scope="module")
def answers() -> dict[str, bytes]:
    """What the router says to each malformed request, all asked of one router."""
    collected: dict[str, bytes] = {}

    @on_uvloop
    async def ask_all() -> None:
        async with running() as s:
            names = list(MALFORMED)
            raws = await asyncio.gather(*(exchange(s, MALFORMED[name]) for name in names))
            collected.update(zip(names, raws, strict=True))
            assert (await s.post()).status == 200

    ask_all()
    return collected


def test_a_second_offer_to_upgrade_is_refused() -> None:
    offer = b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: a\r\n\r\n"
    requests, errors, statuses = feed([offer * 2])
    assert len(requests) == 1
    assert errors == [400]
    assert statuses == [b"HTTP/1.1 200 OK", b"HTTP/1.1 400 B"]


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_requests_are_refused_once_and_the_connection_closed(answers: dict[str, bytes], name: str) -> None:
    raw = answers[name]
    assert status_of(raw) == (505 if name == "HTTP/0.9" else 400)
    assert answers_in(raw) == 1  # nothing after the error was taken for a request
    head, body = raw.split(b"\r\n\r\n", 1)
    assert b"connection: close" in head
    assert json.loads(body)["error"]["message"]


@on_uvloop
async def test_limits() -> None:
    async with running(max_body_bytes=1000) as s:
        assert (await s.post(b" " * 1000)).status == 400
        assert status_of(await exchange(s, post(b" " * 1001))) == 413
        endless = POST + b"transfer-encoding: chunked\r\n\r\n" + b"1f4\r\n%b\r\n" % (b" " * 500) * 3
        assert status_of(await exchange(s, endless)) == 413
        announced = POST + b"content-length: 1001\r\n\r\n"  # refused before a byte of it is sent
        assert status_of(await exchange(s, announced)) == 413
        long = b"GET / HTTP/1.1\r\nhost: x\r\nx-long: " + b"a" * MAX_HEAD_BYTES
        assert status_of(await exchange(s, long)) == 431
        assert status_of(await exchange(s, long + b"\r\n\r\n")) == 431
        assert status_of(await exchange(s, b"GET /" + b"a" * MAX_HEAD_BYTES)) == 431
        many = b"GET / HTTP/1.1\r\nhost: x\r\n" + b"".join(b"x-%d: a\r\n" % n for n in range(200))
        assert status_of(await exchange(s, many + b"\r\n")) == 431
        assert await s.metric("eldr_request_total", endpoint="other", status="413") == 3


@on_uvloop
async def test_a_refused_body_is_not_reset_before_its_answer_is_read() -> None:
    async with running(max_body_bytes=1000) as s:
        reader, writer = await asyncio.open_connection("127.0.0.1", s.router.port)
        writer.write(POST + b"content-length: 3000000\r\n\r\n")
        for _ in range(30):  # a client that sends its whole body before it reads
            writer.write(b" " * 100_000)
            await asyncio.sleep(0.001)
        assert status_of(await reader.readuntil(b"\r\n\r\n")) == 413
        writer.close()


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/v1/completions", b"{", 400, None),
        ("/v1/completions", b"", 400, None),
        ("/v1/completions", b"[1]", 400, None),
        ("/v1/completions", b'{"model": "tiny", "prompt": "x", "max_tokens": NaN}', 400, "max_tokens"),
        ("/v1/completions", b'{"prompt": "\xff"}', 400, None),
        ("/v1/completions", {"model": "tiny"}, 400, "prompt"),
        ("/v1/completions", {"model": 3, "prompt": "x"}, 400, "model"),
        ("/v1/completions", {"model": "other", "prompt": "x"}, 404, "model"),
        ("/v1/chat/completions", {"model": "tiny"}, 400, "messages"),
        ("/v1/chat/completions", {"model": "tiny", "messages": []}, 400, "messages"),
        ("/v1/chat/completions", {**CHAT, "kv_transfer_params": {}}, 400, "kv_transfer_params"),
        ("/v1/completions", {**ASK, "ec_transfer_params": {}}, 400, "ec_transfer_params"),
        ("/v1/completions", {**ASK, "eldr_record": True}, 400, "eldr_record"),
        ("/v1/completions", {**ASK, "vllm_xargs": {"kv_transfer_params": "x"}}, 400, "vllm_xargs.kv_transfer_params"),
        ("/v1/images", ASK, 404, None),
        ("/v1/completions.", ASK, 404, None),
        ("/v1%2Fcompletions", ASK, 404, None),
        ("/", ASK, 404, None),
    ],
)
@on_uvloop
async def test_bad_requests_get_an_openai_error(path: str, body: Any, status: int, param: str | None) -> None:
    async with running() as s:
        answer = await s.post(body, path)
        assert answer.status == status
        assert answer.headers["content-type"] == "application/json"
        assert answer.error.keys() == {"message", "type", "param", "code"}
        assert (answer.error["code"], answer.error["param"]) == (status, param)
        assert s.prefill[0].generated == s.decode[0].generated == []
        assert (await s.post()).status == 200


@on_uvloop
async def test_methods_and_media_types() -> None:
    async with running() as s:
        refused = await s.get("/v1/completions")
        assert (refused.status, refused.headers["allow"]) == (405, "POST")
        refused = await s.post(path="/v1/models")
        assert (refused.status, refused.headers["allow"]) == (405, "GET, HEAD")
        assert (await s.post(headers={"content-type": "text/plain"})).status == 415
        assert (await s.post(headers={"content-type": "application/json; charset=utf-8"})).status == 200


@on_uvloop
async def test_head_is_get_without_the_body() -> None:
    async with running() as s:
        for path in (b"/health", b"/ready", b"/v1/models", b"/metrics"):
            head, get = [
                await exchange(s, b"%b %b HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n" % (method, path))
                for method in (b"HEAD", b"GET")
            ]
            fields, body = head.split(b"\r\n\r\n", 1)
            assert fields.startswith(b"HTTP/1.1 200 OK\r\n")
            assert body == b""
            if path != b"/metrics":  # which counts by then
                assert get.split(b"\r\n\r\n", 1)[0].split(b"\r\n")[-2:] == fields.split(b"\r\n")[-2:]
        raw = await exchange(s, b"HEAD /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert raw.startswith(b"HTTP/1.1 405 ")
        assert raw.endswith(b"\r\n\r\n")


@on_uvloop
async def test_pipelined_requests_are_answered_in_their_order() -> None:
    async with running() as s:
        s.decode[0].token_gap_s = 0.02
        data = GET + post(extra=b"x-request-id: r1\r\n") + GET + post(extra=b"x-request-id: r2\r\n") + GET
        raw = await exchange(s, data + GET.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"))
        assert raw.count(b"HTTP/1.1 200 OK") == 6
        assert raw.index(b'"cmpl-r1"') < raw.index(b'"cmpl-r2"')
        bodies = [part.split(b"\r\n\r\n", 1)[1] for part in raw.split(b"HTTP/1.1 200 OK\r\n")[1:]]
        assert [body == b"{}" for body in bodies] == [True, False, True, False, True, True]


@on_uvloop
async def test_pipelined_requests_of_a_client_that_does_not_read_wait() -> None:
    """Else their answers, longer than the requests, would pile up in the router."""
    requests = 200
    async with running() as s:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(sock, ("127.0.0.1", s.router.port))
        data = b"GET /metrics HTTP/1.1\r\nhost:\r\n\r\n"
        sending = asyncio.create_task(loop.sock_sendall(sock, data * requests + b"\0"))
        await until(lambda: any(connection.stalled for connection in s.router.connections), "the client is full")
        raw = b""
        while piece := await loop.sock_recv(sock, 65536):
            raw += piece
        await sending
        sock.close()
        statuses = re.findall(rb"HTTP/1\.1 (\d{3}) [A-Z]", raw)
        assert statuses == [b"200"] * requests + [b"400"]


async def test_what_waits_for_a_client_that_does_not_read_is_little() -> None:
    class Verbose(Recorder):
        def handle(self, request: Request, exchange: ClientExchange) -> None:
            self.requests.append((request.method, request.path, request.headers, request.body))
            exchange.respond(200, b"x" * 5000)

    requests, most, stalls = 200, 0, 0
    handler, transport = Verbose(), UnreadTransport()
    connection = transport.protocol = ClientConnection(handler, LIMITS, BodyMemory(LIMITS), Turns())
    connection.connection_made(transport)
    connection.data_received(GET * requests + b"\0")
    while not handler.errors:
        most = max(most, transport.unsent)
        if connection.stalled:
            begun = len(handler.requests)
            for _ in range(10):
                await asyncio.sleep(0)
            assert len(handler.requests) == begun
            stalls += 1
            transport.take()
        await asyncio.sleep(0)
    assert transport.written.count(b"HTTP/1.1 200 OK") == len(handler.requests) == requests
    assert stalls > 1
    assert WRITE_HIGH_BYTES < most < 2 * WRITE_HIGH_BYTES


@on_uvloop
async def test_what_follows_a_running_request_and_is_malformed_is_refused_after_it() -> None:
    async with running() as s:
        s.decode[0].token_gap_s = 0.02
        raw = await exchange(s, post() + b"NONSENSE\r\n\r\n")
        assert answers_in(raw) == 2
        assert status_of(raw) == 200
        assert b"HTTP/1.1 400 Bad Request" in raw


@on_uvloop
async def test_a_flood_of_pipelined_requests_is_not_read_ahead() -> None:
    handler, transport = Holding(), MemoryTransport()
    held = handler.held
    connection = ClientConnection(handler, LIMITS, BodyMemory(LIMITS), Turns())
    connection.connection_made(transport)
    connection.data_received(GET)
    assert transport.reading
    connection.data_received(GET * 50_000)  # one piece of input, read before anybody could stop it
    assert not transport.reading
    while len(held) <= MAX_PIPELINED:
        before = len(held)
        held[-1].respond(200, b"{}")
        await until(lambda before=before: len(held) == before + 1, "the next one begins")
    assert (handler.errors, transport.written.count(b"HTTP/1.1 ")) == ([], MAX_PIPELINED)
    held[-1].respond(200, b"{}")
    await until(lambda: bool(handler.errors), "what is too much is refused")
    statuses = re.findall(rb"HTTP/1\.1 (\d{3}) [A-Z]", transport.written)
    assert statuses == [b"200"] * (1 + MAX_PIPELINED) + [b"400"]
    assert handler.errors == [400]


@on_uvloop
async def test_http_1_0_gets_a_stream_without_chunks() -> None:
    async with running() as s:
        body = json.dumps({**ASK, "stream": True}).encode()
        raw = await exchange(s, post(body).replace(b"HTTP/1.1\r\nhost: x\r\n", b"HTTP/1.0\r\n"))
        head, text = raw.split(b"\r\n\r\n", 1)
        assert b"transfer-encoding" not in head
        assert text == b"".join(s.decode[0].events(s.decode[0].generated[0], list("abcd"), False))
        kept = b"GET /health HTTP/1.0\r\nconnection: keep-alive\r\n\r\n"
        raw = await exchange(s, kept + b"GET /health HTTP/1.0\r\n\r\n")
        assert raw.count(b"HTTP/1.1 200 OK") == 2


@on_uvloop
async def test_expect_100_continue() -> None:
    async with running() as s:
        reader, writer = await asyncio.open_connection("127.0.0.1", s.router.port)
        writer.write(POST + b"expect: 100-continue\r\ncontent-length: %d\r\n\r\n" % len(BODY))
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(BODY)
        assert status_of(await reader.readuntil(b"\r\n\r\n")) == 200
        writer.close()
        assert status_of(await exchange(s, POST + b"expect: miracles\r\ncontent-length: 1\r\n\r\n")) == 417


@on_uvloop
async def test_absolute_targets_and_queries() -> None:
    async with running() as s:
        close = b"host: x\r\nconnection: close\r\n\r\n"
        assert status_of(await exchange(s, b"GET http://router:1/health?x=1 HTTP/1.1\r\n" + close)) == 200
        assert status_of(await exchange(s, b"GET /health?a/../b HTTP/1.1\r\n" + close)) == 200
        assert status_of(await exchange(s, b"OPTIONS * HTTP/1.1\r\n" + close)) == 404  # well-formed


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.one_of(wire_requests(), st.binary(max_size=60), st.sampled_from([*MALFORMED.values()]))),
    st.lists(st.integers(0, 4000), max_size=12),
    st.frozensets(st.integers(1, 12)),
)
def test_any_bytes_give_the_same_answers_however_they_are_split_and_the_answers_read(
    pieces: list[bytes], cuts: list[int], stalls: frozenset[int]
) -> None:
    data = b"".join(pieces)
    whole = feed([data]) if data else feed([])
    assert feed(split(data, cuts)) == whole
    assert feed(split(data, cuts), stalls) == whole
    assert len(whole[1]) <= 1
