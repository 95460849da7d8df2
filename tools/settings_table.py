"""Writes the tables of settings in docs/router.md from their declarations.

Run: python tools/settings_table.py [--check]. With --check it writes nothing, and exits with 1 if the page is out of
date.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import get_origin

from eldr.router.config.settings import RouterConfig
from eldr.settings import Setting, settings_of

PAGE = Path(__file__).parents[1] / "docs" / "router.md"
BEGIN, END = "<!-- settings -->", "<!-- /settings -->"


def tables() -> Iterator[str]:
    """Lines of Markdown: a heading and a table for each section."""
    for section, settings in groupby(settings_of(RouterConfig), lambda one: one.section):
        yield from ("", f"### {section}", "", "| key | flag | default | live | meaning |", "|---|---|---|---|---|")
        for one in settings:
            cells = (f"`{one.key}`", f"`{one.flag}`" if one.flag else "", default(one), "yes" * one.live, meaning(one))
            yield f"| {' | '.join(cells)} |".replace("|  ", "| ")


def default(one: Setting) -> str:
    return f"`{one.default}`" if one.kind is str and not one.shown else one.default_text


def meaning(one: Setting) -> str:
    container = get_origin(one.kind)
    form = "" if container is None else f"; in the file a {'table' if issubclass(container, Mapping) else 'list'}"
    if one.choices:
        form = f" ({', '.join(f'`{choice}`' for choice in one.choices)})"
    return one.help + form + (f" ([{heading(one.page)}]({one.page.removeprefix(PAGE.name)}))" if one.page else "")


def heading(link: str) -> str:
    """The heading that a link within docs/ leads to. Raises LookupError if it leads nowhere."""
    page, _, anchor = link.partition("#")
    for line in (PAGE.parent / page).read_text(encoding="utf-8").splitlines():
        mark, _, title = line.partition(" ")
        if set(mark) == {"#"} and anchor in ("", re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-")):
            return title
    raise LookupError(f"docs/{link} leads to no heading")


def main() -> int:
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    new = "\n".join((before + BEGIN, *tables(), "", END)) + after
    if "--check" in sys.argv[1:]:
        if new != page:
            print(f"the settings in {PAGE} are out of date: run `make settings`", file=sys.stderr)
        return int(new != page)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
