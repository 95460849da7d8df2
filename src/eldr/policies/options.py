"""The options of all policies, in one object that the router and the replay share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from eldr.cost import DEFAULT_PRESET, PRESETS, SCOPES, CostError, CostModel, cost_from_wire, find_cost
from eldr.errors import EldrError
from eldr.policies.expected_union import ANCHOR, PREFILL_CHUNK, PREFILL_WEIGHT, TAIL_GUARD
from eldr.policies.request_model import SIGNATURES
from eldr.policies.residents import HostShare, miss_ratio
from eldr.policies.worker_costs import WorkerCosts
from eldr.settings import SettingError, build, check, parsed, setting, text

BOTH = "Locality-band and expected-union"
BAND, UNION = "Locality-band", "Expected-union"


class PolicyError(EldrError):
    """A policy that does not exist, or that cannot be made from the options and files given."""


def cost_table(key: str, value: Any) -> dict[str, str]:
    """Worker -> preset or file. A configuration file gives a table, and flags give pairs. Raises SettingError."""
    of_flags = isinstance(value, list) and all(isinstance(pair, tuple) for pair in value)
    if not of_flags and not isinstance(value, Mapping):
        raise SettingError(f"{key} is {value!r}, expected a table: worker = cost file or preset")
    return {worker: text(f"{key} of {worker}", cost) for worker, cost in dict(value).items()}


def _cost(key: str, value: Any) -> CostModel:
    return find_cost(text(key, value))


def _costs(key: str, value: Any) -> dict[str, CostModel]:
    costs = {}
    for worker, cost in cost_table(key, value).items():
        try:
            costs[worker] = find_cost(cost)
        except CostError as error:
            raise CostError(f"{key} of {worker}: {error}") from None
    return costs


def _miss_cost(key: str, value: Any) -> str:
    found = str(value) if isinstance(value, int | float) and not isinstance(value, bool) else text(key, value)
    miss_ratio(found)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyOptions:
    """Options of all policies. Each policy uses its own and ignores the others.

    Raises PolicyError or CostError for a value that cannot be used.
    """

    signature: str = setting(
        "auto", "what requests are known by: the expert counts of their prompts, the words of their prompts, or counts "
        "where they came and else words", choices=SIGNATURES, flag=True, section=BOTH, page="prompt.md",
    )  # fmt: skip
    tau: float = setting(0.1, "width of the band, in cosine similarity", flag=True, section=BAND)
    two_nearest: bool = setting(True, "take the second-nearest worker into a band of one", flag=True, section=BAND)
    refit_interval_s: float = setting(
        float("inf"), "refit the zones to recent requests this often; inf for never",
        least=0.1, infinite=True, flag=True, section=BAND, page="policies.md#background-refit",
    )  # fmt: skip
    refit_window_s: float = setting(
        5.0, "how far back the requests go that a refit uses", least=0.01, flag=True, section=BAND
    )
    cost: CostModel = setting(
        PRESETS[DEFAULT_PRESET], "step-time model of the decode workers: a preset or a file from `eldr calibrate-cost`",
        parse=_cost, flag=True, metavar="FILE|PRESET", shown=DEFAULT_PRESET, section=UNION,
        page="replay.md#cost-models",
    )  # fmt: skip
    worker_costs: Mapping[str, CostModel] = setting(
        {}, "step-time model of one decode worker whose hardware differs",
        parse=_costs, flag="--worker-cost", metavar="WORKER=COST", section=UNION,
    )  # fmt: skip
    cost_scope: str = setting(
        "step",
        "what the step time covers: whole decode steps, or their MoE layers alone; measured files have only the latter",
        choices=SCOPES, flag=True, section=UNION,
    )  # fmt: skip
    others_weight: float = setting(
        1.0, "weight of the time that a placement adds to the requests there: 0.5 favours the tail, 2 the median",
        flag=True, section=UNION, page="policies.md#knobs",
    )  # fmt: skip
    anchor: float = setting(
        ANCHOR, "weight of sending a request where similar ones went recently; 0 turns it off", flag=True, section=UNION
    )
    tail_guard: float = setting(
        TAIL_GUARD, "how much longer than the mean a step may become, in units of the time that locality saves; "
        "smaller favours the tail of TPOT, larger the median; inf turns it off",
        infinite=True, flag=True, section=UNION,
    )  # fmt: skip
    step_tokens: float = setting(
        1.0, "independent tokens that a request gains per step; above 1 with speculative decoding",
        least=1, flag=True, section=UNION,
    )  # fmt: skip
    expert_parallel: int = setting(
        1, "number of ranks that share the experts of a decode worker",
        least=1, most=1024, flag=True, metavar="R", section=UNION,
    )  # fmt: skip
    resident: float = setting(
        1.0, "share of the experts of each layer that a decode worker's device holds; the others are in the memory "
        "of its host",
        least=0.01, most=1, flag=True, metavar="SHARE", section=UNION, page="policies.md#experts-in-host-memory",
    )  # fmt: skip
    miss_cost: str = setting(
        "pcie5", "what an expert costs that the device does not hold: a copy over pcie5 or pcie4, the host's cpu, or "
        "the time of a copy divided by that of reading the expert on the device",
        parse=_miss_cost, flag=True, metavar="pcie5|pcie4|cpu|RATIO", section=UNION,
        page="policies.md#experts-in-host-memory",
    )  # fmt: skip
    prefill_weight: float = setting(
        PREFILL_WEIGHT, "weight of the time that a prompt costs if its worker computes it: 1 is its true share, more "
        "favours TTFT",
        flag=True, section=UNION, page="policies.md#prompts-that-workers-compute",
    )  # fmt: skip
    prefill_chunk: int = setting(
        PREFILL_CHUNK, "tokens that an aggregated worker computes in a step, at most, decodes included: vLLM's "
        "`--max-num-batched-tokens`",
        least=1, flag=True, metavar="TOKENS", section=UNION, page="policies.md#prompts-that-workers-compute",
    )  # fmt: skip

    def __post_init__(self) -> None:
        try:
            check(self)
        except SettingError as error:
            raise PolicyError(str(error)) from None
        for model in (self.cost, *self.worker_costs.values()):
            model.step_cost(1, self.cost_scope)

    @property
    def host(self) -> HostShare | None:
        """How much of each layer the workers' devices hold. None if all."""
        return HostShare(self.resident, self.miss_cost) if self.resident < 1 else None

    @property
    def refits(self) -> bool:
        return self.refit_interval_s < float("inf")

    def step_costs(self) -> WorkerCosts:
        """The step times of all workers, as configured."""
        return WorkerCosts(self.cost, self.cost_scope, self.worker_costs, self.step_tokens, self.expert_parallel)

    def of_expected_union(self) -> dict[str, Any]:
        """Keyword arguments of ExpectedUnion."""
        return {
            "signature": self.signature,
            "cost": self.cost,
            "scope": self.cost_scope,
            "worker_costs": self.worker_costs,
            "others_weight": self.others_weight,
            "anchor": self.anchor,
            "tail_guard": self.tail_guard,
            "step_tokens": self.step_tokens,
            "ranks": self.expert_parallel,
            "host": self.host,
            "prefill_weight": self.prefill_weight,
            "prefill_chunk": self.prefill_chunk,
        }

    def to_wire(self) -> dict[str, Any]:
        """The form for JSON. Infinity becomes null, because JSON has none."""
        wire = {option.name: getattr(self, option.name) for option in fields(self)}
        wire["cost"] = self.cost.to_wire()
        wire["worker_costs"] = {worker: model.to_wire() for worker, model in self.worker_costs.items()}
        return {name: None if value == float("inf") else value for name, value in wire.items()}

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> PolicyOptions:
        """Read the form that `to_wire` writes. Raises KeyError, TypeError, ValueError or EldrError for any other."""
        found: dict[str, Any] = {name: float("inf") if value is None else value for name, value in wire.items()}
        found["cost"] = cost_from_wire(found["cost"])
        found["worker_costs"] = {worker: cost_from_wire(cost) for worker, cost in found["worker_costs"].items()}
        return cls(**found)

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> PolicyOptions:
        """Make options from flags or a configuration file, where cost models are presets or files. Raises EldrError."""
        return build(cls, settings)

    def changed(self, settings: Mapping[str, Any]) -> PolicyOptions:
        """A copy of these options with `settings`, in the form of `from_settings`, changed. Raises EldrError."""
        return replace(self, **parsed(type(self), settings))
