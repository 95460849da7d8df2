"""The messages between the connector's scheduler side and its worker side: a plan for each step, and its result."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorWorkerMetadata

from eldr.engines.vllm.hostcopy import HostCopy


@dataclass(frozen=True, slots=True)
class Geometry:
    """L MoE layers with E experts each. A token chooses top_k of them per layer."""

    layers: int
    experts: int
    top_k: int


@dataclass(slots=True)
class EndedPrefill:
    """A prompt whose last token is computed in this step, with its blocks and its length in tokens."""

    request_id: str
    blocks: list[int]
    tokens: int


@dataclass(slots=True)
class RecordedSpan:
    """Consecutive generated tokens of a request whose experts are wanted, as the slots that this step computes."""

    request_id: str
    first_position: int
    slots: list[int]


@dataclass(slots=True)
class StepPlan:
    """The scheduler's plan for one step.

    tokens: the number of tokens scheduled.
    taken: blocks from the pool that the step computes into.
    loaded: blocks that a KV load fills.
    ended: prompts whose last token is computed in this step.
    decode_slots: slots of the generated tokens among the step's tokens, drafts included, and slots of generated tokens
        that the step does not write to. None if all tokens are generated ones.
    padding: slots of tokens that are neither of the prompt nor generated.
    drafted: blocks with drafts, from the first step in which there are some.
    recorded: generated tokens of requests that are recorded or reported.
    deadlines_unix_s: for each pull that starts in this step, until when the prefill worker holds its blocks. None if
        the worker did not say.
    """

    tokens: int = 0
    taken: list[int] = field(default_factory=list)
    loaded: list[int] = field(default_factory=list)
    ended: list[EndedPrefill] = field(default_factory=list)
    decode_slots: list[int] | None = field(default_factory=list)
    padding: list[int] = field(default_factory=list)
    drafted: list[int] = field(default_factory=list)
    recorded: list[RecordedSpan] = field(default_factory=list)
    deadlines_unix_s: dict[str, float | None] = field(default_factory=dict)


@dataclass(slots=True)
class RecordedRows:
    """Experts [T, L, k] of the tokens of all spans of a step, one span after the other.

    spans: request, first position and number of tokens of each.
    """

    spans: list[tuple[str, int, int]]
    experts: HostCopy


@dataclass
class StepResult(KVConnectorWorkerMetadata):
    """What a worker read from one step: packed sums of BlockTable, by request, and recorded rows."""

    geometry: Geometry
    sums: dict[str, HostCopy] = field(default_factory=dict)
    rows: RecordedRows | None = None

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """Return this result unchanged. Only one rank of an engine counts, because every rank routes every token."""
        assert isinstance(other, StepResult)
        return StepResult(self.geometry, other.sums | self.sums, self.rows or other.rows)
