"""Fuzz every target for a while, each in a process of its own: `python -m tests.fuzz.fuzz --seconds 120`.

libFuzzer (atheris) mutates inputs towards code not reached before, from the seeds in tests/fuzz/corpus and what earlier
runs found in build/fuzz. A failing input is written to build/fuzz/TARGET/crash-*; to run it again:
`python -m tests.fuzz.fuzz TARGET FILE`. Exit code 1 if anything failed.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
# The first argument of the processes that this one starts.
INSIDE = "--inside"
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "fuzz"


def main() -> int:
    if sys.argv[1:2] == [INSIDE]:
        return _fuzz_here(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0, help="time for all targets together (120)")
    parser.add_argument("--only", action="append", metavar="TARGET", help="this target alone (repeatable)")
    parser.add_argument("again", nargs="*", metavar="TARGET FILE", help="run one input again")
    arguments = parser.parse_args()
    from tests.fuzz.targets import TARGETS

    if arguments.again:
        name, file = arguments.again
        TARGETS[name](Path(file).read_bytes())
        print(f"{name}: nothing fails on {file}")
        return 0
    results = _fuzz_all(arguments.only or list(TARGETS), arguments.seconds)
    BUILD.mkdir(parents=True, exist_ok=True)
    (BUILD / "summary.json").write_text(json.dumps(results, indent=1))
    failed = [name for name, result in results.items() if result["crash"]]
    for name in failed:
        print(f"{name} failed; again with: python -m tests.fuzz.fuzz {name} {results[name]['crash']}")
    return 1 if failed else 0


def _fuzz_all(names: list[str], seconds: float) -> dict[str, dict[str, object]]:
    """Fuzz each target for its share of the time that is left, so that the last one gets as much as the first."""
    until_s = time.monotonic() + seconds
    start_s = 2.0  # what a process takes to begin; then what the one before took
    results: dict[str, dict[str, object]] = {}
    for number, name in enumerate(names):
        began_s = time.monotonic()
        share_s = max(1.0, (until_s - began_s) / (len(names) - number) - start_s)
        results[name] = _fuzz(name, share_s)
        start_s = max(0.0, time.monotonic() - began_s - share_s)
    return results


def _fuzz(name: str, seconds: float) -> dict[str, object]:
    """Run one target in a process; what it did."""
    found, crashes = BUILD / name / "found", BUILD / name
    found.mkdir(parents=True, exist_ok=True)
    before = set(crashes.glob("crash-*")) | set(crashes.glob("timeout-*")) | set(crashes.glob("oom-*"))
    command = [sys.executable, "-m", "tests.fuzz.fuzz", INSIDE, name, f"-max_total_time={max(1, round(seconds))}"]
    command += ["-timeout=10", "-rss_limit_mb=2048", "-max_len=16384", "-print_final_stats=1"]
    command += [f"-artifact_prefix={crashes}/", str(found), str(HERE / "corpus" / name)]
    started_s = time.monotonic()
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds * 2 + 120)
    new = [path for kind in ("crash", "timeout", "oom") for path in crashes.glob(f"{kind}-*") if path not in before]
    executed = re.search(r"stat::number_of_executed_units:\s+(\d+)", ended.stderr)
    runs = int(executed[1]) if executed else 0
    crash = str(new[0]) if new else None
    if ended.returncode and crash is None:
        crash = f"(exit code {ended.returncode})"
    print(
        f"{name:12} {runs:>9,} inputs in {time.monotonic() - started_s:5.1f} s  {crash or 'nothing failed'}", flush=True
    )
    if crash is not None:
        print(ended.stderr[-3000:], file=sys.stderr)
    return {"inputs": runs, "seconds": round(time.monotonic() - started_s, 1), "crash": crash}


def _fuzz_here(name: str, flags: list[str]) -> int:
    import atheris

    with atheris.instrument_imports(include=["eldr"]):
        from tests.fuzz.targets import TARGETS
    atheris.Setup([sys.argv[0], *flags], TARGETS[name])
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
