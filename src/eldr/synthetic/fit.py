"""Fits the model of traffic to a recorded trace.

Kinds, lengths, the main axes and the shape of popularity are read from the trace. The scales are found by trial: traces
are drawn at the recorded geometry and measured, and each scale is moved until what it governs measures as recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from eldr.synthetic.model import Geometry, Kind, SyntheticError, TrafficModel, draw_trace, is_synthetic
from eldr.synthetic.statistics import (
    AXES,
    Profiles,
    coordinates,
    cross_overlap,
    lag_overlap,
    layers_together,
    nearest_overlap,
    own_overlap,
    profiles_of,
    spectrum,
)
from eldr.trace import Trace

ROUNDS = 16
# Requests of a trial, and (row, layer, expert) at most.
TRIAL_REQUESTS = 160
TRIAL_SCORES = 2**25
LEAST_REQUESTS = 32
# Experts that nobody uses get this share of an even use.
RAREST = 0.01
# The covariance of a kind counts as so many requests of all kinds more.
COMMON_REQUESTS = 10.0
# Two requests drawn from one recorded one must not be copies.
LEAST_SCATTER = 0.5
# How far a scale moves of what would be right if everything else stood still, and at most.
STEP, MOST = 0.7, 2.0
# The largest scale of what a token is about. Beyond it choices hardly depend on it any more.
WIDEST = 4.0


@dataclass(frozen=True, slots=True)
class _Target:
    """What the scales govern. Each is positive, and grows with its scale if nothing else is said.

    kindness: overlap of one kind, beyond that of all, as a share of that of a request with itself.
    about, special: overlap of a request with itself beyond that of others, along each main axis and beside them.
    token: how much layers vary together beyond chance; overlap of neighbouring steps beyond that of near ones; of
        near ones beyond that of far ones.
    scatter: overlap of the most similar requests beyond that of all, as a share of that of a request with itself. It
        falls with its scale.
    prompt_own: overlap of a prompt with its decode beyond that with others, as a share of that of a decode with itself.
    prompt_popular: overlap of a prompt with other decodes beyond an even choice, as a share of that of decodes.
    """

    kindness: float
    about: NDArray[np.float64]
    special: float
    token: tuple[float, float, float]
    scatter: float
    prompt_own: float
    prompt_popular: float

    @classmethod
    def of(cls, trace: Trace, request: NDArray[np.int64]) -> _Target:
        profiles = profiles_of(trace, request)
        top_k, even = trace.meta.top_k, trace.meta.top_k / trace.meta.experts
        others = cross_overlap(profiles.whole, profiles.whole, top_k)
        same = profiles.label[:, None] == profiles.label
        kind = cross_overlap(profiles.whole, profiles.whole, top_k, same)
        own = max(own_overlap(profiles.first, profiles.second, top_k) - others, 1e-6)
        along = np.maximum(spectrum(profiles, top_k)[:AXES], 1e-4)
        lag = {at: lag_overlap(trace, profiles.request, at) for at in (1, 16)}
        together = layers_together(trace, profiles.request, np.random.default_rng(0))
        prompt = cross_overlap(profiles.prompt, profiles.whole, top_k)
        of_prompt = own_overlap(profiles.prompt, profiles.whole, top_k) - prompt
        values = (
            (kind - others) / own,
            own - float(along.sum()),
            together - 1,
            lag[1] - lag[16],
            lag[16] - others - own,
            (nearest_overlap(profiles, top_k) - others) / own,
            of_prompt / own,
            (prompt - even) / max(others - even, 1e-6),
        )
        kindness, special, early, middle, late, scatter, prompt_own, prompt_popular = (
            max(float(np.nan_to_num(value)), 1e-4) for value in values
        )
        return cls(kindness, along, special, (early, middle, late), scatter, prompt_own, prompt_popular)


def fit_traffic(
    trace: Trace, *, seed: int = 0, rounds: int = ROUNDS, progress: Callable[[str], None] | None = None
) -> TrafficModel:
    """Fit the model to a trace. The same trace and seed give the same model.

    rounds: how many traces are drawn to find the scales.
    progress: called before each with a description of it.
    Raises SyntheticError if the trace has too few requests, or is synthetic itself.
    """
    if is_synthetic(trace.meta.note):
        raise SyntheticError(f"the trace is {trace.meta.model!r}; fit a model to one that was recorded")
    usable = np.flatnonzero(np.diff(trace.decode_offsets) >= 2)
    if len(usable) < LEAST_REQUESTS:
        raise SyntheticError(
            f"{len(usable)} requests with at least two decode steps are too few to fit a model; record {LEAST_REQUESTS}"
        )
    geometry = Geometry(trace.meta.layers, trace.meta.experts, trace.meta.top_k)
    geometry.check()
    profiles = profiles_of(trace, usable)
    model = _read(trace, profiles, geometry)
    longest = int(np.diff(trace.decode_offsets).mean()) * geometry.layers * geometry.experts
    count = min(TRIAL_REQUESTS, len(usable), max(LEAST_REQUESTS, TRIAL_SCORES // longest))
    chosen = np.sort(np.random.default_rng(seed).choice(usable, count, replace=False))
    target = _Target.of(trace, chosen)
    for number in range(rounds):
        if progress is not None:
            progress(f"trial {number + 1} of {rounds}")
        drawn = draw_trace(model, count, seed=seed)
        model = _moved(model, target, _Target.of(drawn, np.arange(count)))
    return model


def _moved(model: TrafficModel, wanted: _Target, found: _Target) -> TrafficModel:
    """The model with each scale moved towards what is wanted. Overlaps go with the square of a scale."""

    def factor(want: float, have: float) -> float:
        return float(np.clip((want / have) ** (STEP / 2), 1 / MOST, MOST))

    early, middle, late = (
        scale * factor(want, have) for scale, want, have in zip(model.token, wanted.token, found.token, strict=True)
    )
    return replace(
        model,
        kindness=model.kindness * factor(wanted.kindness, found.kindness),
        about=model.about * np.clip((wanted.about / found.about) ** (STEP / 2), 1 / MOST, MOST),
        special=model.special * factor(wanted.special, found.special),
        token=(min(early, WIDEST), min(middle, WIDEST), min(late, WIDEST)),
        scatter=min(max(model.scatter * factor(found.scatter, wanted.scatter), LEAST_SCATTER), 1.0),
        prompt_own=min(model.prompt_own * factor(wanted.prompt_own, found.prompt_own) ** 2, 1.0),
        prompt_popular=min(model.prompt_popular * factor(wanted.prompt_popular, found.prompt_popular) ** 2, 1.0),
    )


def _read(trace: Trace, profiles: Profiles, geometry: Geometry) -> TrafficModel:
    """What is read from the trace as it is. The scales are first guesses."""
    points = coordinates(profiles)
    points = (points - points.mean(axis=0)) / max(float(np.sqrt((points**2).sum(axis=1).mean())), 1e-12)
    steps = np.diff(trace.decode_offsets)[profiles.request]
    lengths = np.stack((trace.prompt_tokens[profiles.request], steps), axis=1).astype(np.int64)
    labels = np.unique(profiles.label).tolist()
    inside = {label: profiles.label == label for label in labels}
    left = points - np.stack([points[inside[label]].mean(axis=0) for label in profiles.label.tolist()])
    common = left.T @ left / max(len(left) - len(labels), 1)
    kinds = []
    for label in labels:
        own = left[inside[label]]
        n = len(own)
        covariance = (own.T @ own + COMMON_REQUESTS * common) / (n + COMMON_REQUESTS)
        values, vectors = np.linalg.eigh(covariance)
        root = vectors * np.sqrt(np.maximum(values, 0))
        centre = points[inside[label]].mean(axis=0)
        kinds.append(Kind(label, n / len(points), centre, own, root, lengths[inside[label]]))
    mean = profiles.whole.mean(axis=0).astype(np.float64)
    use = np.sort(mean * (geometry.experts / geometry.top_k), axis=1)
    deviations = profiles.first.astype(np.float64) - profiles.first.mean(axis=0)
    other = profiles.second.astype(np.float64) - profiles.second.mean(axis=0)
    varied = np.sqrt(np.maximum((deviations * other).sum(axis=(0, 2)), 1e-12))
    return TrafficModel(
        source=trace.meta.model or "an unnamed model",
        geometry=geometry,
        kinds=tuple(kinds),
        use=np.maximum(use, RAREST),
        about=np.ones(AXES),
        request_of_layer=varied / max(float(varied.mean()), 1e-9),
    )
