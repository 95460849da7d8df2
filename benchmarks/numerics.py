"""Time and memory of the numerics: fitting signatures and zones, a decision of locality-band and one of expected-union.

Run from the repository: python benchmarks/numerics.py [fit zones decision union]. Each part runs in a process of its
own, so that its peak memory is its own; `fit` runs on one BLAS thread. Data is synthetic: requests of ten kinds, each
kind with its own preferred experts.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from eldr.calibration import Calibration, Geometry, Picture, fit_calibration
from eldr.counts import ExpertCounts
from eldr.policies import make_policy
from eldr.policies.base import DecodeRequest
from eldr.signature import SignatureModel
from eldr.trace import Trace, TraceMeta
from eldr.zones import balanced_kmeans

KINDS = 10
LAYERS, EXPERTS, TOP_K = 48, 128, 8


def preferences(rng: np.random.Generator) -> NDArray[np.float32]:
    """[KINDS, L, E] log-weights of the experts for each kind of request."""
    return rng.normal(0, 1.2, (KINDS, LAYERS, EXPERTS)).astype(np.float32)


def draw_experts(rng: np.random.Generator, weights: NDArray[np.float32], tokens: int) -> NDArray[np.uint8]:
    """[tokens, L, k]: for each token top-k of the weights plus Gumbel noise, which is sampling without replacement."""
    noise = rng.gumbel(size=(tokens, *weights.shape)).astype(np.float32)
    return np.argpartition(weights + noise, -TOP_K, axis=-1)[..., -TOP_K:].astype(np.uint8)


def make_trace(requests: int, prompt_tokens: int, decode_tokens: int) -> Trace:
    rng = np.random.default_rng(0)
    of_kind = preferences(rng)
    counts = np.zeros((requests, LAYERS, EXPERTS), dtype=np.uint32)
    rows = np.empty((requests * decode_tokens, LAYERS, TOP_K), dtype=np.uint8)
    kinds = rng.integers(KINDS, size=requests)
    for request, kind in enumerate(kinds):
        weights = of_kind[kind] + rng.normal(0, 0.5, (LAYERS, EXPERTS)).astype(np.float32)
        prompt = draw_experts(rng, weights, prompt_tokens)
        for layer in range(LAYERS):
            counts[request, layer] = np.bincount(prompt[:, layer].ravel(), minlength=EXPERTS)
        rows[request * decode_tokens : (request + 1) * decode_tokens] = draw_experts(rng, weights, decode_tokens)
    return Trace(
        prefill_counts=counts,
        prompt_tokens=np.full(requests, prompt_tokens, dtype=np.int32),
        decode_experts=rows,
        decode_offsets=np.arange(requests + 1, dtype=np.int64) * decode_tokens,
        label=np.array([f"kind{kind}" for kind in kinds]),
        meta=TraceMeta("synthetic", LAYERS, EXPERTS, TOP_K),
    )


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def bench_fit() -> None:
    trace = make_trace(1000, prompt_tokens=200, decode_tokens=64)
    profiles = trace.decode_profiles()
    start = time.perf_counter()
    model = SignatureModel.fit(trace.prefill_counts, profiles)
    signature_s = time.perf_counter() - start
    start = time.perf_counter()
    calibration = fit_calibration(trace, 16)
    whole_s = time.perf_counter() - start
    print(
        f"fit 1,000 x {LAYERS} x {EXPERTS}, one thread: signature model {signature_s:.2f} s ({model.layer_mask.sum()} "
        f"layers, rho {model.rho:.3f}); whole calibration, four transforms and 16 zones {whole_s:.2f} s; peak memory "
        f"with the trace {peak_gib():.2f} GiB; rho { ({name: round(rho, 3) for name, rho in calibration.rho.items()}) }"
    )


def bench_zones() -> None:
    requests, zones = 20_000, 16
    rng = np.random.default_rng(0)
    of_kind = np.exp(preferences(rng)).reshape(KINDS, -1)
    kinds = rng.choice(KINDS, requests, p=rng.dirichlet(np.full(KINDS, 0.7)))
    signatures = np.empty((requests, LAYERS * EXPERTS), dtype=np.float32)
    for request, kind in enumerate(kinds):
        signatures[request] = of_kind[kind] * rng.gamma(1.0, size=LAYERS * EXPERTS)
        signatures[request] /= np.linalg.norm(signatures[request])
    start = time.perf_counter()
    found = balanced_kmeans(signatures, zones)
    print(
        f"zones N {requests:,} x D {signatures.shape[1]:,}, K {zones}: {time.perf_counter() - start:.1f} s, sizes "
        f"{found.sizes.min()}..{found.sizes.max()}, mean distance {found.mean_distance:.4f}, peak memory "
        f"{peak_gib():.2f} GiB"
    )


def prompt_counts(rng: np.random.Generator) -> ExpertCounts:
    """Of a prompt of 500 tokens."""
    counts = np.zeros((LAYERS, EXPERTS), dtype=np.uint32)
    experts = draw_experts(rng, preferences(rng)[0], 500)
    for layer in range(LAYERS):
        counts[layer] = np.bincount(experts[:, layer].ravel(), minlength=EXPERTS)
    return ExpertCounts(counts, 500, TOP_K)


def bench_decision() -> None:
    rng = np.random.default_rng(0)
    counts = prompt_counts(rng)
    workers = 32
    centroids = rng.random((workers, LAYERS * EXPERTS), dtype=np.float32)
    centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
    idf = rng.random((LAYERS, EXPERTS), dtype=np.float32)
    model = SignatureModel("count_idf", idf, np.ones(LAYERS, dtype=bool), 0.8)
    nowhere = np.zeros((workers, 2), dtype=np.float32)
    zones = np.arange(workers)
    calibration = Calibration(
        signature=model,
        centroids=centroids,
        zone_sizes=np.ones(workers, dtype=np.int64),
        geometry=Geometry(LAYERS, EXPERTS, TOP_K),
        rho={"count_idf": model.rho},
        provenance={},
        picture=Picture(nowhere, zones, zones.astype(np.str_), nowhere),
    )
    policy = make_policy("locality-band", calibration=calibration)
    in_flight = {f"http://decode-{worker}:8000": int(rng.integers(100)) for worker in range(workers)}
    for worker in in_flight:
        policy.joined(worker)
    request = DecodeRequest("r", 500, counts)
    times_us = []
    for _ in range(5000):
        start = time.perf_counter()
        policy.choose(request, in_flight)
        times_us.append((time.perf_counter() - start) * 1e6)
    p50_us, p99_us = np.percentile(times_us, [50, 99])
    print(f"decision {LAYERS} x {EXPERTS}, {workers} workers: p50 {p50_us:.0f} us, p99 {p99_us:.0f} us")


def bench_union() -> None:
    rng = np.random.default_rng(0)
    workers = 16
    policy = make_policy("expected-union")
    in_flight = {f"http://decode-{worker}:8000": int(rng.integers(64)) for worker in range(workers)}
    for worker in in_flight:
        policy.joined(worker)
    request = DecodeRequest("r", 500, prompt_counts(rng))
    times_us = []
    for _ in range(20_000):
        start = time.perf_counter()
        worker = policy.choose(request, in_flight).worker
        policy.started(request, worker)
        policy.finished(request, worker)
        times_us.append((time.perf_counter() - start) * 1e6)
    p50_us, p99_us = np.percentile(times_us, [50, 99])
    print(
        f"expected-union {LAYERS} x {EXPERTS}, {workers} workers, choice, start and finish: p50 {p50_us:.1f} us, "
        f"p99 {p99_us:.1f} us"
    )


PARTS: dict[str, Callable[[], None]] = {
    "fit": bench_fit,
    "zones": bench_zones,
    "decision": bench_decision,
    "union": bench_union,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    unknown = [part for part in arguments.parts if part not in PARTS]
    if unknown:
        parser.error(f"there is no part {unknown[0]}")
    for part in arguments.parts or PARTS:
        if arguments.here:
            PARTS[part]()
            continue
        environment = os.environ | ({"OPENBLAS_NUM_THREADS": "1"} if part == "fit" else {})
        subprocess.run([sys.executable, __file__, "--here", part], env=environment, check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
