"""The reader of JSON text: both against CPython's json, on texts, on texts with faults, and on bytes from nowhere."""

from __future__ import annotations

import json
import tracemalloc
from types import ModuleType
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import eldr.kernels
import eldr.kernels._json
from eldr.kernels import JsonTextError
from eldr.kernels._types import JSON_DEPTH, JSON_MEMBERS

needs_compiler = pytest.mark.skipif(not eldr.kernels.COMPILED, reason="this installation could not compile the kernels")
BOTH = [
    pytest.param(eldr.kernels._json, id="python"),
    pytest.param(eldr.kernels, id="compiled", marks=needs_compiler),
]
NAMES = ("a", "b", "kv", "ä", "\ud800", "")
READ = "not an object"

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(st.characters(codec=None), max_size=40),
    lambda each: st.lists(each, max_size=4) | st.dictionaries(st.sampled_from(NAMES), each, max_size=3),
    max_leaves=12,
)


@st.composite
def texts(draw: st.DrawFn) -> bytes:
    """A JSON object with duplicates, spaces, and strings with and without escapes."""
    spaces = st.sampled_from(("", "", " ", "\n\t "))

    def written(value: Any) -> str:
        ascii_only = draw(st.booleans())
        return json.dumps(value, ensure_ascii=ascii_only, indent=draw(st.sampled_from((None, 1))))

    members = draw(st.lists(st.tuples(st.sampled_from(NAMES), values), max_size=6))
    text = f"{draw(spaces)},{draw(spaces)}".join(
        f"{written(name)}{draw(spaces)}:{draw(spaces)}{written(value)}" for name, value in members
    )
    whole = f"{draw(spaces)}{{{draw(spaces)}{text}{draw(spaces)}}}{draw(spaces)}"
    return whole.encode("utf-8", "surrogatepass")


@st.composite
def spoiled(draw: st.DrawFn) -> bytes:
    """The same with a few bytes replaced, taken out or put in."""
    data = bytearray(draw(texts()))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        put = draw(
            st.binary(max_size=3) | st.sampled_from((b",", b'"', b"]", b"}", b"\\u12", b"\xed\xa0\x80", b"1.", b"-"))
        )
        data[at : at + draw(st.integers(0, 3))] = put
    return bytes(data)


def by_cpython(data: bytes) -> list[tuple[str, Any]] | str | None:
    """The members of the object as CPython reads them; READ for other JSON, None for what is none."""
    pairs: list[tuple[str, Any]] = []

    def keep(found: list[tuple[str, Any]]) -> dict[str, Any]:
        pairs[:] = found  # the outermost object is the last one
        return dict(found)

    try:
        value = json.loads(data.decode("utf-8", "surrogatepass"), object_pairs_hook=keep)
    except ValueError:
        return None
    return pairs if isinstance(value, dict) else READ


def members(reader: ModuleType, data: bytes, wanted: frozenset[str], prefix: str = "") -> Any:
    try:
        return reader.JsonObject(data, reader.JsonNames(wanted, prefix)).members
    except JsonTextError as error:
        return READ if "Expecting an object" in str(error) else None


def same(one: Any, other: Any) -> bool:
    return repr(one) == repr(other)  # NaN is not equal to itself


@settings(max_examples=300, deadline=None)
@given(
    texts() | spoiled() | st.binary(max_size=12),
    st.sets(st.sampled_from(NAMES)).map(frozenset),
    st.sampled_from(("", "k")),
)
@example(b"", frozenset(), "")
@example(b"{", frozenset(), "")
@example(b'{"a":1,}', frozenset(), "")
@example(b'{"a":01}', frozenset(), "")
@example(b'{"a":1.}', frozenset(), "")
@example(b'{"a":1e}', frozenset(), "")
@example(b'{"a":-}', frozenset(), "")
@example(b'{"a":-Infinity,"b":NaN,"a":1E400}', frozenset("a"), "")
@example(b'{"a":+1}', frozenset(), "")
@example(b'{"a":"\\u00zz"}', frozenset(), "")
@example(b'{"a":"\\x41"}', frozenset(), "")
@example(b'{"a":"\x1f"}', frozenset(), "")
@example(b'{"a":"\x7f"}', frozenset("a"), "")
@example(b'{"a":"\xc0\x80"}', frozenset(), "")
@example(b'{"a":"\xf4\x90\x80\x80"}', frozenset(), "")
@example(b'{"a":"\xed\xa0\x80\\ud800"}', frozenset("a"), "")
@example(b'{"\\u0061":1}', frozenset("a"), "")
@example(b'{"a":[1,2}]', frozenset("a"), "")
@example(b'{"a":[{}]} {}', frozenset("a"), "")
@example(b"\xef\xbb\xbf{}", frozenset(), "")
@example(b"[1]", frozenset(), "")
@example(b"NaN", frozenset(), "")
@pytest.mark.parametrize("reader", BOTH)
def test_what_is_read_is_what_cpython_reads(
    reader: ModuleType, data: bytes, wanted: frozenset[str], prefix: str
) -> None:
    expected, found = by_cpython(data), members(reader, data, wanted, prefix)
    if not isinstance(expected, list):
        assert found == expected
        return
    chosen = [(name, value) for name, value in expected if name in wanted or (prefix and name.startswith(prefix))]
    assert same([(name, json.loads(data[start:end])) for name, start, end in found], chosen)


@settings(max_examples=100, deadline=None)
@given(st.lists(values, max_size=6), st.integers(0, 8), st.booleans())
@pytest.mark.parametrize("reader", BOTH)
def test_the_elements_of_an_array(reader: ModuleType, array: list[Any], most: int, wide: bool) -> None:
    data = b"{ " + json.dumps(array, indent=2 if wide else None).encode() + b" }"
    spans = reader.json_elements(data, 1, len(data) - 1, most)
    assert same([json.loads(data[start:end]) for start, end in spans], array[:most])


@pytest.mark.parametrize("reader", BOTH)
def test_elements_of_something_else(reader: ModuleType) -> None:
    for data in (b"{}", b"1", b"", b"[1,", b"[1;2]", b"[,]"):
        with pytest.raises(JsonTextError):
            reader.json_elements(data, 0, len(data), 9)


def by_loops(messages: Any, known: frozenset[str]) -> bool:
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and not (isinstance(part.get("type"), str) and part["type"] in known):
                return False
    return True


parts = st.dictionaries(
    st.sampled_from(("type", "text")), st.sampled_from(("text", "image", "tëxt", None, 1, ["text"]))
)
messages = st.lists(
    values
    | st.fixed_dictionaries(
        {"content": st.text(max_size=5) | st.lists(parts | values, max_size=3), "role": st.just("user")}
    ),
    max_size=4,
)


@settings(max_examples=200, deadline=None)
@given(messages | values, st.booleans())
@pytest.mark.parametrize("reader", BOTH)
def test_parts_of_unknown_kinds_are_found(reader: ModuleType, value: Any, ascii_only: bool) -> None:
    data, known = (
        json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass"),
        frozenset(("text", "tëxt")),
    )
    assert reader.json_known_parts(data, 0, len(data), known) == by_loops(value, known)


@pytest.mark.parametrize("reader", BOTH)
def test_names_of_messages_may_have_escapes_and_duplicates(reader: ModuleType) -> None:
    known = frozenset(("text",))
    for data, expected in (
        (rb'[{"cont\u0065nt":[{"type":"image"}]}]', False),
        (rb'[{"content":[{"type":"image"}],"content":"x"}]', True),
        (rb'[{"content":[{"type":"image","typ\u0065":"te\u0078t"}]}]', True),
        (rb'[{"content":[{"type":"text"},{"text":"x"}]}]', False),
        (b'[{%b"content":[{"type":"image"}]}]' % (b'"content":"x",' * 2000), False),
        (b'[{"content":[{%b"type":"image"}]}]' % (b'"type":"text",' * 2000), False),
    ):
        assert reader.json_known_parts(data, 0, len(data), known) is expected


@pytest.mark.parametrize("reader", BOTH)
@pytest.mark.parametrize("brackets", [b"[]", b'{"a":}', b'[{"a":}]'])
def test_depth_is_bounded_where_no_reader_follows(reader: ModuleType, brackets: bytes) -> None:
    opening = brackets.rstrip(b"]}")
    closing = brackets[len(opening) :]
    levels = JSON_DEPTH // len(closing)
    deep = b'{"x":' + opening * levels + b"1" + closing * levels + b"}"
    assert members(reader, deep, frozenset("x")) == [("x", 5, len(deep) - 1)]
    deeper = b'{"x":' + opening * (levels + 1) + b"1" + closing * (levels + 1) + b"}"
    with pytest.raises(JsonTextError, match="65536 levels"):
        reader.JsonObject(deeper, reader.JsonNames("x"))


@pytest.mark.parametrize("reader", BOTH)
def test_members_are_bounded(reader: ModuleType) -> None:
    def text(count: int) -> bytes:
        return b"{" + b",".join([b'"a":1'] * count) + b"}"

    assert len(members(reader, text(JSON_MEMBERS), frozenset("a"))) == JSON_MEMBERS
    assert members(reader, text(5 * JSON_MEMBERS), frozenset("b")) == []
    with pytest.raises(JsonTextError, match=f"a few names at byte {6 * JSON_MEMBERS + 1}"):
        reader.JsonObject(text(JSON_MEMBERS + 1), reader.JsonNames("a"))


@pytest.mark.parametrize("reader", BOTH)
@given(
    st.lists(
        st.sampled_from((b"x", b"\xc3\xa4", b"\xe2\x82\xac", b"\xf0\x9f\x98\x80", b'\\"', b"\\u00e4", b"x" * 31)),
        max_size=12,
    )
)
@settings(max_examples=100, deadline=None)
def test_strings_of_any_length_end_at_their_quotes(reader: ModuleType, pieces: list[bytes]) -> None:
    data = b'{"a":"%b","b":%d}' % (b"".join(pieces), 4)
    (_, start, end), (_, other, other_end) = members(reader, data, frozenset("ab"))
    assert json.loads(data[start:end]) == json.loads(data)["a"]
    assert data[other:other_end] == b"4"


def in_one_way(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


words = st.text(st.characters(codec="utf-8"), max_size=20)


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(words | st.floats() | st.integers(), lambda each: st.lists(each) | st.dictionaries(words, each)),
    st.booleans(),
    st.integers(0, 60),
)
@example('/"\\\n\x00\x7fä€😀' * 3, True, 60)
@pytest.mark.parametrize("reader", BOTH)
def test_the_start_of_a_text_is_written_in_one_way(reader: ModuleType, value: Any, ascii_only: bool, most: int) -> None:
    data = json.dumps(value, ensure_ascii=ascii_only, indent=1).replace("/", rb"\/".decode()).encode()
    start, whole = reader.json_start(data, 0, len(data), most), in_one_way(value)
    assert start == whole[:most]


said = st.lists(
    words
    | st.fixed_dictionaries(
        {"role": st.sampled_from(("system", "user")), "content": words | st.lists(parts, max_size=2)},
        optional={"name": words, "tool_calls": st.none()},
    ),
    max_size=5,
)


@settings(max_examples=200, deadline=None)
@given(said, st.booleans(), st.sampled_from((0, 7, 40, 10_000)))
@pytest.mark.parametrize("reader", BOTH)
def test_the_start_of_a_conversation(reader: ModuleType, said: list[Any], ascii_only: bool, most: int) -> None:
    data = json.dumps(said, ensure_ascii=ascii_only, indent=1).encode()
    system, rest = reader.json_chat_start(data, 0, len(data), frozenset((b'"system"',)), most)
    leading = 0
    while leading < len(said) and isinstance(said[leading], dict) and said[leading]["role"] == "system":
        leading += 1
    written = [in_one_way(dict(sorted(m.items())) if isinstance(m, dict) else m).removesuffix(b"}") for m in said]
    assert system == b"".join(written[:leading])
    assert rest == b"".join(written[leading:])[:most]


@pytest.mark.parametrize("reader", BOTH)
def test_a_message_of_many_members_is_taken_as_it_is(reader: ModuleType) -> None:
    for count in (32, 33):
        message = {"role": "system", **{f"k{n:02}": n for n in reversed(range(count - 1))}}
        data = json.dumps([message]).encode()
        system, rest = reader.json_chat_start(data, 0, len(data), frozenset((b'"system"',)), 9999)
        if count == 32:
            assert (system, rest) == (in_one_way(dict(sorted(message.items())))[:-1], b"")
        else:
            assert (system, rest) == (b"", in_one_way(message))


@needs_compiler
def test_the_start_of_many_messages_takes_no_memory_for_each() -> None:
    data = b"[%b{}]" % (b"{}," * 200_000)
    tracemalloc.start()
    try:
        eldr.kernels.json_chat_start(data, 0, len(data), frozenset(), 100)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 2 * len(data)
