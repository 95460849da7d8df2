"""What the scheduler's side of the connector tells the worker's side for one step, and what comes back."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorWorkerMetadata

from eldr.engines.vllm.hostcopy import HostCopy


@dataclass(frozen=True, slots=True)
class Geometry:
    """L MoE layers with E experts each, of which a token chooses top_k."""

    layers: int
    experts: int
    top_k: int


@dataclass(slots=True)
class EndedPrefill:
    """A prompt whose last token is computed in this step: its blocks and its length in tokens."""

    request_id: str
    blocks: list[int]
    tokens: int


@dataclass(slots=True)
class RecordedSpan:
    """Consecutive generated tokens of a recorded request: the slots that this step computes."""

    request_id: str
    first_position: int
    slots: list[int]


@dataclass(slots=True)
class StepPlan:
    """One step.

    tokens: tokens scheduled. taken: blocks from the pool that the step computes into, loaded: blocks that a KV load
    fills. decode_slots: slots of the generated tokens among the step's tokens, None if all are. deadlines_unix_s:
    for each pull that starts in this step, until when the prefill worker holds its blocks, None if it did not say.
    """

    tokens: int = 0
    taken: list[int] = field(default_factory=list)
    loaded: list[int] = field(default_factory=list)
    ended: list[EndedPrefill] = field(default_factory=list)
    decode_slots: list[int] | None = field(default_factory=list)
    recorded: list[RecordedSpan] = field(default_factory=list)
    deadlines_unix_s: dict[str, float | None] = field(default_factory=dict)


@dataclass(slots=True)
class RecordedRows:
    """Experts [T, L, k] of the tokens of one RecordedSpan."""

    first_position: int
    experts: HostCopy


@dataclass
class StepResult(KVConnectorWorkerMetadata):
    """What a worker read off one step: packed sums of BlockTable and recorded rows, by request."""

    geometry: Geometry
    sums: dict[str, HostCopy] = field(default_factory=dict)
    rows: dict[str, RecordedRows] = field(default_factory=dict)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """Only one rank of an engine counts (every rank routes every token), so there is nothing to add up."""
        assert isinstance(other, StepResult)
        return StepResult(self.geometry, other.sums | self.sums, other.rows | self.rows)
