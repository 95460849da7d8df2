"""Who may ask, what a client can make the router do, and what never leaves it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import ssl
import time
import warnings

import aiohttp
import pytest
from certificates import certificate
from fake_worker import begin_stream, chunk, reply
from harness import ASK, CHAT, interpreted, on_uvloop, running, until
from memory import LIMITS, MemoryTransport, Recorder
from test_router_http import exchange, post, status_of

from eldr.router.api.keys import ApiKeys
from eldr.router.config.settings import ConfigError, RouterConfig
from eldr.router.http.server import ClientConnection, State
from eldr.router.http.tls import ServerTls
from eldr.router.observe import logs

KEYS = b"# clients\nsecret-of-alice alice\n\nsecret-of-bob\n"


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.fixture
def key_file(tmp_path):
    path = tmp_path / "keys"
    path.write_bytes(KEYS)
    return path


# API keys.


@on_uvloop
async def test_only_clients_with_a_key_may_ask(key_file):
    async with running(api_key_file=key_file) as s:
        for headers in ({}, bearer("secret-of-carol"), {"authorization": "Basic secret-of-bob"}, bearer("")):
            answer = await s.post(headers=headers)
            assert answer.status == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.error["type"] == "AuthenticationError"
        for path in ("/v1/models", "/metrics", "/nothing"):
            assert (await s.get(path)).status == 401
        for path in ("/health", "/ready"):
            assert (await s.get(path)).status == 200
        assert s.prefill[0].generated == s.decode[0].generated == []
        for key in ("secret-of-alice", "secret-of-bob"):
            assert (await s.post(headers=bearer(key))).status == 200
            assert (await s.get("/v1/models", headers=bearer(key))).status == 200
        assert (await s.post(headers={"authorization": "bearer secret-of-bob"})).status == 200


@on_uvloop
async def test_a_body_is_not_read_from_whoever_has_no_key(key_file):
    async with running(api_key_file=key_file) as s:
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 30000000\r\nexpect: 100-continue\r\n\r\n"
        assert status_of(await exchange(s, head)) == 401


@on_uvloop
async def test_the_clients_key_reaches_no_worker(key_file):
    async with running(api_key_file=key_file) as s:
        await s.post(headers=bearer("secret-of-alice"))
        await s.get("/v1/models", headers=bearer("secret-of-alice"))
        for worker in (*s.prefill, *s.decode):
            assert worker.generated
            assert all("authorization" not in seen.headers for seen in worker.seen)
            assert not any(b"secret" in seen.raw or "secret" in str(seen.headers) for seen in worker.seen)


@on_uvloop
async def test_the_admin_key_is_a_key_too(key_file, tmp_path):
    (tmp_path / "admin").write_text("the-admin-key\n")
    async with running(api_key_file=key_file, admin_key_file=tmp_path / "admin") as s:
        assert (await s.post(headers={**bearer("the-admin-key"), "x-eldr-record": "1"})).status == 200
        assert (await s.post(headers={**bearer("secret-of-bob"), "x-eldr-record": "1"})).status == 403
        assert all("authorization" not in seen.headers for seen in (*s.prefill[0].seen, *s.decode[0].seen))


@interpreted
def test_keys_are_known_by_name_and_can_be_replaced(key_file):
    keys = ApiKeys(key_file)
    assert keys.client(b"Bearer secret-of-alice") == "alice"
    assert keys.client(b"Bearer secret-of-bob") == "client-4"
    for wrong in (
        None,
        b"",
        b"Bearer",
        b"Bearer ",
        b"Bearer secret-of-alice alice",
        b"secret-of-alice",
        b"Bearer \xff",
    ):
        assert keys.client(wrong) is None
    assert b"secret-of-alice" not in repr(vars(keys)).encode()
    key_file.write_bytes(b"another zoe\n")
    keys.reload()
    assert keys.client(b"Bearer secret-of-alice") is None
    assert keys.client(b"Bearer another") == "zoe"
    key_file.write_bytes(b"")
    with pytest.raises(ConfigError, match="it has no keys"):
        keys.reload()
    assert keys.client(b"Bearer another") == "zoe"


@pytest.mark.parametrize(
    ("text", "why"),
    [(b"# none\n", "no key"), (b"a\nb b\na\n", ":3: the same key"), (b"a b c\n", ":1: expected"), (b"\xff\n", ":1:")],
)
def test_a_bad_key_file_is_refused_without_showing_a_key(key_file, text, why):
    key_file.write_bytes(text.replace(b"a", b"hidden"))
    with pytest.raises(ConfigError, match=why) as raised:
        ApiKeys(key_file)
    assert "hidden" not in str(raised.value).replace(str(key_file), "")
    with pytest.raises(ConfigError, match="cannot be read"):
        ApiKeys(key_file.with_name("missing"))


# TLS towards clients.


def too_old(authority) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=authority)
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    return context


@on_uvloop
async def test_tls_towards_clients(tmp_path):
    cert, key = certificate(tmp_path, "router")
    async with running(tls_cert=cert, tls_key=key) as s:
        url = f"https://127.0.0.1:{s.router.port}"
        tls = ssl.create_default_context(cafile=cert)
        async with s.session.post(url + "/v1/completions", json={**ASK, "stream": True}, ssl=tls) as answer:
            assert answer.status == 200
            assert (await answer.read()).endswith(b"data: [DONE]\n\n")
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await s.session.get(url + "/health")  # the system's authorities do not know this certificate
        with pytest.raises(aiohttp.ClientConnectorError):
            await s.session.get(url + "/health", ssl=too_old(cert))
        with pytest.raises(aiohttp.ClientError):
            await s.get("/health")  # plain HTTP to the same port
        renewed, _ = certificate(tmp_path, "router")  # over the old files
        s.router.reload_secrets()
        async with (
            aiohttp.ClientSession() as fresh,
            fresh.get(url + "/health", ssl=ssl.create_default_context(cafile=renewed)) as answer,
        ):
            assert answer.status == 200
        async with aiohttp.ClientSession() as fresh:
            with pytest.raises(aiohttp.ClientConnectorCertificateError):
                await fresh.get(url + "/health", ssl=tls)


def test_certificate_and_key_must_belong_together(tmp_path):
    cert, key = certificate(tmp_path, "one")
    _, other = certificate(tmp_path, "other")
    with pytest.raises(ConfigError, match="tls_cert"):
        ServerTls(cert, other)
    served = ServerTls(cert, key)
    key.write_bytes(other.read_bytes())
    with pytest.raises(ConfigError, match="tls_key"):
        served.reload()
    with pytest.raises(ConfigError, match="go together"):
        RouterConfig.of(prefill=("http://p",), decode=("http://d",), tls_cert=cert)


# What a client can make the router send.

STEERING = {
    "host": "10.0.0.1:6379",
    "x-forwarded-for": "1.2.3.4",
    "x-forwarded-host": "evil",
    "x-forwarded-proto": "https",
    "forwarded": "for=1.2.3.4",
    "x-real-ip": "1.2.3.4",
    "via": "1.1 evil",
    "te": "trailers",
    "keep-alive": "timeout=9",
    "proxy-authorization": "Basic abc",
    "cookie": "a=b",
    "x-data-parallel-rank": "1",
    "x-vllm-priority": "-5",
    "x-eldr-worker": "http://evil",
    "x-eldr-decode": "http://evil",
}


@on_uvloop
async def test_no_header_steers_the_router_or_a_worker():
    async with running(decode=2) as s:
        assert (await s.post(headers=STEERING)).status == 200
        for worker in (*s.prefill, *s.decode):
            for seen in worker.generated:
                assert seen.headers.keys() <= {"host", "content-type", "x-request-id", "content-length"}
                assert seen.headers["host"] == worker.url.removeprefix("http://")


@pytest.mark.parametrize(
    ("headers", "passed"),
    [
        (
            {"traceparent": "00-" + "a" * 32 + "-" + "b" * 16 + "-01", "tracestate": "x=1"},
            {"traceparent", "tracestate"},
        ),
        ({"traceparent": "00-" + "a" * 32 + "-" + "b" * 16 + "-01"}, {"traceparent"}),
        ({"traceparent": "rubbish", "tracestate": "x=1"}, set()),
        ({"tracestate": "x=1"}, set()),
        ({"authorization": "Bearer theirs"}, {"authorization"}),
        ({"authorization": "Bearer theirs", "connection": "keep-alive, Authorization"}, set()),
        ({"traceparent": "00-" + "a" * 32 + "-" + "b" * 16 + "-01", "connection": "traceparent"}, set()),
    ],
)
@on_uvloop
async def test_what_goes_on_to_workers(headers, passed):
    async with running() as s:
        assert (await s.post(headers=headers)).status == 200
        for seen in (*s.prefill[0].generated, *s.decode[0].generated):
            assert seen.headers.keys() & {"traceparent", "tracestate", "authorization", "connection"} == passed


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@on_uvloop
async def test_no_field_names_a_worker(path):
    body = CHAT if "chat" in path else ASK
    async with running() as s:
        for field in ("kv_transfer_params", "ec_transfer_params", "eldr_lease", "eldr_counts", "eldr_record"):
            value = {"remote_host": "169.254.169.254", "remote_port": 80, "do_remote_prefill": True}
            assert (await s.post({**body, field: value}, path)).status == 400
            assert (await s.post({**body, "vllm_xargs": {field: value}}, path)).status == 400
        assert s.prefill[0].generated == s.decode[0].generated == []


@on_uvloop
async def test_a_workers_headers_are_its_own_business():
    async def talkative(worker, seen, reader, writer):
        secrets = "server: vllm\r\nset-cookie: a=b\r\nx-internal: 10.0.0.7\r\naccess-control-allow-origin: *\r\n"
        await reply(writer, 400, b"<script>", f"content-type: text/html\r\n{secrets}")

    async with running() as s:
        s.decode[0].behaviour = talkative
        answer = await s.post()
        shown = {name.lower() for name in answer.headers}
        assert shown == {"content-type", "content-length", "date", "x-request-id", "x-content-type-options"}
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["content-type"] == "application/octet-stream"


# Time limits: the clock is an argument, so that nothing waits.


class Connected:
    """A connection in memory whose clock can be set forward."""

    def __init__(self, transport: MemoryTransport | None = None) -> None:
        self.handler, self.transport = Recorder(), transport or MemoryTransport()
        self.connection = ClientConnection(self.handler, LIMITS)
        self.connection.connection_made(self.transport)
        self.start_s = time.monotonic()

    def send(self, data: bytes) -> None:
        self.connection.data_received(data)

    def after(self, seconds: float) -> bytes:
        self.connection.check(time.monotonic() + seconds)
        return self.transport.written


GET = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"


async def test_a_connection_without_requests_is_closed_in_silence():
    for sent in (b"", GET, b"\r\n"):
        c = Connected()
        c.send(sent)
        written = c.transport.written
        assert c.after(LIMITS.idle_timeout_s - 1) == written
        assert not c.transport.closed
        assert c.after(LIMITS.idle_timeout_s + 1) == written
        assert c.transport.closed


@pytest.mark.parametrize(
    ("sent", "limit_s"),
    [
        (b"G", LIMITS.head_timeout_s),
        (GET[:-2], LIMITS.head_timeout_s),
        (GET + b"G", LIMITS.head_timeout_s),  # behind a request, in the same packet
        (POST + b"content-length: 4\r\n\r\n", LIMITS.body_timeout_s),
        (POST + b"content-length: 4\r\n\r\n{} ", LIMITS.body_timeout_s),
        (POST + b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n", LIMITS.body_timeout_s),
    ],
)
async def test_a_request_that_does_not_arrive_in_time_is_refused(sent, limit_s):
    c = Connected()
    for byte in sent:
        c.send(bytes([byte]))  # a byte now and then does not renew the time
    before = c.transport.written
    assert c.after(limit_s - 1) == before
    answer = c.after(limit_s + 1)[len(before) :]
    assert answer.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
    assert b"connection: close\r\n" in answer
    assert c.handler.errors == [408]


async def test_a_large_body_may_take_its_time():
    c = Connected()
    c.send(POST + b"content-length: 10000\r\n\r\n" + b" " * 9000)
    assert c.after(LIMITS.body_timeout_s + 0.4) == b""
    assert b"408" in c.after(LIMITS.body_timeout_s + 1.4)


async def test_who_does_not_read_is_cut_off():
    c = Connected()
    c.handler.handle = lambda request, exchange: None
    c.send(GET)
    c.connection.pause_writing()
    c.after(LIMITS.stall_timeout_s - 1)
    assert not c.transport.closed
    c.after(LIMITS.stall_timeout_s + 1)
    assert c.transport.closed
    c = Connected()
    c.handler.handle = lambda request, exchange: None
    c.send(GET)
    c.connection.pause_writing()
    c.connection.resume_writing()
    c.after(LIMITS.stall_timeout_s + 1)
    assert not c.transport.closed


async def test_last_bytes_that_nobody_takes_hold_no_connection():
    class Unsent(MemoryTransport):
        aborted = False

        def abort(self):
            self.aborted = True

    def break_off(request, exchange):
        exchange.begin_stream(b"text/event-stream")
        exchange.break_stream()

    for handle in (lambda request, exchange: None, break_off):
        c = Connected(Unsent())
        c.handler.handle = handle
        c.send(GET)
        if handle is not break_off:
            c.connection.close()
        assert c.connection.state is State.CLOSED
        c.after(LIMITS.stall_timeout_s - 1)
        assert not c.transport.aborted
        c.after(LIMITS.stall_timeout_s + 1)
        assert c.transport.aborted


async def test_while_a_request_is_answered_no_limit_of_receiving_runs():
    c = Connected()
    c.handler.handle = lambda request, exchange: None
    c.send(GET + GET[:5])
    assert c.after(1000) == b""
    assert not c.transport.closed


@pytest.mark.parametrize("sent", [b"GET /health HT", POST + b"content-length: 4\r\n\r\n{}"])
@on_uvloop
async def test_the_router_watches_its_connections(sent):
    async with running(head_timeout_s=0.1, body_timeout_s=0.1) as s:
        assert status_of(await exchange(s, sent)) == 408
        assert await s.metric("eldr_request_total", endpoint="other", status="408") == 1


@on_uvloop
async def test_a_client_that_stops_reading_frees_its_worker():
    async with running(stall_timeout_s=0.1) as s:

        async def endless(worker, seen, reader, writer):
            await begin_stream(writer)
            while True:
                await chunk(writer, b"data: {}\n\n" * 10_000)

        s.decode[0].behaviour = endless
        _, writer = await asyncio.open_connection("127.0.0.1", s.router.port, limit=1)
        writer.write(post(json.dumps({**ASK, "stream": True}).encode()))
        await until(lambda: s.decode[0].running == 1, "it runs")
        await until(lambda: s.decode[0].running == 0, "it is let go")
        await until(lambda: s.router.services.admission.admitted == 0, "its slot is free")
        writer.close()


async def test_framing_may_not_outweigh_the_body():
    c = Connected()
    c.send(POST + b"transfer-encoding: chunked\r\n\r\n")
    for _ in range(20):
        c.send(b"1;" + b"a" * 10_000 + b"\r\nx\r\n")
    assert c.handler.errors == [400]
    c = Connected()
    c.send(POST + b"transfer-encoding: chunked\r\n\r\n0\r\n")
    for _ in range(2000):
        c.send(b"x-a: " + b"b" * 20 + b"\r\n")
    assert c.handler.errors == [431]


@on_uvloop
async def test_more_connections_than_allowed_are_turned_away():
    async with running(max_connections=2) as s:
        held = [await s.session.get(s.url + "/health") for _ in range(1)]  # one kept connection
        one = ClientConnection(s.router.clients, LIMITS)
        one.connection_made(MemoryTransport())
        raw = await exchange(s, b"")
        assert status_of(raw) == 503
        assert b"retry-after: " in raw
        one.connection_lost(None)
        assert status_of(await exchange(s, GET.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"))) == 200
        assert held


# What is written down.

PROMPT = "the-prompt-is-private"
ANSWER = "the-answer-is-private"
SECRETS = ("the-client-key", "the-worker-key", "the-admin-key", PROMPT, ANSWER)


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
@on_uvloop
async def test_no_secret_no_prompt_and_no_answer_is_logged(level, tmp_path, capfd):
    files = {}
    for name in ("client", "worker", "admin"):
        (tmp_path / name).write_text(f"the-{name}-key\n")
        files[name] = tmp_path / name
    logs.set_up(level)
    try:
        async with running(
            prefill=2,
            decode=2,
            api_key_file=files["client"],
            worker_api_key_file=files["worker"],
            admin_key_file=files["admin"],
            prefill_timeout_s=1,
            decode_idle_timeout_s=1,
        ) as s:
            await _every_kind_of_failure(s)
    finally:
        logs.set_up("warning")
    written = capfd.readouterr()
    assert (written.err != "") == (level in ("debug", "info", "warning"))
    for secret in SECRETS:
        assert secret not in written.err + written.out


async def _every_kind_of_failure(s) -> None:
    headers = bearer("the-client-key")
    chat = {**CHAT, "messages": [{"role": "user", "content": PROMPT}]}
    ask = {**ASK, "prompt": PROMPT}

    async def garbage(worker, seen, reader, writer):
        writer.write(f"HTTP/1.1 200 {ANSWER}\r\ncontent-length: {ANSWER}\r\n\r\n{ANSWER}".encode())
        await writer.drain()

    async def not_json(worker, seen, reader, writer):
        await reply(writer, 200, f'{{"choices": {ANSWER}'.encode())

    async def error(worker, seen, reader, writer):
        await reply(writer, 500, json.dumps({"error": {"message": f"{PROMPT} {ANSWER}"}}).encode())

    async def closes(worker, seen, reader, writer):
        writer.close()

    async def breaks_off(worker, seen, reader, writer):
        if worker.role == "prefill":
            await worker.answer(seen, writer)
            return
        await begin_stream(writer)
        await chunk(writer, f'data: {{"text": "{ANSWER}"}}\n\n'.encode())
        writer.close()

    async def bad_counts(worker, seen, reader, writer):
        params = {"do_remote_prefill": True, "eldr_counts": {"v": 2, "data": ANSWER}}
        await reply(writer, 200, json.dumps({"choices": [{"text": ANSWER}], "kv_transfer_params": params}).encode())

    for behaviour in (None, garbage, not_json, error, closes, breaks_off, bad_counts):
        for workers in (s.prefill, s.decode, (*s.prefill, *s.decode)):
            for worker in (*s.prefill, *s.decode):
                worker.behaviour = behaviour if worker in workers else None
            for request in (
                s.post({**ask, "stream": True}, headers=headers),
                s.chat(chat, headers=headers),
                s.post(ask, headers={**bearer("the-admin-key"), "x-eldr-record": "1"}),
            ):
                with contextlib.suppress(aiohttp.ClientPayloadError):  # a stream that breaks off
                    await request
    await s.post(ask)
    await s.post(f'{{"prompt": "{PROMPT}'.encode(), headers=headers)
    await s.post({**ask, "model": PROMPT}, headers=headers)
    await s.post(ask, f"/v1/{PROMPT}", headers=headers)
    await exchange(s, f"GET /{PROMPT} HTTP/1.1\r\nauthorization: the-client-key\r\n{ANSWER}\r\n\r\n".encode())
    logging.getLogger("eldr.router").warning("the log is open")


def test_an_exception_is_logged_without_what_it_says(capfd):
    logs.set_up("warning")
    try:
        int(PROMPT)
    except ValueError:
        logging.getLogger("eldr.router").exception("it failed")
    (line,) = capfd.readouterr().err.splitlines()
    fields = json.loads(line)
    assert fields["message"] == "it failed"
    assert fields["exception"].startswith("ValueError\n")
    assert "test_router_security.py" in fields["exception"]
    assert "int(PROMPT)" in fields["exception"]
    assert PROMPT not in line


@on_uvloop
async def test_metrics_show_no_key_and_no_name_of_a_client(key_file):
    async with running(api_key_file=key_file) as s:
        await s.post(headers=bearer("secret-of-alice"))
        text = (await s.get("/metrics", headers=bearer("secret-of-alice"))).body
        assert b"secret" not in text
        assert b"alice" not in text
