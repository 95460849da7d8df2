"""The text of a prompt that a trace keeps."""

from typing import Any

import pytest

from eldr.record import prompt_text


def said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"prompt": "def f():"}, "def f():"),
        ({"messages": [said("user", "a"), said("assistant", "b"), said("user", "c")]}, "a\nb\nc"),
        ({"messages": [said("system", "be kind"), said("developer", "be brief"), said("user", "a")]}, "a"),
        # Instructions in the middle belong to this conversation alone.
        ({"messages": [said("user", "a"), said("system", "now rhyme"), said("user", "b")]}, "a\nnow rhyme\nb"),
        ({"messages": [said("system", "only this")]}, ""),
        ({"messages": [said("user", [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}])]}, "x\ny"),
        ({"messages": [said("user", [{"type": "image_url", "image_url": {}}, {"text": 3}, "z"])]}, ""),
        ({"messages": [said("assistant", None), said("tool", "42")]}, "42"),
        ({"messages": ["no message", said("system", "s"), {"content": "no role"}]}, "no role"),
        ({"messages": "no list"}, ""),
        ({}, ""),
    ],
)
def test_the_text_is_what_is_said_after_leading_instructions(body: dict[str, Any], text: str) -> None:
    assert prompt_text(body) == text
