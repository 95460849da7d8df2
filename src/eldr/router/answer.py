"""A decode worker's answer on its way to the client: streams are passed on piece by piece, the rest is gathered."""

from __future__ import annotations

import re
import time

from eldr.router.errors import ApiError
from eldr.router.forwarding import content_type
from eldr.router.http import ClientConnection
from eldr.router.metrics import Metrics
from eldr.router.upstream import Answer, ExchangeError

DONE_EVENT = b"data: [DONE]\n\n"
# The usage comes in an event without choices.
USAGE_MARK = b'"choices":[]'
COMPLETION_TOKENS = re.compile(rb'"completion_tokens":\s*(\d+)')


class DecodeAnswer(Answer):
    """Hears the answer of a decode leg.

    Until the first piece of a stream nothing has reached the client, so that a failure can still be repaired. After
    that `finished` always resolves: a stream that broke ends with an error event and a connection closed short of
    the stream's end.

    events: server-sent events passed on. vLLM's stream carries no transfer parameters, so nothing is taken out.
    """

    def __init__(
        self,
        client: ClientConnection,
        metrics: Metrics,
        response_headers: bytes,
        received_s: float,
        wants_usage: bool,
    ) -> None:
        super().__init__()
        self._client = client
        self._metrics = metrics
        self._response_headers = response_headers
        self._received_s = received_s
        self._wants_usage = wants_usage
        self._usage = b""
        self._is_stream = False
        self.streaming = False
        self.broken = False
        self.events = 0
        self.first_s = 0.0
        self.last_s = 0.0

    def on_head(self, status: int, headers: dict[bytes, bytes]) -> None:
        super().on_head(status, headers)
        self._is_stream = status == 200 and content_type(headers).startswith(b"text/event-stream")

    def on_body(self, data: bytes) -> None:
        if not self._is_stream:
            super().on_body(data)
            return
        if not self.streaming:
            self._begin()
        # JSON escapes its line ends: a bare empty line can only be the end of an event.
        events = data.count(b"\n\n")
        self.events += events
        if events != 1 or data != DONE_EVENT:
            self.last_s = time.monotonic()
        if self._wants_usage and USAGE_MARK in data:
            self._usage = data
        self._client.write(data)

    def _begin(self) -> None:
        self.streaming = True
        self.first_s = time.monotonic()
        self._metrics.ttft.observe(self.first_s - self._received_s)
        self._client.begin_stream(self.headers[b"content-type"], self._response_headers)

    def on_done(self) -> None:
        if self._is_stream:
            if not self.streaming:
                self._begin()
            self._client.end_stream()
        super().on_done()

    def on_failed(self, error: ExchangeError) -> None:
        if not self.streaming:
            super().on_failed(error)
            return
        self.broken = True
        event = ApiError(502, "the worker broke off in the middle of the answer").body()
        self._client.write(b"data: %b\n\n" % event)
        self._client.break_stream()
        super().on_done()

    def observe_tpot(self, extra_events: int) -> None:
        """Count the mean time between tokens.

        The usage says how many there were, where the client asked for it. Otherwise every event counts as one, less
        `extra_events` and the usage; a worker that falls behind puts several into one event, which is then slower.
        """
        self._metrics.stream_events += self.events
        found = COMPLETION_TOKENS.search(self._usage)
        tokens = int(found[1]) if found else self.events - extra_events - self._wants_usage
        if tokens > 1 and not self.broken:
            self._metrics.tpot.observe((self.last_s - self.first_s) / (tokens - 1))
