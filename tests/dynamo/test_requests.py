"""What is read of Dynamo's requests."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from eldr_dynamo.errors import Failure, read_error
from eldr_dynamo.requests import max_tokens, prompt_start, prompt_words, take_counts, with_token_list

from eldr.counts import encode_counts
from eldr.prompt.words import words_of_tokens
from tests.dynamo.topics import counts_of


def with_params(params: Any) -> dict[str, Any]:
    return {"token_ids": [1, 2], "prefill_result": {"disaggregated_params": {"kv_transfer_params": params, "other": 1}}}


def test_counts_are_taken_out_and_nothing_else_is_changed() -> None:
    counts = encode_counts(counts_of([1, 2]))
    given = with_params({"do_remote_prefill": True, "eldr_counts": counts, "eldr_lease": {"left_s": 5}})
    kept, has_handoff, wire = take_counts(given)
    assert wire == counts
    assert has_handoff
    assert kept == with_params({"do_remote_prefill": True, "eldr_lease": {"left_s": 5}})
    assert "eldr_counts" in given["prefill_result"]["disaggregated_params"]["kv_transfer_params"]


@pytest.mark.parametrize(
    "request_",
    [
        {"token_ids": [1]},
        {"token_ids": [1], "prefill_result": None},
        {"token_ids": [1], "prefill_result": {"disaggregated_params": None}},
        {"token_ids": [1], "prefill_result": {"disaggregated_params": {"kv_transfer_params": []}}},
        with_params({}),
    ],
)
def test_a_request_without_a_hand_off(request_: dict[str, Any]) -> None:
    assert take_counts(request_) == (request_, False, None)


def test_packed_token_ids() -> None:
    packed = {"token_ids": struct.pack("<3i", 1, 70000, 3), "model": "m"}
    assert with_token_list(packed) == {"token_ids": [1, 70000, 3], "model": "m"}
    plain = {"token_ids": [1, 2]}
    assert with_token_list(plain) is plain


def test_words_are_those_of_a_prompt_of_token_ids() -> None:
    text = b"[7, 8, 7, 130000]"
    expected = words_of_tokens(text, 0, len(text))
    found = prompt_words({"token_ids": [7, 8, 7, 130000]})
    np.testing.assert_array_equal(found.buckets, expected.buckets)
    np.testing.assert_array_equal(found.counts, expected.counts)


def test_words_of_a_long_prompt_are_those_of_its_end() -> None:
    end = list(range(100, 4000))
    found, expected = (prompt_words({"token_ids": ids}) for ids in ([5] * 100_000 + end, [9] * 100_000 + end))
    np.testing.assert_array_equal(found.buckets, expected.buckets)
    assert len(found) > 1000


def test_the_start_of_a_prompt() -> None:
    shared = list(range(1000))
    assert prompt_start({"token_ids": [*shared, 1]}, 1024) == prompt_start({"token_ids": [*shared, 2]}, 1024)
    assert prompt_start({"token_ids": [1, 2]}, 1024) != prompt_start({"token_ids": [1, 3]}, 1024)
    assert prompt_start({"token_ids": [1], "model": "a"}, 1024) != prompt_start({"token_ids": [1], "model": "b"}, 1024)


@pytest.mark.parametrize("conditions", [None, {}, {"max_tokens": None}, {"max_tokens": True}, []])
def test_no_limit_on_tokens(conditions: Any) -> None:
    assert max_tokens({"stop_conditions": conditions}) is None


def test_limit_on_tokens() -> None:
    assert max_tokens({"stop_conditions": {"max_tokens": 7}}) == 7
    assert max_tokens({}) is None


class OfDynamo(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize(
    ("error", "sent", "expected"),
    [
        (OfDynamo("Unavailable: x"), True, None),
        (
            Exception("Unavailable: TCP connection to 10.0.0.1:5 failed"), False,
            Failure("Unavailable", "TCP connection to 10.0.0.1:5 failed", True, "refused"),
        ),
        (
            ValueError("Unavailable: TCP connection to 10.0.0.1:5 failed"), True,
            Failure("Unavailable", "TCP connection to 10.0.0.1:5 failed", False, "failed"),
        ),
        (Exception("Unavailable: gone"), False, Failure("Unavailable", "gone", False, "failed")),
        (ValueError("Internal: a: b"), True, Failure("Internal", "a: b", False, "status")),
        (ValueError("InvalidRequest: no"), True, Failure("InvalidRequest", "no")),
        (ValueError("no class"), True, Failure("no class", "")),
    ],
)  # fmt: skip
def test_what_an_error_means(error: Exception, sent: bool, expected: Failure | None) -> None:
    assert read_error(error, sent) == expected
