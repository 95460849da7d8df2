"""Answers of workers, byte by byte."""

from __future__ import annotations

import asyncio
import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from eldr.router.upstream import Exchange, WorkerConnection, WorkerPool


class Heard(Exchange):
    def __init__(self) -> None:
        self.status = 0
        self.headers = {}
        self.body = b""
        self.ended = []

    def on_head(self, status, headers):
        self.status, self.headers = status, headers

    def on_body(self, data):
        self.body += data

    def on_done(self):
        self.ended.append("done")

    def on_failed(self, error):
        self.ended.append("failed")


class Wire(asyncio.Transport):
    """Takes what is written and remembers whether it was closed."""

    def __init__(self) -> None:
        super().__init__()
        self.closed = False

    def write(self, data):
        pass

    def is_closing(self):
        return self.closed

    def close(self):
        self.closed = True

    def abort(self):
        self.closed = True


def hear(pieces: list[bytes], lost: bool = False) -> tuple[Heard, bool]:
    """What an exchange hears of these bytes, and whether its connection could be used again."""
    pool = WorkerPool("http://w:1", connect_timeout_s=1.0)
    connection, wire, heard = WorkerConnection(pool), Wire(), Heard()
    connection.connection_made(wire)
    connection.start(heard, b"request", 60.0)
    for piece in pieces:
        if not wire.closed:
            connection.data_received(piece)
    kept = not wire.closed and not pool.active
    if lost:
        connection.connection_lost(None)
    return heard, kept


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted({cut % (len(data) + 1) for cut in cuts}), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges) if a < b]


@st.composite
def answers(draw):
    body = draw(st.binary(max_size=400))
    head = b"HTTP/1.1 %d OK\r\nServer: uvicorn\r\nContent-Type: text/plain\r\n" % draw(st.sampled_from([200, 400, 503]))
    if draw(st.booleans()):
        head = b"HTTP/1.1 100 Continue\r\n\r\n" + head
    if draw(st.booleans()):
        return head + b"Content-Length: %d\r\n\r\n%b" % (len(body), body), body
    chunks = split(body, draw(st.lists(st.integers(0, 400), max_size=5)))
    framed = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
    return head + b"Transfer-Encoding: chunked\r\n\r\n" + framed + b"0\r\n\r\n", body


@settings(max_examples=200, deadline=None)
@given(answers(), st.lists(st.integers(0, 1000), max_size=12))
def test_however_an_answer_is_split_it_is_heard_the_same(answer, cuts):
    raw, body = answer
    heard, kept = hear(split(raw, cuts))
    assert (heard.body, heard.ended, kept) == (body, ["done"], True)
    assert heard.status == int(raw.rsplit(b"HTTP/1.1 ", 1)[1][:3])
    assert heard.headers[b"server"] == b"uvicorn"


@settings(max_examples=200, deadline=None)
@given(answers(), st.lists(st.integers(0, 1000), max_size=5), st.data())
def test_a_part_of_an_answer_is_never_taken_for_all_of_it(answer, cuts, data):
    raw = answer[0][: data.draw(st.integers(0, len(answer[0]) - 1))]
    heard, _ = hear(split(raw, cuts), lost=True)
    assert heard.ended == ["failed"]


@settings(max_examples=200, deadline=None)
@given(answers(), st.binary(min_size=1, max_size=50))
def test_what_follows_an_answer_is_not_part_of_it(answer, rest):
    raw, body = answer
    heard, kept = hear([raw + rest], lost=True)
    assert (heard.body, heard.ended) == (body, ["done"])
    # Line ends between messages are allowed; the connection must not be used after anything else.
    assert not kept or not rest.strip(b"\r\n")


@settings(max_examples=300, deadline=None)
@given(st.lists(st.binary(max_size=40), max_size=5))
def test_any_bytes_end_an_exchange_exactly_once(pieces):
    heard, _ = hear([piece for piece in pieces if piece], lost=True)
    assert len(heard.ended) == 1
