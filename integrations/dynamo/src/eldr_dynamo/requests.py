"""What eldr reads of Dynamo's requests (`PreprocessedRequest`), which are JSON objects with token ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import orjson

from eldr.prompt.words import MOST_TEXT_BYTES, Words, words_of_tokens

# Each token takes at least a digit and a comma.
MOST_TOKENS = MOST_TEXT_BYTES // 2

Request = dict[str, Any]


def with_token_list(request: Request) -> Request:
    """Return the request with its token ids as a list.

    With DYN_TOKEN_IDS_AS_BYTES, a frontend sends them as packed little-endian int32. Not every worker reads those.
    """
    ids = request.get("token_ids")
    if isinstance(ids, bytes | bytearray | memoryview):
        return {**request, "token_ids": np.frombuffer(ids, dtype="<i4").tolist()}
    return request


def prompt_words(request: Request) -> Words:
    """The token ids of the prompt as words, as the router sees those of a prompt that a client gives as token ids."""
    text = orjson.dumps(request["token_ids"][-MOST_TOKENS:])
    return words_of_tokens(text, 0, len(text))


def prompt_start(request: Request, window_bytes: int) -> bytes:
    """The start of the prompt, for the choice of the prefill worker. Requests for another model never share it."""
    text = orjson.dumps(request["token_ids"][: window_bytes // 2])
    return text[1:-1][:window_bytes] + str(request.get("model")).encode()


def max_tokens(request: Request) -> int | None:
    """The client's limit on generated tokens. None if there is none."""
    conditions = request.get("stop_conditions")
    most = conditions.get("max_tokens") if isinstance(conditions, Mapping) else None
    return most if type(most) is int else None


def take_counts(request: Request) -> tuple[Request, bool, Any]:
    """Take the expert counts out of a decode request. Decode workers do not read them, and they are 8 KB.

    Returns the request without them, whether it has a hand-off, and the counts as the prefill worker sent them. They
    are None if there are none.
    """
    result = _mapping(request.get("prefill_result"))
    disaggregated = _mapping(result.get("disaggregated_params"))
    params = _mapping(disaggregated.get("kv_transfer_params"))
    if "eldr_counts" not in params:
        return request, bool(params), None
    kept = {key: value for key, value in params.items() if key != "eldr_counts"}
    result = {**result, "disaggregated_params": {**disaggregated, "kv_transfer_params": kept}}
    return {**request, "prefill_result": result}, True, params["eldr_counts"]


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
