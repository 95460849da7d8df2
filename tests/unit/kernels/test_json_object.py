"""Objects as text, in both readers: what is found, taken out and put in, and that all other bytes stay."""

from __future__ import annotations

import json
import math
from types import ModuleType
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import eldr.kernels
import eldr.kernels._json
from tests.unit.kernels.test_json import BOTH, needs_compiler, same, values

NAMES = ("a", "b", "c", "d", "ä", "\ud800", "", "aa")
ALL = frozenset(NAMES)

both = pytest.mark.parametrize("reader", BOTH)


def read(reader: ModuleType, text: bytes, *names: str, prefix: str = "") -> Any:
    return reader.JsonObject(text, reader.JsonNames(names, prefix))


@st.composite
def objects(draw: st.DrawFn) -> bytes:
    """A JSON object with duplicates and spaces, its names with and without escapes."""
    space = st.sampled_from((b"", b"", b" ", b"\r\n\t"))
    members = draw(
        st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from((b"1", b'"x,}"', b"[{},2]"))), max_size=12)
    )

    def written(name: str) -> bytes:
        text = json.dumps(name, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
        return text.replace(b"a", rb"\u0061") if draw(st.integers(0, 3)) == 0 and b"\\" not in text else text

    each = [b"%b%b%b:%b%b%b" % (draw(space), written(n), draw(space), draw(space), v, draw(space)) for n, v in members]
    return draw(space) + b"{" + (b",".join(each) or draw(space)) + b"}" + draw(space)


def pairs(text: bytes) -> list[tuple[str, Any]]:
    """The members of an object without objects in it, or with empty ones, in order."""
    found: list[list[tuple[str, Any]]] = []
    json.loads(text.decode("utf-8", "surrogatepass"), object_pairs_hook=found.append)
    return found[-1]


@settings(max_examples=300, deadline=None)
@given(objects(), st.sets(st.sampled_from(NAMES)), st.sampled_from((b"", b'"new":1', b'"a":0,"new":1')), st.booleans())
@both
def test_members_are_taken_out_and_put_in(
    reader: ModuleType, text: bytes, owned: set[str], added: bytes, within: bool
) -> None:
    names = reader.JsonNames(NAMES)
    if within:
        around = b'["a",' + text + b"]"
        whole = reader.JsonObject(around, names, 5, len(around) - 1)
    else:
        whole = reader.JsonObject(text, names)
    spliced = whole.spliced(frozenset(owned), added)
    kept = [(name, value) for name, value in pairs(text) if name not in owned]
    assert pairs(spliced) == kept + pairs(b"{%b}" % added)
    if not added and len(kept) == len(pairs(text)):
        assert spliced == text
    # What was not looked for is not changed by a byte.
    assert read(reader, text).spliced(frozenset(owned)) == text


@settings(max_examples=300, deadline=None)
@given(objects(), st.sets(st.sampled_from(NAMES)), st.sampled_from((b"", b'"new":1')))
def test_both_readers_splice_alike(text: bytes, owned: set[str], added: bytes) -> None:
    plain = read(eldr.kernels._json, text, *NAMES)
    assert read(eldr.kernels, text, *NAMES).spliced(frozenset(owned), added) == plain.spliced(frozenset(owned), added)


@both
def test_all_other_bytes_are_those_of_the_text(reader: ModuleType) -> None:
    text = b'{ "a" : 1.0e00,\n"b":"\\u00e4", "c" : [ 1 , 18446744073709551617 ],"b":2 ,"d":NaN }\n'
    whole = read(reader, text, "b")
    expected = b'{ "a" : 1.0e00,\n"c" : [ 1 , 18446744073709551617 ],"d":NaN ,"b":3}'
    assert whole.spliced(frozenset(("b",)), b'"b":3') == expected


@both
@pytest.mark.parametrize("size", [1, 65_000, 100_000])
def test_long_texts_are_spliced_as_short_ones_are(reader: ModuleType, size: int) -> None:
    text = b'{"a":1,"x":"%b","b":2 , "a":3 }' % (b"x" * size)
    whole = read(reader, text, "a", "b")
    assert whole.spliced(frozenset("a")) == b'{"x":"%b","b":2 }' % (b"x" * size)
    assert whole.spliced(frozenset("ab"), b'"c":4') == b'{"x":"%b","c":4}' % (b"x" * size)


@settings(max_examples=300, deadline=None)
@given(values, st.booleans())
@example(10**18 - 1, True)
@example(10**18, True)
@example(-0.0, True)
@example('\x7f\\"', True)
@both
def test_values(reader: ModuleType, value: Any, ascii_only: bool) -> None:
    raw = json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    text = b'{"x":1,"a": %b }' % raw
    whole = read(reader, text, "a", "b")
    found = whole.get("a")
    if isinstance(value, (list, dict)):
        assert found == raw
    else:
        assert type(found) is type(value)
        assert same(found, value)
    start, end = whole.span("a")
    assert whole.raw("a") == raw == text[start:end]
    assert ("a" in whole, "b" in whole) == (True, False)
    assert (whole.span("b"), whole.raw("b"), whole.get("b")) == (None, None, None)


@both
def test_the_last_of_duplicates_counts_and_null_is_nothing(reader: ModuleType) -> None:
    whole = read(reader, b'{"a":1,"\\u0061":[2, 3],"b":null}', "a", "b", "c")
    assert whole.get("a") == b"[2, 3]"
    assert whole.raw("a") == b"[2, 3]"
    assert "b" in whole
    assert whole.raw("b") == b"null"
    assert (whole.get("b"), whole.get("c"), whole.raw("c")) == (None, None, None)


@both
def test_a_name_is_found_whichever_string_it_is(reader: ModuleType) -> None:
    made = "".join(("long", "_name"))
    for names, prefix in ((("long_name",), ""), ((made,), ""), ((), "long")):
        whole = reader.JsonObject(b'{"x":1,"long_name":2}', reader.JsonNames(names, prefix))
        assert (whole.get("long_name"), whole.get("".join(("long", "_name"))), whole.get("x")) == (2, 2, None)
        assert whole.spliced(frozenset(("".join(("long", "_name")),))) == b'{"x":1}'


@both
def test_members_with_a_prefix_are_found_by_their_names(reader: ModuleType) -> None:
    whole = read(reader, b'{"own_x":1,"a":2,"\\u006fwn_\\u0079":3,"own":4,"own_":5,"own_x":6}', "a", prefix="own_")
    assert [name for name, _, _ in whole.members] == ["own_x", "a", "own_y", "own_", "own_x"]
    assert [whole.get(name) for name in ("own_x", "own_y", "own_", "own", "own_z")] == [6, 3, 5, None, None]
    assert whole.spliced(frozenset(("own_x", "own_y"))) == b'{"a":2,"own":4,"own_":5}'


@both
def test_integers_without_end_are_read_as_infinite(reader: ModuleType) -> None:
    whole = read(reader, b'{"a":%b,"b":-%b}' % (b"9" * 5000, b"9" * 5000), "a", "b")
    assert (whole.get("a"), whole.get("b")) == (math.inf, -math.inf)


@both
def test_objects_inside(reader: ModuleType) -> None:
    names = reader.JsonNames(("x",))
    text = b'{"a":{"x":1, "y":{"x":2}},"b":[],"c": { "x":{"x":3} } ,"d":{%b}}' % b",".join([b'"x":1'] * 2000)
    whole = read(reader, text, "a", "b", "c", "d", "e")
    for name in ("b", "d", "e"):
        assert whole.inner(name, names) is None
    found, other = whole.inner("a", names), whole.inner("c", names)
    assert (found.get("x"), found.spliced(frozenset("x"))) == (1, b'{"y":{"x":2}}')
    assert (other.get("x"), other.inner("x", names).get("x")) == (b'{"x":3}', 3)
    assert other.spliced(frozenset()) == b'{ "x":{"x":3} }'


@needs_compiler
def test_no_byte_outside_of_the_text_is_read() -> None:
    for start, end in ((0, 9), (3, 1), (-1, 2)):
        with pytest.raises(ValueError, match="within the text"):
            eldr.kernels.JsonObject(b"{}", eldr.kernels.JsonNames(()), start, end)
