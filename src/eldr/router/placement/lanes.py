"""What each group of workers has of its own: the ring of its prefill workers, and a policy for those that decode."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from eldr.counts import ExpertCounts
from eldr.learning.lessons import Lesson
from eldr.learning.step_counters import StepCounters
from eldr.policies.base import Picture, Policy
from eldr.policies.worker_costs import LearnedCost
from eldr.router.fleet.groups import ModelGroup
from eldr.router.fleet.workers import Fleet, Worker
from eldr.router.observe.counters import Metrics
from eldr.router.placement.decode import KEPT, Placed, Placements
from eldr.router.placement.learning import Learning
from eldr.router.placement.prefill import PrefillRing
from eldr.router.placement.refits import ZoneRefits
from eldr.router.placement.sharing import Sharing
from eldr.router.placement.step_costs import StepCosts

# Makes the policy of a group.
MakePolicy = Callable[[ModelGroup], Policy]
MakeRefits = Callable[[Policy], ZoneRefits | None]
MakeLearning = Callable[[ModelGroup, Policy], Learning | None]
MakeCosts = Callable[[Policy, Placements], StepCosts | None]


class Lane:
    """What one group has of its own.

    ring, placements: of its prefill workers, and of its decode workers.
    learning: learns from its requests. None if nothing is learned.
    costs: learns the step times of its workers. None if they are not learned.
    tasks: what runs for it in the background.
    """

    def __init__(
        self,
        group: ModelGroup,
        ring: PrefillRing,
        placements: Placements,
        learning: Learning | None,
        costs: StepCosts | None,
        tasks: Sequence[asyncio.Task[None]],
    ) -> None:
        self.group = group
        self.ring = ring
        self.placements = placements
        self.learning = learning
        self.costs = costs
        self.tasks = tasks


class Lanes:
    """Makes a lane for each group when its first worker comes, and drops it with the group.

    sharing: tells other replicas of requests. None if there are none. To be set before the first worker comes.
    recent: the latest decisions of all groups.
    """

    def __init__(
        self,
        fleet: Fleet,
        make_policy: MakePolicy,
        make_refits: MakeRefits,
        make_learning: MakeLearning,
        make_costs: MakeCosts,
        metrics: Metrics,
        seed: int,
    ) -> None:
        self._fleet = fleet
        self._make_policy = make_policy
        self._make_refits = make_refits
        self._make_learning = make_learning
        self._make_costs = make_costs
        self._metrics = metrics
        self._seed = seed
        self._lanes: dict[ModelGroup, Lane] = {}
        self.sharing: Sharing | None = None
        self.recent: deque[Placed] = deque(maxlen=KEPT)

    def __iter__(self) -> Iterator[Lane]:
        return iter(self._lanes.values())

    def of(self, group: ModelGroup) -> Lane | None:
        """The lane of a group. None if its last worker has left, while a request may still wait for another."""
        return self._lanes.get(group)

    def fleet_changed(self, worker: Worker) -> None:
        """A listener of the fleet."""
        group = self._fleet.group(worker)
        if group is not None and group not in self._lanes:
            self._lanes[group] = self._make(group)
        for lane in list(self._lanes.values()):
            lane.ring.fleet_changed(worker)
            lane.placements.fleet_changed(worker)
            if lane.costs is not None and not lane.placements.knows(worker.url):
                lane.costs.left(worker.url)
            if lane.group not in self._fleet.groups:
                del self._lanes[lane.group]
                for task in lane.tasks:
                    task.cancel()

    def _make(self, group: ModelGroup) -> Lane:
        policy = self._make_policy(group)
        refits, learning = self._make_refits(policy), self._make_learning(group, policy)
        tasks = [asyncio.create_task(part.run()) for part in (refits, learning) if part is not None]
        placements = Placements(policy, learning, self.sharing, group, self._metrics, self._seed, self.recent)
        return Lane(group, PrefillRing(group), placements, learning, self._make_costs(policy, placements), tasks)

    def counted(self, worker: Worker, counters: StepCounters) -> None:
        """A listener of the fleet (`Fleet.on_steps`)."""
        group = self._fleet.group(worker)
        lane = None if group is None else self._lanes.get(group)
        if lane is not None and lane.costs is not None:
            lane.costs.counted(worker, counters)

    def learned_costs(self) -> Iterator[tuple[ModelGroup, str, LearnedCost]]:
        """The group, URL and learned step time of each worker that has one."""
        for lane in self._lanes.values():
            if lane.costs is not None:
                for url, learned in lane.costs.known.items():
                    yield lane.group, url, learned

    def report(self, request_id: str, decode: ExpertCounts) -> None:
        """A finished request's experts became known (`eldr.router.experts.base.ExpertSink`). Raises CountsError."""
        for lane in self._lanes.values():
            if lane.learning is not None and lane.learning.expects(request_id):
                lane.learning.report(request_id, decode)

    def learned_elsewhere(self, model: str, lesson: Lesson) -> None:
        """Another replica knows the experts of a finished request. model: the name of its base model."""
        for lane in self._lanes.values():
            if lane.learning is not None and (model in lane.group.bases or not (model or lane.group.bases)):
                lane.learning.learner.add(lesson)

    def pictures(self) -> Iterator[tuple[ModelGroup, Picture]]:
        """Each policy's view of its state, for those that have one."""
        for lane in self._lanes.values():
            picture = lane.placements.picture()
            if picture is not None:
                yield lane.group, picture

    async def close(self) -> None:
        tasks = [task for lane in self._lanes.values() for task in lane.tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
