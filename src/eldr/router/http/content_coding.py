"""Compressed request bodies (RFC 9110, section 8.4): gzip, deflate and, with eldr[zstd], zstd.

A body is decoded in small pieces, because a megabyte of it may decode to a gigabyte. The caller checks after each piece
whether it wants more.
"""

from __future__ import annotations

import importlib
import sys
import zlib
from collections.abc import Callable
from typing import Any, Final

from eldr.router.http.errors import ApiError


def _zstd_module() -> Any:
    try:
        return importlib.import_module("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")
    except ModuleNotFoundError:
        return None


zstd: Final[Any] = _zstd_module()

# A piece of the decoded body. It takes about half a millisecond.
PIECE_BYTES = 128 * 1024
# How much is given to the decoder at once. What it leaves is copied.
INPUT_BYTES = 16 * 1024
# gzip and zstd may consist of members, one after the other. Compressors that use several cores write one per 64 KiB or
# more. Without a limit, a million empty ones would be decoded.
MAX_MEMBERS = 1024
# The window that a decoder must support, and the largest that an encoder may use (RFC 9659): 8 MiB.
ZSTD_WINDOW_LOG = 23


def _gzip(start: bytes) -> Any:
    return zlib.decompressobj(16 + zlib.MAX_WBITS)


def _deflate(start: bytes) -> Any:
    """The coding is the zlib format, but some clients leave out its two bytes of head (RFC 9110, section 8.4.1.2)."""
    has_head = len(start) > 1 and start[0] & 0x0F == zlib.DEFLATED and (start[0] << 8 | start[1]) % 31 == 0
    return zlib.decompressobj(zlib.MAX_WBITS if has_head else -zlib.MAX_WBITS)


def _zstd(start: bytes) -> Any:
    return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: ZSTD_WINDOW_LOG})


# Coding -> what makes a decoder from the first bytes of a member.
DECODERS: Final[dict[bytes, Callable[[bytes], Any]]] = {b"gzip": _gzip, b"x-gzip": _gzip, b"deflate": _deflate}
ERRORS: tuple[type[Exception], ...] = (zlib.error,)
if zstd is not None:
    DECODERS[b"zstd"] = _zstd
    ERRORS += (zstd.ZstdError,)
ACCEPTED: Final = b", ".join(name for name in DECODERS if not name.startswith(b"x-"))


def coding_of(headers: dict[bytes, bytes]) -> bytes:
    """The coding of a request's body. Empty if it has none. Raises ApiError 415 for an unknown one and for several."""
    given = headers.get(b"content-encoding")
    if given is None:
        return b""
    codings = [name for name in (part.strip().lower() for part in given.split(b",")) if name not in (b"", b"identity")]
    if not codings:
        return b""
    if len(codings) > 1 or codings[0] not in DECODERS:
        why = f"the Content-Encoding must be one of {ACCEPTED.decode()}, or absent"
        # Section 12.5.3: it tells a client what it may use.
        raise ApiError(415, why, headers=b"accept-encoding: %b\r\n" % ACCEPTED)
    return codings[0]


class BodyDecoder:
    """Decodes one body, a piece for each call.

    coding: one that `coding_of` returns, not empty.
    complete: whether the whole body was returned.
    """

    def __init__(self, coding: bytes, body: bytes) -> None:
        self._coding = coding
        self._body = body
        self._at = 0
        self._input = b""
        self._member: Any = None
        self._members = 0
        self.complete = False

    def next_piece(self) -> bytes:
        """At most PIECE_BYTES more, perhaps none. Raises ApiError 400 if the body is damaged or cut short."""
        if not self._input and self._at < len(self._body):
            self._input = self._body[self._at : self._at + INPUT_BYTES]
            self._at += len(self._input)
        ends_here = not self._input
        try:
            if self._member is None:
                self._begin_member()
            piece: bytes = self._member.decompress(self._input, PIECE_BYTES)
        except ERRORS as error:
            raise self._damaged(str(error)) from None
        if self._member.eof:
            self._input = self._member.unused_data
            self._member = None
            self.complete = not self._input and self._at == len(self._body)
        elif ends_here and not piece:
            raise self._damaged("it is cut short")
        elif self._coding == b"zstd":
            self._input = b""  # zstd keeps what it has not decoded yet
        else:
            self._input = self._member.unconsumed_tail
        return piece

    def _begin_member(self) -> None:
        if self._members and self._coding == b"deflate":
            raise self._damaged("something follows its end")
        if self._members == MAX_MEMBERS:
            raise self._damaged(f"it has more than {MAX_MEMBERS} members")
        self._members += 1
        self._member = DECODERS[self._coding](self._input)

    def _damaged(self, why: str) -> ApiError:
        return ApiError(400, f"the request body is not valid {self._coding.decode()}: {why}")
