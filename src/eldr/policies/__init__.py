"""Decode policies by name. A new policy is one file here and one line in `_MAKERS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from eldr.cost import DEFAULT_PRESET, PRESETS, CostModel
from eldr.errors import EldrError
from eldr.policies.base import Policy
from eldr.policies.domain import Domain
from eldr.policies.expected_union import ANCHOR, TAIL_GUARD, ExpectedUnion
from eldr.policies.load import PowerOfTwo, Random, RoundRobin, ShortestQueue
from eldr.policies.locality_band import LocalityBand

if TYPE_CHECKING:
    from eldr.calibration import Calibration


class PolicyError(EldrError):
    """A policy that does not exist or cannot be made from what was given."""


@dataclass(frozen=True, slots=True)
class _Options:
    calibration: Calibration | None
    tau: float
    two_nearest: bool
    seed: int
    cost: CostModel
    scope: str
    worker_costs: Mapping[str, CostModel]
    others_weight: float
    anchor: float
    tail_guard: float


def _locality_band(options: _Options) -> Policy:
    if options.calibration is None:
        raise PolicyError("policy locality-band needs a calibration file (eldr record, then eldr fit)")
    if not 0 <= options.tau < float("inf"):
        raise PolicyError(f"tau is {options.tau}, expected a number from 0")
    return LocalityBand(options.calibration, tau=options.tau, two_nearest=options.two_nearest, seed=options.seed)


def _expected_union(options: _Options) -> Policy:
    for name, value in (("others weight", options.others_weight), ("anchor", options.anchor)):
        if not 0 <= value < float("inf"):
            raise PolicyError(f"{name} is {value}, expected a number from 0")
    if not options.tail_guard >= 0:
        raise PolicyError(f"tail guard is {options.tail_guard}, expected a number from 0, or inf for none")
    return ExpectedUnion(
        None if options.calibration is None else options.calibration.predictor,
        cost=options.cost,
        scope=options.scope,
        worker_costs=options.worker_costs,
        others_weight=options.others_weight,
        anchor=options.anchor,
        tail_guard=options.tail_guard,
        seed=options.seed,
    )


_MAKERS: dict[str, Callable[[_Options], Policy]] = {
    "rr": lambda options: RoundRobin(),
    "random": lambda options: Random(options.seed),
    "p2c": lambda options: PowerOfTwo(options.seed),
    "jsq": lambda options: ShortestQueue(options.seed),
    "domain": lambda options: Domain(options.seed),
    "locality-band": _locality_band,
    "expected-union": _expected_union,
}

POLICY_NAMES: tuple[str, ...] = tuple(_MAKERS)


def make_policy(
    name: str,
    *,
    calibration: Calibration | None = None,
    tau: float = 0.1,
    two_nearest: bool = True,
    seed: int = 0,
    cost: CostModel = PRESETS[DEFAULT_PRESET],
    scope: str = "step",
    worker_costs: Mapping[str, CostModel] | None = None,
    others_weight: float = 1.0,
    anchor: float = ANCHOR,
    tail_guard: float = TAIL_GUARD,
) -> Policy:
    """The policy called `name`; options that it does not have are ignored.

    tau, two_nearest: of locality-band. cost, scope, worker_costs, others_weight, anchor, tail_guard: of
    expected-union, which needs no calibration. Raises PolicyError for an unknown name, a missing calibration or a bad
    number.
    """
    if name not in _MAKERS:
        raise PolicyError(f"there is no policy {name!r}; there are {', '.join(POLICY_NAMES)}")
    return _MAKERS[name](
        _Options(
            calibration, tau, two_nearest, seed, cost, scope, worker_costs or {}, others_weight, anchor, tail_guard
        )
    )
