"""What sharing is worth on real vLLM workers: how many experts their decode steps activate behind one router and two.

    python benchmarks/peers/real.py [--rounds 3] [--requests 320] [--in-flight 40] [--decode-workers 4]
        [--vllm-python .envs/vllm-0.32/bin/python]

The fleet, the model and the prompts are those of `eldr demo`. Each round runs the same requests, in turn, through

    jsq, one router                    it looks at no experts
    expected-union, one router
    expected-union, two that share     with --peers and a NATS server; requests go to the one and the other in turn
    expected-union, two that do not    the same without --peers

A fixed number of requests is in flight over all workers, the same with each variant. Counted is what the workers do
from the end of the first so many requests, which begin all at once, until the last request begins. Such figures depend
little on how fast the machine is. Times would, and none is reported.

exit codes: 0 measured, 1 a worker or a router failed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import aiohttp
from peers import OUT as LOGS
from peers import ROOT, started, wait_for_port
from prometheus_client.parser import text_string_to_metric_families

from eldr.demo.engine_metrics import read_active_experts
from eldr.demo.load import make_requests
from eldr.demo.measure import ActiveExperts
from eldr.demo.model import write_model
from eldr.demo.ports import free_ports
from eldr.demo.processes import MODEL_NAME, Workers, running_router, running_workers
from eldr.demo.prompts import make_prompts
from eldr.load.client import Target, send
from eldr.load.request import Request

MAX_TOKENS = (96, 160)
OUT = ROOT / "build" / "bench-peers-real"
MEET_WITHIN_S = 30.0
WARM_UP_ROUNDS = 3
# Name -> policy, routers, whether they share.
VARIANTS = {
    "jsq, one router": ("jsq", 1, False),
    "expected-union, one router": ("expected-union", 1, False),
    "expected-union, two that share": ("expected-union", 2, True),
    "expected-union, two that do not": ("expected-union", 2, False),
}
Figures = dict[str, float]


class Counted:
    """What the decode workers have counted since they started. active: over steps and layers. tokens: generated."""

    def __init__(self, active: ActiveExperts, tokens: float) -> None:
        self.active = active
        self.tokens = tokens

    @staticmethod
    async def now(workers: Workers) -> Counted:
        active = await read_active_experts(workers.decode_urls)
        tokens = await asyncio.gather(*(sample(url, "vllm:generation_tokens_total") for url in workers.decode_urls))
        return Counted(sum(active.values(), ActiveExperts(0, 0)), sum(tokens))


async def sample(url: str, name: str, **labels: str) -> float:
    """The sum of a metric's samples that have the labels."""
    async with aiohttp.ClientSession() as session, session.get(f"{url}/metrics") as response:
        families = text_string_to_metric_families(await response.text())
    samples = [each for family in families for each in family.samples if each.name == name]
    return sum(each.value for each in samples if labels.items() <= each.labels.items())


async def measure(
    name: str, run: str, workers: Workers, requests: Sequence[Request], in_flight: int, layers: int
) -> Figures:
    """Run all requests through one variant. run: keeps its prompts apart from those that are cached.

    Returns active experts of a step and layer, experts that a layer reads for each token, and sequences in a step.
    """
    policy, routers, shares = VARIANTS[name]
    async with contextlib.AsyncExitStack() as stack:
        flags = ["--policy", policy]
        if shares:
            port = free_ports(1)[0]
            server = shutil.which("nats-server", path=str(ROOT / ".envs/dev/bin")) or "nats-server"
            stack.enter_context(started([server, "-a", "127.0.0.1", "-p", str(port)]))
            wait_for_port(port)
            flags += ["--peers", f"nats://127.0.0.1:{port}"]
        logs = [OUT / "logs" / f"{run}-{number}.log" for number in range(routers)]
        urls = [await stack.enter_async_context(running_router(workers, flags, log)) for log in logs]
        if shares:
            async with asyncio.timeout(MEET_WITHIN_S):
                for url in urls:
                    while await sample(url, "eldr_peers", state="synced") != routers - 1:
                        await asyncio.sleep(0.1)
        before, after = await load([Target(url, MODEL_NAME, run) for url in urls], workers, requests, in_flight)
    active, tokens = after.active - before.active, after.tokens - before.tokens
    steps = active.samples / layers
    return {
        "active_experts": active.total / active.samples,
        "sequences_per_step": tokens / steps,
        "experts_per_token": active.total / layers / tokens,
    }


async def load(
    targets: Sequence[Target], workers: Workers, requests: Sequence[Request], in_flight: int
) -> tuple[Counted, Counted]:
    """Send all requests, some at a time, to each target in turn. Returns the counts of its window."""
    waiting = iter(requests)
    spread, last_begun = asyncio.Event(), asyncio.Event()
    ended = 0

    async def client(session: aiohttp.ClientSession) -> None:
        nonlocal ended
        for request in waiting:
            outcome = await send(session, targets[request.number % len(targets)], request)
            if outcome.error is not None:
                raise SystemExit(f"request {request.number}: {outcome.error}")
            ended += 1
            if ended == in_flight:
                spread.set()
        last_begun.set()

    timeout = aiohttp.ClientTimeout(total=targets[0].timeout_s)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session, asyncio.TaskGroup() as clients:
        for _ in range(in_flight):
            clients.create_task(client(session))
        await spread.wait()
        before = await Counted.now(workers)
        await last_begun.wait()
        after = await Counted.now(workers)
    return before, after


async def measure_all(args: argparse.Namespace) -> dict[str, list[Figures]]:
    model = OUT / "model"
    for folder in (OUT / "logs", LOGS):
        folder.mkdir(parents=True, exist_ok=True)
    write_model(model)
    layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    requests = make_requests(make_prompts(args.requests, seed=args.seed), seed=args.seed, max_tokens=MAX_TOKENS)
    rounds: dict[str, list[Figures]] = {name: [] for name in VARIANTS}
    python = Path(args.vllm_python)
    async with running_workers(python, model, model, OUT / "logs", args.decode_workers, lambda: None) as workers:
        # Every decode worker connects to the prefill worker.
        async with running_router(workers, ["--policy", "rr"], OUT / "logs" / "warm-up.log") as url:
            count = WARM_UP_ROUNDS * args.decode_workers
            await load([Target(url, MODEL_NAME, "warm-up")], workers, requests[:count], args.decode_workers)
        for number in range(args.rounds):
            names = list(VARIANTS)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                run = f"round{number}-{names.index(name)}"
                found = await measure(name, run, workers, requests, args.in_flight, layers)
                rounds[name].append(found)
                print(f"round {number}, {name}: {found}", file=sys.stderr, flush=True)
                (OUT / "rounds.json").write_text(json.dumps(rounds, indent=1) + "\n")
    return rounds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=320, help="of each variant in each round")
    parser.add_argument("--in-flight", type=int, default=40, help="over all decode workers")
    parser.add_argument("--decode-workers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vllm-python", default=str(ROOT / ".envs/vllm-0.32/bin/python"))
    args = parser.parse_args()
    rounds = asyncio.run(measure_all(args))
    medians = {
        name: {key: statistics.median(each[key] for each in found) for key in found[0]}
        for name, found in rounds.items()
    }
    options = {key: getattr(args, key) for key in ("rounds", "requests", "in_flight", "decode_workers", "seed")}
    summary = {"options": options, "rounds": rounds, "medians": medians, "cores": os.cpu_count()}
    (OUT / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    base = medians["jsq, one router"]
    print("| | active experts of a step and layer | | experts read for each token | | sequences in a step |")
    print("|---|--:|--:|--:|--:|--:|")
    for name, median in medians.items():
        active, loads = (
            f"{median[key]:.2f} | {median[key] / base[key] - 1:+.0%}" for key in ("active_experts", "experts_per_token")
        )
        print(f"| {name} | {active} | {loads} | {median['sequences_per_step']:.1f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
