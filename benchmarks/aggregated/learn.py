"""Aggregated stock workers, no connector: does learning from their own routed experts bring similar requests together?

Starts plain vLLM workers with --enable-return-routed-experts, and before them a router with jsq and one with
expected-union, in turns. Each router gets requests to learn from, and then as many to measure, whose clients keep the
experts of their own answers. From these and from the times of the requests, this script counts the distinct experts
that each worker's running requests used at the same time. Every answer must equal that of a worker alone.

On a CPU, vLLM states routed experts up to 0.30:

    python benchmarks/aggregated/learn.py --python .envs/vllm-0.30/bin/python
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import numpy as np
from numpy.typing import NDArray

from eldr.demo.model import write_model
from eldr.demo.ports import free_ports
from eldr.demo.prompts import make_prompts
from eldr.demo.workers import WorkerProcess, WorkerSpec
from eldr.routed_experts import decode_npy

POLICIES = ("jsq", "expected-union")
SAMPLE_S = 0.005


class Finished(NamedTuple):
    """One answered request. experts: [decode rows, layers, top-k], None unless its client asked for them."""

    name: str
    text: str
    began_s: float
    ended_s: float
    experts: NDArray[np.int64] | None


async def ask(session: aiohttp.ClientSession, url: str, name: str, prompt: str, tokens: int, keep: bool) -> Finished:
    body: dict[str, Any] = {"model": "small", "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    if keep:
        body["routed_experts_prompt_start"] = 0
    began_s = time.monotonic()
    async with session.post(f"{url}/v1/completions", json=body, headers={"X-Request-Id": name}) as answer:
        found = await answer.json()
        if answer.status != 200:
            raise SystemExit(f"{url} answered {answer.status}: {found}")
    choice = found["choices"][0]
    rows = None
    if keep:
        rows = decode_npy(choice["routed_experts"].encode())[found["usage"]["prompt_tokens"] :].astype(np.int64)
    return Finished(name, choice["text"], began_s, time.monotonic(), rows)


async def ask_all(url: str, names: str, prompts: list[str], tokens: int, at_once: int, keep: bool) -> list[Finished]:
    slots = asyncio.Semaphore(at_once)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(600)) as session:

        async def one(number: int, prompt: str) -> Finished:
            async with slots:
                return await ask(session, url, f"{names}-{number}", prompt, tokens, keep)

        return await asyncio.gather(*(one(number, prompt) for number, prompt in enumerate(prompts)))


def distinct(finished: list[Finished], worker_of: dict[str, str], layers: int, experts: int) -> tuple[float, float]:
    """Distinct experts per layer, and requests, that run on a worker at the same time, averaged over busy moments."""
    first, last = (np.percentile([one.began_s for one in finished], percent) for percent in (10, 90))
    unions, batches = [], []
    for now_s in np.arange(first, last, SAMPLE_S):
        running: dict[str, list[Finished]] = {}
        for one in finished:
            if one.began_s <= now_s < one.ended_s:
                running.setdefault(worker_of[one.name], []).append(one)
        for batch in running.values():
            active = np.zeros((layers, experts), dtype=bool)
            for one in batch:
                assert one.experts is not None
                row = int(len(one.experts) * (now_s - one.began_s) / (one.ended_s - one.began_s))
                np.put_along_axis(active, one.experts[min(row, len(one.experts) - 1)], True, axis=1)
            unions.append(active.sum() / layers)
            batches.append(len(batch))
    return float(np.mean(unions)), float(np.mean(batches))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--python", type=Path, required=True, help="interpreter of an environment with vLLM")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--requests", type=int, default=200, help="requests to learn from, and as many to measure")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--at-once", type=int, default=15)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="eldr-learn-") as folder:
        base = Path(folder)
        write_model(base / "model")
        shape = json.loads((base / "model" / "config.json").read_text())
        layers, experts, top_k = (shape[key] for key in ("num_hidden_layers", "num_experts", "num_experts_per_tok"))
        ports = free_ports(arguments.workers + 1)
        workers = [
            WorkerProcess(
                WorkerSpec(
                    "plain",
                    port,
                    0,
                    base / "model",
                    "small",
                    arguments.python.absolute(),
                    base / f"{port}.log",
                    extra_args=("--enable-return-routed-experts",),
                )
            )
            for port in ports[1:]
        ]
        try:
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.wait_ready(300)
            for round_ in range(arguments.rounds):
                for policy in POLICIES:
                    measure(arguments, base, workers, ports[0], policy, round_, layers, experts, top_k)
        finally:
            for worker in workers:
                worker.stop()


def measure(
    arguments: argparse.Namespace, base: Path, workers: list[WorkerProcess], port: int, policy: str, round_: int,
    layers: int, experts: int, top_k: int,
) -> None:  # fmt: skip
    log = base / f"decisions-{policy}-{round_}.jsonl"
    command = [sys.executable, "-m", "eldr", "serve", "--port", str(port), "--policy", policy]
    command += ["--decision-log", str(log), "--routed-experts-share", "1", "--signature", "prompt"]
    command += ["--expert-geometry", f"{layers}x{experts}x{top_k}"]
    command += [text for worker in workers for text in ("--worker", worker.url)]
    url = f"http://127.0.0.1:{port}"
    router = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        asyncio.run(wait_ready(url))
        prompts = [prompt.text for prompt in make_prompts(2 * arguments.requests, seed=round_)]
        teach, measured = prompts[: arguments.requests], prompts[arguments.requests :]
        asyncio.run(ask_all(url, f"teach-{round_}", teach, arguments.tokens, arguments.at_once, False))
        time.sleep(3)  # for the last fit
        finished = asyncio.run(ask_all(url, f"measured-{round_}", measured, arguments.tokens, arguments.at_once, True))
        alone = asyncio.run(ask_all(workers[0].url, "alone", measured[:40], arguments.tokens, 4, False))
    finally:
        router.terminate()
        router.wait()
    equal = sum(one.text == other.text for one, other in zip(finished, alone, strict=False))
    worker_of: dict[str, str] = {}
    reasons: dict[str, int] = {}
    names: list[str] = []
    for line in log.read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "joined":
            names.append(event["worker"])
        elif event["event"] == "choose":
            worker_of[event["id"].partition("/")[0]] = event["worker"]
            if event["id"].startswith("measured"):
                reasons[event["reason"]] = reasons.get(event["reason"], 0) + 1
    union, batch = distinct(finished, worker_of, layers, experts)
    seconds = float(np.median([one.ended_s - one.began_s for one in finished]))
    print(
        f"{policy:16} round {round_}: {union:5.2f} distinct experts of {experts} per layer at batch {batch:.2f}, "
        f"median request {seconds:.2f} s, {equal} of {len(alone)} answers equal, reasons {reasons}",
        flush=True,
    )


async def wait_ready(url: str) -> None:
    async with aiohttp.ClientSession() as session:
        for _ in range(300):
            try:
                async with session.get(f"{url}/ready") as answer:
                    if answer.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.1)
    raise SystemExit("the router is not ready")


if __name__ == "__main__":
    main()
