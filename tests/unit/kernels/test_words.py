"""The words of prompts: compiled and in Python alike, and both as a plain tokeniser and CPython's json see them."""

from __future__ import annotations

import json
import math
import unicodedata
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

import eldr.kernels
import eldr.kernels._words
from eldr.kernels import WORD_BUCKETS, JsonTextError
from eldr.prompt.words import END_BYTES, END_TIMES, MOST_TEXT_BYTES, words_of_text, words_of_tokens

needs_compiler = pytest.mark.skipif(not eldr.kernels.COMPILED, reason="this installation could not compile the kernels")
BOTH = [
    pytest.param(eldr.kernels._words, id="python"),
    pytest.param(eldr.kernels, id="compiled", marks=needs_compiler),
]
both = pytest.mark.parametrize("kernels", BOTH)
LEADING = frozenset((b'"system"', b'"developer"'))
EVERYTHING = 2**20

characters = st.characters(codec=None)
words_and_signs = st.text(
    st.sampled_from("aZz09 \t\r\n.,@[`{~\x00\x7f\x80äßЖ中文字\u3042é\U0001f600\ud800\udc00"), max_size=60
)
any_text = words_and_signs | st.text(characters, max_size=60)


def bucket(word: bytes) -> int:
    """FNV-1a with 64 bits, by its definition, and its top bits after a multiplication."""
    number = 14695981039346656037
    for byte in word:
        number = (number ^ byte) * 1099511628211 % 2**64
    return (number ^ (number >> 32)) * 0x9E3779B97F4A7C15 % 2**64 // 2**48


def plain_words(text: str) -> list[bytes]:
    """The words of a text, character by character."""
    found: list[bytes] = []
    run = before = ""
    for character in text:
        if character.isascii() and character.isalpha():
            run += character.lower()
            before = ""
            continue
        if run:
            found.append(run.encode())
            run = ""
        if character.isascii():
            before = ""
            if character not in " \t\r":
                found.append(character.encode())
            continue
        found.append(character.encode("utf-8", "surrogatepass"))
        if before:
            found.append((before + character).encode("utf-8", "surrogatepass"))
        before = character
    if run:
        found.append(run.encode())
    return found


def counted(words: list[bytes]) -> dict[int, int]:
    counts: dict[int, int] = {}
    for word in words:
        counts[bucket(word)] = min(65535, counts.get(bucket(word), 0) + 1)
    return counts


def as_dict(found: tuple[NDArray[np.uint16], NDArray[np.uint16]]) -> dict[int, int]:
    buckets, counts = found
    assert buckets.dtype == counts.dtype == np.uint16
    assert buckets.shape == counts.shape
    result = dict(zip(buckets.tolist(), counts.tolist(), strict=True))
    assert len(result) == len(buckets), "a bucket twice"
    return result


def test_a_hash_that_was_published() -> None:
    # http://www.isthe.com/chongo/tech/comp/fnv/: FNV-1a of "foobar" with 64 bits is 0x85944171f73967e8.
    number = 0x85944171F73967E8
    expected = (number ^ (number >> 32)) * 0x9E3779B97F4A7C15 % 2**64 >> 48
    for kernels in (eldr.kernels, eldr.kernels._words):
        assert as_dict(kernels.text_words(b"FooBar")) == {expected: 1}


@both
@given(any_text)
@example("")
@example("aé中中 中\ud800\ud800 Don't 4096 tokens")
def test_words_are_those_of_a_plain_tokeniser(kernels: ModuleType, text: str) -> None:
    found = kernels.text_words(text.encode("utf-8", "surrogatepass"))
    expected = counted(plain_words(text))
    assert as_dict(found) == expected
    assert found[0].tolist() == list(expected), "buckets are in the order of their first sight"


def test_every_script() -> None:
    """A text with characters of every kind that Unicode knows."""
    text = "".join(chr(code) for code in range(0, 0x110000, 37) if unicodedata.category(chr(code)) != "Cn")
    expected = counted(plain_words(text))
    assert len(expected) > 5000
    for kernels in (eldr.kernels, eldr.kernels._words):
        assert as_dict(kernels.text_words(text.encode("utf-8", "surrogatepass"))) == expected


@needs_compiler
@given(
    st.binary(max_size=80)
    | st.lists(st.sampled_from([b"\xc3", b"\xff", b"\x80", b"\xf0\x9f", b"a", b" "])).map(b"".join)
)
def test_bytes_that_are_no_text_are_counted_alike(text: bytes) -> None:
    found, expected = eldr.kernels.text_words(text, 30, 3), eldr.kernels._words.text_words(text, 30, 3)
    assert found[0].tolist() == expected[0].tolist()
    assert found[1].tolist() == expected[1].tolist()


@both
def test_counts_stop_where_16_bits_end(kernels: ModuleType) -> None:
    for times, count in ((65534, 65534), (65535, 65535), (65536, 65535), (140000, 65535)):
        assert as_dict(kernels.text_words(b"yes " * times)) == {bucket(b"yes"): count}
        assert as_dict(kernels.text_words(b"no")) == {bucket(b"no"): 1}, "the text before is forgotten"
    assert as_dict(kernels.token_words(b"7," * 70000, 0, 140000)) == {bucket(b"\0007"): 65535}


@needs_compiler
def test_as_many_words_as_there_are_buckets() -> None:
    """Letters to base 26, until every bucket is used: no count is lost and none is written elsewhere."""
    words = [bytes(97 + number // 26**place % 26 for place in range(5)) for number in range(900000)]
    buckets, counts = eldr.kernels.text_words(b" ".join(words))
    assert len(buckets) == WORD_BUCKETS
    assert len(set(buckets.tolist())) == WORD_BUCKETS
    assert int(counts.sum(dtype=np.int64)) == len(words)
    assert as_dict(eldr.kernels.text_words(b"")) == {}


@both
@given(st.lists(st.integers(0, 2**63)), st.integers(0, 9), st.integers(0, 9))
def test_token_ids_are_words_of_their_own(kernels: ModuleType, ids: list[int], before: int, behind: int) -> None:
    text = b"9" * before + json.dumps(ids).encode() + b"9" * behind
    found = as_dict(kernels.token_words(text, before, len(text) - behind))
    assert found == counted([b"\0" + str(number).encode() for number in ids])


def test_only_the_end_of_a_text_is_counted() -> None:
    """However long a text is, no more than its last bytes become words."""
    end = b" the end" * 2048
    for text in (b"word " * (32 * 2**18) + end, b"x" * (32 * 2**20) + end):
        found = words_of_text(text)
        before, last = MOST_TEXT_BYTES // len(b" the end"), END_BYTES // len(b" the end")
        times = before - last + END_TIMES * last
        assert as_dict((found.buckets, found.counts)) == {bucket(b"the"): times, bucket(b"end"): times}
    found = words_of_text(b"x" * (32 * 2**20))
    assert found.counts.tolist() == [1]  # it begins before the end
    ids = json.dumps(list(range(3_000_000))).encode()
    tokens = words_of_tokens(ids, 0, len(ids))
    number, each = MOST_TEXT_BYTES // len(b", 2999999"), len(b", 2999999")
    last = 1 + (END_BYTES - len(b"2999999]")) // each
    heard = [b"\0%d" % id for id in range(3_000_000 - number, 3_000_000)]
    assert as_dict((tokens.buckets, tokens.counts)) == counted(heard + heard[-last:] * (END_TIMES - 1))


@both
@given(st.lists(st.sampled_from([b"some", b"of", b"these", b"9", b"."]), max_size=30), st.integers(0, 80), st.data())
def test_words_that_begin_at_the_end_count_more(
    kernels: ModuleType, words: list[bytes], end_bytes: int, data: st.DataObject
) -> None:
    """Laid out with spaces between, so that every word's place is known."""
    times = data.draw(st.integers(1, 40))
    text, weighed = b"", []
    for word in words:
        weighed.append((word, len(text)))
        text += word + b" "
    expected: dict[int, int] = {}
    for word, place in weighed:
        count = times if place >= len(text) - end_bytes else 1
        expected[bucket(word)] = expected.get(bucket(word), 0) + count
    assert as_dict(kernels.text_words(text, end_bytes, times)) == expected
    assert as_dict(kernels.text_words(text)) == counted(words), "nothing is left of the weights"


@both
def test_pairs_of_characters_and_token_ids_count_more_at_the_end(kernels: ModuleType) -> None:
    first, second, third = (sign.encode() for sign in "中文字")
    found = as_dict(kernels.text_words(first + second + third, 6, 5))
    assert found == {
        bucket(first): 1, bucket(second): 5, bucket(third): 5, bucket(first + second): 5, bucket(second + third): 5
    }  # fmt: skip
    ids = b"[17, 4, 17, 256]"
    found = as_dict(kernels.token_words(ids, 1, len(ids) - 1, len(b"17, 256"), 3))
    assert found == {bucket(b"\x0017"): 4, bucket(b"\x004"): 1, bucket(b"\x00256"): 3}
    assert as_dict(kernels.text_words(b"a " * 3, 6, 65535)) == {bucket(b"a"): 65535}


@both
def test_weights_of_the_end_that_cannot_be_are_refused(kernels: ModuleType) -> None:
    for end_bytes, end_times in ((-1, 1), (1, 0), (1, 65536), (1, -3)):
        with pytest.raises(ValueError, match="end_bytes or end_times"):
            kernels.text_words(b"text", end_bytes, end_times)
        with pytest.raises(ValueError, match="end_bytes or end_times"):
            kernels.token_words(b"[1]", 0, 3, end_bytes, end_times)


# The texts of a prompt.

content = st.one_of(
    any_text,
    st.lists(any_text | st.fixed_dictionaries({"type": st.just("text"), "text": any_text | st.integers()}), max_size=4),
    st.none(),
    st.integers(),
    st.lists(st.lists(any_text, max_size=2) | st.none() | st.fixed_dictionaries({"image": any_text}), max_size=3),
)
messages = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from(("system", "developer", "user", "assistant", "tool")) | st.integers(),
            "content": content,
            "name": any_text,
        },
    )
    | any_text
    | st.none()
    | st.lists(any_text, max_size=2),
    max_size=5,
)
prompts = any_text | st.lists(any_text, max_size=5) | messages


def plain_texts(prompt: Any) -> list[str]:
    """The texts of a prompt as CPython's json reads it."""
    if isinstance(prompt, str):
        return [prompt]
    found: list[str] = []
    in_front = True
    for each in prompt:
        if isinstance(each, str):
            found.append(each)
        elif isinstance(each, dict):
            in_front = in_front and each.get("role") in ("system", "developer")
            parts = each.get("content")
            if in_front or parts is None:
                continue
            if isinstance(parts, str):
                found.append(parts)
            elif isinstance(parts, list):
                for part in parts:
                    if isinstance(part, str):
                        found.append(part)
                    elif isinstance(part, dict) and isinstance(part.get("text"), str):
                        found.append(part["text"])
    return found


@st.composite
def written(draw: st.DrawFn) -> tuple[bytes, int, int]:
    """A prompt as JSON, within other bytes: text, start, end."""
    prompt = draw(prompts)
    text = json.dumps(prompt, ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from((None, 1))))
    front, behind = (
        draw(st.sampled_from((b"", b'{"prompt": ', b'"', b" \n"))),
        draw(st.sampled_from((b"", b"}", b'"', b" ,"))),
    )
    data = text.encode("utf-8", "surrogatepass")
    space = draw(st.sampled_from((b"", b" ", b"\r\n\t")))
    return front + space + data + space + behind, len(front), len(front) + 2 * len(space) + len(data)


@both
def test_strings_without_their_end_are_refused(kernels: ModuleType) -> None:
    for text in (b'"', b' "', b'"abc', b'"abc ', b'" \n', b"", b" ", b'["a', b'[{"content": "a]'):
        with pytest.raises(JsonTextError):
            kernels.json_texts(text, 0, len(text), LEADING, 9)


@both
@given(written())
def test_the_texts_of_a_prompt_are_those_of_cpythons_json(
    kernels: ModuleType, given_text: tuple[bytes, int, int]
) -> None:
    text, start, end = given_text
    prompt = json.loads(text[start:end].decode("utf-8", "surrogatepass"))
    expected = [each.encode("utf-8", "surrogatepass") for each in plain_texts(prompt)]
    found = kernels.json_texts(text, start, end, LEADING, EVERYTHING)
    # json joins an escaped surrogate with one that is written as it is; bytes keep them apart.
    assert found == b"\n".join(expected) or decoded(found) == decoded(b"\n".join(expected))


def decoded(text: bytes) -> str:
    return text.decode("utf-8", "surrogatepass").encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")


@needs_compiler
@given(written(), st.integers(-1, 200))
def test_cuts_are_the_same(given_text: tuple[bytes, int, int], most: int) -> None:
    text, start, end = given_text
    whole = eldr.kernels._words.json_texts(text, start, end, LEADING, EVERYTHING)
    found = eldr.kernels.json_texts(text, start, end, LEADING, most)
    assert found == eldr.kernels._words.json_texts(text, start, end, LEADING, most)
    assert len(found) <= max(0, most)
    if b"\\" not in text:
        assert whole.endswith(found)


@needs_compiler
@given(written(), st.data())
def test_what_is_no_json_is_refused_or_read_alike(given_text: tuple[bytes, int, int], data: st.DataObject) -> None:
    text, start, end = given_text
    spoiled = bytearray(text)
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(spoiled)))
        put = data.draw(
            st.binary(max_size=3) | st.sampled_from((b'"', b"\\", b"\\u12", b"[", b"]", b"{", b"}", b",", b"\xed\xa0"))
        )
        spoiled[at : at + data.draw(st.integers(0, 3))] = put
    end = data.draw(st.integers(min(start, len(spoiled)), len(spoiled)))
    most = data.draw(st.sampled_from((0, 1, 7, 40, EVERYTHING)))
    results: list[Any] = []
    for kernels in (eldr.kernels, eldr.kernels._words):
        try:
            results.append(kernels.json_texts(bytes(spoiled), min(start, end), end, LEADING, most))
        except JsonTextError:
            results.append("refused")
    # Whoever reads a body has checked before that it is UTF-8.
    assert results[0] == results[1] or spoiled.decode("utf-8", "replace").count("\ufffd")


@both
def test_a_text_is_cut_behind_a_space_and_never_within_a_character(kernels: ModuleType) -> None:
    text = json.dumps("one two three four", ensure_ascii=False).encode()
    for most, expected in (
        (18, "one two three four"),
        (17, "two three four"),
        (11, "three four"),
        (10, "four"),
        (4, "four"),
    ):
        assert kernels.json_texts(text, 0, len(text), LEADING, most) == expected.encode()
    text = json.dumps("中文字", ensure_ascii=False).encode()
    assert [kernels.json_texts(text, 0, len(text), LEADING, most).decode() for most in (9, 8, 7, 6, 5, 3, 2)] == [
        "中文字", "文字", "文字", "文字", "字", "字", ""
    ]  # fmt: skip
    text = json.dumps(["first", "second", "third"]).encode()
    found = [kernels.json_texts(text, 0, len(text), LEADING, most) for most in (18, 17, 12, 6, 5, 2, 0)]
    assert found == [b"first\nsecond\nthird", b"irst\nsecond\nthird", b"second\nthird", b"third", b"third", b"rd", b""]


@both
def test_of_very_many_texts_the_last_ones_are_read(kernels: ModuleType) -> None:
    for pieces in (1023, 1024, 1025, 5000):
        texts = [str(number) for number in range(pieces)]
        text = json.dumps(texts).encode()
        assert kernels.json_texts(text, 0, len(text), LEADING, EVERYTHING) == "\n".join(texts[-1024:]).encode()
        parts = [{"role": "user", "content": [{"type": "text", "text": each} for each in texts]}]
        text = json.dumps(parts).encode()
        assert kernels.json_texts(text, 0, len(text), LEADING, EVERYTHING) == "\n".join(texts[-1024:]).encode()


@both
def test_of_duplicates_the_last_counts_and_leading_system_messages_do_not(kernels: ModuleType) -> None:
    text = b"""[{"role": "user", "role": "system", "content": "rules"}, {"content": 1, "role": "developer"},
        {"role": "user", "content": "no", "content": [{"text": "no", "text": "yes"}]},
        {"role": "system", "content": "too"}]"""
    assert kernels.json_texts(text, 0, len(text), LEADING, EVERYTHING) == b"yes\ntoo"


# Latents and scores.


def weights(rank: int, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.int8], NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    weight = np.where(rng.random(WORD_BUCKETS) < 0.5, rng.uniform(0, 5, WORD_BUCKETS), 0).astype(np.float32)
    return (
        weight,
        rng.integers(-127, 128, (WORD_BUCKETS, rank)).astype(np.int8),
        rng.uniform(0, 1, rank).astype(np.float32),
    )


@both
@pytest.mark.parametrize("rank", [0, 1, 3, 4, 5, 8, 31, 32])
def test_latents_and_scores_are_those_of_plain_sums(kernels: ModuleType, rank: int) -> None:
    weight, table, scale = weights(rank)
    rng = np.random.default_rng(rank)
    for words in (0, 1, 2, 700):
        buckets = rng.choice(WORD_BUCKETS, words, replace=False).astype(np.uint16)
        counts = rng.integers(1, 65536, words).astype(np.uint16)
        latent = np.full(rank, np.nan, dtype=np.float32)
        length = kernels.words_to_latent(buckets, counts, weight, table, scale, latent)
        sums, squares = [0.0] * rank, 0.0
        for each, count in zip(buckets.tolist(), counts.tolist(), strict=True):
            by = math.sqrt(count) * float(weight[each])
            squares += by * by
            for column in range(rank):
                sums[column] += by * int(table[each, column])
        expected = [float(scale[at]) * total / math.sqrt(squares) if squares else 0 for at, total in enumerate(sums)]
        assert length == pytest.approx(math.sqrt(squares), rel=1e-4)
        assert latent.tolist() == pytest.approx(expected, rel=1e-3, abs=2e-3)
    for size in (0, 1, 1023, 1024, 1025, 2500):
        mean, up = rng.normal(size=size).astype(np.float32), rng.normal(size=(rank, size)).astype(np.float32)
        latent, scores = rng.normal(size=rank).astype(np.float32), np.full(size, np.nan, dtype=np.float32)
        kernels.latent_to_scores(mean, latent, up, scores)
        plain = [float(mean[at]) + sum(float(latent[r]) * float(up[r, at]) for r in range(rank)) for at in range(size)]
        assert scores.tolist() == pytest.approx(plain, rel=1e-4, abs=1e-4)


@needs_compiler
def test_arrays_that_do_not_fit_are_refused() -> None:
    kernels: Any = eldr.kernels
    weight, table, scale = weights(4)
    good: dict[str, Any] = {
        "buckets": np.array([1, 2, 65535], np.uint16),
        "counts": np.array([1, 2, 3], np.uint16),
        "weight": weight,
        "table": table,
        "scale": scale,
        "latent": np.zeros(4, np.float32),
    }
    kernels.words_to_latent(*good.values())
    wrong = {
        "buckets": [np.array([1, 2], np.uint16), np.array([1, 2, 70000], np.int64), [1, 2, 3]],
        "counts": [np.array([1, 2], np.uint16), np.array([1, 2, 3], np.float32), None],
        "weight": [weight[:-1], weight.astype(np.float64), weight[::-1]],
        "table": [table[:-1], table[:, :3], table.astype(np.int16), np.asfortranarray(table)],
        "scale": [scale[:3], np.zeros(5, np.float32), 1.0],
        "latent": [np.zeros(3, np.float32), np.zeros(5, np.float32), np.zeros(4), 4],
    }
    for name, values in wrong.items():
        for value in values:
            with pytest.raises((ValueError, TypeError)):
                kernels.words_to_latent(*{**good, name: value}.values())
    mean, up = np.zeros(6, np.float32), np.zeros((4, 6), np.float32)
    latent, scores = np.zeros(4, np.float32), np.zeros(6, np.float32)
    kernels.latent_to_scores(mean, latent, up, scores)
    for arrays in (
        (mean[:5], latent, up, scores),
        (mean, latent[:3], up, scores),
        (mean, latent, up[:, :5], scores),
        (mean, latent, up, scores[:5]),
        (mean, latent, up.astype(np.float64), scores),
        (mean, latent, up, None),
    ):
        with pytest.raises((ValueError, TypeError)):
            kernels.latent_to_scores(*arrays)


@both
def test_parts_outside_a_text_are_refused(kernels: ModuleType) -> None:
    for start, end in ((-1, 1), (2, 1), (0, 9), (9, 9), (-5, -1)):
        with pytest.raises(ValueError, match="must be within the text"):
            kernels.token_words(b"[1]", start, end)
        with pytest.raises(ValueError, match="must be within the text"):
            kernels.json_texts(b"[1]", start, end, LEADING, 9)
    with pytest.raises(TypeError):
        kernels.text_words("text")
