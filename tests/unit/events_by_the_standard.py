"""A plain reading of server-sent events, for comparison."""

from __future__ import annotations

import re

# A type and data, and whether the data is whole.
Told = tuple[bytes, bytes, bool]


def by_the_standard(stream: bytes, keep_bytes: int) -> list[Told]:
    """Section 9.2.6, step by step, over the whole stream; and then what is kept of each event."""
    *lines, _ = re.split(rb"\r\n|\r|\n", stream.removeprefix(b"\xef\xbb\xbf"))
    told: list[Told] = []
    data, kind = b"", b""
    for line in lines:
        if line == b"":
            if data != b"":
                data = data[:-1]
                told.append((kind[:keep_bytes], data[:keep_bytes], len(data) <= keep_bytes))
            data, kind = b"", b""
        elif line.startswith(b":"):
            continue
        else:
            field, value = line.split(b":", 1) if b":" in line else (line, b"")
            value = value[1:] if value[:1] == b" " else value
            if field == b"data":
                data += value + b"\n"
            elif field == b"event":
                kind = value
    return told
