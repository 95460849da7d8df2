"""A prompt from its start on, in one form, and how many tokens it has: for guessing what a worker has cached of it."""

from __future__ import annotations

from typing import Final, NamedTuple

from eldr.kernels import JsonObject, json_chat_start, json_start
from eldr.router.protocols.json_text import ARRAY, SPACES
from eldr.router.protocols.openai import Endpoint
from eldr.router.protocols.prompt_start import BYTES_PER_TOKEN, SYSTEM, array_of_ids, single_prompt

# How much of a prompt is looked at: about 64,000 tokens of text.
MOST_BYTES: Final = 256 * 1024
# Between the instructions and the conversation.
SEPARATOR: Final = b"\0"


class PromptPrefix(NamedTuple):
    """What is known of a prompt before it is computed.

    text: its first MOST_BYTES. Two prompts that begin alike have texts that do, however they are written.
    bytes_per_token: about how many bytes of `text` make a token.
    tokens: about how many tokens the prompt has.
    """

    text: bytes
    bytes_per_token: float
    tokens: int


def prompt_prefix(endpoint: Endpoint, body: JsonObject) -> PromptPrefix:
    """Return how the prompt in `body` begins. Instructions that stand elsewhere come first, as they do for a model."""
    text = body.text
    start, end = body.span(endpoint.input) or (0, 0)
    if start == end:
        return PromptPrefix(b"", BYTES_PER_TOKEN, 0)
    raw_bytes = end - start
    if text[start] == ARRAY and not endpoint.messages:
        start, end = single_prompt(text, start, end)
        if array_of_ids(text, start, end):
            raw = text[start + 1 : min(end - 1, start + 1 + MOST_BYTES)]
            begun = raw.translate(None, SPACES)
            tokens = begun.count(b",") + 1
            per_token = len(begun) / tokens
            if len(raw) == MOST_BYTES:
                tokens = tokens * (end - start) // len(raw)
            return PromptPrefix(begun, per_token, tokens)
    if text[start] == ARRAY and endpoint.messages:
        system, rest = json_chat_start(text, start, end, SYSTEM, MOST_BYTES)
        begun = system + rest
    else:
        begun = json_start(text, start, end, MOST_BYTES)
    instructions = body.span(endpoint.system) if endpoint.system else None
    if instructions is not None:
        raw_bytes += instructions[1] - instructions[0]
        begun = json_start(text, instructions[0], instructions[1], MOST_BYTES) + SEPARATOR + begun
    # What was read to its end is measured without escapes, of which there may be many.
    prompt_bytes = len(begun) if len(begun) < MOST_BYTES else raw_bytes
    return PromptPrefix(begun[:MOST_BYTES], BYTES_PER_TOKEN, prompt_bytes // BYTES_PER_TOKEN)
