"""The requests that other replicas run: part of every worker's load, and of what its policy knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from eldr.learning.lessons import Lesson
from eldr.policies.shares import Share
from eldr.router.fleet.groups import ModelGroup
from eldr.router.fleet.workers import Fleet, Worker
from eldr.router.placement.admission import Admission
from eldr.router.placement.decode import Placements
from eldr.router.placement.lanes import Lanes


class RunningElsewhere:
    """A request that another replica runs.

    url: of its worker, which this router may not know.
    share: what a policy must know of it. None if it needs nothing.
    computed: whether its worker has computed its prompt, or never had to.
    told: whose policy knows of it. None if none does.
    """

    __slots__ = ("computed", "share", "told", "url")

    def __init__(self, url: str, share: Share | None, computed: bool) -> None:
        self.url: Final = url
        self.share: Final = share
        self.computed = computed
        self.told: Placements | None = None


class Elsewhere:
    """Keeps the fleet and the policies up to date about what other replicas run.

    running: how many requests these are.
    """

    def __init__(self, fleet: Fleet, lanes: Lanes, admission: Admission) -> None:
        self._fleet = fleet
        self._lanes = lanes
        self._admission = admission
        self._at: dict[str, dict[RunningElsewhere, None]] = {}
        self._needs: Mapping[str, tuple[int, int]] = {}
        self._grown: dict[ModelGroup, None] = {}  # groups that may have more room than at the last look
        self.running = 0

    def started(self, request: RunningElsewhere) -> None:
        at = self._at.get(request.url)
        if at is None:
            at = self._at[request.url] = {}
        at[request] = None
        self.running += 1
        worker = self._fleet.workers("decode").get(request.url)
        if worker is not None:
            self._fleet.set_elsewhere(worker, len(at))
            self._tell(request, self._placements(worker))

    def ended(self, request: RunningElsewhere) -> None:
        at = self._at[request.url]
        del at[request]
        self.running -= 1
        if not at:
            del self._at[request.url]
        worker = self._fleet.workers("decode").get(request.url)
        if worker is not None:
            self._fleet.set_elsewhere(worker, len(at))
            self._note_growth(worker)
        self._tell(request, None)

    def prompt_computed(self, request: RunningElsewhere) -> None:
        if not request.computed:
            request.computed = True
            if request.told is not None and request.share is not None:
                request.told.elsewhere_prompt_computed(request.url, request.share)

    def need(self, needs: Mapping[str, tuple[int, int]]) -> None:
        """What all other replicas need.

        needs: name of a base model -> their admitted requests that have no worker yet, and how many replicas have
            requests that wait for a slot.
        """
        self._needs = needs
        for group in self._fleet.groups:
            promised = waiting = 0
            for name in group.bases or ("",):
                need = needs.get(name)
                if need is not None:
                    promised, waiting = promised + need[0], waiting + need[1]
            if promised < group.promised_elsewhere or waiting < group.waiting_elsewhere:
                self._grown[group] = None
            group.promised_elsewhere, group.waiting_elsewhere = promised, waiting
            group.note_room()

    def learned(self, model: str, lesson: Lesson) -> None:
        """Another replica has learned from a request."""
        self._lanes.learned_elsewhere(model, lesson)

    def admit(self) -> None:
        """Admit whoever has room now. To be called after a few of the other calls.

        Most of what replicas tell takes room, or none. So the queue is not looked at unless there may be more.
        """
        if self._grown:
            grown, self._grown = self._grown, {}
            self._admission.room_grew(grown)

    def _note_growth(self, worker: Worker) -> None:
        group = self._fleet.group(worker)
        if group is not None:
            self._grown[group] = None

    def fleet_changed(self, worker: Worker) -> None:
        """A listener of the fleet, after `lanes`. A policy forgets what runs at a worker that leaves its group."""
        if worker.leg != "decode":
            return
        self.need(self._needs)
        at = self._at.get(worker.url)
        here = self._fleet.workers("decode").get(worker.url)
        if here is not None:
            self._fleet.set_elsewhere(here, 0 if at is None else len(at))
        if at is not None:
            placements = None if here is None else self._placements(here)
            for request in at:
                self._tell(request, placements)

    def _placements(self, worker: Worker) -> Placements | None:
        """Whose policy knows this worker."""
        group = self._fleet.group(worker)
        lane = None if group is None else self._lanes.of(group)
        return lane.placements if lane is not None and lane.placements.knows(worker.url) else None

    def _tell(self, request: RunningElsewhere, placements: Placements | None) -> None:
        """Let this policy know of a request, and no other."""
        told, share = request.told, request.share
        if told is placements:
            return
        request.told = placements
        if share is None:
            return
        if told is not None:
            told.elsewhere_finished(request.url, share)
        if placements is not None:
            placements.elsewhere_started(request.url, share)
            if share.computes_prompt and request.computed:
                placements.elsewhere_prompt_computed(request.url, share)
