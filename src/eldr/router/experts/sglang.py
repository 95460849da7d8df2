"""Source: SGLang's routed experts, for servers that run with --enable-return-routed-experts.

A request has to ask (`return_routed_experts`). The answer then has `sglext.routed_experts`, or
`meta_info.routed_experts` in older versions: int32 without a shape.
"""

from __future__ import annotations

from typing import ClassVar

from eldr.counts import ExpertCounts
from eldr.kernels import JsonTextError
from eldr.routed_experts import decode_ids
from eldr.router.experts.base import AnswerExperts, MoeGeometry, count_decode_rows
from eldr.router.protocols.json_object import QUOTE, JsonObject, inner_object

HOLDERS = ("sglext", "meta_info")
WANTED = frozenset(("routed_experts",))


class SglangRoutedExperts(AnswerExperts):
    """SGLang 0.5.22 and newer."""

    source: ClassVar[str] = "sglang"
    asks: ClassVar[str] = "return_routed_experts"
    unasked: ClassVar[bool] = False

    def asking(self, body: bytes) -> bytes:
        return JsonObject(body, frozenset((self.asks,))).spliced(
            frozenset((self.asks,)), b'"return_routed_experts":true'
        )

    def take(self, answer: bytes, choices: tuple[int, int] | None) -> tuple[bytes, list[bytes]]:
        try:
            fields = JsonObject(answer, frozenset(HOLDERS))
        except JsonTextError:
            return answer, []
        for name in HOLDERS:
            held = inner_object(fields.raw(name), WANTED)
            text = None if held is None else held.raw("routed_experts")
            if held is None or text is None or text[0] != QUOTE:
                continue
            left = held.spliced(WANTED)
            added = b"" if left.strip(b"{} \t\r\n") == b"" else b'"%b":%b' % (name.encode(), left)
            return fields.spliced(frozenset((name,)), added), [text[1:-1]]
        return answer, []

    def decode(self, text: bytes, prompt_tokens: int, generated_tokens: int, geometry: MoeGeometry) -> ExpertCounts:
        rows = decode_ids(text, prompt_tokens + generated_tokens - 1, geometry.top_k)
        return count_decode_rows(rows, prompt_tokens, generated_tokens, geometry)
