"""The words of the prompt in a client's body, for a signature before anything is computed."""

from __future__ import annotations

import re
from typing import Final

from eldr.kernels import JsonObject, JsonTextError, json_texts
from eldr.prompt.words import MOST_TEXT_BYTES, Words, words_of_text, words_of_tokens
from eldr.router.protocols.json_text import ARRAY, QUOTE
from eldr.router.protocols.openai import Endpoint
from eldr.router.protocols.prompt_start import SYSTEM

# An array, or arrays in an array, of numbers.
TOKENS: Final = re.compile(rb"[\[ \t\r\n]*[0-9]")


def prompt_text(endpoint: Endpoint, body: JsonObject) -> bytes | None:
    """Return the end of the prompt's text. None for a prompt of token ids.

    Of a conversation these are the texts of its messages. Leading system messages are left out: they are what many
    requests share, and say nothing about one of them.
    """
    start, end = body.span(endpoint.input) or (0, 0)
    text = body.text
    if text[start] == ARRAY and TOKENS.match(text, start + 1, end):
        return None
    if text[start] not in (ARRAY, QUOTE):
        return b""
    try:
        return json_texts(text, start, end, SYSTEM, MOST_TEXT_BYTES)
    except JsonTextError:  # an array with more levels than a value may have was read as one before
        return b""


def prompt_words(endpoint: Endpoint, body: JsonObject) -> Words:
    """Return the words of a prompt. A worker refuses what has none that can be found."""
    text = prompt_text(endpoint, body)
    if text is not None:
        return words_of_text(text)
    start, end = body.span(endpoint.input) or (0, 0)
    return words_of_tokens(body.text, start, end)
