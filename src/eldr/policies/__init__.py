"""Decode policies by name. A new policy is one file here and one line in `_MAKERS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from eldr.errors import EldrError
from eldr.policies.base import Policy
from eldr.policies.domain import Domain
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


def _locality_band(options: _Options) -> Policy:
    if options.calibration is None:
        raise PolicyError("policy locality-band needs a calibration file (eldr record, then eldr fit)")
    if not 0 <= options.tau < float("inf"):
        raise PolicyError(f"tau is {options.tau}, expected a number from 0")
    return LocalityBand(options.calibration, tau=options.tau, two_nearest=options.two_nearest, seed=options.seed)


_MAKERS: dict[str, Callable[[_Options], Policy]] = {
    "rr": lambda options: RoundRobin(),
    "random": lambda options: Random(options.seed),
    "p2c": lambda options: PowerOfTwo(options.seed),
    "jsq": lambda options: ShortestQueue(options.seed),
    "domain": lambda options: Domain(options.seed),
    "locality-band": _locality_band,
}

POLICY_NAMES: tuple[str, ...] = tuple(_MAKERS)


def make_policy(
    name: str,
    *,
    calibration: Calibration | None = None,
    tau: float = 0.1,
    two_nearest: bool = True,
    seed: int = 0,
) -> Policy:
    """The policy called `name`. Raises PolicyError for an unknown name, a missing calibration or a bad tau."""
    if name not in _MAKERS:
        raise PolicyError(f"there is no policy {name!r}; there are {', '.join(POLICY_NAMES)}")
    return _MAKERS[name](_Options(calibration, tau, two_nearest, seed))
