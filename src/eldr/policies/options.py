"""Everything that can be set about policies, in one object that the router and the replay share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from eldr.cost import DEFAULT_PRESET, PRESETS, CostModel, cost_from_wire, find_cost
from eldr.errors import EldrError
from eldr.policies.expected_union import ANCHOR, TAIL_GUARD

REFIT_WINDOW_S = 5.0
REFIT_LEAST_INTERVAL_S = 0.1


class PolicyError(EldrError):
    """A policy that does not exist or cannot be made from what was given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyOptions:
    """Options of all policies; each takes those that it has. Raises PolicyError or CostError for what cannot be used.

    Of locality-band:
    tau: width of the band in cosine similarity. two_nearest: whether a band of one takes the second-nearest worker in.

    refit_interval_s: time between two refits of the zones to recent requests, infinity for none. refit_window_s: how
        long ago recent is.

    Of expected-union:
    cost: step-time model of every decode worker; worker_costs: of single ones, worker -> model. cost_scope: "step" for
        whole decode steps, "moe" for the MoE layers alone, which is all that a measured file may have.
    others_weight: weight of what a placement adds to the requests already there.
    anchor: weight of the self-anchor, 0 for none.
    tail_guard: margin of the tail guard, in units of what locality saves; infinity for no guard.
    step_tokens: independent tokens that a step takes a request further, more than 1 with speculative decoding.
    expert_parallel: ranks that the experts of a decode worker are divided over.
    """

    tau: float = 0.1
    two_nearest: bool = True
    refit_interval_s: float = float("inf")
    refit_window_s: float = REFIT_WINDOW_S
    cost: CostModel = PRESETS[DEFAULT_PRESET]
    cost_scope: str = "step"
    worker_costs: Mapping[str, CostModel] = field(default_factory=dict)
    others_weight: float = 1.0
    anchor: float = ANCHOR
    tail_guard: float = TAIL_GUARD
    step_tokens: float = 1.0
    expert_parallel: int = 1

    def __post_init__(self) -> None:
        for name in ("tau", "others_weight", "anchor"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise PolicyError(f"{name} is {value}, expected a number from 0")
        if not self.tail_guard >= 0:
            raise PolicyError(f"tail_guard is {self.tail_guard}, expected a number from 0, or inf for none")
        if not 1 <= self.step_tokens < float("inf"):
            raise PolicyError(f"step_tokens is {self.step_tokens}, expected a number from 1")
        if type(self.expert_parallel) is not int or self.expert_parallel < 1:
            raise PolicyError(f"expert_parallel is {self.expert_parallel!r}, expected a whole number from 1")
        if not self.refit_interval_s >= REFIT_LEAST_INTERVAL_S:
            raise PolicyError(
                f"refit_interval_s is {self.refit_interval_s}, expected seconds from {REFIT_LEAST_INTERVAL_S:g} "
                "or inf for none"
            )
        if not 0 < self.refit_window_s < float("inf"):
            raise PolicyError(f"refit_window_s is {self.refit_window_s}, expected seconds above 0")
        for model in (self.cost, *self.worker_costs.values()):
            model.step_cost(1, self.cost_scope)

    @property
    def refits(self) -> bool:
        return self.refit_interval_s < float("inf")

    def of_expected_union(self) -> dict[str, Any]:
        """Keyword arguments of ExpectedUnion."""
        return {
            "cost": self.cost,
            "scope": self.cost_scope,
            "worker_costs": self.worker_costs,
            "others_weight": self.others_weight,
            "anchor": self.anchor,
            "tail_guard": self.tail_guard,
            "step_tokens": self.step_tokens,
            "ranks": self.expert_parallel,
        }

    def to_wire(self) -> dict[str, Any]:
        """JSON-able form; infinity, which JSON has not, is null."""
        wire = {name: getattr(self, name) for name in OPTION_NAMES}
        wire["cost"] = self.cost.to_wire()
        wire["worker_costs"] = {worker: model.to_wire() for worker, model in self.worker_costs.items()}
        return {name: None if value == float("inf") else value for name, value in wire.items()}

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> PolicyOptions:
        """Raises KeyError, TypeError, ValueError or EldrError for what is no wire form of options."""
        found: dict[str, Any] = {name: float("inf") if value is None else value for name, value in wire.items()}
        found["cost"] = cost_from_wire(found["cost"])
        found["worker_costs"] = {worker: cost_from_wire(cost) for worker, cost in found["worker_costs"].items()}
        return cls(**found)

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> PolicyOptions:
        """Options from flags or a configuration file, where cost models are given as presets or files."""
        return cls(**_with_models(settings))

    def changed(self, settings: Mapping[str, Any]) -> PolicyOptions:
        """These options but for what `settings` say, in the form of `from_settings`."""
        return replace(self, **_with_models(settings))


def _with_models(settings: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(settings)
    if "cost" in found:
        found["cost"] = find_cost(found["cost"])
    if "worker_costs" in found:
        found["worker_costs"] = {worker: find_cost(cost) for worker, cost in dict(found["worker_costs"]).items()}
    return found


OPTION_NAMES: tuple[str, ...] = tuple(option.name for option in fields(PolicyOptions))
