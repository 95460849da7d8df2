"""Asks the policy for a decode or aggregated worker and tells it what happens to the request.

A failing policy never fails a request.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from eldr.policies.base import Decision, DecodeRequest, ExpectedStep, Picture, Policy
from eldr.policies.load import ShortestQueue
from eldr.policies.shares import Share
from eldr.policies.worker_costs import LearnedCost
from eldr.router.fleet.groups import ModelGroup, Served
from eldr.router.fleet.workers import Worker
from eldr.router.observe.counters import Metrics
from eldr.router.observe.logs import Throttle
from eldr.router.placement.learning import Learning
from eldr.router.placement.prefixes import Prefix, SeenPrefixes
from eldr.router.placement.sharing import Sharing

log = logging.getLogger("eldr.router")


# How many recent decisions are kept for display.
KEPT = 100


class Placed(NamedTuple):
    """A decision, for display. in_flight: the other requests that the worker ran at that time, for all routers."""

    unix_s: float
    request_id: str
    prompt_tokens: int
    label: str | None
    worker: str
    reason: str
    in_flight: int


class Placement:
    """One request on one worker that decodes, from the decision until the end of its `with` block.

    number: by which other replicas know it. 0 if there are none.
    """

    __slots__ = ("_moved", "_owner", "_request", "_served", "_share", "decision", "number", "worker")

    def __init__(
        self, owner: Placements, request: DecodeRequest, served: Served, worker: Worker, decision: Decision
    ) -> None:
        self._owner = owner
        self._request = request
        self._served = served
        self.worker = worker
        self.decision = decision
        self.number = 0
        self._moved = False
        self._share: Share | None = None  # once it has moved

    @property
    def request_id(self) -> str:
        """The request as the policy knows it. Each attempt has its own."""
        return self._request.request_id

    @property
    def computes_prompt(self) -> bool:
        """Whether the worker computes the prompt too."""
        return self._request.computes_prompt

    def prompt_computed(self) -> None:
        """The worker has computed the prompt. It may be told to a policy that prices prompts."""
        if self._request.computes_prompt:
            self._owner.prompt_computed(self._request, self.worker, self.number)

    def move(self, worker: Worker) -> None:
        """Another worker runs the request than the one that was chosen, and has computed its prompt if it had to."""
        if self._moved:
            self._owner.ended_there(self.worker, self._share, self.number)
        else:
            self._share = self._owner.left(self._request, self.worker, self.number)
            self._moved = True
        self.worker = worker
        self.number = self._owner.arrived(worker, self._share)

    def generated(self, tokens: int | None) -> None:
        """The answer had so many tokens. None if nobody knows."""
        self._request.generated_tokens = tokens

    def __enter__(self) -> Placement:
        return self

    def __exit__(self, kind: object, error: object, where: object) -> None:
        """The request no longer runs there. It keeps a slot for another attempt until it leaves the admission."""
        self._served.promise()
        if self._moved:
            self._owner.ended_there(self.worker, self._share, self.number)
        else:
            self._owner.ended(self._request, self.worker, self.number)


class Placements:
    """Wraps the policy of one group. If the policy raises, join-shortest-queue places that request.

    learning: learns from its requests. None if nothing is learned.
    sharing: tells other replicas. None if there are none.
    recent: the latest decisions of all groups, for display.
    """

    def __init__(
        self,
        policy: Policy,
        learning: Learning | None,
        sharing: Sharing | None,
        group: ModelGroup,
        metrics: Metrics,
        seed: int,
        recent: deque[Placed],
    ) -> None:
        self._policy = policy
        self._learning = learning
        self._sharing = sharing
        self._group = group
        self._metrics = metrics
        self._fallback = ShortestQueue(seed)
        self._throttle = Throttle()
        self._joined: set[str] = set()
        self._prefixes = SeenPrefixes()
        self._recent = recent

    @property
    def policy_name(self) -> str:
        return self._policy.name

    def wants_words(self, with_counts: bool) -> bool:
        """Whether the words of a request matter that comes with the counts of its prompt, or without."""
        return self._policy.wants_words(with_counts)

    def picture(self) -> Picture | None:
        """Return the policy's view of its state, or None if it has none or fails."""
        try:
            return self._policy.picture()
        except Exception:
            self._failed("failed to show its state", exc_info=True)
            return None

    def knows(self, url: str) -> bool:
        """Whether the policy knows the worker with this URL."""
        return url in self._joined

    def fleet_changed(self, worker: Worker) -> None:
        """A listener of the fleet. The policy learns of a worker when it is first up, and when it leaves."""
        if worker.leg != "decode":
            return
        if not worker.healthy or not self._group.has(worker):  # it may come back as a new process
            self._prefixes.forget(worker.url)
        if not self._group.has(worker):
            if worker.url in self._joined:
                self._joined.discard(worker.url)
                self._tell(self._policy.left, worker.url)
        elif worker.healthy and worker.url not in self._joined:
            self._joined.add(worker.url)
            self._tell(self._policy.joined, worker.url)

    def place(
        self,
        request: DecodeRequest,
        served: Served,
        excluded: Collection[str],
        usable: Collection[str] | None,
        prefix: Prefix | None = None,
    ) -> Placement | None:
        """Choose a worker for `request` and start it there. None if no worker is eligible.

        prefix: the start of the prompt, if the chosen worker computes it. None if it does not.
        Workers in `excluded` are chosen only if no other is eligible, and workers that are not in `usable` never. None
        stands for all.
        """
        eligible: Mapping[str, int] = self._group.eligible
        if usable is not None:
            eligible = {url: load for url, load in eligible.items() if url in usable}
        if excluded:
            eligible = {url: load for url, load in eligible.items() if url not in excluded} or eligible
        if not eligible:
            return None
        if prefix is not None:
            request.cached_tokens = self._prefixes.cached_tokens(prefix, eligible)
        decision = self._decide(request, eligible)
        self._metrics.decisions[self._policy.name, decision.reason] += 1
        worker = self._group.workers["decode"][decision.worker]
        served.release()
        if prefix is not None:
            self._metrics.prompt_tokens += request.prompt_tokens
            self._metrics.prompt_tokens_cached += (request.cached_tokens or {}).get(worker.url, 0)
            self._prefixes.sent(prefix, worker)
        self._recent.append(
            Placed(
                time.time(),
                request.request_id,
                request.prompt_tokens,
                request.label,
                worker.url,
                decision.reason,
                worker.busy,
            )
        )
        self._tell(self._policy.started, request, worker.url)
        placement = Placement(self, request, served, worker, decision)
        if self._sharing is not None:
            placement.number = self._sharing.started(worker.url, self._share(request, worker.url))
        if self._learning is not None:
            self._learning.placed(request)
        request.forget_counts()
        return placement

    def prompt_computed(self, request: DecodeRequest, worker: Worker, number: int) -> None:
        self._tell(self._policy.prompt_computed, request, worker.url)
        if self._sharing is not None:
            self._sharing.prompt_computed(number)

    def ended(self, request: DecodeRequest, worker: Worker, number: int) -> None:
        self._tell(self._policy.finished, request, worker.url)
        if self._sharing is not None:
            self._sharing.ended(number)

    # Requests that a proxy has sent to another worker than the chosen one. To a policy they are as those that another
    # replica has placed.

    def left(self, request: DecodeRequest, worker: Worker, number: int) -> Share | None:
        """A request does not run where it was placed. Returns what a policy must know of it wherever it runs."""
        share = self._share(request, worker.url)
        self.ended(request, worker, number)
        return share

    def arrived(self, worker: Worker, share: Share | None) -> int:
        """It runs there, and its prompt has been computed. Returns its number for other replicas, 0 without any."""
        if share is not None:
            self.elsewhere_started(worker.url, share)
            if share.computes_prompt:
                self.elsewhere_prompt_computed(worker.url, share)
        if self._sharing is None:
            return 0
        number = self._sharing.started(worker.url, share)
        self._sharing.prompt_computed(number)
        return number

    def ended_there(self, worker: Worker, share: Share | None, number: int) -> None:
        if share is not None:
            self.elsewhere_finished(worker.url, share)
        if self._sharing is not None:
            self._sharing.ended(number)

    def _share(self, request: DecodeRequest, url: str) -> Share | None:
        try:
            return self._policy.share(request, url)
        except Exception:
            self._failed("failed to say what others must know of a request", exc_info=True)
            return None

    # Step times learned from the workers' reports.

    def expected_step(self, url: str) -> ExpectedStep | None:
        """What the policy expects of the next step of a worker that it knows. None if it expects nothing, or fails."""
        try:
            return self._policy.expected_step(url)
        except Exception:
            self._failed("failed to say what it expects of a step", exc_info=True)
            return None

    def cost_learned(self, url: str, learned: LearnedCost) -> None:
        """The steps of a worker that the policy knows take this time."""
        self._tell(self._policy.cost_learned, url, learned)

    # What other replicas run.

    def elsewhere_started(self, url: str, share: Share) -> None:
        self._tell(self._policy.elsewhere_started, url, share)

    def elsewhere_prompt_computed(self, url: str, share: Share) -> None:
        self._tell(self._policy.elsewhere_prompt_computed, url, share)

    def elsewhere_finished(self, url: str, share: Share) -> None:
        self._tell(self._policy.elsewhere_finished, url, share)

    def _decide(self, request: DecodeRequest, eligible: Mapping[str, int]) -> Decision:
        try:
            decision = self._policy.choose(request, eligible)
            if decision.worker in eligible:
                return decision
            self._failed(f"chose {decision.worker}, which is not eligible")
        except Exception:
            self._failed("failed to choose", exc_info=True)
        return Decision(self._fallback.choose(request, eligible).worker, "policy_error")

    def _tell(self, hook: Callable[..., None], *event: DecodeRequest | str | Share | LearnedCost) -> None:
        try:
            hook(*event)
        except Exception:
            self._failed("failed to take note of a request or a worker", exc_info=True)

    def _failed(self, what: str, exc_info: bool = False) -> None:
        self._metrics.policy_errors += 1
        if self._throttle.due(what):
            log.error("policy %s %s", self._policy.name, what, exc_info=exc_info)
