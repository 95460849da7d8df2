"""Workers killed, stopped, replaced, slow and failing under load: eldr beside other P/D routers, in one run.

    python benchmarks/faults/faults.py [--only eldr,sglang-router] [--scenarios kill,stop] [--seconds 15] [--json]

Every router gets the same seeded requests, half of them streamed, half chats, and every worker process meets the same
faults at the same times. Every answer is checked token by token. Figures: build/faults/summary.json.

exit codes: 0 eldr lost nothing that it need not lose, 1 it did (named), 2 wrong arguments.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console
from rich.progress import Progress

HERE = Path(__file__).parent
sys.path += [str(HERE.with_name("router")), str(HERE.with_name("soak"))]

from acts import SCENARIOS  # noqa: E402
from contenders import CONTENDERS, ROOT  # noqa: E402
from tally import losses, table, tally  # noqa: E402
from trial import Load, try_router  # noqa: E402

from eldr.fileio import write_atomically  # noqa: E402

ROUTERS = ("eldr", "sglang-router", "vllm-router")
OUT = ROOT / "build" / "faults"
Results = dict[str, dict[str, dict[str, Any] | None]]


async def run(names: list[str], scenarios: list[str], load: Load, console: Console) -> Results:
    """scenario -> router -> figures, None where the router cannot do what the scenario asks for."""
    results: Results = {}
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=len(scenarios) * len(names))
        for scenario in scenarios:
            results[scenario] = {}
            for name in names:
                progress.update(task, description=f"{scenario}: {name}")
                folder = OUT / scenario / name
                folder.mkdir(parents=True, exist_ok=True)
                trial = await try_router(name, SCENARIOS[scenario], load, folder)
                results[scenario][name] = None if trial is None else tally(trial)
                progress.advance(task)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(ROUTERS), help="routers, by commas")
    parser.add_argument("--scenarios", default=",".join(SCENARIOS), help="scenarios, by commas")
    parser.add_argument("--seconds", type=float, default=15.0, help="how long requests arrive, each time (15)")
    parser.add_argument("--rate", type=float, default=100.0, help="requests a second (100)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print the summary as JSON instead of a table")
    args = parser.parse_args()
    wanted, scenarios = args.only.split(","), args.scenarios.split(",")
    for name, known in [*((name, ROUTERS) for name in wanted), *((name, tuple(SCENARIOS)) for name in scenarios)]:
        if name not in known:
            parser.error(f"{name!r} is none of {', '.join(known)}")
    missing = [name for name in wanted if not CONTENDERS[name].installed]
    console = Console(stderr=args.json)
    load = Load(args.seconds, args.rate, args.seed)
    results = uvloop.run(run([name for name in wanted if name not in missing], scenarios, load, console))
    failed = {
        scenario: kinds
        for scenario, routers in results.items()
        if (found := routers.get("eldr")) and (kinds := {kind: count for kind, count in losses(found).items() if count})
    }
    summary = {
        "seconds": load.load_s,
        "requests_per_s": load.rate_per_s,
        "seed": load.seed,
        "missing": missing,
        "eldr_lost": failed,
        "scenarios": results,
    }
    OUT.mkdir(parents=True, exist_ok=True)
    text = json.dumps(summary, indent=1) + "\n"
    write_atomically(OUT / "summary.json", lambda file: file.write(text.encode()))
    if args.json:
        print(text)
    else:
        console.print(table(results))
    if missing:
        console.print(f"not installed, not tried: {', '.join(missing)}")
    for scenario, kinds in failed.items():
        print(
            f"faults: {scenario}: eldr: {', '.join(f'{count} {kind}' for kind, count in kinds.items())}",
            file=sys.stderr,
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
