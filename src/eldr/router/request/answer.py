"""Relays a decode worker's answer to its client: streams are forwarded piece by piece, other answers are collected."""

from __future__ import annotations

import re
import time
from bisect import bisect_left
from collections.abc import Callable

from eldr.router.http.client import Answer, ExchangeError
from eldr.router.http.errors import ApiError
from eldr.router.http.exchange import ClientExchange
from eldr.router.http.forwarding import content_type
from eldr.router.observe.counters import ITL_BOUNDS_S, Metrics
from eldr.router.request.verdict import ERROR_EVENT, WrongAnswerError, check_status

DONE_EVENT = b"data: [DONE]\n\n"
# The longest form of [DONE], with line ends of two bytes each.
DONE_BYTES = 16
# The first event is held back until it is complete, up to this size.
MAX_FIRST_EVENT_BYTES = 1024 * 1024
# The usage arrives in an event without choices.
USAGE_MARK = b'"choices":[]'
COMPLETION_TOKENS = re.compile(rb'"completion_tokens":\s*(\d{1,9})')


class TokenTimes:
    """Records when the tokens of a stream arrive, and counts them as they do.

    events: server-sent events forwarded.
    first_s, last_s: monotonic times of the first and the last token. 0 before there are any.
    """

    def __init__(self, metrics: Metrics, received_s: float, wants_usage: bool) -> None:
        self._metrics = metrics
        self._gaps = metrics.itl.counts
        self._received_s = received_s
        self._wants_usage = wants_usage
        self._usage = b""
        self.events = 0
        self.first_s = 0.0
        self.last_s = 0.0

    def begin(self) -> None:
        self.first_s = time.monotonic()
        self._metrics.ttft.observe(self.first_s - self._received_s)

    def heard(self, events: int, data: bytes) -> None:
        """`events` events arrived at once."""
        self.events += events
        now_s = time.monotonic()
        if self.last_s:
            self._gaps[bisect_left(ITL_BOUNDS_S, now_s - self.last_s)] += 1
        self.last_s = now_s
        if self._wants_usage and USAGE_MARK in data:
            self._usage = data

    def observe(self, extra_events: int, whole: bool) -> float | None:
        """Record the mean time between tokens and return it. None if there is none, as for an incomplete stream.

        The usage tells the number of tokens, if the client asked for it. Otherwise every event counts as one token,
        except for `extra_events` and the usage. A worker that falls behind puts several tokens into one event, and then
        looks slower.
        """
        metrics = self._metrics
        metrics.stream_events += self.events
        if self.last_s:
            metrics.itl.sum += self.last_s - self.first_s
        found = COMPLETION_TOKENS.search(self._usage)
        tokens = int(found[1]) if found else self.events - extra_events - self._wants_usage
        if tokens < 2 or not whole:
            return None
        tpot_s = (self.last_s - self.first_s) / (tokens - 1)
        metrics.tpot.observe(tpot_s)
        return tpot_s


class DecodeAnswer(Answer):
    """Receives the answer of a decode leg and forwards a stream to the client.

    Nothing reaches the client until the first event of a stream is complete, so a failure before that can still be
    repaired. From then on (`begun`) `finished` always resolves. A stream that broke, or that ended without [DONE], ends
    with an error event, and the connection is closed before the proper end of the stream. vLLM's streams contain no
    transfer parameters, so nothing has to be removed.

    first_event: called with the first event. Raises WrongAnswerError if the client must not get it.
    broken: how the worker failed a stream that had begun. None if it did not.
    cut: whether the router ended the stream.
    """

    def __init__(
        self,
        client: ClientExchange,
        times: TokenTimes,
        head_lines: bytes,
        first_event: Callable[[bytes], None],
        wants_stream: bool | None,
    ) -> None:
        super().__init__()
        self._client = client
        self._head_lines = head_lines
        self._first_event = first_event
        self._wants_stream = wants_stream
        self._is_stream = False
        self._held = b""
        self._tail = b""
        self._done = False
        self.times = times
        self.broken: ExchangeError | None = None
        self.cut = False

    def on_head(self, status: int, headers: dict[bytes, bytes]) -> None:
        super().on_head(status, headers)
        check_status(status)
        self._is_stream = status == 200 and content_type(headers).startswith(b"text/event-stream")
        if status == 200 and self._wants_stream is (not self._is_stream):
            raise WrongAnswerError("a stream that was not requested" if self._is_stream else "not a stream")

    def on_body(self, data: bytes, framed: bytes | None = None) -> None:
        if not self._is_stream:
            super().on_body(data)
            return
        if not self.begun:
            framed = None
            data = self._begin(data)
            if not data:
                return
        # JSON escapes line ends, so a bare empty line can only be the end of an event.
        events = data.count(b"\n\n")
        if events == 1 and data == DONE_EVENT:
            self._done = True
            self.times.events += 1
        else:
            self.times.heard(events, data)
            self._tail = data if len(data) >= DONE_BYTES else (self._tail + data)[-DONE_BYTES:]
        self._client.write(data, framed)

    def _begin(self, data: bytes) -> bytes:
        """Return everything received so far once the first event is complete and fit for the client.

        Otherwise return b"".
        """
        self._held += data
        if b"\n\n" not in self._held and b"\r\n\r\n" not in self._held:
            if len(self._held) > MAX_FIRST_EVENT_BYTES:
                raise WrongAnswerError("the first event does not end")
            return b""
        self._first_event(self._held)
        self.begun = True
        self.times.begin()
        self._client.begin_stream(self.headers[b"content-type"], self._head_lines)
        held, self._held = self._held, b""
        return held

    @property
    def complete(self) -> bool:
        """Whether all events of a stream were forwarded."""
        return self._done or self._tail.rstrip().endswith(b"[DONE]")

    def on_done(self) -> None:
        if self._is_stream:
            if not self.begun:
                super().on_failed(WrongAnswerError("a stream without events"))
                return
            if not self.complete:
                self.on_failed(ExchangeError("the stream ended without [DONE]"))
                return
            if self._tail.startswith(ERROR_EVENT):
                self.broken = ExchangeError("the worker reported an error within the stream")
            self._client.end_stream()
        super().on_done()

    def settle(self) -> None:
        """The client left before the end of the body, but with everything it waited for."""
        super().on_done()

    def on_failed(self, error: ExchangeError) -> None:
        if not self.begun:
            super().on_failed(error)
            return
        self.broken = error
        self._end_short(ApiError(504 if error.timed_out else 502, "the worker failed in the middle of the answer"))

    def cut_off(self, error: ApiError) -> None:
        """End a stream early, through no fault of the worker. The client gets `error` as its last event."""
        self.cut = True
        self._end_short(error)

    def _end_short(self, error: ApiError) -> None:
        self._client.write(b"data: %b\n\n" % error.body())
        self._client.break_stream()
        super().on_done()
