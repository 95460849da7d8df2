"""Reads server-sent events as they arrive (WHATWG HTML, section 9.2.6, "interpreting an event stream").

The router watches the streams that it relays, and the load client measures those that it gets. Neither may import the
other, so what both need lies here.

`id` and `retry` are passed over. They tell a browser how to connect again, which no completion can be continued by.
"""

from __future__ import annotations

from typing import Final

BOM: Final = b"\xef\xbb\xbf"
# How much longer than its value a line can be: the name of the field, a colon and a space. A line is cut behind this.
NAME_BYTES: Final = 16
# As numbers: to look for bytes, Python 3.11 first raises an error, and for compiled code that is what costs most here.
CR: Final = 13
LF: Final = 10
# A plain event begins so. A JSON object has no bare line ends, so the first one ends the line.
OBJECT: Final = b"data: {"


class Event:
    """One event.

    type: empty for the default, a message.
    data: its lines, joined by LF. Possibly empty.
    whole: False if the data was cut.
    """

    __slots__ = ("data", "type", "whole")

    def __init__(self, type: bytes, data: bytes, whole: bool = True) -> None:
        self.type = type
        self.data = data
        self.whole = whole


class EventReader:
    """Turns the pieces of one stream into its events, however they are cut.

    Of an event's data, and of its type, no more than the first `keep_bytes` are kept, and nothing of comments. The
    reader thus needs little memory, whatever the stream.

    between: whether the stream is between two events, so that a comment may be inserted. Not before its first bytes,
        which may be a byte order mark.
    """

    def __init__(self, keep_bytes: int) -> None:
        self._keep_bytes = keep_bytes
        self._line = bytearray()  # the start of the unfinished line
        self._data = bytearray()
        self._has_data = False
        self._whole = True
        self._type = b""
        self._first_line = True
        self._after_cr = False
        self.between = False

    def is_plain(self, piece: bytes) -> bool:
        """Whether a piece is exactly one event with a JSON object for its data, in the form in which vLLM sends tokens.

        Such a piece need not be fed, because it leaves the reader as it was.
        """
        last = len(piece) - 1
        return (
            self.between
            and piece.startswith(OBJECT)
            and piece.find(b"\n") == last - 1
            and piece[last] == LF
            and CR not in piece
        )

    def feed(self, piece: bytes) -> list[Event]:
        """Read on, and return the events that `piece` completes."""
        events: list[Event] = []
        if not piece:
            return events
        if self._after_cr:
            self._after_cr = False
            piece = piece.removeprefix(b"\n")
        if CR in piece:
            self._after_cr = piece.endswith(b"\r")
            piece = piece.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        lines = piece.split(b"\n")
        rest = lines.pop()
        for line in lines:
            if self._line:
                self._extend_line(line)
                line = bytes(self._line)
                self._line.clear()
            self._take(line, events)
        self._extend_line(rest)
        self.between = not (self._line or self._has_data or self._type)
        return events

    @property
    def overlong(self) -> Event | None:
        """The start of the unfinished event, once more of its data has arrived than is kept."""
        if self._whole and len(self._line) <= self._keep_bytes:
            return None
        unfinished = self.unfinished
        return None if unfinished is None or unfinished.whole else unfinished

    @property
    def unfinished(self) -> Event | None:
        """The part of the next event that has arrived, including its unfinished line. None if it has no data.

        By the standard, an event that is unfinished when the stream ends is none.
        """
        ahead = EventReader(self._keep_bytes)
        ahead._data += self._data
        ahead._has_data, ahead._whole, ahead._type = self._has_data, self._whole, self._type
        ahead._first_line = self._first_line
        events: list[Event] = []
        if self._line:
            ahead._take(bytes(self._line), events)
        ahead._dispatch(events)
        return events[0] if events else None

    def _extend_line(self, more: bytes) -> None:
        room = self._keep_bytes + NAME_BYTES - len(self._line)
        if room > 0:
            self._line += more if len(more) <= room else more[:room]

    def _take(self, line: bytes, events: list[Event]) -> None:
        """Interpret one line, without its end."""
        if self._first_line:
            self._first_line = False
            line = line.removeprefix(BOM)
        if not line:
            self._dispatch(events)
            return
        if len(line) > self._keep_bytes + NAME_BYTES:
            line = line[: self._keep_bytes + NAME_BYTES]
        name, _, value = line.partition(b":")
        if name == b"data":
            self._add_data(value.removeprefix(b" "))
        elif name == b"event":
            self._type = value.removeprefix(b" ")[: self._keep_bytes]

    def _add_data(self, value: bytes) -> None:
        if self._has_data:
            self._data += b"\n"
        self._has_data = True
        self._data += value
        if len(self._data) > self._keep_bytes:
            self._whole = False
            del self._data[self._keep_bytes :]

    def _dispatch(self, events: list[Event]) -> None:
        """A blank line ends the event. Without data it is none."""
        if self._has_data:
            events.append(Event(self._type, bytes(self._data), self._whole))
        self._data.clear()
        self._has_data = False
        self._whole = True
        self._type = b""
