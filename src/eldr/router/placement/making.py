"""Makes what places requests, as configured: policies with the calibration of their model, and lanes around them."""

from __future__ import annotations

import logging
import os
import re
import zlib

from eldr.calibration import Calibration, load_calibration
from eldr.learning.kept import Kept, KeptError, load_kept
from eldr.learning.learner import Learner
from eldr.policies import PolicyError, make_policy
from eldr.policies.base import Policy
from eldr.policies.learned import Learned
from eldr.policies.logged import LoggedPolicy
from eldr.policies.options import PolicyOptions
from eldr.policies.refit import RefitSchedule
from eldr.router.config.groups import PlacementSettings
from eldr.router.fleet.groups import ModelGroup
from eldr.router.fleet.workers import Fleet
from eldr.router.observe.counters import Metrics
from eldr.router.observe.decision_log import DecisionLog, calibration_digests, log_header
from eldr.router.placement.decode import Placements
from eldr.router.placement.lanes import Lanes, MakePolicy
from eldr.router.placement.learning import Learning
from eldr.router.placement.refits import ZoneRefits
from eldr.router.placement.sharing import Sharing
from eldr.router.placement.step_costs import StepCosts

log = logging.getLogger("eldr.router")


def policy_maker(placement: PlacementSettings) -> MakePolicy:
    """Return what makes the configured policy for each group of workers, with the calibration of its model.

    Raises EldrError for a policy that cannot be made, or a calibration that cannot be read.
    """
    calibrations = {path: load_calibration(path) for path in placement.calibration.values()}

    def make(calibration: Calibration | None) -> Policy:
        return make_policy(placement.policy, placement.options, calibration=calibration, seed=placement.seed)

    def make_for(group: ModelGroup) -> Policy:
        path = placement.calibration_of(sorted(group.bases))
        try:
            return make(None if path is None else calibrations[path])
        except PolicyError as error:
            # A model that is placed by load is better than one that is not served.
            log.error("the requests for %s are placed by jsq: %s", group.name or "a model", error)
            return make_policy("jsq", seed=placement.seed)

    for calibration in calibrations.values() or (None,):
        make(calibration)
    return make_for


def logged(make_policy: MakePolicy, placement: PlacementSettings, decision_log: DecisionLog) -> MakePolicy:
    """Make policies whose events are logged, each after a header of its own."""
    digests = calibration_digests(placement)

    def make(group: ModelGroup) -> Policy:
        policy, write = make_policy(group), decision_log.run()
        write(log_header(placement, digests, policy.name, group.bases).to_wire())
        return LoggedPolicy(policy, write)

    return make


def make_lanes(
    placement: PlacementSettings,
    fleet: Fleet,
    make: MakePolicy,
    metrics: Metrics,
    *,
    reports: bool = False,
    keeps: bool = True,
) -> Lanes:
    """Return the lanes of a fleet's groups. They have to be told of the fleet's changes.

    reports: whether the experts of finished requests become known.
    keeps: whether what is learned is written to `learned_dir`. Of several processes, one should.
    """
    lanes = Lanes(
        fleet,
        make,
        lambda policy: _zone_refits(policy, placement.options, metrics),
        lambda group, policy: _learning(group, policy, placement, metrics, reports, keeps, lanes.sharing),
        lambda policy, placements: _step_costs(policy, placements, placement),
        metrics,
        placement.seed,
    )
    return lanes


def _zone_refits(policy: Policy, options: PolicyOptions, metrics: Metrics) -> ZoneRefits | None:
    if not options.refits:
        return None
    return ZoneRefits(policy, RefitSchedule(options.refit_interval_s, options.refit_window_s), metrics)


def _step_costs(policy: Policy, placements: Placements, placement: PlacementSettings) -> StepCosts | None:
    if placement.learn_costs == "off" or not policy.prices_steps:
        return None
    return StepCosts(placements, placement.options)


def _learning(
    group: ModelGroup,
    policy: Policy,
    placement: PlacementSettings,
    metrics: Metrics,
    reports: bool,
    keeps: bool,
    sharing: Sharing | None,
) -> Learning | None:
    """What learns from a group's requests, beginning with what was kept or fitted before."""
    words, counts = policy.wants_words(False), policy.corrects_counts and reports
    if placement.learn == "off" or not (words or counts):
        return None
    kept, file = Kept(policy.prompts, policy.predictor), None
    if placement.learned_dir is not None:
        file = placement.learned_dir / _file_name(min(group.bases, default=""))
        if os.path.exists(file):  # noqa: PTH110 - Path.exists raises where the folder may not be read
            try:
                found = load_kept(file)
                kept = Kept(found.prompts or kept.prompts, found.activation or kept.activation)
                policy.learned(Learned.of(found.prompts, found.activation))
            except KeptError as error:
                log.error("what was learned before is not used: %s", error)
    learner = Learner(kept.prompts, kept.activation, words=words, counts=counts, seed=placement.seed)
    tell = None if sharing is None else lambda lesson: sharing.learned(group.name, lesson)
    return Learning(policy, learner, metrics, file if keeps else None, reports, tell)


def _file_name(model: str) -> str:
    """A file name for what was learned about a model, whose own name a worker may have made up."""
    readable = re.sub("[^A-Za-z0-9._-]", "_", model)[:100]
    return f"{readable}-{zlib.crc32(model.encode('utf-8', 'surrogatepass')):08x}.npz"
