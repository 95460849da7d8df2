"""Docstrings of eldr name parameters and attributes as `name: meaning`; on the site each becomes an item of a list."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from griffe import Class, Extension, Function, Object

# At the start of a line, or behind a sentence or a semicolon.
_FIELD = re.compile(r"(?:^|(?<=[.;] )|(?<=\n)) *(\w+(?:, \w+)*): ")


class DocstringFields(Extension):
    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None and isinstance(obj, (Class, Function)):
            obj.docstring.value = with_fields_listed(obj.docstring.value, _names(obj))


def with_fields_listed(text: str, names: set[str]) -> str:
    """`text` with the fields of each paragraph as a Markdown list. Only `names` count as fields."""
    return "\n\n".join(part for paragraph in text.split("\n\n") for part in _parts(paragraph, names))


def _parts(paragraph: str, names: set[str]) -> Iterator[str]:
    fields = [match for match in _FIELD.finditer(paragraph) if names.issuperset(match[1].split(", "))]
    if not fields:
        yield paragraph
        return
    if lead := paragraph[: fields[0].start()].strip():
        yield lead
    items: list[str] = []
    rest = ""
    ends = [match.start() for match in fields[1:]] + [len(paragraph)]
    for match, end in zip(fields, ends, strict=True):
        meaning, raises, error = paragraph[match.end() : end].partition("\nRaises ")
        rest += (raises + error).strip()
        named = ", ".join(f"`{name}`" for name in match[1].split(", "))
        items.append(f"- {named}: " + " ".join(meaning.split()).removesuffix(";"))
    yield "\n".join(items)
    if rest:
        yield rest


def _names(obj: Class | Function) -> set[str]:
    if isinstance(obj, Function):
        return {parameter.name for parameter in obj.parameters}
    names = set(obj.members)
    if isinstance(init := obj.members.get("__init__"), Function):
        names |= _names(init)
    return names
