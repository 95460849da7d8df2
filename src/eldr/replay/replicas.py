"""Several routers in front of one simulated fleet, and the news that they send each other.

Each router has a policy of its own, and knows the load only from its own requests and from what it has heard. News of a
start or an end reaches the others a fixed time later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from eldr.policies.base import DecodeRequest, Policy
from eldr.policies.shares import Share
from eldr.replay.learning import SimulatedLearning
from eldr.replay.refits import SimulatedRefits
from eldr.replay.step_costs import SimulatedCosts

# What routers tell each other of their requests: everything, on which worker they run and nothing else, or nothing.
SHARED = ("all", "load", "nothing")


@dataclass(frozen=True, slots=True)
class Sharing:
    """How many routers there are, and what they know of each other's requests.

    replicas: how many routers.
    what: one of SHARED.
    delay_s: how long news is on its way.
    """

    replicas: int = 1
    what: str = "all"
    delay_s: float = 0.05


class Replica:
    """One router.

    policy: its policy, which nobody else uses.
    refits, learning, costs: what happens to the policy in the background. None for nothing.
    in_flight: eligible worker -> the requests that it knows to run there.
    """

    def __init__(
        self,
        policy: Policy,
        refits: SimulatedRefits | None = None,
        learning: SimulatedLearning | None = None,
        costs: SimulatedCosts | None = None,
    ) -> None:
        self.policy = policy
        self.refits = refits
        self.learning = learning
        self.costs = costs
        self.in_flight: dict[str, int] = {}

    def count(self, worker: str, change: int) -> None:
        """One request more or less on a worker. It may have begun to drain: then its load no longer matters."""
        if worker in self.in_flight:
            self.in_flight[worker] += change

    def hear_started(self, worker: str, share: Share) -> None:
        """Another router has started a request."""
        self.count(worker, 1)
        self.policy.elsewhere_started(worker, share)

    def hear_prompt_computed(self, worker: str, share: Share) -> None:
        """The prompt of a request of another router was computed."""
        self.policy.elsewhere_prompt_computed(worker, share)

    def hear_finished(self, worker: str, share: Share) -> None:
        """A request of another router has ended."""
        self.count(worker, -1)
        self.policy.elsewhere_finished(worker, share)


class Replicas:
    """All routers of a run.

    routers: at least one. Their policies must be fresh.
    sharing: what they tell each other, and how late. Its number of routers does not matter here.
    """

    def __init__(self, routers: Sequence[Replica], sharing: Sharing = Sharing()) -> None:
        self.routers = tuple(routers)
        self._shares = len(self.routers) > 1 and sharing.what != "nothing"
        self._load_alone = sharing.what == "load"
        self._delay_s = sharing.delay_s
        self._running: dict[str, Share] = {}  # by request, what was told of it
        self._news: deque[tuple[float, Replica, Callable[[Replica, str, Share], None], str, Share]] = deque()

    def joined(self, worker: str) -> None:
        """A worker has joined. All routers notice at once."""
        for router in self.routers:
            router.in_flight[worker] = 0
            router.policy.joined(worker)

    def drain(self, worker: str) -> None:
        """A worker takes no more requests."""
        for router in self.routers:
            del router.in_flight[worker]

    def left(self, worker: str) -> None:
        """A worker has left for good."""
        for router in self.routers:
            router.policy.left(worker)

    def advance(self, now_s: float) -> None:
        """Let everything happen that is due. Call this before every choice."""
        news = self._news
        while news and news[0][0] <= now_s:
            _, origin, hear, worker, share = news.popleft()
            for router in self.routers:
                if router is not origin:
                    hear(router, worker, share)
        for router in self.routers:
            if router.refits is not None:
                router.refits.advance(now_s)
            if router.learning is not None:
                router.learning.advance(now_s)
            if router.costs is not None:
                router.costs.advance(now_s)

    def started(self, router: Replica, request: DecodeRequest, worker: str, now_s: float) -> None:
        """A router has sent a request to a worker."""
        router.count(worker, 1)
        router.policy.started(request, worker)
        if self._shares:
            share = router.policy.share(request, worker)
            if share is not None:
                if self._load_alone:
                    share = Share(None, share.context_tokens)
                self._running[request.request_id] = share
                self._tell(router, Replica.hear_started, request, worker, now_s)

    def prompt_computed(self, router: Replica, request: DecodeRequest, worker: str, now_s: float) -> None:
        """A worker has computed the prompt of a router's request."""
        router.policy.prompt_computed(request, worker)
        if not self._load_alone:
            self._tell(router, Replica.hear_prompt_computed, request, worker, now_s)

    def finished(self, router: Replica, request: DecodeRequest, worker: str, now_s: float) -> None:
        """A router's request has ended."""
        router.count(worker, -1)
        router.policy.finished(request, worker)
        self._tell(router, Replica.hear_finished, request, worker, now_s)
        self._running.pop(request.request_id, None)

    def _tell(
        self,
        origin: Replica,
        hear: Callable[[Replica, str, Share], None],
        request: DecodeRequest,
        worker: str,
        now_s: float,
    ) -> None:
        """Send news of a request to all routers but its own, if they were told of its start."""
        share = self._running.get(request.request_id)
        if share is not None:
            self._news.append((now_s + self._delay_s, origin, hear, worker, share))


def alone(policy: Policy) -> Replicas:
    """A single router with this policy."""
    return Replicas([Replica(policy)])
