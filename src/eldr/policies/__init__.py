"""Decode policies by name. To add a policy, add a file here and a line in `_MAKERS`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from eldr.policies.base import Policy
from eldr.policies.domain import Domain
from eldr.policies.expected_union import ExpectedUnion
from eldr.policies.load import FastestQueue, PowerOfTwo, Random, RoundRobin, ShortestQueue
from eldr.policies.locality_band import LocalityBand
from eldr.policies.options import PolicyError, PolicyOptions
from eldr.policies.prefix_affinity import PrefixAffinity
from eldr.policies.refit import CAPACITY

if TYPE_CHECKING:
    from eldr.calibration import Calibration

__all__ = ["POLICY_NAMES", "PolicyError", "PolicyOptions", "make_policy"]

_Maker = Callable[["Calibration | None", PolicyOptions, int], Policy]


def _locality_band(calibration: Calibration | None, options: PolicyOptions, seed: int) -> Policy:
    if calibration is None:
        raise PolicyError("policy locality-band needs a calibration file (eldr record, then eldr fit)")
    if options.signature == "prompt" and calibration.prompt_centroids is None:
        raise PolicyError(
            "policy locality-band cannot know requests by their prompts: the calibration holds no prompt model; record "
            "a trace with --keep-prompts, and fit it"
        )
    remember = CAPACITY if options.refits else 0
    return LocalityBand(
        calibration,
        signature=options.signature,
        tau=options.tau,
        two_nearest=options.two_nearest,
        remember=remember,
        seed=seed,
    )


def _expected_union(calibration: Calibration | None, options: PolicyOptions, seed: int) -> Policy:
    predictor = None if calibration is None else calibration.predictor
    prompts = None if calibration is None else calibration.prompts
    return ExpectedUnion(predictor, prompts=prompts, **options.of_expected_union(), seed=seed)


_MAKERS: dict[str, _Maker] = {
    "rr": lambda calibration, options, seed: RoundRobin(),
    "random": lambda calibration, options, seed: Random(seed),
    "p2c": lambda calibration, options, seed: PowerOfTwo(seed),
    "jsq": lambda calibration, options, seed: ShortestQueue(seed),
    "jsq-speed": lambda calibration, options, seed: FastestQueue(options.step_costs(), seed),
    "prefix-affinity": lambda calibration, options, seed: PrefixAffinity(seed),
    "domain": lambda calibration, options, seed: Domain(seed),
    "locality-band": _locality_band,
    "expected-union": _expected_union,
}

POLICY_NAMES: tuple[str, ...] = tuple(_MAKERS)


def make_policy(
    name: str, options: PolicyOptions | None = None, *, calibration: Calibration | None = None, seed: int = 0
) -> Policy:
    """Make the policy called `name`.

    name: one of POLICY_NAMES.
    options: policy options. Those that the policy does not have are ignored.
    calibration: a fitted calibration. expected-union works without one.
    seed: the seed of the policy's random choices.
    Raises PolicyError for an unknown name or a missing calibration.
    """
    if name not in _MAKERS:
        raise PolicyError(f"there is no policy {name!r}; choose from {', '.join(POLICY_NAMES)}")
    return _MAKERS[name](calibration, options or PolicyOptions(), seed)
