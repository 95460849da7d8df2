"""Requests on whose end two parties might disagree, byte by byte: which are refused, which are taken, and as what.

Expected answers follow RFC 9112 (HTTP/1.1) and RFC 9110 (HTTP semantics).
"""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest

from tests.router.harness import ASK, on_uvloop, running
from tests.router.wire import exchange

HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"
LAST = b"0\r\n\r\n"
# What an attacker wants to be taken for a request of its own.
HIDDEN = b"GET /health HTTP/1.1\r\nhost: hidden\r\n\r\n"
BODY = json.dumps(ASK).encode()
# Ends the connection of whoever was not refused.
END = b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
LENGTH = b"content-length: %d\r\n" % len(BODY)


def chunk(data: bytes, extension: bytes = b"") -> bytes:
    return b"%x%b\r\n%b\r\n" % (len(data), extension, data)


REFUSED = {
    # Content-Length, RFC 9112 section 6.3
    "no digits": HEAD + b"content-length:\r\n\r\n" + HIDDEN,
    "two numbers": HEAD + b"content-length: 2 2\r\n\r\n{}" + HIDDEN,
    "a fraction": HEAD + b"content-length: 2.0\r\n\r\n{}" + HIDDEN,
    "an exponent": HEAD + b"content-length: 2e0\r\n\r\n{}" + HIDDEN,
    "an underscore": HEAD + b"content-length: 1_0\r\n\r\n{}" + HIDDEN,
    "a vertical tab": HEAD + b"content-length: \x0b2\r\n\r\n{}" + HIDDEN,
    "a null behind": HEAD + b"content-length: 2\x00\r\n\r\n{}" + HIDDEN,
    "another script's digit": HEAD + "content-length: \uff12\r\n\r\n{}".encode() + HIDDEN,
    "a superscript": HEAD + b"content-length: \xb2\r\n\r\n{}" + HIDDEN,
    "beyond 64 bits": HEAD + b"content-length: 18446744073709551618\r\n\r\n{}" + HIDDEN,
    "two different lengths": HEAD + b"content-length: 2\r\nContent-Length: 40\r\n\r\n{}" + HIDDEN,
    # Transfer-Encoding, section 6.1
    "with a length before": HEAD + LENGTH + b"transfer-encoding: chunked\r\n\r\n" + LAST + HIDDEN,
    "with a length behind": HEAD + b"transfer-encoding: chunked\r\n" + LENGTH + b"\r\n" + LAST + HIDDEN,
    "empty": HEAD + b"transfer-encoding:\r\n\r\n" + LAST + HIDDEN,
    "a longer name": HEAD + b"transfer-encoding: xchunked\r\n\r\n" + LAST + HIDDEN,
    "a comma before": HEAD + b"transfer-encoding: ,chunked\r\n\r\n" + LAST + HIDDEN,
    "a comma behind": HEAD + b"transfer-encoding: chunked,\r\n\r\n" + LAST + HIDDEN,
    "in quotes": HEAD + b'transfer-encoding: "chunked"\r\n\r\n' + LAST + HIDDEN,
    "a parameter": HEAD + b"transfer-encoding: chunked;q=1\r\n\r\n" + LAST + HIDDEN,
    "a no-break space": HEAD + b"transfer-encoding: \xa0chunked\r\n\r\n" + LAST + HIDDEN,
    "identity after chunked": HEAD + b"transfer-encoding: chunked\r\ntransfer-encoding: identity\r\n\r\n" + LAST,
    "a space before the colon": HEAD + b"transfer-encoding : chunked\r\n\r\n" + LAST + HIDDEN,
    "a tab before the colon": HEAD + b"transfer-encoding\t: chunked\r\n\r\n" + LAST + HIDDEN,
    "a null in the name": HEAD + b"transfer-\x00encoding: chunked\r\n" + LENGTH + b"\r\n" + BODY,
    "on a folded line": HEAD + b"x: y\r\n transfer-encoding: chunked\r\n" + LENGTH + b"\r\n" + BODY,
    # chunks, section 7.1
    "size 0x": CHUNKED + b"0x2\r\n{}\r\n" + LAST + HIDDEN,
    "size with a plus": CHUNKED + b"+2\r\n{}\r\n" + LAST + HIDDEN,
    "size with a minus": CHUNKED + b"-2\r\n{}\r\n" + LAST + HIDDEN,
    "size after a space": CHUNKED + b" 2\r\n{}\r\n" + LAST + HIDDEN,
    "size before a space": CHUNKED + b"2 \r\n{}\r\n" + LAST + HIDDEN,
    "size with an underscore": CHUNKED + b"0_2\r\n{}\r\n" + LAST + HIDDEN,
    "no size": CHUNKED + b"\r\n{}\r\n" + LAST + HIDDEN,
    "an extension without a size": CHUNKED + b";a\r\n{}\r\n" + LAST + HIDDEN,
    "size beyond 64 bits": CHUNKED + b"10000000000000002\r\n{}\r\n" + LAST + HIDDEN,
    "a longer chunk": CHUNKED + b"1\r\n{}\r\n" + LAST + HIDDEN,
    "a shorter chunk": CHUNKED + b"3\r\n{}\r\n" + LAST + HIDDEN,
    "a bare LF behind the size": CHUNKED + b"2\n{}\r\n" + LAST + HIDDEN,
    "a bare CR behind the size": CHUNKED + b"2\r{}\r\n" + LAST + HIDDEN,
    "a bare LF behind the data": CHUNKED + b"2\r\n{}\n" + LAST + HIDDEN,
    "a bare LF in an extension": CHUNKED + b"2;a\nb\r\n{}\r\n" + LAST + HIDDEN,
    "a bare CR in an extension": CHUNKED + b"2;a\rb\r\n{}\r\n" + LAST + HIDDEN,
    "a quoted line end in an extension": CHUNKED + b'2;a="\r\n"\r\n{}\r\n' + LAST + HIDDEN,
    "a null in an extension": CHUNKED + b"2;\x00\r\n{}\r\n" + LAST + HIDDEN,
    "bare LFs at the end": CHUNKED + b"2\r\n{}\r\n0\n\n" + HIDDEN,
    "a bare LF at the end": CHUNKED + b"2\r\n{}\r\n0\r\n\n" + HIDDEN,
    "no line end at the end": CHUNKED + b"2\r\n{}\r\n0\r\n" + HIDDEN,
    "a length in the trailer": CHUNKED + b"2\r\n{}\r\n0\r\ncontent-length: 5\r\n\r\n" + HIDDEN,
    "a coding in the trailer": CHUNKED + b"2\r\n{}\r\n0\r\ntransfer-encoding: chunked\r\n\r\n" + HIDDEN,
    "a folded trailer": CHUNKED + b"2\r\n{}\r\n0\r\nx-a: b\r\n c\r\n\r\n" + HIDDEN,
    # fields, sections 5 and 2.2
    "no name": HEAD + b": x\r\n" + LENGTH + b"\r\n" + BODY,
    "no colon": HEAD + b"foo\r\n" + LENGTH + b"\r\n" + BODY,
    "a space in a name": HEAD + b"a b: c\r\n" + LENGTH + b"\r\n" + BODY,
    "a bracket in a name": HEAD + b"a(b): c\r\n" + LENGTH + b"\r\n" + BODY,
    "obs-text in a name": HEAD + b"a\xff: c\r\n" + LENGTH + b"\r\n" + BODY,
    "a control character": HEAD + b"a: \x01\r\n" + LENGTH + b"\r\n" + BODY,
    "a DEL": HEAD + b"a: \x7f\r\n" + LENGTH + b"\r\n" + BODY,
    "a bare LF behind a field": HEAD + b"a: b\n" + LENGTH + b"\r\n" + BODY,
    "two CRs behind a field": HEAD + b"a: b\r\r\n" + LENGTH + b"\r\n" + BODY,
    "a bare LF behind the head": HEAD + LENGTH + b"\n" + BODY,
    "a folded first field": b"POST /v1/completions HTTP/1.1\r\n host: x\r\n" + LENGTH + b"\r\n" + BODY,
    # request line, section 3
    "a space before it": b" " + HIDDEN,
    "tabs in it": b"GET\t/health\tHTTP/1.1\r\nhost: x\r\n\r\n" + HIDDEN,
    "a space behind it": b"GET /health HTTP/1.1 \r\nhost: x\r\n\r\n" + HIDDEN,
    "a null in the target": b"GET /he\x00alth HTTP/1.1\r\nhost: x\r\n\r\n" + HIDDEN,
    "obs-text in the target": b"GET /he\xffalth HTTP/1.1\r\nhost: x\r\n\r\n" + HIDDEN,
    "a relative target": b"GET health HTTP/1.1\r\nhost: x\r\n\r\n" + HIDDEN,
    "an absolute target with half an address": b"GET http://[::1/health HTTP/1.1\r\nhost: x\r\n\r\n" + HIDDEN,
    "an unknown method": b"FOO /health HTTP/1.1\r\nhost: x\r\n\r\n" + HIDDEN,
    "a method in lower case": b"get /health HTTP/1.1\r\nhost: x\r\n\r\n" + HIDDEN,
    "version in lower case": b"GET /health http/1.1\r\nhost: x\r\n\r\n" + HIDDEN,
    "version 1.2": b"GET /health HTTP/1.2\r\nhost: x\r\n\r\n" + HIDDEN,
    "version 1.10": b"GET /health HTTP/1.10\r\nhost: x\r\n\r\n" + HIDDEN,
    "version 2.0": b"GET /health HTTP/2.0\r\nhost: x\r\n\r\n" + HIDDEN,
    # Host, section 3.2
    "two hosts in one": b"GET /health HTTP/1.1\r\nhost: a, b\r\n\r\n" + HIDDEN,
    "a host with a path": b"GET /health HTTP/1.1\r\nhost: a/b\r\n\r\n" + HIDDEN,
    "a host with a user": b"GET /health HTTP/1.1\r\nhost: a@b\r\n\r\n" + HIDDEN,
    "a host with a space": b"GET /health HTTP/1.1\r\nhost: a b\r\n\r\n" + HIDDEN,
    "a second host": b"GET /health HTTP/1.1\r\nhost: a\r\nHost: a\r\n\r\n" + HIDDEN,
}

# What looks odd and is right, and how many answers it gets, that to END included.
TAKEN = {
    "an extension": (CHUNKED + chunk(BODY, b";a=b") + LAST + HIDDEN, 3),
    "a quoted extension": (CHUNKED + chunk(BODY, b';a="b;c"') + LAST + HIDDEN, 3),
    "an extension of the last chunk": (CHUNKED + chunk(BODY) + b"0;x\r\n\r\n" + HIDDEN, 3),
    "a size with zeros before it": (CHUNKED + b"00000000" + chunk(BODY) + LAST + HIDDEN, 3),
    "a size in capitals": (CHUNKED + b"%X\r\n%b\r\n" % (len(BODY), BODY) + LAST + HIDDEN, 3),
    "a trailer": (CHUNKED + chunk(BODY) + b"0\r\nauthorization: x\r\n\r\n" + HIDDEN, 3),
    "bytes as chunks": (CHUNKED + b"".join(chunk(bytes([b])) for b in BODY) + LAST + HIDDEN, 3),
    "coding in capitals": (HEAD + b"Transfer-Encoding: CHUNKED\r\n\r\n" + chunk(BODY) + LAST + HIDDEN, 3),
    "a length with zeros before it": (HEAD + b"content-length: 00%d\r\n\r\n%b" % (len(BODY), BODY) + HIDDEN, 3),
    "blanks around a length": (HEAD + b"content-length: \t%d \t\r\n\r\n%b" % (len(BODY), BODY) + HIDDEN, 3),
    "an underscore is no hyphen": (HEAD + b"transfer_encoding: chunked\r\n" + LENGTH + b"\r\n" + BODY, 2),
    "obs-text in a value": (HEAD + b"x-a: \xff\xfe\r\n" + LENGTH + b"\r\n" + BODY + HIDDEN, 3),
    "a body of a GET": (b"GET /health HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(HIDDEN) + HIDDEN, 2),
    "empty lines before it": (b"\r\n\r\n" + HIDDEN, 2),
    "an absolute target": (b"GET http://other:1/health HTTP/1.1\r\nhost: x\r\n\r\n" + HIDDEN, 3),
    "an empty host": (b"GET /health HTTP/1.1\r\nhost:\r\n\r\n", 2),
    "blanks around a host": (b"GET /health HTTP/1.1\r\nhost: \t a \t\r\n\r\n", 2),
    "an address as host": (b"GET /health HTTP/1.1\r\nhost: [::1]:80\r\n\r\n", 2),
    "HTTP/1.0": (b"GET /health HTTP/1.0\r\n\r\n" + HIDDEN, 1),
    "HTTP/1.0 keep-alive": (b"GET /health HTTP/1.0\r\nconnection: keep-alive\r\n\r\n" + HIDDEN, 3),
    "what follows a close": (b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n" + HIDDEN, 1),
    "rubbish behind a close": (b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n\x00\x01", 1),
    "an offer of websockets": (
        b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\r\n" + HIDDEN,
        3,
    ),
    "an offer of HTTP/2 with a body": (
        HEAD
        + b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAM\r\n"
        + LENGTH
        + b"\r\n"
        + BODY
        + HIDDEN,
        3,
    ),
    "an offer of HTTP/2 with chunks": (
        HEAD
        + b"connection: upgrade\r\nupgrade: h2c\r\ntransfer-encoding: chunked\r\n\r\n"
        + chunk(BODY)
        + LAST
        + HIDDEN,
        3,
    ),
}


@pytest.fixture(scope="module")
def raws() -> dict[str, Any]:
    """Everything the router sends for each case until it closes, all asked of one router."""
    collected: dict[str, Any] = {}

    @on_uvloop
    async def ask_all() -> None:
        async with running() as s:
            cases = REFUSED | {name: data + END for name, (data, _) in TAKEN.items()}
            answers = await asyncio.gather(*(exchange(s, data) for data in cases.values()))
            collected.update(zip(cases, answers, strict=True))
            collected["bodies"] = [seen.body for seen in s.decode[0].generated]
            assert (await s.post()).status == 200

    ask_all()
    return collected


def statuses(raw: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) [A-Z]", raw)]


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_in_doubt_is_refused_and_nothing_behind_it_is_taken_for_a_request(
    raws: dict[str, Any], name: str
) -> None:
    raw = raws[name]
    assert statuses(raw) in ([400], [505])
    head, body = raw.split(b"\r\n\r\n", 1)
    assert b"\r\nconnection: close\r\n" in head + b"\r\n"
    assert json.loads(body)["error"]["message"]


@pytest.mark.parametrize("name", TAKEN)
def test_what_is_clear_is_taken_as_what_it_is(raws: dict[str, Any], name: str) -> None:
    assert statuses(raws[name]) == [200] * TAKEN[name][1]


def test_workers_get_the_bodies_that_were_framed(raws: dict[str, Any]) -> None:
    assert raws["bodies"]
    for body in raws["bodies"]:
        assert {key: body[key] for key in ASK} == ASK
