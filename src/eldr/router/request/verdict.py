"""Whether a worker's answer is one: what status and body say, and that it belongs to the request it came for.

An answer with status 200 may hold an error, no JSON, or another request's result. Another request's hand-off is the
worst: its blocks would be read as this prompt's. vLLM names what it answers after the X-Request-Id it got, so the
name is checked, for all workers and one kind of answer from the first on that bears one; other servers need not.
"""

from __future__ import annotations

from typing import Any, ClassVar

import orjson

from eldr.router.http.client import Answer, ExchangeError
from eldr.router.http.heads import STATUS_LINES
from eldr.router.protocols.base import LegProtocol

# How vLLM begins an error in a stream whose status is already sent.
ERROR_EVENT = b'data: {"error"'
DATA = b"data:"
OBJECT = b"data: {"
# An event's id stands near its start.
ID_WITHIN_BYTES = 512


class WrongAnswerError(ExchangeError):
    """An answer, good HTTP, that is not the answer to this request."""

    reason: ClassVar[str] = "wrong_answer"


class WorkerStatusError(ExchangeError):
    """A status that says that the worker failed, with its own words for the client."""

    reason: ClassVar[str] = "status"


class Names:
    """Whether the workers name answers of one kind after the request."""

    def __init__(self) -> None:
        self._named = False

    def check(self, belongs: bool) -> None:
        """Take note of an answer that bears the request's name or not. Raises WrongAnswerError if it must."""
        if belongs:
            self._named = True
        elif self._named:
            raise WrongAnswerError("the answer belongs to another request")


def check_status(status: int) -> None:
    """Raises WrongAnswerError unless it is 200 or an error of HTTP's own: nothing else answers a completion."""
    if status != 200 and (status < 400 or status not in STATUS_LINES):
        raise WrongAnswerError(f"status {status}")


def check_completion(answer: Answer, protocol: LegProtocol, leg_name: str, names: Names) -> dict[str, Any]:
    """The fields of a whole completion with status 200. Raises ExchangeError if it is none."""
    fields = answer.json()
    if not isinstance(fields, dict) or fields.get("error") is not None or not isinstance(fields.get("choices"), list):
        raise WrongAnswerError("status 200 without a completion")
    names.check(protocol.is_named_after(fields.get("id"), leg_name))
    return fields


def check_first_event(event: bytes, protocol: LegProtocol, leg_name: str, names: Names) -> None:
    """Raises WrongAnswerError for an event that reports the failure of the worker, or is another request's."""
    if event.startswith(ERROR_EVENT):
        code = _error_code(event)
        if code is None or code >= 500:
            raise WrongAnswerError(f"status 200 with error {code}")
    elif event.startswith(OBJECT):
        names.check(protocol.event_is_named_after(event[:ID_WITHIN_BYTES], leg_name))


def _error_code(event: bytes) -> int | None:
    try:
        error = orjson.loads(event.partition(b"\n\n")[0].removeprefix(DATA))["error"]
        code = error.get("code")
    except (orjson.JSONDecodeError, AttributeError):
        return None
    return code if type(code) is int else None
