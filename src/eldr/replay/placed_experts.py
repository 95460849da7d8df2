"""Places the experts of a worker by recorded traffic, and says what each placement is worth on requests held out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eldr.calibration import Calibration
from eldr.expert_ranks.eplb import eplb
from eldr.expert_ranks.placement import ExpertPlacement, contiguous
from eldr.expert_ranks.union_aware import union_aware
from eldr.replay.calibrations import check_calibration
from eldr.replay.errors import ReplayError
from eldr.replay.packed import pack_trace
from eldr.replay.ranks import FLEET_STEPS, REPLICAS, ExpertParallel, sampled_tokens
from eldr.trace import Trace


@dataclass(frozen=True, slots=True, eq=False)
class PlacedExperts:
    """A placement and what it is worth.

    placement: the union-aware one.
    worth: one row for each placement, redundant experts and choice of replica, JSON-serialisable. `busiest` is the
        mean of the experts that the busiest rank reads in a layer of a step, on the requests held out.
    distinct: the mean of the distinct experts of these steps in a layer. No placement without copies is better than
        `distinct` / ranks.
    """

    placement: ExpertPlacement
    worth: list[dict[str, Any]]
    distinct: float


def place_experts(
    trace: Trace,
    chosen: NDArray[np.int64],
    ranks: int,
    redundant: int,
    batch: int,
    held_out: float,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> PlacedExperts:
    """Fit placements to random batches of some requests, and measure them on those of the others.

    chosen: indices of the requests that are this worker's traffic.
    held_out: the share of them to measure on, above 0 and below 1.
    progress: as in `union_aware`.

    Raises ReplayError if either part has no decode step, PlacementError if the experts do not fill the ranks.
    """
    packed = pack_trace(trace)
    rng = np.random.default_rng(seed)
    order = rng.permutation(chosen[[packed.steps(int(request)) > 0 for request in chosen]])
    cut = round(len(order) * held_out)
    if not 0 < cut < len(order):
        raise ReplayError(
            f"of {len(order)} requests with decode steps, a share of {held_out:g} leaves none to place experts by, or "
            "none to hold out"
        )
    past = sampled_tokens(packed, order[cut:], batch, FLEET_STEPS, rng)
    later = sampled_tokens(packed, order[:cut], batch, FLEET_STEPS, rng)
    active, load = (past > 0).astype(np.uint8), past.sum(axis=0, dtype=np.float64)
    layers, experts = packed.layers, packed.experts
    best = union_aware(active, ranks, redundant, progress)
    placements = {
        "contiguous": contiguous(layers, experts, ranks, redundant),
        "eplb": eplb(load, ranks, redundant),
        "union-aware": best,
    }
    worth = []
    if redundant and experts % ranks == 0:
        worth.append(_worth("contiguous", contiguous(layers, experts, ranks), ExpertParallel(), later))
    worth += [
        _worth(name, placement, ExpertParallel(name, "fleet", redundant, replica), later)
        for name, placement in placements.items()
        for replica in (REPLICAS if redundant else REPLICAS[:1])
    ]
    return PlacedExperts(best, worth, float((later > 0).sum(axis=2).mean()))


def _worth(name: str, placement: ExpertPlacement, how: ExpertParallel, tokens: NDArray[np.uint8]) -> dict[str, Any]:
    busiest = float(how.choice(placement, 0).reads(tokens).mean()) / placement.layers
    replica = how.replica if how.redundant else None
    return {"placement": name, "redundant": how.redundant, "replica": replica, "busiest": busiest}


def requests_of(
    trace: Trace, labels: tuple[str, ...] | None, calibration: Calibration | None, zone: int | None
) -> NDArray[np.int64]:
    """The requests of a trace that one worker gets: those with these labels, in this zone of a calibration.

    The zone of a request is the nearest to the signature of its expert counts, as locality-band has it.

    Raises ReplayError for a label, zone or geometry that does not exist, or if there are none.
    """
    chosen = np.ones(trace.requests, dtype=np.bool_)
    for label in labels or ():
        if label not in trace.label:
            raise ReplayError(f"the trace has no request with the label {label!r}")
    if labels is not None:
        chosen &= np.isin(trace.label, labels)
    if calibration is not None:
        check_calibration(calibration, trace.meta)
        if zone is None or not 0 <= zone < calibration.workers:
            raise ReplayError(f"there is no zone {zone}; the calibration has the zones 0 to {calibration.workers - 1}")
        signatures = calibration.signature.transform(trace.prefill_counts)
        chosen &= (signatures @ calibration.centroids.T).argmax(axis=1) == zone
    if not chosen.any():
        raise ReplayError("no request of the trace is left; choose other labels or another zone")
    return np.flatnonzero(chosen)


def location_file(placement: ExpertPlacement, dense_layers: int) -> dict[str, list[list[int]]]:
    """What `--init-expert-location` of SGLang reads (`compute_initial_expert_location_metadata`).

    dense_layers: the layers without experts that come before those with. SGLang counts them too.
    """
    plain = contiguous(
        dense_layers, placement.experts, placement.ranks, placement.expert_of_slot.shape[1] - placement.experts
    )
    rows = [*plain.expert_of_slot.tolist(), *placement.expert_of_slot.tolist()]
    return {"physical_to_logical_map": rows}
