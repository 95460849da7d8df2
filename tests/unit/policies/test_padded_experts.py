"""Models whose layers differ in experts: counts are padded with zeros, which must not change what policies do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from eldr.calibration import fit_calibration
from eldr.counts import ExpertCounts
from eldr.policies import PolicyOptions, make_policy
from eldr.policies.base import DecodeRequest
from eldr.policies.expected_union import ExpectedUnion
from eldr.trace import Trace, TraceMeta
from tests.synthetic import make_trace, prompts_of_kinds

PADDING = 40
WORKERS = ("a", "b", "c")


def padded(trace: Trace) -> Trace:
    meta = trace.meta
    counts = np.pad(trace.prefill_counts, ((0, 0), (0, 0), (0, PADDING)))
    return replace(
        trace,
        prefill_counts=counts,
        meta=TraceMeta(meta.model, meta.layers, meta.experts + PADDING, meta.top_k, meta.note),
    )


@pytest.fixture
def trace() -> Trace:
    return make_trace(requests=120, **prompts_of_kinds(120))


def requests(trace: Trace, *, computes_prompt: bool) -> list[DecodeRequest]:
    return [
        DecodeRequest(
            str(n),
            int(tokens),
            ExpertCounts(counts, int(tokens), trace.meta.top_k),
            computes_prompt=computes_prompt,
        )
        for n, (counts, tokens) in enumerate(zip(trace.prefill_counts, trace.prompt_tokens, strict=True))
    ]


def last_costs(trace: Trace, *, computes_prompt: bool) -> list[float]:
    """What the last request of a trace costs on each worker, after the others were placed by turns."""
    policy = ExpectedUnion()
    for worker in WORKERS:
        policy.joined(worker)
    *others, last = requests(trace, computes_prompt=computes_prompt)
    for n, request in enumerate(others):
        worker = WORKERS[n % 3]
        policy.started(request, worker)
        if n < len(others) - 12:
            policy.finished(request, worker)
    costs = policy.costs(last, {"a": 4, "b": 4, "c": 4})
    assert costs is not None
    return list(costs.values())


@pytest.mark.parametrize("computes_prompt", [False, True])
def test_costs_are_those_without_padding(trace: Trace, computes_prompt: bool) -> None:
    plain = last_costs(trace, computes_prompt=computes_prompt)
    # Probabilities are nowhere below 1e-4: of 12 requests, 40 experts more in 3 layers add up to 0.14 experts.
    assert last_costs(padded(trace), computes_prompt=computes_prompt) == pytest.approx(plain, rel=2e-3)
    assert len(set(plain)) == 3, "all workers cost the same"


def test_a_fit_is_the_one_without_padding(trace: Trace) -> None:
    with np.errstate(all="raise"):
        plain, wide = (fit_calibration(found, 3, seed=1) for found in (trace, padded(trace)))
    assert wide.rho == pytest.approx(plain.rho)
    assert wide.signature.layer_mask.tolist() == plain.signature.layer_mask.tolist()
    np.testing.assert_allclose(without_padding(wide.centroids, trace), plain.centroids, atol=1e-5)
    assert wide.predictor is not None
    assert plain.predictor is not None
    assert wide.predictor.r2 == pytest.approx(plain.predictor.r2, abs=0.01)
    assert np.isfinite(wide.predictor.slope).all()
    # Zones of signatures that words predict, in which unused experts would weigh most.
    assert wide.prompt_centroids is not None
    assert plain.prompt_centroids is not None
    assert not padding_of(wide.prompt_centroids, trace).any()
    np.testing.assert_allclose(without_padding(wide.prompt_centroids, trace), plain.prompt_centroids, atol=0.02)


def of_layers(centroids: NDArray[np.float32], trace: Trace) -> NDArray[np.float32]:
    return centroids.reshape(len(centroids), -1, trace.meta.experts + PADDING)


def without_padding(centroids: NDArray[np.float32], trace: Trace) -> NDArray[np.float32]:
    return of_layers(centroids, trace)[..., : trace.meta.experts].reshape(len(centroids), -1)


def padding_of(centroids: NDArray[np.float32], trace: Trace) -> NDArray[np.float32]:
    return of_layers(centroids, trace)[..., trace.meta.experts :]


def test_zones_are_chosen_as_without_padding(trace: Trace) -> None:
    chosen = []
    for found in (trace, padded(trace)):
        policy = make_policy("locality-band", PolicyOptions(), calibration=fit_calibration(found, 3, seed=1), seed=0)
        for worker in WORKERS:
            policy.joined(worker)
        load = dict.fromkeys(WORKERS, 1)
        chosen.append([policy.choose(request, load) for request in requests(found, computes_prompt=False)])
    assert chosen[0] == chosen[1]
