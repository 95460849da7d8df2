"""Source: `choices[].routed_experts` of stock vLLM workers that run with --enable-return-routed-experts.

Such a worker states them in every answer that is not a stream, with or without being asked. So the router takes them
out of all answers, and reads those of a share. A client can only say which rows of the prompt to skip. One that does
(`routed_experts_prompt_start`) wants them. The router cannot skip these rows itself: vLLM refuses a number above the
length of the prompt, which is not known before.
"""

from __future__ import annotations

from typing import ClassVar

from eldr.counts import ExpertCounts
from eldr.kernels import JsonNames, JsonObject, JsonTextError, json_elements
from eldr.routed_experts import decode_npy
from eldr.router.experts.base import AnswerExperts, MoeGeometry, count_decode_rows
from eldr.router.protocols.json_text import QUOTE

MEMBER = b'"routed_experts"'
WANTED = JsonNames(("routed_experts",))
# Of more choices, no experts are taken: no worker is asked for so many.
MOST_CHOICES = 1024


class VllmRoutedExperts(AnswerExperts):
    """vLLM 0.30 and newer (vllm/entrypoints/openai/completion/protocol.py, chat_completion/protocol.py)."""

    source: ClassVar[str] = "routed_experts"
    asks: ClassVar[str] = "routed_experts_prompt_start"
    unasked: ClassVar[bool] = True

    def asking(self, body: bytes) -> bytes:
        return body

    def take(self, answer: bytes, choices: tuple[int, int] | None) -> tuple[bytes, list[bytes]]:
        """A worker without the flag says null."""
        if choices is None or MEMBER not in answer:
            return answer, []
        pieces: list[bytes] = []
        texts: list[bytes] = []
        kept = 0
        for start, end in json_elements(answer, choices[0], choices[1], MOST_CHOICES):
            try:
                span = JsonObject(answer, WANTED, start, end).span("routed_experts")
            except JsonTextError:  # no object
                span = None
            if span is None or answer[span[0]] != QUOTE:
                continue
            at, behind = span
            texts.append(answer[at + 1 : behind - 1])
            pieces += (answer[kept:at], b"null")
            kept = behind
        pieces.append(answer[kept:])
        return b"".join(pieces), texts

    def decode(self, text: bytes, prompt_tokens: int, generated_tokens: int, geometry: MoeGeometry) -> ExpertCounts:
        return count_decode_rows(decode_npy(text), prompt_tokens, generated_tokens, geometry)
