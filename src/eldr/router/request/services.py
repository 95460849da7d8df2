"""The parts of the router that every request uses, and the first step that all take."""

from __future__ import annotations

from dataclasses import dataclass

from eldr.router.config.settings import RouterConfig
from eldr.router.experts.watch import ExpertSources
from eldr.router.fleet.groups import Served
from eldr.router.fleet.lists import ModelLists
from eldr.router.fleet.outcomes import Outcomes
from eldr.router.fleet.workers import Fleet
from eldr.router.observe.counters import Metrics
from eldr.router.placement.admission import Admission, Claim
from eldr.router.placement.lanes import Lanes
from eldr.router.protocols.base import LegProtocol
from eldr.router.request.attempts import Retries
from eldr.router.request.intake import Intake
from eldr.router.request.legs import Legs
from eldr.router.request.quotas import Quotas


@dataclass(frozen=True, slots=True)
class Services:
    """The parts of one router, in the order in which a request meets them."""

    config: RouterConfig
    quotas: Quotas
    intake: Intake
    lists: ModelLists
    admission: Admission
    lanes: Lanes
    protocol: LegProtocol
    legs: Legs
    retries: Retries
    outcomes: Outcomes
    fleet: Fleet
    metrics: Metrics
    experts: ExpertSources | None  # None if no source of finished requests' experts is on


async def admit(services: Services, claim: Claim, model: str | None) -> Served:
    """Wait for a slot at a worker that serves `model`, and return who does. Raises ApiError, like `Admission.enter`.

    While no worker is there, nobody knows who will serve the model. The one that comes first may serve another.
    """
    while True:
        served = services.fleet.served(model) or await services.lists.find(model)
        await services.admission.enter(claim, served)
        if served.name or not model or services.fleet.served(model) is served:
            return served
        services.admission.leave(served)
