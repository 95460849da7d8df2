"""Source: a stock vLLM worker that was started with --enable-return-routed-experts.

vLLM 0.32 returns the experts of prompt and answer in `choices[].routed_experts` of every answer that is not streamed
(vllm/entrypoints/openai/completion/protocol.py).
"""

from __future__ import annotations

from eldr.counts import CountsError
from eldr.record.prompts import Prompt, RecordError
from eldr.record.server import RecordOptions, ServerSource, sample_of
from eldr.record.sources import MoeShape, Sample
from eldr.routed_experts import decode_npy


class RoutedExperts(ServerSource):
    """shape: the model's MoE layers. The answers do not say how many experts there are."""

    def __init__(self, options: RecordOptions, shape: MoeShape) -> None:
        super().__init__(options)
        self._shape = shape

    def sample(self, prompt: Prompt) -> Sample:
        answer = self.ask(prompt)
        choices = answer.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
        text = choice.get("routed_experts")
        if not isinstance(text, str):
            raise RecordError(
                f"{self.options.url} answered without routed experts; start the vLLM worker with "
                "--enable-return-routed-experts"
            )
        try:
            return sample_of(decode_npy(text.encode("utf-8", "replace")), self._shape, answer)
        except CountsError as error:
            raise RecordError(f"{self.options.url} answered with unusable experts: {error}") from None
