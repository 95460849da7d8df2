"""Answers of workers, byte by byte."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.router.memory import hear, split


@st.composite
def answers(draw: st.DrawFn) -> tuple[bytes, bytes]:
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
def test_however_an_answer_is_split_it_is_heard_the_same(answer: tuple[bytes, bytes], cuts: list[int]) -> None:
    raw, body = answer
    heard, kept = hear(split(raw, cuts))
    assert (heard.body, heard.ended, kept) == (body, ["done"], True)
    assert heard.status == int(raw.rsplit(b"HTTP/1.1 ", 1)[1][:3])
    assert heard.headers[b"server"] == b"uvicorn"


STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.binary(min_size=1, max_size=40) | st.just(b"3\r\nabc\r\n") | st.just(b"x" * 5000), max_size=8),
    st.lists(st.booleans(), min_size=8, max_size=8),
    st.sampled_from([b"%x", b"%X", b"0%x", b"%x;a=b"]),
)
def test_chunks_that_come_whole_are_heard_like_others(chunks: list[bytes], alone: list[bool], form: bytes) -> None:
    """Whole chunks pass by the parser: what it sees of the others must still be the message."""
    pieces = [STREAM_HEAD]
    for chunk, by_itself in zip(chunks, alone, strict=False):
        framed = b"%b\r\n%b\r\n" % (form % len(chunk), chunk)
        if by_itself:
            pieces.append(framed)
        else:
            pieces[-1] += framed
    heard, kept = hear([*pieces, b"0\r\n\r\n"])
    assert (heard.body, heard.ended, kept) == (b"".join(chunks), ["done"], True)


def test_a_chunk_that_comes_whole_is_handed_on_with_its_frame() -> None:
    heard, _ = hear([STREAM_HEAD + b"1\r\na\r\n", b"1\r\nb\r\n", b"2\r\ncd\r\n", b"0\r\n\r\n"])
    assert (heard.body, heard.framed) == (b"abcd", 2)


@pytest.mark.parametrize("size", [b"+1", b"0x1", b"-1", b" 1", b"1_0", b"\xb2", b"g", b""])
def test_a_size_that_is_none_ends_the_exchange(size: bytes) -> None:
    heard, _ = hear([STREAM_HEAD + b"1\r\na\r\n", size + b"\r\nb\r\n", b"0\r\n\r\n"], lost=True)
    assert heard.ended == ["failed"]
    assert not heard.framed


@settings(max_examples=200, deadline=None)
@given(answers(), st.lists(st.integers(0, 1000), max_size=5), st.data())
def test_a_part_of_an_answer_is_never_taken_for_all_of_it(
    answer: tuple[bytes, bytes], cuts: list[int], data: st.DataObject
) -> None:
    raw = answer[0][: data.draw(st.integers(0, len(answer[0]) - 1))]
    heard, _ = hear(split(raw, cuts), lost=True)
    assert heard.ended == ["failed"]


@settings(max_examples=200, deadline=None)
@given(answers(), st.binary(min_size=1, max_size=50))
def test_what_follows_an_answer_is_not_part_of_it(answer: tuple[bytes, bytes], rest: bytes) -> None:
    raw, body = answer
    heard, kept = hear([raw + rest], lost=True)
    assert (heard.body, heard.ended) == (body, ["done"])
    # Line ends between messages are allowed; the connection must not be used after anything else.
    assert not kept or not rest.strip(b"\r\n")


@settings(max_examples=300, deadline=None)
@given(st.lists(st.binary(max_size=40), max_size=5))
def test_any_bytes_end_an_exchange_exactly_once(pieces: list[bytes]) -> None:
    heard, _ = hear([piece for piece in pieces if piece], lost=True)
    assert len(heard.ended) == 1
