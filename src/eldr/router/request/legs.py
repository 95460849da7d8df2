"""One leg at one worker: the bytes it is sent, what its answer is worth, and who is to blame if it is worth nothing."""

from __future__ import annotations

import logging
import time

from eldr.router.config.endpoint import Role
from eldr.router.fleet.workers import Worker
from eldr.router.http.client import Answer, ExchangeError
from eldr.router.http.errors import ApiError
from eldr.router.http.pool import WorkerPool
from eldr.router.protocols.handoff import HandOff, read_handoff
from eldr.router.request.intake import RETRY_AFTER_S, Job
from eldr.router.request.services import Services
from eldr.router.request.verdict import check_completion, check_handoff, check_status

log = logging.getLogger("eldr.router")

# Errors that another worker may not have. 501 is not among them: it says that the request cannot be served at all.
WORKERS_ERRORS = frozenset((500, 502, 503, 504))


class RelayedError(Exception):
    """A worker answered with something other than 200: the client gets it as it is."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(f"status {answer.status}")
        self.answer = answer


class LegFailure(Exception):  # noqa: N818 - it may well be repaired
    """A leg that did not succeed and may be tried again: nothing of its answer has reached the client.

    reason: a metric label. error: what the client hears if nothing is tried any more, or `answer`, the worker's own
    answer, where it gave one. worker: its URL, None if there was none.
    """

    def __init__(
        self, leg: Role, reason: str, why: object, *, worker: str | None = None, answer: Answer | None = None
    ) -> None:
        super().__init__(f"{leg} leg: {why}")
        self.leg = leg
        self.reason = reason
        self.worker = worker
        self.answer = answer

    @property
    def error(self) -> ApiError:
        if self.reason == "timeout":
            return ApiError(504, f"the {self.leg} worker did not answer in time", retry_after_s=RETRY_AFTER_S)
        return ApiError(502, f"no {self.leg} worker completed the request", retry_after_s=RETRY_AFTER_S)


def request_bytes(pool: WorkerPool, job: Job, leg_id: str, body: bytes) -> bytes:
    """The bytes of one leg. vLLM names the request after X-Request-Id: every leg and attempt has its own."""
    headers = b"%bx-request-id: %b\r\n" % (job.leg_headers, leg_id.encode())
    return pool.request(b"POST", job.path, headers, body, job.authorization)


async def prefill(services: Services, job: Job, worker: Worker, leg_id: str, body: bytes) -> HandOff | None:
    """A hand-off, None if the worker gives none. Raises ConnectError, LegFailure or RelayedError."""
    pool = services.pools[worker]
    services.outcomes.began(worker)
    services.fleet.started(worker)
    try:
        connection = await pool.connection()
        answer = Answer()
        sent_s = time.monotonic()
        connection.start(answer, request_bytes(pool, job, leg_id, body), services.config.prefill_timeout_s)
        await connection.finish(answer)
        check_answered(services, worker, answer)
        handoff = _handoff(services, job, worker, answer, leg_id, sent_s)
        services.outcomes.succeeded(worker)
    except ExchangeError as error:
        services.metrics.timeouts["prefill"] += error.timed_out
        raise blame(services, worker, error.reason, error) from None
    finally:
        services.fleet.finished(worker)
        services.outcomes.ended(worker)
    now_s = time.monotonic()
    services.metrics.prefill.observe(now_s - sent_s)
    if handoff is not None:
        worker.lease_until_s = max(worker.lease_until_s, now_s + handoff.left_s(now_s))
    return handoff


def _handoff(
    services: Services, job: Job, worker: Worker, answer: Answer, leg_id: str, sent_s: float
) -> HandOff | None:
    """Raises ExchangeError."""
    fields = check_completion(answer, leg_id, services.answer_names["prefill", job.path, False])
    handoff = read_handoff(fields, sent_s)
    if handoff is None:
        if services.throttle.due("no_handoff"):
            log.warning("prefill worker %s hands nothing off; its requests run whole", worker.url)
        return None
    check_handoff(handoff.request_name, leg_id, services.handoff_names)
    services.metrics.handoffs += 1
    if handoff.counts_error is not None:
        reason = handoff.counts_error.reason
        services.metrics.counts_errors[reason] += 1
        if services.throttle.due(reason):
            log.warning("expert counts of %s cannot be used: %s", worker.url, handoff.counts_error)
    return handoff


def check_answered(services: Services, worker: Worker, answer: Answer, pulled_from: str | None = None) -> None:
    """Nothing for status 200. Raises LegFailure for an error of the worker, RelayedError for one of the client."""
    check_status(answer.status)
    if answer.status in WORKERS_ERRORS:
        raise blame(services, worker, "status", f"status {answer.status}", pulled_from, answer)
    if answer.status != 200:
        services.outcomes.succeeded(worker)
        raise RelayedError(answer)


def blame(
    services: Services,
    worker: Worker,
    reason: str,
    why: object,
    pulled_from: str | None = None,
    answer: Answer | None = None,
) -> LegFailure:
    """The failure to raise, put down to the worker.

    pulled_from: the prefill worker whose blocks it was to pull; if that one is gone, the pull fails everywhere.
    """
    source = None if pulled_from is None else services.fleet.workers("prefill").get(pulled_from)
    if pulled_from is None or (source is not None and source.available):
        services.outcomes.failed(worker, reason)
    return LegFailure(worker.role, reason, why, worker=worker.url, answer=answer)
