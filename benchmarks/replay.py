"""Speed and memory of the replay, and time of an expected-union decision. Run: python benchmarks/replay.py

Everything runs on made-up requests whose experts follow one of eight kinds; speed does not depend on what they are.
"""

from __future__ import annotations

import resource
import statistics
import time

import numpy as np
from numpy.typing import NDArray

from eldr.activation import ActivationModel
from eldr.counts import ExpertCounts
from eldr.policies import make_policy
from eldr.policies.base import DecodeRequest
from eldr.policies.expected_union import ExpectedUnion
from eldr.replay.experiment import Laboratory, Settings
from eldr.replay.split import Mix
from eldr.trace import Trace, TraceMeta


def made_up_trace(layers: int, experts: int, top_k: int, requests: int, steps: int, prompt_tokens: int) -> Trace:
    """Decode experts drawn from the eight kinds' weights (Gumbel top-k), prompt counts likewise."""
    rng = np.random.default_rng(0)
    weights = rng.normal(0, 2, (8, layers, experts)).astype(np.float32)
    decode = np.empty((requests * steps, layers, top_k), dtype=np.uint8)
    counts = np.zeros((requests, layers, experts), dtype=np.uint32)
    for request in range(requests):
        decode[request * steps : (request + 1) * steps] = _draw(rng, weights[request % 8], steps, top_k)
        for layer, chosen in enumerate(_draw(rng, weights[request % 8], prompt_tokens, top_k).swapaxes(0, 1)):
            counts[request, layer] = np.bincount(chosen.reshape(-1), minlength=experts)
    return Trace(
        prefill_counts=counts,
        prompt_tokens=np.full(requests, prompt_tokens, dtype=np.int32),
        decode_experts=decode,
        decode_offsets=np.arange(requests + 1, dtype=np.int64) * steps,
        label=np.array([f"kind {request % 8}" for request in range(requests)]),
        meta=TraceMeta("made up", layers, experts, top_k),
    )


def _draw(rng: np.random.Generator, weights: NDArray[np.float32], tokens: int, top_k: int) -> NDArray[np.uint8]:
    noisy = weights - np.log(rng.standard_exponential((tokens, *weights.shape), dtype=np.float32) + np.float32(1e-9))
    return np.argpartition(-noisy, top_k, axis=-1)[..., :top_k].astype(np.uint8)


def replay_speed(layers: int, experts: int, top_k: int) -> None:
    """Decode tokens replayed per second of one core, for jsq and for expected-union, 16 workers at batch 7."""
    trace = made_up_trace(layers, experts, top_k, requests=10_000_000 // layers // 200, steps=200, prompt_tokens=40)
    start = time.perf_counter()
    laboratory = Laboratory(trace, Settings(requests=3000, mix=Mix(0.2)))
    print(f"{layers} x {experts}: {len(trace.decode_experts)} rows packed in {time.perf_counter() - start:.2f} s")
    rate = laboratory.rate_for_batch(7, 16)
    for name in ("jsq", "expected-union-own"):
        start = time.process_time()
        result = laboratory.run(name, 16, rate, 7, seed=0)
        seconds = time.process_time() - start
        print(f"  {name}: {result.replayed_tokens / seconds:,.0f} tokens/s of CPU, {result.replayed_tokens} tokens")
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"  peak memory so far {peak_gib:.2f} GiB, the trace itself included")


def decision_time(workers: int, layers: int = 48, experts: int = 128, top_k: int = 8, rank: int = 16) -> None:
    """Median time of choose, started and finished, and of hearing of another router's request, with a predictor and
    without.
    """
    rng = np.random.default_rng(0)
    dimension = layers * experts

    def flat(*shape: int) -> NDArray[np.float32]:
        return rng.uniform(0, top_k / experts, (*shape, dimension)).astype(np.float32)

    model = ActivationModel(flat(), flat(), flat(), flat(rank), flat(rank), layers, top_k, 1.0, 0.5)
    requests = []
    for number in range(200):
        counts = np.zeros((layers, experts), dtype=np.uint32)
        for layer in range(layers):
            counts[layer] = np.bincount(rng.choice(experts, 500 * top_k), minlength=experts)
        requests.append(DecodeRequest(str(number), 500, ExpertCounts(counts, 500, top_k)))
    for kind, policy in (("predictor", ExpectedUnion(model)), ("own frequencies", make_policy("expected-union"))):
        load = {f"w{worker}": 3 for worker in range(workers)}
        for worker in load:
            policy.joined(worker)
        hooks = ("choose", "started", "finished", "elsewhere_started", "elsewhere_finished")
        times: dict[str, list[float]] = {hook: [] for hook in hooks}
        for number, request in enumerate(requests):
            marks = [time.perf_counter()]
            worker = policy.choose(request, load).worker
            marks.append(time.perf_counter())
            policy.started(request, worker)
            marks.append(time.perf_counter())
            share = policy.share(request, worker)
            assert share is not None
            if number % 2:
                policy.finished(request, worker)
            marks.append(time.perf_counter())
            policy.elsewhere_started(worker, share)
            marks.append(time.perf_counter())
            policy.elsewhere_finished(worker, share)
            marks.append(time.perf_counter())
            for values, first, last in zip(times.values(), marks, marks[1:], strict=False):
                values.append(last - first)
        shown = ", ".join(f"{name} {1e6 * statistics.median(values):.0f} us" for name, values in times.items())
        print(f"{layers} x {experts}, {workers} workers, {kind}: {shown}")


def main() -> None:
    for workers in (32, 1000):
        decision_time(workers)
    replay_speed(24, 32, 4)
    replay_speed(48, 128, 8)


if __name__ == "__main__":
    main()
