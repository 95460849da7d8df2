"""The start of prompts as intake takes it from a body."""

from __future__ import annotations

import json
from typing import Any

from eldr.kernels import JsonNames, JsonObject
from eldr.router.protocols.openai import ENDPOINTS
from eldr.router.protocols.prompt_start import prompt_start


def start(path: bytes, body: dict[str, Any] | bytes, window_bytes: int = 1024) -> bytes:
    """The start of the prompt in a body, given as it is sent or as what it says."""
    endpoint = ENDPOINTS[path]
    fields = JsonObject(body if isinstance(body, bytes) else json.dumps(body).encode(), JsonNames(endpoint.members))
    at, end = fields.span(endpoint.input) or (0, 0)
    return prompt_start(endpoint, fields.text, at, end, window_bytes)


def chat(*contents: str, system: str | None = None) -> dict[str, Any]:
    messages = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return {"messages": messages + [{"role": roles[n % 2], "content": text} for n, text in enumerate(contents)]}
