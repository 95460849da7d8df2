"""Relays a decode worker's answer to its client: streams are forwarded piece by piece, other answers are collected."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable
from typing import Final

from eldr.event_stream import BOM, Event, EventReader
from eldr.router.http.client import Answer, ExchangeError
from eldr.router.http.errors import ApiError
from eldr.router.http.exchange import ClientExchange
from eldr.router.http.media_types import EVENT_STREAM, essence
from eldr.router.observe.counters import ITL_BOUNDS_S, Metrics
from eldr.router.protocols.streams import StreamForm, usage_tokens
from eldr.router.request.verdict import WrongAnswerError, check_status

# Of a longer event, the start is enough to judge it: vLLM's events begin with their id, and errors with `error`. Events
# of tokens have some hundred bytes. The first one can have megabytes, if the client asked for the prompt's token ids or
# logprobs. 64 KiB are also what one read from a worker brings at most.
EVENT_BYTES: Final = 64 * 1024
# How much may come before the first event, such as comments.
MAX_HELD_BYTES: Final = 1024 * 1024


class TokenTimes:
    """Records when the tokens of a stream arrive, and counts them as they do.

    others: how many events are no tokens. At first those that every such stream has, except for its end.

    events: server-sent events forwarded.
    stated: the number of tokens according to the usage. 0 if the stream has none.
    first_s, last_s: monotonic times of the first and the last token. 0 before there are any.
    """

    def __init__(self, metrics: Metrics, received_s: float, others: int) -> None:
        self._metrics = metrics
        self._gaps = metrics.itl.counts
        self._received_s = received_s
        self.others = others
        self.events = 0
        self.stated = 0
        self.first_s = 0.0
        self.last_s = 0.0

    def begin(self) -> None:
        self.first_s = time.monotonic()
        self._metrics.ttft.observe(self.first_s - self._received_s)

    def heard(self, events: int) -> None:
        """`events` events arrived at once."""
        self.events += events
        now_s = time.monotonic()
        if self.last_s:
            self._gaps[bisect_left(ITL_BOUNDS_S, now_s - self.last_s)] += 1
        self.last_s = now_s

    @property
    def tokens(self) -> int:
        """The number of tokens so far, as `observe` counts them."""
        return self.stated or max(0, self.events - self.others)

    def observe(self, whole: bool) -> float | None:
        """Record the mean time between tokens and return it. None if there is none, as for an incomplete stream.

        The usage tells the number of tokens, if the client asked for it. Otherwise every event counts as one token,
        except for `others`. A worker that falls behind puts several tokens into one event, and then looks slower.
        """
        metrics = self._metrics
        metrics.stream_events += self.events
        if self.last_s:
            metrics.itl.sum += self.last_s - self.first_s
        tokens = self.tokens
        if tokens < 2 or not whole:
            return None
        tpot_s = (self.last_s - self.first_s) / (tokens - 1)
        metrics.tpot.observe(tpot_s)
        return tpot_s


class DecodeAnswer(Answer):
    """Receives the answer of a decode leg and forwards a stream to the client.

    Nothing reaches the client until the first event with data, so a failure before that can still be repaired. Comments
    before it are held back. Of a very long first event, the start is enough. From then on (`begun`) `finished` always
    resolves. A stream that broke, or that ended without its last event, ends with an error event, and the connection is
    closed before the proper end of the stream. Once the last event has been forwarded, the client has a whole answer,
    whatever follows. vLLM's streams contain no transfer parameters, so nothing has to be removed.

    It has many attributes because it holds the state of one stream: what came before its first event, where the reader
    is, and how it ended.

    form: what the events mean.
    first_event: called with the first event. Raises WrongAnswerError if the client must not get it.
    broken: how the worker failed a stream that had begun. None if it did not.
    cut: whether the router ended the stream.
    """

    def __init__(
        self,
        client: ClientExchange,
        times: TokenTimes,
        head_lines: bytes,
        form: StreamForm,
        first_event: Callable[[Event], None],
        wants_stream: bool | None,
    ) -> None:
        super().__init__()
        self._client = client
        self._head_lines = head_lines
        self._form = form
        self._first_event = first_event
        self._wants_stream = wants_stream
        self._is_stream = False
        self._reader = EventReader(EVENT_BYTES)
        self._held = bytearray()
        self._opening: list[Event] = []  # the events that are held back
        self._latest = b""  # the latest event before the end: its data, or `data: ` with it
        self._ended = False  # the last event has been forwarded
        self._refused = False  # it was an error of the client's
        self.times = times
        self.broken: ExchangeError | None = None
        self.cut = False

    def on_head(self, status: int, headers: dict[bytes, bytes]) -> None:
        super().on_head(status, headers)
        check_status(status)
        self._is_stream = status == 200 and essence(headers.get(b"content-type", b"")) == EVENT_STREAM
        if status == 200 and self._wants_stream is (not self._is_stream):
            raise WrongAnswerError("a stream that was not requested" if self._is_stream else "not a stream")

    def on_body(self, data: bytes, framed: bytes | None = None) -> None:
        if self.begun:
            if self._reader.is_plain(data):  # nearly every token
                self._latest = data
                self.times.heard(1)
            else:
                self._take(self._reader.feed(data))
            self._client.write(data, framed)
        elif self._is_stream:
            self._hold_back(data)
        else:
            super().on_body(data)

    def _hold_back(self, data: bytes) -> None:
        """Keep `data` until the first event, or enough of it, has arrived and is fit for the client."""
        self._held += data
        self._opening += [event for event in self._reader.feed(data) if event.data]
        events = self._opening
        overlong = self._reader.overlong
        if overlong is None and all(self._form.is_opening(event) for event in events):
            if len(self._held) > MAX_HELD_BYTES:
                raise WrongAnswerError(f"no event in the first {MAX_HELD_BYTES} bytes")
            return
        first = events[0] if events else overlong
        assert first is not None
        # An error may come behind what opened the stream, and its end behind the error.
        for event in events[1:]:
            if self._form.error_status(event.data, event.whole) >= 500:
                raise WrongAnswerError("status 200 with an error")
        self._first_event(first)
        self.begun = True
        self.times.begin()
        held = bytes(self._held)
        self._held.clear()
        if self._client.streaming:
            held = held.removeprefix(BOM)  # comments have been sent before
        else:
            self._client.begin_stream(self.headers[b"content-type"], self._head_lines)
        self._opening = []
        self._take(events)
        self._client.write(held)

    def _take(self, events: list[Event]) -> None:
        """Count the events of one piece, and see whether the stream ends with one of them."""
        heard = 0
        for event in events:
            if not event.data:
                continue
            if self._ended or self._form.is_end(event):
                self.times.events += 1
                self.times.others += 1
                if not self._ended:
                    self._end(event)
                continue
            heard += 1
            self._latest = event.data
            if not self._form.is_token(event):
                self.times.others += 1
        if heard:
            self.times.heard(heard)

    def _end(self, event: Event) -> None:
        """The last event has arrived. It, or the one before it, may report an error."""
        self._ended = True
        latest = self._latest.removeprefix(b"data: ")
        status = self._form.error_status(event.data) or self._form.error_status(latest, len(latest) < EVENT_BYTES)
        if status >= 500:
            self.broken = ExchangeError("the worker reported an error within the stream")
        self._refused = 0 < status < 500
        self.times.stated = usage_tokens(latest) or usage_tokens(event.data)

    @property
    def opened(self) -> bool:
        """Whether what opens a stream has arrived, and nothing else."""
        return not self.begun and len(self._opening) > 0

    @property
    def complete(self) -> bool:
        """Whether all events of a stream were forwarded."""
        return self._ended

    @property
    def whole(self) -> bool:
        """Whether all of a stream was forwarded, and it reports no error."""
        return self._ended and not self._refused and self.broken is None

    @property
    def between(self) -> bool:
        """Whether something may be inserted into a stream that has begun."""
        return self._reader.between and not self.finished.done()

    def on_done(self) -> None:
        if self._is_stream:
            if not self.begun:
                super().on_failed(WrongAnswerError("a stream without events"))
                return
            if not self._has_ended():
                self.on_failed(ExchangeError("the stream ended without its last event"))
                return
            self._client.end_stream()
        super().on_done()

    def _has_ended(self) -> bool:
        """Whether the last event has arrived, with or without the blank line behind it.

        By the standard, an event without that line is none. But the clients of this API take it for one.
        """
        unfinished = None if self._ended else self._reader.unfinished
        if unfinished is not None and self._form.is_end(Event(b"", unfinished.data)):
            self._end(unfinished)
        return self._ended

    def settle(self) -> None:
        """The client left before the end of the body, but with everything it waited for."""
        super().on_done()

    def on_failed(self, error: ExchangeError) -> None:
        if not self.begun:
            super().on_failed(error)
        elif self._has_ended():
            self.on_done()
        else:
            self.broken = error
            self._end_short(ApiError(504 if error.timed_out else 502, "the worker failed in the middle of the answer"))

    def cut_off(self, error: ApiError) -> None:
        """End a stream early, through no fault of the worker. The client gets `error` as its last event."""
        if self._has_ended():
            self.on_done()
            return
        self.cut = True
        self._end_short(error)

    def _end_short(self, error: ApiError) -> None:
        event = self._form.error_event(error)
        # Within an event, it would become a part of that one.
        self._client.write(event if self._reader.between else b"\n\n" + event)
        self._client.break_stream()
        super().on_done()
