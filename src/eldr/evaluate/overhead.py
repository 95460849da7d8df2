"""The overhead of routing on experts: memory of the signature cache, capture, and the router's own time."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from eldr.counts import decode_counts, encode_counts
from eldr.evaluate.bench import Bench, Experiment, Part, Row
from eldr.kernels import COMPILED
from eldr.policies import make_policy
from eldr.policies.base import DecodeRequest

WORKERS = 32
IN_FLIGHT = 4
DECISIONS = 300
BLOCK_SIZES = (16, 32, 64, 128)


@dataclass(frozen=True, slots=True)
class CachedModel:
    """A published model's cache geometry.

    full_attention_layers: the layers whose blocks the rows are kept with.
    kv_bytes: bytes of one token in one such layer.
    """

    name: str
    moe_layers: int
    experts: int
    full_attention_layers: int
    kv_bytes: int


# From the models' published configurations. kv_bytes is keys and values, heads x head width x 2 bytes (bfloat16).
CACHED_MODELS = (
    CachedModel("Qwen3-30B-A3B", 48, 128, 48, 2 * 4 * 128 * 2),
    CachedModel("GPT-OSS-120B", 36, 128, 18, 2 * 8 * 64 * 2),
    CachedModel("OLMoE-1B-7B", 16, 64, 16, 2 * 16 * 128 * 2),
)


def _memory(bench: Bench, part: Part) -> list[Row]:
    """The size of a row of counts relative to its KV blocks.

    One byte per count, because blocks hold up to 255 tokens.
    """
    rows = []
    for model in CACHED_MODELS:
        for block in BLOCK_SIZES:
            row_bytes = model.moe_layers * model.experts
            block_bytes = block * model.full_attention_layers * model.kv_bytes
            share = 100 * row_bytes / block_bytes
            rows.append(
                {
                    "model": model.name,
                    "block_tokens": block,
                    "row_bytes": row_bytes,
                    "kv_block_bytes": block_bytes,
                    "share_percent": share,
                }
            )
    return rows


def _capture(bench: Bench, part: Part) -> list[Row]:
    """The time of the connector's own operations on this machine's CPU, in an interpreter that has PyTorch."""
    if bench.torch_python is None:
        return []
    command = [str(bench.torch_python), "-m", "eldr.evaluate.capture"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    rows: list[Row] = json.loads(done.stdout)
    return rows


def _decisions(bench: Bench, part: Part) -> list[Row]:
    """CPU time of the router's steps for one request, with the trace's own prompts and 32 workers."""
    laboratory = bench.laboratory
    split = laboratory.split(0)
    calibration = laboratory.calibration(min(WORKERS, len(split.calibrate)), 0)
    counts = [laboratory.packed.counts[request] for request in split.serve.tolist()]
    wires = [encode_counts(entry) for entry in counts]
    rows = [_row("counts: decode the wire form", [time_s(decode_counts, wire) for wire in wires])]
    for name, fitted in (
        ("jsq", None), ("locality-band", calibration), ("expected-union", calibration), ("expected-union-own", None)
    ):  # fmt: skip
        policy = make_policy(name.removesuffix("-own"), calibration=fitted)
        load = {f"w{worker}": IN_FLIGHT for worker in range(WORKERS)}
        for worker in load:
            policy.joined(worker)
        times: dict[str, list[float]] = {"choose": [], "started": [], "finished": []}
        running: list[tuple[DecodeRequest, str]] = []
        for number in range(DECISIONS):
            entry = counts[number % len(counts)]
            request = DecodeRequest(str(number), entry.prompt_tokens, entry)
            times["choose"].append(time_s(policy.choose, request, load))
            worker = f"w{number % WORKERS}"
            times["started"].append(time_s(policy.started, request, worker))
            running.append((request, worker))
            if len(running) > WORKERS * IN_FLIGHT:
                times["finished"].append(time_s(policy.finished, *running.pop(0)))
        rows += [_row(f"{name}: {step}", values) for step, values in times.items()]
    return rows


def time_s(call: Callable[..., object], *arguments: object) -> float:
    begin = time.thread_time_ns()  # CPU time, so that other work on the machine does not count
    call(*arguments)
    return (time.thread_time_ns() - begin) / 1e9


def _row(what: str, times_s: list[float]) -> Row:
    p50, p99 = (1e6 * np.percentile(times_s, (50, 99))).tolist()
    loops = "C" if COMPILED else "numpy"
    return {"what": what, "loops": loops, "workers": WORKERS, "calls": len(times_s), "p50_us": p50, "p99_us": p99}


MEMORY = Experiment("memory", lambda bench: [{}], _memory, once=True)
CAPTURE = Experiment("capture", lambda bench: [{}], _capture, once=True)
DECISIONS_TIME = Experiment("decisions", lambda bench: [{}], _decisions)
