"""What GitHub renders and Python-Markdown does not: lists right below a paragraph, and Markdown inside <details>."""

from __future__ import annotations

import re
from typing import Any

_FENCE = re.compile(r" {0,3}(```|~~~)")
# A numbered list interrupts a paragraph only where it begins with 1 (CommonMark 0.31, section 5.3).
_ITEM = re.compile(r"([-*+]|1[.)]) +\S")
_NOT_A_PARAGRAPH = re.compile(r"\s|([-*+]|\d+[.)]) |[#|<>]|$")


def on_page_markdown(markdown: str, **_: Any) -> str:
    lines: list[str] = []
    fence = ""
    in_list = False
    for line in markdown.split("\n"):
        if match := _FENCE.match(line):
            fence = "" if match[1] == fence else fence or match[1]
        elif not fence:
            if _ITEM.match(line):
                if not in_list and lines and not _NOT_A_PARAGRAPH.match(lines[-1]):
                    lines.append("")
                in_list = True
            elif not line:
                in_list = False
            line = line.replace("<details>", '<details markdown="1">')
        lines.append(line)
    return "\n".join(lines)
