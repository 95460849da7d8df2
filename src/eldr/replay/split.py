"""Splits a trace into requests that calibrate and requests that are served."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eldr.replay.errors import ReplayError
from eldr.trace import Trace

Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Mix:
    """How a trace is split.

    calibrate_fraction: the share of requests to calibrate on, among kinds that are both calibrated on and served. 0
        calibrates on nothing.
    calibrate_labels, serve_labels: kinds of requests. None for all. A kind in only one of the two goes there entirely.
    switch_at: the share of the arrivals after which the served kinds change from calibrate_labels to serve_labels. None
        serves serve_labels throughout.
    """

    calibrate_fraction: float = 0.5
    calibrate_labels: tuple[str, ...] | None = None
    serve_labels: tuple[str, ...] | None = None
    switch_at: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Indices into the trace.

    calibrate: the requests to calibrate on.
    serve: the requests to serve.
    serve_before: the requests to serve before the switch. None without a switch.
    """

    calibrate: Indices
    serve: Indices
    serve_before: Indices | None = None


def split_trace(label: Sequence[str], steps: NDArray[np.int64], mix: Mix, rng: np.random.Generator) -> Split:
    """Split a trace at random. Requests without a decode step are never served.

    label: [N].
    steps: int64 [N], the decode steps of each request.
    Raises ReplayError for labels that the trace does not have, or if nothing is left to serve.
    """
    labels = np.asarray(label)
    for wanted in (mix.calibrate_labels, mix.serve_labels):
        _check_labels(labels, wanted)
    if not 0 <= mix.calibrate_fraction < 1:
        raise ReplayError(f"calibrate fraction {mix.calibrate_fraction}: expected a number of at least 0 and below 1")
    may_calibrate = _having(labels, mix.calibrate_labels)
    may_serve = _having(labels, mix.serve_labels)
    if mix.calibrate_fraction == 0:
        may_calibrate = np.zeros_like(may_calibrate)
    order = rng.permutation(len(labels))
    if mix.switch_at is None:
        shared, first = may_calibrate & may_serve, may_calibrate & ~may_serve
    else:  # the calibrated kinds are served before the switch, so all of them are shared
        shared, first = may_calibrate, np.zeros_like(may_calibrate)
    mixed = order[shared[order]]
    cut = round(len(mixed) * mix.calibrate_fraction)
    calibrate = np.sort(np.concatenate((mixed[:cut], np.flatnonzero(first))))
    free = np.ones(len(labels), dtype=bool)
    free[calibrate] = False
    free &= steps > 0
    serve = np.flatnonzero(may_serve & free)
    before = None
    if mix.switch_at is not None:
        if not 0 < mix.switch_at < 1:
            raise ReplayError(f"switch at {mix.switch_at}: expected a share of the run between 0 and 1")
        before = np.flatnonzero(_having(labels, mix.calibrate_labels) & free)
    if not len(serve) or (before is not None and not len(before)):
        raise ReplayError("no request is left to serve; lower the calibrate fraction or serve other labels")
    return Split(calibrate, serve, before)


def _having(labels: NDArray[np.str_], wanted: tuple[str, ...] | None) -> NDArray[np.bool_]:
    return np.ones(len(labels), dtype=bool) if wanted is None else np.isin(labels, wanted)


def _check_labels(labels: NDArray[np.str_], wanted: tuple[str, ...] | None) -> None:
    unknown = [label for label in wanted or () if not (labels == label).any()]
    if unknown:
        names, counts = np.unique(labels, return_counts=True)
        shown = ", ".join(f"{names[at]} ({counts[at]})" for at in np.argsort(-counts)[:12])
        raise ReplayError(f"the trace has no request with the label {unknown[0]!r}; it has {shown}")


def take_requests(trace: Trace, chosen: Indices) -> Trace:
    """Return a trace of only the chosen requests, for calibration. Gate scores and arrival times are dropped."""
    rows, decode_offsets = _taken(trace.decode_offsets, chosen)
    text, text_offsets = trace.prompt_text, trace.prompt_text_offsets
    if text is not None and text_offsets is not None:
        index, text_offsets = _taken(text_offsets, chosen)
        text = text[index]
    return Trace(
        prefill_counts=trace.prefill_counts[chosen],
        prompt_tokens=trace.prompt_tokens[chosen],
        decode_experts=trace.decode_experts[rows],
        decode_offsets=decode_offsets,
        label=trace.label[chosen],
        meta=trace.meta,
        prompt_text=text,
        prompt_text_offsets=text_offsets,
    )


def _taken(offsets: NDArray[np.int64], chosen: Indices) -> tuple[Indices, NDArray[np.int64]]:
    """Indices of what `offsets` [N + 1] give to the chosen requests, one request after the other, and new offsets."""
    lengths = offsets[chosen + 1] - offsets[chosen]
    ends = np.cumsum(lengths)
    index = np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(offsets[chosen] - (ends - lengths), lengths)
    return index, np.concatenate(([0], ends)).astype(np.int64)
