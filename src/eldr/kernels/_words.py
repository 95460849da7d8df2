"""The words of prompts in Python. It runs if the compiled kernels are missing, and its docstrings describe both.

A word is a run of ASCII letters, in any case; a digit; any other ASCII sign but a space, a newline included; a
character beyond ASCII; or two of these in a row, since scripts without spaces have no other words. It is known by 16
bits of its hash alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from eldr.kernels._json import JsonNames, JsonObject, json_elements
from eldr.kernels._types import JSON_FAULTS, WORD_BUCKETS, WORD_NEAR_BYTES, WORD_PIECES, Floats, JsonTextError

MOST_OF_A_WORD = 65535
# FNV-1a with 64 bits (http://www.isthe.com/chongo/tech/comp/fnv/), and the golden ratio to mix its bits at the end.
SEED, PRIME, MIX = 0xCBF29CE484222325, 0x100000001B3, 0x9E3779B97F4A7C15
BITS_64 = 2**64 - 1

# Characters as their first byte says, since a text may be cut anywhere.
WORD = re.compile(
    rb"[A-Za-z]+|[\x00-\x08\n\x0b\x0c\x0e-\x1f!-@\[-`{-\x7f]|[\x80-\xbf]|[\xc0-\xdf].?|[\xe0-\xef].{0,2}|[\xf0-\xff].{0,3}",
    re.DOTALL,
)
DIGITS = re.compile(rb"[0-9]+")
ESCAPE = re.compile(rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|.)", re.DOTALL)
NAMED = {b"b": b"\b", b"f": b"\f", b"n": b"\n", b"r": b"\r", b"t": b"\t"}

Numbers = NDArray[np.uint16]


def text_words(text: bytes, end_bytes: int = 0, end_times: int = 1) -> tuple[Numbers, Numbers]:
    """Count the words of a text.

    text: UTF-8, but any bytes will do.
    end_bytes: words that begin in so many bytes at the end count `end_times` times, 1 to 65,535.
    Returns the buckets of its words in the order of their first sight, and how often each was seen, uint16 [n] each.
    Counts stop at 65,535.
    """
    _check_end(end_bytes, end_times)
    hashes: list[tuple[int, int]] = []
    before, before_end = b"", 0
    end_from = len(text) - end_bytes
    for match in WORD.finditer(text):
        word, times = match[0], 1 if match.start() < end_from else end_times
        if word[0] < 0x80:
            hashes.append((_hash(bytes(byte | 32 for byte in word) if word.isalpha() else word), times))
            continue
        hashes.append((_hash(word), times))
        if before and before_end == match.start():
            hashes.append((_hash(before + word), times))
        before, before_end = word, match.end()
    return _counted(hashes)


def token_words(text: bytes, start: int, end: int, end_bytes: int = 0, end_times: int = 1) -> tuple[Numbers, Numbers]:
    """The same for token ids, which are the runs of digits in text[start:end]."""
    _check_part(text, start, end)
    _check_end(end_bytes, end_times)
    found = DIGITS.finditer(text, start, end)
    return _counted([(_hash(b"\0" + match[0]), 1 if match.start() < end - end_bytes else end_times) for match in found])


def json_texts(text: bytes, start: int, end: int, leading: frozenset[bytes], most: int) -> bytes:
    """Return the last `most` bytes of the texts of a prompt, joined by newlines.

    text[start:end]: JSON: a string; an array of strings; or an array of messages, whose `content` is a string or an
        array of strings and of parts with a `text`. All else is skipped.
    leading: roles, as JSON writes them. Messages with such a role are skipped before the first one without.
    most: lengths count as JSON writes them. Where a text is cut, it begins behind a space, if there is one near.

    Raises JsonTextError for what is no JSON. No more is checked than is needed.
    """
    _check_part(text, start, end)
    match = re.compile(rb"[ \t\n\r]*+").match(text, start, end)
    at = start if match is None else match.end()
    if at == end:
        raise JsonTextError(JSON_FAULTS.index("Expecting value"), start)
    pieces: list[tuple[int, int]] = []
    if text[at] == ord('"'):
        while text[end - 1] in b" \t\n\r":
            end -= 1
        if end - at < 2 or text[end - 1] != ord('"'):
            raise JsonTextError(JSON_FAULTS.index("Unterminated string"), at)
        pieces.append((at + 1, end - 1))
    elif text[at] == ord("["):
        in_front = True
        for value, value_end in json_elements(text, at, end, end):
            if text[value] == ord('"'):
                pieces.append((value + 1, value_end - 1))
            elif text[value] == ord("{"):
                role, content = _member(text, value, value_end, "role"), _member(text, value, value_end, "content")
                in_front = in_front and role is not None and text[role[0] : role[1]] in leading
                if not in_front and content is not None:
                    pieces += _parts(text, *content)
    return b"\n".join(_last(text, pieces, max(0, most)))


def words_to_latent(
    buckets: Numbers, counts: Numbers, weight: Floats, table: NDArray[np.int8], scale: Floats, latent: Floats
) -> float:
    """Write scale * (w @ table) / |w| to `latent`, where w is sqrt(count) * weight of each bucket. Returns |w|.

    weight: float32 [65536]. table: int8 [65536, R]. scale, latent: float32 [R]. Without words, `latent` becomes zero.
    """
    if weight.shape != (WORD_BUCKETS,) or table.shape != (WORD_BUCKETS, len(latent)) or scale.shape != latent.shape:
        raise ValueError("weight, table, scale and latent do not fit")
    weights = np.sqrt(counts.astype(np.float32)) * weight[buckets]
    length = float(np.sqrt(weights @ weights))
    latent[:] = scale * (weights @ table[buckets].astype(np.float32)) / length if length > 0 else 0
    return length


def latent_to_scores(mean: Floats, latent: Floats, up: Floats, scores: Floats) -> None:
    """Write mean + latent @ up to `scores`. mean, scores: float32 [D]. latent: float32 [R]. up: float32 [R, D]."""
    if up.size != len(latent) * len(mean) or scores.shape != mean.shape:
        raise ValueError("mean, latent, up and scores do not fit")
    scores[:] = mean + latent @ up.reshape(len(latent), len(mean))


def _hash(word: bytes) -> int:
    found = SEED
    for byte in word:
        found = (found ^ byte) * PRIME & BITS_64
    return ((found ^ found >> 32) * MIX & BITS_64) >> 48


def _counted(hashes: Iterable[tuple[int, int]]) -> tuple[Numbers, Numbers]:
    counts: dict[int, int] = {}
    for found, times in hashes:
        counts[found] = counts.get(found, 0) + times
    sizes = np.minimum(np.fromiter(counts.values(), dtype=np.int64, count=len(counts)), MOST_OF_A_WORD)
    return np.fromiter(counts, dtype=np.uint16, count=len(counts)), sizes.astype(np.uint16)


def _check_part(text: bytes, start: int, end: int) -> None:
    if not 0 <= start <= end <= len(text):
        raise ValueError("start or end does not fit: it must be within the text")


def _check_end(end_bytes: int, end_times: int) -> None:
    if end_bytes < 0 or not 1 <= end_times <= MOST_OF_A_WORD:
        raise ValueError("end_bytes or end_times does not fit: it must be 0 or more, and 1 to 65535")


def _member(text: bytes, start: int, end: int, name: str) -> tuple[int, int] | None:
    """Where the value of a member is: of duplicates, the last."""
    return JsonObject(text, JsonNames((name,)), start, end).span(name)


def _parts(text: bytes, start: int, end: int) -> list[tuple[int, int]]:
    if text[start] == ord('"'):
        return [(start + 1, end - 1)]
    pieces: list[tuple[int, int]] = []
    if text[start] == ord("["):
        for value, value_end in json_elements(text, start, end, end):
            if text[value] == ord('"'):
                pieces.append((value + 1, value_end - 1))
            elif text[value] == ord("{"):
                found = _member(text, value, value_end, "text")
                if found is not None and text[found[0]] == ord('"'):
                    pieces.append((found[0] + 1, found[1] - 1))
    return pieces


def _last(text: bytes, pieces: list[tuple[int, int]], most: int) -> list[bytes]:
    found: list[bytes] = []
    for start, end in reversed(pieces[-WORD_PIECES:]):
        if most <= 0:
            break
        if end - start > most:
            start, most = _behind_cut(text, end - most, end), 0
        most -= end - start + 1
        found.append(ESCAPE.sub(_unescaped, text[start:end]))
    return found[::-1]


def _behind_cut(text: bytes, at: int, end: int) -> int:
    space = text.find(b" ", at, min(end, at + WORD_NEAR_BYTES))
    if space >= 0:
        return space + 1
    while at < end and text[at] & 0xC0 == 0x80:
        at += 1
    return at


def _unescaped(match: re.Match[bytes]) -> bytes:
    escape = match[0]
    if len(escape) == 2:
        return NAMED.get(escape[1:], escape[1:])
    character: str = json.loads(b'"%b"' % escape)
    return character.encode("utf-8", "surrogatepass")
