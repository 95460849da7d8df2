"""Prompts to record, and the text of a prompt that a signature model learns from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eldr.errors import EldrError

SYSTEM = ("system", "developer")


class RecordError(EldrError):
    """Raised when a prompt file cannot be read or a model cannot be recorded."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One line of a prompt file.

    body: the part of the request body that holds the prompt or the messages.
    label: the kind of the prompt, empty if the file gives none.
    """

    body: dict[str, Any]
    label: str

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if "messages" in self.body else "/v1/completions"


def read_prompts(path: Path) -> list[Prompt]:
    """Read the prompts of a file. Empty lines are skipped.

    path: a .jsonl file of objects {"prompt": text} or {"messages": [...]} with an optional "label", or a .txt file with
        one prompt per line.
    Raises RecordError with the file and the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{path}: cannot be read: {error}") from None
    if path.suffix == ".txt":
        prompts = [Prompt({"prompt": line}, "") for line in lines if line.strip()]
    elif path.suffix == ".jsonl":
        prompts = [_parse_line(path, n, line) for n, line in enumerate(lines, 1) if line.strip()]
    else:
        raise RecordError(f"{path}: a prompt file ends in .jsonl or .txt")
    if not prompts:
        raise RecordError(f"{path}: holds no prompts")
    return prompts


def _parse_line(path: Path, number: int, line: str) -> Prompt:
    try:
        item = json.loads(line)
    except json.JSONDecodeError as error:
        raise RecordError(f"{path}:{number}: not JSON: {error}") from None
    if not isinstance(item, dict):
        raise RecordError(f'{path}:{number}: expected an object like {{"prompt": "...", "label": "..."}}')
    label = item.get("label", "")
    if not isinstance(label, str):
        raise RecordError(f"{path}:{number}: the label is not a string")
    if isinstance(item.get("prompt"), str) and item["prompt"] and "messages" not in item:
        return Prompt({"prompt": item["prompt"]}, label)
    if isinstance(item.get("messages"), list) and item["messages"] and "prompt" not in item:
        return Prompt({"messages": item["messages"]}, label)
    raise RecordError(f'{path}:{number}: expected a non-empty "prompt" (a string) or "messages" (a list)')


def prompt_text(body: dict[str, Any]) -> str:
    """The text by which a request is known before it runs: its prompt, or what its conversation says.

    Leading system messages are left out, because most requests share them. The contents of the others are joined by
    newlines.
    """
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return prompt
    messages = body.get("messages")
    if not isinstance(messages, list):
        return ""
    told = [message for message in messages if isinstance(message, dict)]
    start = next((at for at, message in enumerate(told) if message.get("role") not in SYSTEM), len(told))
    return "\n".join(text for message in told[start:] for text in _texts(message.get("content")))


def _texts(content: object) -> Sequence[str]:
    """The texts of a message's content, which is a string or a list of parts."""
    if isinstance(content, str):
        return (content,)
    if not isinstance(content, list):
        return ()
    texts = [part.get("text") for part in content if isinstance(part, dict)]
    return [text for text in texts if isinstance(text, str)]
