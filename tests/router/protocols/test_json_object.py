"""Objects as text: what is taken out and put in, and that all other bytes stay."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eldr.kernels import JsonTextError
from eldr.router.protocols.json_object import JsonObject, inner_object, utf8, value_of

NAMES = ("a", "b", "c", "d")


@st.composite
def objects(draw: st.DrawFn) -> bytes:
    space = st.sampled_from((b"", b"", b" ", b"\r\n\t"))
    members = draw(
        st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from((b"1", b'"x,}"', b"[{},2]"))), max_size=6)
    )
    written = [
        b'%b"%b"%b:%b%b%b' % (draw(space), n.encode(), draw(space), draw(space), v, draw(space)) for n, v in members
    ]
    return draw(space) + b"{" + (b",".join(written) or draw(space)) + b"}" + draw(space)


def pairs(text: bytes) -> list[tuple[str, Any]]:
    """The members of an object without objects in it, or with empty ones, in order."""
    found: list[list[tuple[str, Any]]] = []
    json.loads(text, object_pairs_hook=found.append)
    return found[-1]


@settings(max_examples=300, deadline=None)
@given(objects(), st.sets(st.sampled_from(NAMES)), st.sampled_from((b"", b'"new":1', b'"a":0,"new":1')))
def test_members_are_taken_out_and_put_in(text: bytes, owned: set[str], added: bytes) -> None:
    whole = JsonObject(text, frozenset(NAMES))
    spliced = whole.spliced(frozenset(owned), added)
    kept = [(name, value) for name, value in pairs(text) if name not in owned]
    assert pairs(spliced) == kept + pairs(b"{%b}" % added)
    if not added and len(kept) == len(pairs(text)):
        assert spliced == text
    # What was not looked for is not changed by a byte.
    assert JsonObject(text, frozenset()).spliced(frozenset(owned)) == text


def test_all_other_bytes_are_those_of_the_text() -> None:
    text = b'{ "a" : 1.0e00,\n"b":"\\u00e4", "c" : [ 1 , 18446744073709551617 ],"b":2 ,"d":NaN }\n'
    whole = JsonObject(text, frozenset(("b",)))
    expected = b'{ "a" : 1.0e00,\n"c" : [ 1 , 18446744073709551617 ],"d":NaN ,"b":3}'
    assert whole.spliced(frozenset(("b",)), b'"b":3') == expected


@pytest.mark.parametrize("size", [1, 65_000, 100_000])
def test_long_texts_are_spliced_as_short_ones_are(size: int) -> None:
    text = b'{"a":1,"x":"%b","b":2 , "a":3 }' % (b"x" * size)
    whole = JsonObject(text, frozenset("ab"))
    assert whole.spliced(frozenset("a")) == b'{"x":"%b","b":2 }' % (b"x" * size)
    assert whole.spliced(frozenset("ab"), b'"c":4') == b'{"x":"%b","c":4}' % (b"x" * size)


@settings(max_examples=100, deadline=None)
@given(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(), st.booleans())
def test_values(value: Any, ascii_only: bool) -> None:
    read = value_of(json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass"))
    assert (type(read), read) == (type(value), value)


def test_the_last_of_duplicates_counts_and_null_is_nothing() -> None:
    whole = JsonObject(b'{"a":1,"\\u0061":[2, 3],"b":null}', frozenset("abc"))
    assert whole.get("a") == b"[2, 3]"
    assert whole.raw("a") == b"[2, 3]"
    assert "b" in whole
    assert whole.raw("b") == b"null"
    assert (whole.get("b"), whole.get("c"), whole.raw("c")) == (None, None, None)


def test_integers_without_end_are_read_as_infinite() -> None:
    assert value_of(b"9" * 5000) == math.inf
    assert value_of(b"-" + b"9" * 5000) == -math.inf


def test_what_is_no_object_inside() -> None:
    assert inner_object(None, frozenset()) is None
    assert inner_object(b"[]", frozenset()) is None
    found = inner_object(b'{"a":1}', frozenset("a"))
    assert found is not None
    assert found.get("a") == 1


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]
)
def test_every_encoding_that_pythons_json_detects(encoding: str) -> None:
    text = '{"a":"ä€😀"}'
    raw = text.encode(encoding)
    assert json.loads(raw) == json.loads(utf8(raw))
    assert utf8(raw) == text.encode()


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=8))
def test_bytes_from_nowhere_are_read_as_pythons_json_would(raw: bytes) -> None:
    try:
        expected = raw.decode(json.detect_encoding(raw), "surrogatepass")
    except UnicodeDecodeError:
        with pytest.raises((UnicodeDecodeError, JsonTextError)):
            JsonObject(utf8(raw), frozenset())
        return
    assert utf8(raw) == expected.encode("utf-8", "surrogatepass")
