"""Judges a worker's answer: what its status and body say, and whether it belongs to the request it came for.

An answer with status 200 may contain an error, invalid JSON, or another request's result. Another request's hand-off is
the worst, because its blocks would be read as this prompt's. vLLM puts the X-Request-Id it got into the name of its
answer, so the name is checked. For each kind of answer, the check starts with the first answer from any worker that has
such a name, because other servers need not do this.
"""

from __future__ import annotations

from typing import ClassVar

from eldr.event_stream import Event
from eldr.kernels import JsonObject, JsonTextError
from eldr.router.http.client import Answer, ExchangeError
from eldr.router.http.errors import ApiError
from eldr.router.http.heads import STATUS_LINES
from eldr.router.protocols.base import LegProtocol
from eldr.router.protocols.json_text import ARRAY
from eldr.router.protocols.openai import Endpoint
from eldr.router.protocols.streams import StreamForm

# vLLM's events begin with their id. If an event is too long to be kept whole and has an id here, it is the event's own.
ID_WITHIN_BYTES = 512


class WrongAnswerError(ExchangeError):
    """A valid HTTP answer that is not the answer to this request."""

    reason: ClassVar[str] = "wrong_answer"


class WorkerStatusError(ExchangeError):
    """A status that means that the worker failed. Its own message is kept for the client."""

    reason: ClassVar[str] = "status"


class Names:
    """Learns whether workers name one kind of answer after the request."""

    def __init__(self) -> None:
        self._named = False

    def check(self, belongs: bool) -> None:
        """Note whether an answer has the request's name. Raises WrongAnswerError if it must have it and does not."""
        if belongs:
            self._named = True
        elif self._named:
            raise WrongAnswerError("the answer belongs to another request")


def check_status(status: int) -> None:
    """Raise WrongAnswerError unless the status is 200 or an HTTP error. No other status answers a completion."""
    if status != 200 and (status < 400 or status not in STATUS_LINES):
        raise WrongAnswerError(f"status {status}")


def worker_error(answer: Answer) -> ApiError:
    """A worker's answer with an error status, for a client that can no longer get it as it is."""
    message: object = None
    param = None
    try:
        fields = answer.json()
    except ExchangeError:
        fields = None
    if isinstance(fields, dict):
        error = fields if fields.get("object") == "error" else fields.get("error")  # the former is SGLang's form
        if isinstance(error, dict):
            message, param = error.get("message"), error.get("param")
        else:
            message = error
    if not isinstance(message, str) or not message:
        message = f"the worker answered with status {answer.status}"
    return ApiError(answer.status, message, param=param if isinstance(param, str) else None)


def check_completion(
    answer: Answer, endpoint: Endpoint, protocol: LegProtocol, leg_name: str, names: Names
) -> JsonObject:
    """Return the members of a whole completion with status 200. Raises ExchangeError if it is not one."""
    try:
        fields = JsonObject(answer.body, protocol.answer_names)
    except JsonTextError as error:
        raise WrongAnswerError(f"status 200 without a completion: {error}") from None
    output = fields.span(endpoint.output)
    if fields.get("error") is not None or output is None or fields.text[output[0]] != ARRAY:
        raise WrongAnswerError("status 200 without a completion")
    names.check(protocol.is_named_after(fields.get("id"), leg_name))
    return fields


def check_first_event(event: Event, form: StreamForm, protocol: LegProtocol, leg_name: str, names: Names) -> None:
    """Raise WrongAnswerError for an event that reports a failure of the worker, or belongs to another request."""
    data = event.data
    status = form.error_status(data, event.whole)
    if status >= 500:
        raise WrongAnswerError(f"status 200 with error {status}")
    if status == 0 and data.startswith(b"{"):
        belongs = protocol.event_is_named_after(data, leg_name)
        if belongs or event.whole or b'"id"' in data[:ID_WITHIN_BYTES]:
            names.check(belongs)
