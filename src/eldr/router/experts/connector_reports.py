"""Source: reports that eldr's connector posts from decode workers, in batches (engines/vllm/reports.py).

A worker names a request as its engine does: the X-Request-Id of the leg between a prefix of the endpoint's and a random
part of vLLM's (vllm/entrypoints/*/serving.py, vllm/v1/engine/input_processor.py).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

import orjson

from eldr.counts import CountsError, decode_counts
from eldr.router.experts.expected import ExpectedReports
from eldr.router.http.errors import ApiError

SOURCE: Final = "connector"
VERSION: Final = 1
# A report of 48 x 128 experts takes up to 8 KiB.
MAX_BATCH_BYTES: Final = 2**20
MAX_REPORTS: Final = 256
MAX_NAME_CHARS: Final = 512
# What an engine puts before and behind the name of a leg. Responses are called resp_ and their turn; the router itself
# chooses the first.
PREFIX = re.compile("chatcmpl-|cmpl-|resp_")
SUFFIX = re.compile("-[0-9a-f]{8}$")
NUMBER = re.compile("[-_][0-9]{1,6}$")


def read_batch(body: bytes) -> list[Any]:
    """Return the reports of a batch, not yet looked at. Raises ApiError."""
    if len(body) > MAX_BATCH_BYTES:
        raise ApiError(413, f"a batch of reports has at most {MAX_BATCH_BYTES} bytes")
    try:
        batch = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ApiError(400, f"the batch is not JSON: {error}") from None
    if not isinstance(batch, dict) or not isinstance(batch.get("reports"), list):
        raise ApiError(400, 'expected {"v": 1, "reports": [{"id": ..., "counts": ...}]}')
    if batch.get("v") != VERSION:
        raise ApiError(400, f"reports of version {batch.get('v')!r}; this router reads version {VERSION}", param="v")
    reports: list[Any] = batch["reports"]
    if len(reports) > MAX_REPORTS:
        raise ApiError(413, f"a batch has at most {MAX_REPORTS} reports", param="reports")
    return reports


def take_reports(reports: Sequence[Any], expected: ExpectedReports, outcomes: Counter[str]) -> None:
    """Check each report and pass on what can be used. `outcomes` counts `accepted` and the reasons of refusals."""
    for report in reports:
        try:
            take_report(report, expected)
        except CountsError as error:
            outcomes[error.reason] += 1
        else:
            outcomes["accepted"] += 1


def is_known(report: Any, expected: ExpectedReports) -> bool:
    """Whether a report is of a request of this process."""
    name = report.get("id") if isinstance(report, dict) else None
    return isinstance(name, str) and len(name) <= MAX_NAME_CHARS and any(map(expected.knows, leg_names(name)))


def take_report(report: Any, expected: ExpectedReports) -> None:
    """Take one report. Raises CountsError if it cannot be used."""
    try:
        name = report.get("id") if isinstance(report, dict) else None
        if not isinstance(name, str) or len(name) > MAX_NAME_CHARS:
            raise CountsError("malformed", "a report without the id of a request")
        leg_name = next((found for found in leg_names(name) if expected.knows(found)), None)
        if leg_name is None:  # before anything is decoded
            raise CountsError("unknown_request", f"no request of this router is called {name[:80]!r}")
        counts = decode_counts(report.get("counts"))
    except CountsError as error:
        expected.refused(SOURCE, error.reason)
        raise
    expected.take(SOURCE, leg_name, counts)


def leg_names(engines_name: str) -> tuple[str, str]:
    """The names that a leg may have whose request an engine calls `engines_name`, the likelier first.

    A completion has the number of its prompt behind its name, which is 0, and a response its turn.
    """
    prefix = PREFIX.match(engines_name)
    inner = SUFFIX.sub("", engines_name[prefix.end() :] if prefix else engines_name)
    numbered = NUMBER.sub("", inner)
    return (inner, numbered) if engines_name.startswith("chatcmpl-") else (numbered, inner)
