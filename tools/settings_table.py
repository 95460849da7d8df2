"""Writes the tables of settings in docs/router.md and docs/gateway.md from their declarations.

Run: python tools/settings_table.py [--check]. With --check it writes nothing, and exits with 1 if a page is out of
date.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import get_origin

from eldr.router.config.picker import PickerConfig
from eldr.router.config.settings import RouterConfig
from eldr.settings import Setting, settings_of

DOCS = Path(__file__).parents[1] / "docs"
OF_ROUTER = settings_of(RouterConfig)
KNOWN = {one.key for one in OF_ROUTER}
# Each page has the settings that none before it has.
PAGES = {
    DOCS / "router.md": OF_ROUTER,
    DOCS / "gateway.md": tuple(one for one in settings_of(PickerConfig) if one.key not in KNOWN),
}
BEGIN, END = "<!-- settings -->", "<!-- /settings -->"


def tables(page: Path) -> Iterator[str]:
    """Lines of Markdown: a heading and a table for each section."""
    for section, settings in groupby(PAGES[page], lambda one: one.section):
        yield from ("", f"### {section}", "", "| key | flag | default | live | meaning |", "|---|---|---|---|---|")
        for one in settings:
            cells = (
                f"`{one.key}`",
                f"`{one.flag}`" if one.flag else "",
                default(one),
                "yes" * one.live,
                meaning(one, page),
            )
            yield f"| {' | '.join(cells)} |".replace("|  ", "| ")


def default(one: Setting) -> str:
    return f"`{one.default}`" if one.kind is str and not one.shown else one.default_text


def meaning(one: Setting, page: Path) -> str:
    container = get_origin(one.kind)
    form = "" if container is None else f"; in the file a {'table' if issubclass(container, Mapping) else 'list'}"
    if one.choices:
        form = f" ({', '.join(f'`{choice}`' for choice in one.choices)})"
    return one.help + form + (f" ([{heading(one.page)}]({one.page.removeprefix(page.name)}))" if one.page else "")


def heading(link: str) -> str:
    """The heading that a link within docs/ leads to. Raises LookupError if it leads nowhere."""
    page, _, anchor = link.partition("#")
    for line in (DOCS / page).read_text(encoding="utf-8").splitlines():
        mark, _, title = line.partition(" ")
        if set(mark) == {"#"} and anchor in ("", re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-")):
            return title
    raise LookupError(f"docs/{link} leads to no heading")


def main() -> int:
    stale = 0
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        before, _, rest = page.partition(BEGIN)
        _, _, after = rest.partition(END)
        new = "\n".join((before + BEGIN, *tables(path), "", END)) + after
        if "--check" not in sys.argv[1:]:
            path.write_text(new, encoding="utf-8")
        elif new != page:
            print(f"the settings in {path} are out of date: run `make settings`", file=sys.stderr)
            stale = 1
    return stale


if __name__ == "__main__":
    sys.exit(main())
