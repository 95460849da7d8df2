"""Time per output token, and between tokens."""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from types import SimpleNamespace
from typing import cast

import pytest

from eldr.router.http.exchange import ClientExchange
from eldr.router.observe.counters import Metrics
from eldr.router.protocols.openai import COMPLETIONS
from eldr.router.protocols.streams import FORMS
from eldr.router.request.answer import DecodeAnswer, TokenTimes
from tests.router.harness import interpreted


class Silent:
    """A client connection that takes everything."""

    streaming = False

    def begin_stream(self, content_type: bytes, extra: bytes) -> None:
        pass

    def write(self, data: bytes, framed: None = None) -> None:
        pass

    def end_stream(self) -> None:
        pass


@interpreted
@pytest.mark.parametrize(
    ("usage", "expected_s"),
    [(False, (3.0 - 1.0) / (3 - 1)), (True, (4.0 - 1.0) / (7 - 1))],
)
def test_time_per_output_token_is_taken_over_tokens(
    monkeypatch: pytest.MonkeyPatch, usage: bool, expected_s: float
) -> None:
    """Seven tokens in three events, a second apart; only the usage tells that there were seven."""

    async def run() -> Metrics:
        metrics = Metrics()
        times = TokenTimes(metrics, 0.0, others=usage)
        answer = DecodeAnswer(cast(ClientExchange, Silent()), times, b"", FORMS[COMPLETIONS], lambda event: None, True)
        answer.on_head(200, {b"content-type": b"text/event-stream"})
        pieces = [b'data: {"choices":[{"text":"%b"}]}\n\n' % text for text in (b"a", b"bcd", b"efg")]
        if usage:
            pieces.append(b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":7}}\n\n')
        pieces.append(b"data: [DONE]\n\n")
        clock = iter(float(n) for n in range(1, 20))
        now_s = 0.0
        monkeypatch.setattr("eldr.router.request.answer.time", SimpleNamespace(monotonic=lambda: now_s))
        for piece in pieces:
            now_s = next(clock)
            answer.on_body(piece)
        answer.on_done()
        assert answer.whole
        times.observe(answer.whole)
        assert metrics.stream_events == len(pieces)
        return metrics

    metrics = asyncio.run(run())
    assert sum(metrics.tpot.counts) == 1
    assert metrics.tpot.sum == pytest.approx(expected_s)
    gaps = 3 if usage else 2
    assert metrics.itl.counts[bisect_left(metrics.itl.bounds, 1.0)] == sum(metrics.itl.counts) == gaps
    assert metrics.itl.sum == pytest.approx(gaps)
