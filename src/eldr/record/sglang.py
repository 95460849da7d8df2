"""Source: an SGLang server that was started with --enable-return-routed-experts.

A request with `return_routed_experts` gets the experts of prompt and answer in `sglext.routed_experts`, or in
`meta_info.routed_experts` of its choice, as int32 without a shape.
"""

from __future__ import annotations

from typing import Any

from eldr.counts import CountsError
from eldr.record.prompts import Prompt, RecordError
from eldr.record.server import RecordOptions, ServerSource, sample_of, usage_of
from eldr.record.sources import MoeShape, Sample
from eldr.routed_experts import decode_ids


class Sglang(ServerSource):
    """shape: the model's MoE layers. The answers say nothing about them."""

    def __init__(self, options: RecordOptions, shape: MoeShape) -> None:
        super().__init__(options)
        self._shape = shape

    def sample(self, prompt: Prompt) -> Sample:
        answer = self.ask(prompt, return_routed_experts=True)
        text = _experts_of(answer)
        if text is None:
            raise RecordError(
                f"{self.options.url} answered without routed experts; start the SGLang server with "
                "--enable-return-routed-experts"
            )
        prompt_tokens, generated_tokens = usage_of(answer)
        try:
            rows = decode_ids(text.encode("utf-8", "replace"), prompt_tokens + generated_tokens - 1, self._shape.top_k)
            return sample_of(rows, self._shape, answer)
        except CountsError as error:
            raise RecordError(f"{self.options.url} answered with unusable experts: {error}") from None


def _experts_of(answer: dict[str, Any]) -> str | None:
    choices = answer.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    for holder in (answer, first):
        for name in ("sglext", "meta_info"):
            found = holder.get(name) if isinstance(holder, dict) else None
            text = found.get("routed_experts") if isinstance(found, dict) else None
            if isinstance(text, str):
                return text
    return None
