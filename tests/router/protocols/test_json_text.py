"""The encodings of JSON that Python's json reads."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eldr.kernels import JsonNames, JsonObject, JsonTextError
from eldr.router.protocols.json_text import utf8


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
            JsonObject(utf8(raw), JsonNames(()))
        return
    assert utf8(raw) == expected.encode("utf-8", "surrogatepass")
