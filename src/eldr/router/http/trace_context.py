"""W3C Trace Context (https://w3.org/TR/trace-context-2): the traceparent and tracestate that go on to the workers.

Level 2 is read, whose formats include those of level 1. An invalid context is dropped as if it had not come, so the
trace begins at the next party.
"""

from __future__ import annotations

import re

from eldr.router.http.message import Request, is_hop_by_hop

# Section 3.2. Version 00 has these four fields and nothing else. A later version may have more, behind another dash,
# and is read by the four (section 4.3). A comma there can only come from a repeated header, which is invalid.
PARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-[^,]*)?")
NO_TRACE, NO_SPAN = b"0" * 32, b"0" * 16
# The flags that version 00 knows: sampled and, since level 2, random. Others must not be passed on in its name.
KNOWN_FLAGS = 0x03
SAMPLED = 0x01
# Section 3.3.1: a list of at most 32 members, of which some may be empty. Level 1's tenant@system is such a key too.
MEMBER = re.compile(
    rb"([a-z0-9][a-z0-9_\-*/@]{0,255})=([\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e])"
)
MAX_MEMBERS = 32
BLANKS = b" \t"


def trace_context(request: Request) -> tuple[bytes | None, bytes | None]:
    """The traceparent, as version 00, and the tracestate of a request. Each is None if there is no valid one."""
    headers = request.headers
    given = headers.get(b"traceparent")
    if given is None or is_hop_by_hop(headers, b"traceparent"):
        return None, None
    parent = read_parent(given)
    state = headers.get(b"tracestate")
    if parent is None or state is None or is_hop_by_hop(headers, b"tracestate"):
        return parent, None
    state = state.strip(BLANKS)
    return parent, state if is_state(state) else None


def read_parent(given: bytes) -> bytes | None:
    """The traceparent of version 00 that says the same. None if `given` is invalid."""
    found = PARENT.fullmatch(given.strip(BLANKS))
    if found is None:
        return None
    version, trace, span, flags, more = found.groups()
    if version == b"ff" or trace == NO_TRACE or span == NO_SPAN:
        return None
    if version == b"00":
        return None if more is not None else found[0]
    return b"00-%b-%b-%02x" % (trace, span, int(flags, 16) & KNOWN_FLAGS)


def is_state(state: bytes) -> bool:
    """Whether this is a valid tracestate, with at least one member."""
    keys: set[bytes] = set()
    for text in state.split(b","):
        text = text.strip(BLANKS)
        if not text:
            continue
        member = MEMBER.fullmatch(text)
        if member is None or member[1] in keys or len(keys) == MAX_MEMBERS:
            return False
        keys.add(member[1])
    return bool(keys)


def is_sampled(parent: bytes) -> bool:
    """Whether the caller of this request records its trace."""
    return bool(int(parent[-2:], 16) & SAMPLED)


def trace_lines(parent: bytes | None, state: bytes | None) -> bytes:
    """The header lines of a trace context."""
    if parent is None:
        return b""
    line = b"traceparent: %b\r\n" % parent
    return line if state is None else b"%btracestate: %b\r\n" % (line, state)
