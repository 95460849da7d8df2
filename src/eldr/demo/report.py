"""Writes the demo's report: active experts and locality first, then all other measurements."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from eldr.demo.measure import PolicyRun, workers_per_kind
from eldr.demo.result import DemoResult
from eldr.load.outcome import Outcome, percentile_ms
from eldr.load.request import Request
from eldr.report.html import Html, Tile, figure, page, paragraph, row, section, table, tiles, write_page
from eldr.report.plots import COLOURS, bars, distributions, heat_map, scatter
from eldr.workloads.kinds import KINDS

SMALL_MODEL = (
    "The model is small and was trained for this demo: 3.5 million parameters, over bytes, on eight kinds of text. Its "
    "training rewards experts that follow the text, and half of the kinds have their own script. Its locality is "
    "therefore larger than a real model's. The demo shows that the mechanism works end to end on real engines, not how "
    "much it saves."
)
NO_SPEED = (
    "All engines share this machine's cores, and a CPU does not read expert weights the way a GPU does. These times "
    "show that requests flow. They are no evidence of speed, for or against any policy."
)
PROMPT_CHARS, OUTPUT_CHARS = 90, 60


def write_report(result: DemoResult, requests: list[Request], path: Path) -> None:
    """Write the report as one HTML file."""
    workers = [f"D{number}" for number in range(len(result.workers))]
    calibration = result.calibration
    document = page(
        "eldr demo",
        f"{len(result.runs)} policies with {len(requests)} streaming requests each, on real vLLM workers on the CPU: "
        f"1 prefill, {len(workers)} decode, NIXL hand-off. Model: {calibration.geometry}.",
        _headline(result),
        section(
            "Where each kind of prompt was decoded",
            paragraph(
                "Each cell counts the requests of one kind (row) that one decode worker served (column). No policy is "
                "told the kind, but locality-band sees which experts the prompt used."
            ),
            row(*(_placement(run, result.workers, workers) for run in result.runs)),
        ),
        section(
            "Distinct experts per decode step and MoE layer",
            paragraph(
                f"Mean of each decode worker's own counts, from 0 to {calibration.geometry.experts}. A step with fewer "
                "distinct experts reads fewer expert weights."
            ),
            row(_active_experts(result, workers), _zones(result)),
            paragraph(SMALL_MODEL, note=True),
        ),
        section("All figures", _figures(result)),
        section("Latency", paragraph(NO_SPEED, note=True), figure(_latency(result.runs))),
        section("Outputs", paragraph(_verdict(result)), _examples(result.runs[-1], requests)),
    )
    write_page(document, path)


def _headline(result: DemoResult) -> Html:
    check = result.check
    first, last = result.runs[0], result.runs[-1]
    before, after = first.active_experts_mean, last.active_experts_mean
    items = []
    if before and after and first is not last:
        change = f"active experts per decode step and layer ({100 * (after / before - 1):+.0f} %)"
        items.append(Tile(f"{before:.1f} → {after:.1f}", change, "accent"))
    spreads = [_spread(run, result.workers) for run in result.runs]
    if first is not last:
        caption = f"decode workers per kind of prompt, {first.policy} → {last.policy}"
        items.append(Tile(f"{spreads[0]} → {spreads[-1]}", caption, "accent"))
    ties = f"; {check.ties} ties of logits" if check.ties else ""
    requests = sum(len(run.outcomes) for run in result.runs)
    errors = sum(run.errors for run in result.runs)
    items += [
        Tile(
            f"{check.equal} of {check.total}",
            f"outputs equal to those of one plain vLLM worker{ties}",
            "bad" if check.differences else "good",
        ),
        Tile(str(errors), f"errors in {requests} requests", "bad" if errors else "good"),
    ]
    return tiles(items)


def _spread(run: PolicyRun, urls: list[str]) -> str:
    spread = workers_per_kind(run.placement(list(KINDS), urls))
    return "–" if spread is None else f"{spread:.1f}"


def _placement(run: PolicyRun, urls: list[str], workers: list[str]) -> Html:
    kinds = list(KINDS)
    return figure(heat_map(run.placement(kinds, urls), kinds, workers, COLOURS[1]), run.policy)


def _active_experts(result: DemoResult, workers: list[str]) -> Html:
    series = {}
    for run in result.runs:
        means = [run.active[url].mean if url in run.active else None for url in result.workers]
        series[run.policy] = [mean or 0.0 for mean in [*means, run.active_experts_mean]]
    return figure(bars(series, [*workers, "all"], "distinct experts"), "by decode worker, and over all of them")


def _zones(result: DemoResult) -> Html:
    picture = result.calibration.picture
    names = [f"zone {number}" for number in range(len(picture.centroids))]
    caption = f"signatures of the calibration prompts on two axes, rho = {result.calibration.signature.rho:.2f}"
    return figure(scatter(picture.points, picture.labels.tolist(), picture.centroids, names), caption)


def _figures(result: DemoResult) -> Html:
    head = ["policy", "requests", "errors", "active experts", "workers per kind"]
    head += ["TTFT p50 (ms) *", "TPOT p50 (ms) *", "TPOT p99 (ms) *", "ITL p50 (ms) *", "duration (s) *"]
    rows = [
        [
            run.policy,
            str(len(run.outcomes)),
            str(run.errors),
            "–" if run.active_experts_mean is None else f"{run.active_experts_mean:.2f}",
            _spread(run, result.workers),
            _ms(percentile_ms(run.ttft_s, 50)),
            _ms(percentile_ms(run.tpot_s, 50)),
            _ms(percentile_ms(run.tpot_s, 99)),
            _ms(percentile_ms(run.itl_s, 50)),
            f"{run.duration_s:.1f}",
        ]
        for run in result.runs
    ]
    return Html(table(head, rows) + paragraph("* no evidence of speed, see below"))


def _latency(runs: list[PolicyRun]) -> Html:
    panels = {
        "time to first token": {run.policy: _in_ms(run.ttft_s) for run in runs},
        "time per output token": {run.policy: _in_ms(run.tpot_s) for run in runs},
        "inter-token latency": {run.policy: _in_ms(run.itl_s) for run in runs},
    }
    return distributions(panels, "ms")


def _verdict(result: DemoResult) -> str:
    check = result.check
    text = f"{check.equal} of {check.total} outputs are equal to those of a single plain vLLM worker."
    if check.ties:
        text += f" {check.ties} differ by a tie: the reference's two largest logits are less than 1e-4 apart there."
    for difference in check.differences[:10]:
        text += f" Request {difference.number} under {difference.policy} differs: {difference.reason}."
    return text + " One request of each kind:"


def _examples(run: PolicyRun, requests: list[Request]) -> Html:
    outcomes: Mapping[int, Outcome] = {outcome.number: outcome for outcome in run.succeeded}
    shown: dict[str, list[str]] = {}
    for request in requests:
        outcome = outcomes.get(request.number)
        if outcome is not None and request.prompt.kind not in shown:
            prompt = request.prompt.text.strip()[-PROMPT_CHARS:]
            shown[request.prompt.kind] = [request.prompt.kind, f"… {prompt}", outcome.text[:OUTPUT_CHARS]]
    return table(["kind", "end of the prompt", "start of the output"], list(shown.values()), text=True)


def _in_ms(times_s: list[float]) -> list[float]:
    return [1000 * time_s for time_s in times_s]


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"
