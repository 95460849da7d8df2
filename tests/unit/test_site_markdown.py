"""The site renders what GitHub renders: lists below a paragraph, Markdown inside <details>."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

HOOK = Path(__file__).parents[2] / "tools" / "site" / "github_markdown.py"

Convert = Callable[[str], str]


@pytest.fixture(scope="module")
def convert() -> Convert:
    spec = importlib.util.spec_from_file_location("github_markdown", HOOK)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: Convert = module.on_page_markdown
    return found


@pytest.mark.parametrize("item", ["- a", "* a", "1. a"])
def test_a_list_below_a_paragraph_gets_a_blank_line(convert: Convert, item: str) -> None:
    assert convert(f"text:\n{item}\nmore") == f"text:\n\n{item}\nmore"


@pytest.mark.parametrize(
    "text",
    [
        "# heading\n- a\n- b",
        "- a\n  more of a\n- b",
        "- a\nmore of a\n- b",
        "text:\n\n- a\n- b",
        "in\n2. is no list",
        "text\n-5 is no item",
        "```\ntext\n- a\n```",
        "~~~\n```\ntext\n- a\n~~~",
        "    text\n    - a",
    ],
)
def test_everything_else_stays(convert: Convert, text: str) -> None:
    assert convert(text) == text


def test_after_a_fence_lists_are_lists_again(convert: Convert) -> None:
    assert convert("```\ncode\n```\ntext\n- a") == "```\ncode\n```\ntext\n\n- a"


def test_details_hold_markdown_but_not_in_code(convert: Convert) -> None:
    assert convert("<details><summary>s</summary>") == '<details markdown="1"><summary>s</summary>'
    assert convert("```\n<details>\n```") == "```\n<details>\n```"
