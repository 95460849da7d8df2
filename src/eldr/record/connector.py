"""Source: eldr's connector in a vLLM worker, asked directly or by a router.

It returns the expert counts of the prompt and the experts of every generated token, if the request asks for them. A
router asks for a client that has its admin key.
"""

from __future__ import annotations

from eldr.counts import CountsError, decode_counts
from eldr.expert_rows import decode_rows
from eldr.record.prompts import Prompt, RecordError
from eldr.record.server import ServerSource
from eldr.record.sources import Sample


class Connector(ServerSource):
    """A worker with the connector or, if the options have an admin key, a router."""

    def sample(self, prompt: Prompt) -> Sample:
        if self.options.admin_key is None:
            found = self.ask(prompt, kv_transfer_params={"eldr_record": True}).get("kv_transfer_params") or {}
            counts, rows = found.get("eldr_counts"), found.get("eldr_decode_experts")
        else:
            found = self.ask(prompt).get("eldr_record") or {}
            counts, rows = found.get("counts"), found.get("decode_experts")
        if counts is None or rows is None:
            raise RecordError(
                f"{self.options.url} answered without expert counts; record from a vLLM worker that runs the eldr "
                "connector, or from a router with its admin key"
            )
        try:
            return Sample(decode_counts(counts), decode_rows(rows))
        except CountsError as error:
            raise RecordError(f"{self.options.url} answered with unusable expert counts: {error}") from None
