"""A soak of the router: steady load over a mock fleet whose workers are killed, stopped, added and drained at random.

    python benchmarks/soak/soak.py [--minutes 15] [--clients 48] [--policy expected-union]

Every answer is checked token by token and every request accounted for. At the end the fleet is brought back to what
it was, and the router must be too: memory flat, no task, descriptor or request in flight left. Exit code 1 and the
checks that failed otherwise. Figures: build/soak/summary.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import statistics
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import aiohttp
import uvloop
from asking import NEVER
from chaos import Chaos
from fleet import SoakFleet
from load import Load, Outcomes
from rich.live import Live
from rich.table import Table

from eldr.fileio import write_atomically

PREFILL, DECODE = 3, 5
SAMPLE_S = 2.0
# How long after something was done to a worker its streams may break: the longest silence that the router allows,
# and the sweep that finds it.
BLAME_S = 30.0
SETTLE_S = 20.0
# Memory of the last fifth of the run over that of the second fifth; allocators do not give everything back.
MOST_GROWTH_BYTES = 8 * 2**20
MOST_MORE_FDS = 4


def process_figures(pid: int) -> dict[str, int]:
    """Resident memory in bytes and open descriptors of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+)", status)
    assert found is not None
    return {"rss_bytes": int(found[1]) * 1024, "fds": len(list(Path(f"/proc/{pid}/fd").iterdir()))}


async def metrics(url: str) -> dict[str, float]:
    """Sums of the router's metrics over their labels."""
    sums: defaultdict[str, float] = defaultdict(float)
    async with aiohttp.ClientSession() as session, session.get(f"{url}/metrics") as answer:
        for line in (await answer.text()).splitlines():
            if line.startswith(("eldr_", "process_")):
                name, _, value = line.rpartition(" ")
                if name.startswith("eldr_request_total") and "/v1/completions" not in name:
                    continue
                sums[name.partition("{")[0]] += float(value)
    return dict(sums)


async def sample(fleet: SoakFleet, started_s: float) -> dict[str, float]:
    assert fleet.router is not None
    told = await metrics(fleet.url)
    names = ("eldr_tasks", "eldr_inflight", "eldr_admitted", "eldr_queued", "process_cpu_seconds_total")
    return {
        "time_s": time.monotonic() - started_s,
        **process_figures(fleet.router.pid),
        **{name: told[name] for name in names},
    }


def status_table(load: Load, chaos: Chaos, samples: list[dict[str, float]], left_s: float) -> Table:
    table = Table(title=f"soak, {max(0, left_s):.0f} s left", title_justify="left", show_header=False)
    table.add_row("requests", f"{load.outcomes.sent}  " + _listed(load.outcomes.ended))
    table.add_row("done to the fleet", _listed(chaos.done))
    if samples:
        last = samples[-1]
        table.add_row(
            "router",
            f"{last['rss_bytes'] / 2**20:.1f} MiB, {last['fds']} descriptors, {last['eldr_tasks']:.0f} tasks, "
            f"{last['eldr_inflight']:.0f} in flight, {last['eldr_queued']:.0f} queued",
        )
    return table


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))


async def soak(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    fleet = SoakFleet(folder, args.policy, PREFILL, DECODE)
    try:
        await fleet.start()
        await asyncio.sleep(SAMPLE_S)
        load, chaos = Load(fleet.url, args.clients, args.seed), Chaos(fleet, args.period, args.seed)
        before = await sample(fleet, time.monotonic())
        samples = await _run(args, fleet, load, chaos)
        after = await _settle(fleet, before)
        told = await metrics(fleet.url)
        whole = await _is_whole(fleet)
        code = fleet.end()
    except BaseException:
        fleet.end()
        raise
    checks = _checks(fleet, load.outcomes, samples, before, after, told) | {
        "the fleet is what it was": whole,
        "the router ended by itself": code == 0,
    }
    return {
        "minutes": args.minutes,
        "clients": args.clients,
        "policy": args.policy,
        "seed": args.seed,
        "requests": load.outcomes.sent,
        "tokens": load.outcomes.tokens,
        "ended": dict(sorted(load.outcomes.ended.items())),
        "errors": dict(sorted(load.outcomes.errors.items())),
        "done_to_the_fleet": dict(sorted(chaos.done.items())),
        "router": {
            name: told.get(f"eldr_{name}_total", 0.0)
            for name in ("request", "client_disconnects", "retries", "ejections", "broken_streams", "queue_refusals")
        },
        "before": before,
        "after": after,
        "rss_mib": _flatness(samples),
        "cpu_s": after["process_cpu_seconds_total"] - before["process_cpu_seconds_total"],
        "checks": checks,
        "examples": load.outcomes.examples,
        "samples": samples,
    }


async def _run(args: argparse.Namespace, fleet: SoakFleet, load: Load, chaos: Chaos) -> list[dict[str, float]]:
    started_s = time.monotonic()
    end_s = started_s + 60 * args.minutes
    samples: list[dict[str, float]] = []
    clients = asyncio.create_task(load.run())
    acts = asyncio.create_task(chaos.run(load.stop))
    with Live(refresh_per_second=1, transient=True) as live:
        while (now_s := time.monotonic()) < end_s:
            await asyncio.sleep(min(SAMPLE_S, end_s - now_s))
            samples.append(await sample(fleet, started_s))
            live.update(status_table(load, chaos, samples, end_s - time.monotonic()))
    load.stop.set()
    await acts
    await clients
    return samples


async def _settle(fleet: SoakFleet, before: dict[str, float]) -> dict[str, float]:
    """Bring the fleet back to its first size, and wait until the router has nothing left to do."""
    for role, count in (("prefill", PREFILL), ("decode", DECODE)):
        members = [member for member in fleet.members if member.role == role]
        for member in members[count:]:
            await fleet.drain(member)
        for _ in range(count - len(members)):
            await fleet.add(role)
    deadline_s = time.monotonic() + SETTLE_S
    while True:
        await asyncio.sleep(SAMPLE_S)
        after = await sample(fleet, time.monotonic())
        quiet = after["eldr_tasks"] == before["eldr_tasks"] and after["fds"] <= before["fds"]
        if time.monotonic() > deadline_s or (quiet and await _is_whole(fleet)):
            return after


async def _is_whole(fleet: SoakFleet) -> bool:
    """Whether the router has as many workers as at first, and all are up."""
    workers = (await fleet.admin("GET", "/admin/workers"))["workers"]
    return len(workers) == PREFILL + DECODE and all(worker["state"] == "up" for worker in workers)


def _flatness(samples: list[dict[str, float]]) -> dict[str, float]:
    """Median resident memory, MiB, of the second and of the last fifth of the run."""
    fifth = max(1, len(samples) // 5)
    early, late = samples[fifth : 2 * fifth] or samples, samples[-fifth:]
    return {
        name: round(statistics.median(each["rss_bytes"] for each in part) / 2**20, 2)
        for name, part in (("second_fifth", early), ("last_fifth", late))
    }


def _checks(
    fleet: SoakFleet,
    outcomes: Outcomes,
    samples: list[dict[str, float]],
    before: dict[str, float],
    after: dict[str, float],
    told: dict[str, float],
) -> dict[str, bool]:
    flat = _flatness(samples)
    spent = fleet.used.read_text().split()
    faults = {member.port: member.faults for member in (*fleet.members, *fleet.gone)}
    unblamed = [
        (when_s, port)
        for when_s, port in outcomes.broken
        if not any(0 <= when_s - fault_s <= BLAME_S and what != "drained" for fault_s, what in faults.get(port, ()))
        # A drain that took too long cuts off what still runs.
        and not any(when_s - fault_s >= 9 and what == "drained" for fault_s, what in faults.get(port, ()))
    ]
    counted = told.get("eldr_request_total", 0.0) + told.get("eldr_client_disconnects_total", 0.0)
    return {
        "every request ended": outcomes.sent == sum(outcomes.ended.values()),
        "no answer wrong, truncated, cut or hung": not any(outcomes.ended[name] for name in NEVER),
        "the router was always there": outcomes.ended["refused"] == 0,
        "streams broke only with their worker": not unblamed,
        "the router counted every request": counted == outcomes.sent,
        "no hand-off was used twice": len(spent) == len(set(spent)),
        "nothing is left in flight": after["eldr_inflight"] == after["eldr_admitted"] == after["eldr_queued"] == 0,
        "no task is left": after["eldr_tasks"] == before["eldr_tasks"],
        "no descriptor is left": after["fds"] <= before["fds"] + MOST_MORE_FDS,
        "memory is flat": (flat["last_fifth"] - flat["second_fifth"]) * 2**20 <= MOST_GROWTH_BYTES,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--clients", type=int, default=48, help="requests under way at a time (48)")
    parser.add_argument("--period", type=float, default=3.0, help="mean seconds between two acts on the fleet (3)")
    parser.add_argument("--policy", default="expected-union")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("build/soak"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    summary = uvloop.run(soak(args, args.output.absolute()))
    text = json.dumps(summary, indent=1) + "\n"
    write_atomically(args.output / "summary.json", lambda file: file.write(text.encode()))
    print(json.dumps({name: value for name, value in summary.items() if name != "samples"}, indent=1))
    failed = [name for name, passed in summary["checks"].items() if not passed]
    for name in failed:
        print(f"soak: not so: {name}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
