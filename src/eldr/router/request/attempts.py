"""Limits the attempts of a request: a few retries each, and a budget for all requests together."""

from __future__ import annotations

import logging
from collections.abc import Collection

from eldr.router.config.endpoint import LegName
from eldr.router.config.groups import RetrySettings
from eldr.router.fleet.groups import Served
from eldr.router.fleet.lists import ModelLists
from eldr.router.fleet.outcomes import Outcomes
from eldr.router.fleet.workers import Worker
from eldr.router.observe.counters import Metrics
from eldr.router.observe.logs import Throttle
from eldr.router.placement.admission import NoWorkerError
from eldr.router.request.legs import OVERLOAD, LegFailure, LegRefused, RelayedError

log = logging.getLogger("eldr.router")

# How often one worker may refuse the same request. After each refusal it gets no requests until a probe succeeds.
MOST_REFUSALS = 3
# What vLLM says of a model that it does not serve.
NO_MODEL = b"does not exist"
# How many workers may turn out to have unloaded the model of one request.
MOST_UNSERVED = 8
# After these failures of a leg, the cause may be the transfer, and so the other worker.
TRANSFER_FAILURES = ("status", "timeout", "wrong_answer")


class RetryBudget:
    """Limits retries across all requests, so that a dying fleet is not hammered.

    Every request pays in a fraction of a retry, and every retry takes one out.

    ratio: retries per request in the long run.
    burst: the most that can be saved up, and the balance at the start.
    """

    def __init__(self, ratio: float, burst: int) -> None:
        self._ratio = ratio
        self._burst = float(burst)
        self.left = self._burst

    def request(self) -> None:
        self.left = min(self._burst, self.left + self._ratio)

    def take(self) -> bool:
        """Take one retry. Returns False if the budget has none left."""
        if self.left < 1.0:
            return False
        self.left -= 1.0
        return True


class Retries:
    """The retry state that all requests share."""

    def __init__(self, config: RetrySettings, lists: ModelLists, outcomes: Outcomes, metrics: Metrics) -> None:
        self.most = config.retries
        self.budget = RetryBudget(config.retry_ratio, config.retry_burst)
        self.lists = lists
        self.outcomes = outcomes
        self.metrics = metrics
        self.throttle = Throttle()


class Attempts:
    """The attempts of one request. served: who serves its model."""

    def __init__(self, shared: Retries, request_id: str, served: Served) -> None:
        self._shared = shared
        self._id = request_id
        self._served = served
        self._prefills = self._decodes = 0
        self._repeated = 0
        self._unserved = 0
        # Most requests need neither.
        self._refusals: dict[str, int] = {}
        self._tried: dict[LegName, set[str]] = {}
        shared.budget.request()

    def next_name(self, leg: LegName) -> str:
        """Return the X-Request-Id of the next leg.

        Every leg has its own. The client sees the answer of the first decode leg, so that leg uses the request's own
        id.
        """
        if leg == "prefill":
            self._prefills += 1
            return f"{self._id}-prefill-{self._prefills}"
        self._decodes += 1
        return self._id if self._decodes == 1 else f"{self._id}-decode-{self._decodes}"

    def tried(self, leg: LegName) -> Collection[str]:
        """Return the URLs of the workers that failed this leg of the request. Other workers are preferred."""
        return self._tried.get(leg, ())

    def _avoid(self, worker: Worker) -> None:
        self._tried.setdefault(worker.leg, set()).add(worker.url)

    def refused(self, refused: LegRefused) -> None:
        """Note a refused connection. No byte was sent, so the leg goes to another worker without using up a retry.

        Raises NoWorkerError for a worker that answers its probes but refuses again and again.
        """
        worker, shared = refused.worker, self._shared
        self._refusals[worker.url] = refusals = self._refusals.get(worker.url, 0) + 1
        self._avoid(worker)
        shared.metrics.retries[worker.leg, refused.reason] += 1
        shared.metrics.timeouts["connect"] += refused.timed_out
        shared.outcomes.refused(worker, refused.reason)
        if refusals == MOST_REFUSALS:
            raise NoWorkerError(worker.role)

    def _has_untried(self, leg: LegName) -> bool:
        """Whether an available worker that serves the request's model has not failed this leg of it yet."""
        tried = self.tried(leg)
        return any(worker.available and worker.url not in tried for worker in self._served.workers(leg))

    async def served_elsewhere(self, relayed: RelayedError) -> bool:
        """Whether a worker answered 404 because it no longer serves the model, and others do. They get the request.

        The worker refused it before it cost anything, so no retry is used up.
        """
        served, worker, answer = self._served, relayed.worker, relayed.answer
        if answer.status != 404 or worker is None or not served.name or worker.models is None:
            return False
        if NO_MODEL not in answer.body:
            return False
        await self._shared.lists.look_at(worker)
        if worker.models is None or served.name in worker.models or served.decode == frozenset():
            return False
        self._avoid(worker)
        self._unserved += 1
        self._shared.metrics.retries[worker.leg, "unserved"] += 1
        return self._unserved < MOST_UNSERVED

    def failed(self, failure: LegFailure) -> None:
        """Use one more attempt. If there is none left, raise what the client gets: ApiError or RelayedError."""
        shared, leg, reason = self._shared, failure.leg, failure.reason
        if failure.worker is not None:
            self._avoid(failure.worker)
        if failure.partner is not None and reason in TRANSFER_FAILURES:
            self._avoid(failure.partner)
        why_not = None
        if self._repeated == shared.most or (reason == OVERLOAD and not self._has_untried(leg)):
            why_not = "tries"
        elif not shared.budget.take():
            why_not = "budget"
        url = None if failure.worker is None else failure.worker.url
        fields = {"id": self._id, "worker": url, "reason": reason, "retried": why_not is None}
        # When a whole fleet fails, log one line per kind for a while. The rest is counted, and logged at level debug.
        level = logging.WARNING if shared.throttle.due(f"{leg} {reason} {url}") else logging.DEBUG
        # As text: a handler may keep the record, and a failure knows the frames that hold the bodies.
        log.log(level, "%s", str(failure), extra={"fields": fields})
        if why_not is None:
            self._repeated += 1
            shared.metrics.retries[leg, reason] += 1
            return
        shared.metrics.retries_denied[leg, why_not] += 1
        raise RelayedError(failure.answer) if failure.answer is not None else failure.error
