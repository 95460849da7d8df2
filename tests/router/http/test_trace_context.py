"""Trace contexts: what is valid, and what goes on in its place."""

from __future__ import annotations

import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from eldr.router.http.message import Request
from eldr.router.http.trace_context import is_state, read_parent, trace_context

TRACE, SPAN = b"1" * 32, b"2" * 16
IDS = b"%b-%b" % (TRACE, SPAN)


def context(**headers: bytes) -> tuple[bytes | None, bytes | None]:
    return trace_context(Request(b"POST", b"/", {name.encode(): value for name, value in headers.items()}, b""))


@pytest.mark.parametrize(
    ("text", "read"),
    [
        (b"00-%b-01" % IDS, b"00-%b-01" % IDS),
        (b"00-%b-00" % IDS, b"00-%b-00" % IDS),
        (b"00-%b-03" % IDS, b"00-%b-03" % IDS),
        (b" 00-%b-01\t" % IDS, b"00-%b-01" % IDS),
        (b"01-%b-01" % IDS, b"00-%b-01" % IDS),
        (b"01-%b-01-more" % IDS, b"00-%b-01" % IDS),
        (b"01-%b-01-" % IDS, b"00-%b-01" % IDS),
        (b"cc-%b-ff-a-b.c" % IDS, b"00-%b-03" % IDS),
        (b"fe-%b-fc" % IDS, b"00-%b-00" % IDS),
        (b"00-%b-01-" % IDS, None),
        (b"00-%b-01-more" % IDS, None),
        (b"01-%b-01more" % IDS, None),
        (b"01-%b-01.more" % IDS, None),
        (b"ff-%b-01" % IDS, None),
        (b"00-%b-%b-01" % (b"0" * 32, SPAN), None),
        (b"00-%b-%b-01" % (TRACE, b"0" * 16), None),
        (b"01-%b-%b-01" % (TRACE, b"0" * 16), None),
        (b"00-%b-%b-01" % (b"A" * 32, SPAN), None),
        (b"00-%b-0A" % IDS, None),
        (b"00-%b-01, 00-%b-01" % (IDS, IDS), None),
        (b"01-%b-01-x, 01-%b-01-x" % (IDS, IDS), None),
        (b"00-%b-1" % IDS, None),
        (b"0-%b-01" % IDS, None),
        (b"00_%b_01" % IDS, None),
        (b"", None),
    ],
)
def test_what_is_read_of_a_traceparent(text: bytes, read: bytes | None) -> None:
    assert read_parent(text) == read
    assert context(traceparent=text, tracestate=b"a=b") == (read, None if read is None else b"a=b")


HEX = "0123456789abcdef"


@st.composite
def parents(draw: st.DrawFn) -> str:
    def digits(count: int) -> str:
        return draw(st.just("0" * count) | st.text(HEX, min_size=count, max_size=count))

    version = draw(st.sampled_from(["00", "01", "ff"]) | st.text(HEX, min_size=2, max_size=2))
    text = f"{version}-{digits(32)}-{digits(16)}-{digits(2)}" + draw(st.just("") | st.text("-a0.", max_size=5))
    if draw(st.booleans()):
        at = draw(st.integers(0, len(text)))
        cut, put = draw(st.integers(0, 2)), draw(st.text("0aAg- \t", max_size=2))
        text = text[:at] + put + text[at + cut :]
    return text


@settings(max_examples=500, deadline=None)
@given(parents())
def test_another_reader_of_a_traceparent_agrees(text: str) -> None:
    carrier = TraceContextTextMapPropagator().extract({"traceparent": text})
    theirs = trace.get_current_span(carrier).get_span_context()
    read = read_parent(text.encode())
    assert (read is not None) == theirs.is_valid
    if read is not None:
        ids = f"{trace.format_trace_id(theirs.trace_id)}-{trace.format_span_id(theirs.span_id)}"
        assert read[:52].decode() == f"00-{ids}"
        assert int(read[53:], 16) & 1 == theirs.trace_flags & 1


KEY_START = string.ascii_lowercase + string.digits
VALUE = "".join(map(chr, range(0x21, 0x7F))).replace(",", "").replace("=", "")


def valid_state(text: str) -> bool:
    """The rules of section 3.3.1, one after the other."""
    members = [each for each in (part.strip(" \t") for part in text.split(",")) if each]
    keys = [each.partition("=")[0] for each in members]
    if not 1 <= len(members) <= 32 or len(set(keys)) < len(keys):
        return False
    for each in members:
        key, equals, value = each.partition("=")
        if not equals or not 1 <= len(key) <= 256 or not 1 <= len(value) <= 256:
            return False
        if key[0] not in KEY_START or set(key) - set(KEY_START + "_-*/@"):
            return False
        if set(value) - set(VALUE + " ") or value[-1] == " ":
            return False
    return True


members = st.builds(
    "{}{}={}".format, st.sampled_from(KEY_START), st.text(KEY_START + "_-*/@", max_size=5), st.text(VALUE, min_size=1)
)
odd = st.sampled_from(
    ["", " ", "a", "=", "a=", "=b", "a=b=c", "A=b", "a b=c", "a=b c", "é=x", "@a=b", "a=\x7f", "a=\tb"]
)


@settings(max_examples=500, deadline=None)
@given(st.lists(members | odd, max_size=40), st.sampled_from([",", ", ", " \t,"]))
def test_which_tracestates_are_valid(parts: list[str], comma: str) -> None:
    text = comma.join(parts)
    assert is_state(text.encode()) == valid_state(text)


@pytest.mark.parametrize(
    ("state", "passed"),
    [
        (b" a=b \t", b"a=b"),
        (b"a=b, c=d", b"a=b, c=d"),  # as repeated headers are joined
        (b"tenant@system=1", b"tenant@system=1"),
        (b",".join(b"k%d=v" % number for number in range(32)), ...),
        (b",".join(b"k%d=v" % number for number in range(33)), None),
        (b"%b=%b" % (b"k" * 256, b"v" * 256), ...),
        (b"%b=v" % (b"k" * 257), None),
        (b"k=%b" % (b"v" * 257), None),
        (b"a=b,a=c", None),
        (b"a=b\xe9", None),
        (b", ,", None),
        (b"", None),
    ],
)
def test_a_tracestate_goes_on_whole_or_not_at_all(state: bytes, passed: object) -> None:
    parent = b"00-%b-01" % IDS
    assert context(traceparent=parent, tracestate=state) == (parent, state if passed is ... else passed)
    assert context(tracestate=state) == (None, None)


def test_a_context_that_connection_names_is_the_routers_own() -> None:
    parent = b"00-%b-01" % IDS
    assert context(traceparent=parent, tracestate=b"a=b", connection=b"x, Traceparent") == (None, None)
    assert context(traceparent=parent, tracestate=b"a=b", connection=b"tracestate") == (parent, None)
