"""Source: SGLang's routed experts, for servers that run with --enable-return-routed-experts.

A request has to ask (`return_routed_experts`). The answer then has `sglext.routed_experts`, or
`meta_info.routed_experts` in older versions: int32 without a shape.
"""

from __future__ import annotations

from typing import ClassVar

from eldr.counts import ExpertCounts
from eldr.kernels import JsonNames, JsonObject, JsonTextError
from eldr.routed_experts import decode_ids
from eldr.router.experts.base import AnswerExperts, MoeGeometry, count_decode_rows
from eldr.router.protocols.json_text import QUOTE

HOLDERS = ("sglext", "meta_info")
HOLDER_NAMES = JsonNames(HOLDERS)
EXPERTS = "routed_experts"
EXPERTS_NAMES = JsonNames((EXPERTS,))
ASKS = "return_routed_experts"
ASKS_NAMES = JsonNames((ASKS,))


class SglangRoutedExperts(AnswerExperts):
    """SGLang 0.5.22 and newer."""

    source: ClassVar[str] = "sglang"
    asks: ClassVar[str] = ASKS
    unasked: ClassVar[bool] = False

    def asking(self, body: bytes) -> bytes:
        return JsonObject(body, ASKS_NAMES).spliced(frozenset((ASKS,)), b'"return_routed_experts":true')

    def take(self, answer: bytes, choices: tuple[int, int] | None) -> tuple[bytes, list[bytes]]:
        try:
            fields = JsonObject(answer, HOLDER_NAMES)
        except JsonTextError:
            return answer, []
        for name in HOLDERS:
            held = fields.inner(name, EXPERTS_NAMES)
            text = None if held is None else held.raw(EXPERTS)
            if held is None or text is None or text[0] != QUOTE:
                continue
            left = held.spliced(frozenset((EXPERTS,)))
            added = b"" if left.strip(b"{} \t\r\n") == b"" else b'"%b":%b' % (name.encode(), left)
            return fields.spliced(frozenset((name,)), added), [text[1:-1]]
        return answer, []

    def decode(self, text: bytes, prompt_tokens: int, generated_tokens: int, geometry: MoeGeometry) -> ExpertCounts:
        rows = decode_ids(text, prompt_tokens + generated_tokens - 1, geometry.top_k)
        return count_decode_rows(rows, prompt_tokens, generated_tokens, geometry)
