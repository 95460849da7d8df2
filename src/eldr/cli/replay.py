"""`eldr replay`: compares policies on a trace and prints the results."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eldr.cli.arguments import count, words
from eldr.cli.json_output import write_json
from eldr.policies.options import PolicyOptions
from eldr.settings import add_flags, given

if TYPE_CHECKING:
    from collections.abc import Iterator

    from eldr.replay.changes import FleetChange, Slowdown
    from eldr.replay.experiment import Cell, Laboratory
    from eldr.replay.host_memory import HostLayout
    from eldr.replay.prompts import SharedPrefixes
    from eldr.replay.replicas import Sharing
    from eldr.replay.workload import ServedKind

EVICTIONS = ("lru", "lfu")
SUMMARY = "compare policies on a recorded trace, without a fleet"
EXAMPLES = """examples:
  eldr replay trace.npz --workers 8,16 --batch 7
  eldr replay trace.npz --policies locality-band,expected-union --workers 16 --rate 60 --seeds 10 --json results.json
  eldr replay trace.npz --workers 4 --batch 12 --calibrate-labels code,math --serve-labels medical,legal
  eldr replay trace.npz --workers 16 --goodput 30
  eldr replay trace.npz --workers 8 --fleet-change 0.3:-1,0.6:+1 --json -
  eldr replay trace.npz --policies jsq-speed,expected-union --worker-cost w0=h100.cost.json --learn-costs
  eldr replay trace.npz --slow w3=1.5@0.4-0.7 --learn-costs --json -
  eldr replay trace.npz --signature prompt --learn online --calibrate-fraction 0
  eldr replay trace.npz --workload task --kind math=gsm8k,mgsm --workers 16 --batch 5
  eldr replay trace.npz --aggregated --prompt-tokens azure_conv.csv --policies prefix-affinity,expected-union
  eldr replay trace.npz --replicas 1,2,4,8 --share-delay-ms 200 --policies expected-union,jsq
  eldr replay trace.npz --replicas 4 --share nothing
  eldr replay trace.npz --expert-parallel 4 --placement union-aware --placement-of worker
  eldr replay trace.npz --expert-parallel 4 --placement eplb --redundant 8 --replica fewest
  eldr replay trace.npz --resident 0.5 --miss-cost pcie4 --in-flight 32 --policies expected-union

The load balancers rr, random, p2c and jsq always run, and jsq-speed where workers differ, in a single router, because
changes are given against the best of them. "expected-union x4" is expected-union in four routers.
These policies exist only in the replay:
  expected-union-own   without a calibration
  expected-union-true  with the true decode profiles
  clairvoyant          greedy, with full knowledge of every running request

exit codes: 0 success, 2 bad input.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `eldr replay`."""
    flag = parser.add_argument
    flag("trace", type=Path, metavar="TRACE.npz", help="file made by `eldr record`")
    flag("--policies", type=words, default=("locality-band", "expected-union"), metavar="A,B",
         help="policies to compare (locality-band,expected-union)")  # fmt: skip
    flag("--workers", type=_whole_numbers, default=(8,), metavar="W[,W...]", help="number of decode workers (8)")
    load = parser.add_mutually_exclusive_group()
    load.add_argument("--rate", type=_positive, metavar="R", help="requests per second for the whole fleet")
    load.add_argument("--batch", type=_positive, metavar="B",
                      help="use the rate that gives this mean batch under jsq (7)")  # fmt: skip
    load.add_argument("--in-flight", type=_whole, metavar="N",
                      help="keep N requests in flight on the whole fleet: the next arrives when one ends")  # fmt: skip
    load.add_argument("--goodput", type=_positive, metavar="LIMIT_MS",
                      help="find the highest rate at which p99 TPOT stays within this limit")  # fmt: skip
    flag("--requests", type=_whole, default=2000, metavar="N", help="measured requests per run (2000)")
    flag("--max-output", type=_whole, metavar="T", help="cut requests after T generated tokens")
    flag("--seeds", type=_whole, default=5, metavar="S", help="paired runs per policy (5)")
    flag("--calibrate-fraction", type=float, default=0.5, metavar="F",
         help="share of the requests to calibrate on, which are not served; 0 for none (0.5)")  # fmt: skip
    flag("--calibrate-labels", type=words, metavar="A,B", help="calibrate only on requests with these labels")
    flag("--serve-labels", type=words, metavar="C,D", help="serve only requests with these labels")
    flag("--workload", metavar="NAME", help="serve the kinds and shares of a named workload (`eldr workload list`)")
    flag("--kind", action="append", default=[], metavar="KIND=LABEL[,LABEL...]",
         help="with --workload: the trace's labels that belong to this kind (repeatable)")  # fmt: skip
    flag("--switch-at", type=float, metavar="SHARE",
         help="serve --calibrate-labels until this share of the run, then --serve-labels")  # fmt: skip
    flag("--fleet-change", type=_changes, default=(), metavar="SHARE:+N[,SHARE:-N...]",
         help="at this share of the run, N workers join (+) or drain and leave (-)")  # fmt: skip
    flag("--slow", type=_slowdowns, default=(), metavar="WORKER=FACTOR@FROM-TO[,...]",
         help="steps of a worker, such as w3, take so many times as long between these shares of the run")  # fmt: skip
    flag("--learn-costs", action="store_true",
         help="do not tell policies --worker-cost: they learn step times from what workers report")  # fmt: skip
    flag("--learn", choices=("off", "online"), default="off",
         help="whether to learn from finished requests which experts prompts lead to (off)")  # fmt: skip
    flag("--learn-share", type=_share, default=1.0, metavar="SHARE",
         help="with --learn online: the share of the finished requests whose experts become known (1)")  # fmt: skip
    flag("--calibration", type=Path, metavar="FILE", help="use this file instead of calibrating on the trace")
    flag("--arrivals", default="poisson", metavar="poisson|trace|FILE",
         help="poisson, or recorded arrival times stretched to the rate: those of the trace, or of a .csv, .jsonl "
         "or text file (poisson)")  # fmt: skip
    flag(
        "--aggregated",
        action="store_true",
        help="every worker also computes the prompts of its requests, --prefill-chunk tokens a step",
    )
    flag("--prompt-tokens", default="trace", metavar="trace|FILE",
         help="lengths of the prompts: those of the trace, or of a .csv (Azure) or .jsonl file (Mooncake, with the "
         "prefixes that its prompts share) (trace)")  # fmt: skip
    flag(
        "--shared-prefixes",
        type=_prefixes,
        metavar="N:TOKENS",
        help="with --aggregated: prompts begin with one of N prefixes of so many tokens, the i-th as often as 1/i",
    )
    flag("--max-num-seqs", type=_whole, default=256, metavar="N", help="requests that a worker runs at once (256)")
    flag("--kv-tokens", type=_whole, metavar="N",
         help="tokens that a worker's KV cache holds, and its prefix cache (no limit)")  # fmt: skip
    flag("--placement", choices=("contiguous", "eplb", "union-aware"), default="contiguous",
         help="with --expert-parallel: which rank holds which experts: in their order, by EPLB (balanced tokens), or "
         "so that the busiest rank reads few (contiguous)")  # fmt: skip
    flag("--placement-of", choices=("fleet", "worker"), default="fleet",
         help="whose traffic places the experts: that of the calibration requests once, or again and again what each "
         "worker's steps used lately (fleet)")  # fmt: skip
    flag("--redundant", type=count, default=0, metavar="N",
         help="with --expert-parallel: redundant experts in each layer (0)")  # fmt: skip
    flag("--replica", choices=("random", "lp", "fewest"),
         help="with --redundant: which copy of an expert computes: one at random for each token, as vLLM has it, by "
         "LPLB's linear programme on tokens, or so that the busiest rank reads fewest, as METRO (random)")  # fmt: skip
    flag("--evict", choices=EVICTIONS,
         help="with --resident: what a device drops for an expert that is copied to it: what was used least recently "
         "(lru) or least often (lfu) (lru)")  # fmt: skip
    flag("--replicas", type=_whole_numbers, default=(1,), metavar="R[,R...]",
         help="number of routers, each with its own policy; a request goes to a random one (1)")  # fmt: skip
    flag("--share", choices=("all", "load", "nothing"),
         help="with --replicas: what routers know of each other's requests: all, only how many there are on which "
         "worker, or nothing (all)")  # fmt: skip
    flag("--share-delay-ms", type=_delay, metavar="MS", help="with --replicas: how late they know it (50)")
    flag("--json", metavar="FILE|-", help="write the results as JSON to a file, or to standard output (-)")
    add_flags(parser, PolicyOptions)


def run(arguments: argparse.Namespace) -> int:
    """Run `eldr replay` and return the exit code."""
    from rich.console import Console

    from eldr.replay.errors import ReplayError
    from eldr.replay.output import as_tables
    from eldr.synthetic import is_synthetic

    console = Console(stderr=arguments.json == "-")
    laboratory = _laboratory(arguments)
    sharings = _sharings(arguments)
    objects: list[dict[str, Any]] = []
    with _progress() as advance:
        for workers in arguments.workers:
            objects += (_goodput if arguments.goodput else _compare)(laboratory, workers, sharings, arguments, advance)
    options = laboratory.settings.options
    name = f"{arguments.trace.name} (synthetic)" if is_synthetic(laboratory.trace.meta.note) else arguments.trace.name
    title = f"{name}: {arguments.seeds} seeds, cost {options.cost.name} ({options.cost_scope})"
    if options.expert_parallel > 1:
        title += f", {laboratory.settings.ranks.shown(options.expert_parallel)}"
    console.print(*as_tables(objects, title))
    write_json(arguments.json, objects, "results", ReplayError)
    return 0


def _laboratory(arguments: argparse.Namespace) -> Laboratory:
    from eldr.calibration import load_calibration
    from eldr.replay.arrivals import read_arrivals
    from eldr.replay.errors import ReplayError
    from eldr.replay.experiment import Laboratory, Settings, check_names
    from eldr.replay.prompts import read_prompts
    from eldr.replay.ranks import ExpertParallel
    from eldr.replay.split import Mix
    from eldr.replay.worker import WorkerLimits
    from eldr.trace import read_trace

    check_names(arguments.policies)
    trace = read_trace(arguments.trace)
    recorded = None
    if arguments.arrivals == "trace":
        recorded = trace.arrival_s
        if recorded is None:
            raise ReplayError(f"{arguments.trace} has no arrival times; omit --arrivals trace")
    elif arguments.arrivals != "poisson":
        recorded = read_arrivals(Path(arguments.arrivals))
    if arguments.in_flight is not None and recorded is not None:
        raise ReplayError("--in-flight takes no --arrivals: a request arrives when another ends")
    options = PolicyOptions.from_settings(given(arguments, PolicyOptions))
    if arguments.shared_prefixes is not None and not arguments.aggregated:
        raise ReplayError("--shared-prefixes needs --aggregated")
    if arguments.aggregated and arguments.max_num_seqs > options.prefill_chunk:
        raise ReplayError(
            f"--prefill-chunk {options.prefill_chunk} is less than --max-num-seqs {arguments.max_num_seqs}: a step "
            "must have room for a token of every request"
        )
    if arguments.replica is not None and not arguments.redundant:
        raise ReplayError("--replica needs --redundant: without redundant experts there is nothing to choose")
    ranks = ExpertParallel(
        arguments.placement, arguments.placement_of, arguments.redundant, arguments.replica or "random"
    )
    most = max(arguments.workers) + sum(max(change.workers, 0) for change in arguments.fleet_change)
    for slowdown in arguments.slow:
        if slowdown.index >= most:
            raise ReplayError(f"--slow names {slowdown.worker}, but the last worker is w{most - 1}")
    kinds, output_tokens = _workload(arguments, trace.label.tolist())
    labels = tuple(label for kind in kinds for label in kind.labels) or None
    settings = Settings(
        requests=arguments.requests,
        max_output=arguments.max_output or output_tokens,
        mix=Mix(
            arguments.calibrate_fraction,
            labels or arguments.calibrate_labels,
            labels or arguments.serve_labels,
            arguments.switch_at,
        ),
        kinds=kinds,
        fleet_changes=arguments.fleet_change,
        slowdowns=arguments.slow,
        learn_costs=arguments.learn_costs,
        learn=arguments.learn,
        learn_share=arguments.learn_share,
        limits=WorkerLimits(arguments.max_num_seqs, arguments.kv_tokens),
        recorded_arrivals_s=recorded,
        options=options,
        aggregated=arguments.aggregated,
        recorded_prompts=None if arguments.prompt_tokens == "trace" else read_prompts(Path(arguments.prompt_tokens)),
        shared_prefixes=arguments.shared_prefixes,
        ranks=ranks,
        host_memory=_host_memory(arguments, options),
    )
    calibration = None if arguments.calibration is None else load_calibration(arguments.calibration)
    return Laboratory(trace, settings, calibration)


def _host_memory(arguments: argparse.Namespace, options: PolicyOptions) -> HostLayout | None:
    from eldr.replay.errors import ReplayError
    from eldr.replay.host_memory import HostLayout

    host, evict = options.host, arguments.evict
    if host is None:
        if evict is not None:
            raise ReplayError("--evict needs --resident: a device that holds all experts drops none")
        return None
    if host.computed and evict is not None:
        raise ReplayError(
            "--evict has no meaning with --miss-cost cpu: the device then holds the same experts for good"
        )
    return HostLayout(host, by_frequency=evict == "lfu")


def _sharings(arguments: argparse.Namespace) -> list[Sharing]:
    from eldr.replay.errors import ReplayError
    from eldr.replay.replicas import Sharing

    shared, delay_ms = arguments.share, arguments.share_delay_ms
    if max(arguments.replicas) == 1 and not (shared is None and delay_ms is None):
        raise ReplayError("--share and --share-delay-ms need --replicas: a single router has nobody to tell")
    if shared == "nothing" and delay_ms is not None:
        raise ReplayError("--share-delay-ms has no meaning with --share nothing")
    how = {} if delay_ms is None else {"delay_s": delay_ms / 1e3}
    return [Sharing(replicas, shared or "all", **how) for replicas in arguments.replicas]


def _workload(arguments: argparse.Namespace, labels: list[str]) -> tuple[tuple[ServedKind, ...], int | None]:
    """Return the kinds to serve and their output length, or nothing if no workload was named."""
    from eldr.replay.errors import ReplayError
    from eldr.replay.workload import ServedKind
    from eldr.workloads.presets import find_workload, kinds_of, labels_of_kinds

    if arguments.workload is None:
        if arguments.kind:
            raise ReplayError("--kind needs --workload")
        return (), None
    if arguments.calibrate_labels or arguments.serve_labels or arguments.switch_at is not None:
        raise ReplayError("--workload cannot be combined with --calibrate-labels, --serve-labels or --switch-at")
    preset = find_workload(arguments.workload)
    found = labels_of_kinds(preset, labels, kinds_of(arguments.kind))
    return tuple(ServedKind(kind.name, found[kind.name], kind.share) for kind in preset.kinds), preset.output_tokens


def _compare(
    laboratory: Laboratory,
    workers: int,
    sharings: list[Sharing],
    arguments: argparse.Namespace,
    advance: Callable[[int, int], None],
) -> list[dict[str, Any]]:
    from eldr.replay.experiment import compare, compared
    from eldr.replay.output import as_object, recoveries_s, timeline_ms

    rate: float | None
    if arguments.in_flight is not None:
        rate, batch = None, arguments.in_flight / workers
    elif arguments.rate is not None:
        rate = arguments.rate
        batch = laboratory.batch_at(rate, workers)
    else:
        batch = arguments.batch or 7.0
        rate = laboratory.rate_for_batch(batch, workers)
    arrivals = len(laboratory.workload(rate, workers * batch, 0).request)
    advance(0, arrivals * len(compared(arguments.policies, sharings, laboratory.settings.unequal)) * arguments.seeds)
    cells = compare(
        laboratory, arguments.policies, workers, rate, batch, arguments.seeds, lambda done: advance(done, 0), sharings
    )
    settings = laboratory.settings
    objects = [as_object(cell, cells, settings.options.cost_scope, settings.aggregated) for cell in cells]
    if arguments.switch_at is not None or arguments.fleet_change or arguments.slow:
        for entry, cell in zip(objects, cells, strict=True):
            entry["timeline_tpot_mean_ms"] = timeline_ms(cell)
            if arguments.fleet_change:
                entry["recovery_s"] = recoveries_s(cell, arguments.fleet_change)
    return objects


def _goodput(
    laboratory: Laboratory,
    workers: int,
    sharings: list[Sharing],
    arguments: argparse.Namespace,
    advance: Callable[[int, int], None],
) -> list[dict[str, Any]]:
    from eldr.replay.experiment import compared
    from eldr.replay.goodput import goodput
    from eldr.replay.output import as_object

    def search(name: str, sharing: Sharing) -> tuple[Cell, bool]:
        shared = laboratory.with_settings(dataclasses.replace(laboratory.settings, sharing=sharing))
        return goodput(shared, name, workers, arguments.goodput, arguments.seeds, lambda done: advance(done, done))

    names = compared(arguments.policies, sharings, laboratory.settings.unequal)
    found = [search(name, sharing) for name, sharing in names]
    cells = [cell for cell, _ in found]
    best = max(cell.rate for cell in cells if cell.is_baseline)
    objects = []
    for cell, reached in found:
        entry = as_object(cell, cells, laboratory.settings.options.cost_scope)
        # The cells have different rates here, so a change of TPOT between them would mean nothing.
        entry = {key: value for key, value in entry.items() if "vs_" not in key}
        entry |= {"goodput_limit_ms": arguments.goodput, "goodput_reached": reached}
        objects.append(entry | {"goodput_vs_best_baseline": 100 * (cell.rate / best - 1)})
    return objects


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar on standard error. Yields a function that takes (requests done, requests added)."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("replaying"), BarColumn(), TextColumn("{task.completed:.0f} requests"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=0)
        expected = 0

        def advance(done: int, more: int) -> None:
            nonlocal expected
            expected += more
            progress.update(task, advance=done, total=expected)

        yield advance


def _changes(text: str) -> tuple[FleetChange, ...]:
    from eldr.replay.changes import parse_changes
    from eldr.replay.errors import ReplayError

    try:
        return parse_changes(text)
    except ReplayError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _slowdowns(text: str) -> tuple[Slowdown, ...]:
    from eldr.replay.changes import parse_slowdowns
    from eldr.replay.errors import ReplayError

    try:
        return parse_slowdowns(text)
    except ReplayError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _prefixes(text: str) -> SharedPrefixes:
    from eldr.replay.prompts import SharedPrefixes

    count, colon, tokens = text.partition(":")
    if not colon:
        raise argparse.ArgumentTypeError(f"{text!r} is not N:TOKENS, such as 32:1024")
    return SharedPrefixes(_whole(count), _whole(tokens))


def _delay(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a time in milliseconds")
    return value


def _whole(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return value


def _whole_numbers(text: str) -> tuple[int, ...]:
    return tuple(_whole(part) for part in text.split(","))


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share above 0 and up to 1")
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value
