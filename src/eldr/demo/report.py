"""Writes the demo's report: the change of TPOT first, then what explains it, then all other measurements."""

from __future__ import annotations

from collections.abc import Mapping
from math import isnan
from pathlib import Path

from eldr.demo.change import in_words
from eldr.demo.measure import PolicyRun, workers_per_kind
from eldr.demo.result import DemoResult
from eldr.demo.step_cost import StepLine
from eldr.load.outcome import Outcome, mean_ms, percentile_ms
from eldr.load.request import Request
from eldr.report.html import Html, Tile, figure, page, paragraph, row, section, table, tiles, write_page
from eldr.report.plots import COLOURS, bars, distributions, heat_map, points_and_lines, scatter
from eldr.workloads.kinds import KINDS

SMALL_MODEL = (
    "The model is small and was trained for this demo: 3.5 million parameters, over bytes, on eight kinds of text. Its "
    "training rewards experts that follow the text, and half of the kinds have their own script. Its locality is "
    "therefore larger than a real model's. The demo shows that the mechanism works end to end on real engines, not how "
    "much it saves."
)
WHAT_SPEED_MEANS = (
    "The experts are padded with zeros, which changes no output. Stock vLLM on a CPU skips the experts that no token "
    "chose and reads the others whole, as on a GPU. So a step costs what its distinct experts weigh. The size of the "
    "change is this model's and this machine's: all engines share its cores, and what they do beside decoding takes "
    "its part of every step."
)
PROMPT_CHARS, OUTPUT_CHARS = 90, 60


def write_report(result: DemoResult, requests: list[Request], path: Path) -> None:
    """Write the report as one HTML file."""
    workers = [f"D{number}" for number in range(len(result.workers))]
    calibration = result.calibration
    document = page(
        "eldr demo",
        f"{len(result.runs)} policies in turns, with the same streaming requests for each in {result.measured_rounds} "
        f"rounds, on real vLLM workers on the CPU: 1 prefill, {len(workers)} decode, NIXL hand-off. Model: "
        f"{calibration.geometry}; {result.experts.in_words()}.",
        _headline(result),
        section(
            "What a decode step costs on this machine",
            paragraph(_line_in_words(result.step_line)),
            figure(_step_line(result.step_line), "time of a step of one decode worker, all other engines idle"),
            paragraph(WHAT_SPEED_MEANS, note=True),
        ),
        section(
            "Where each kind of prompt was decoded",
            paragraph(
                "Each cell counts the requests of one kind (row) that one decode worker served (column). No policy is "
                "told the kind, but locality-band and expected-union see which experts the prompt used."
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
        section("TPOT, round by round", figure(_rounds(result.runs), "p50 over the requests of a round")),
        section("Latency", figure(_latency(result.runs))),
        section("Outputs", paragraph(_verdict(result)), _examples(result.runs[-1], requests)),
    )
    write_page(document, path)


def _headline(result: DemoResult) -> Html:
    check = result.check
    first, last = result.runs[0], result.runs[-1]
    items = []
    for policy, figures in result.tpot_changes.items():
        change = figures["p50"]
        interval = "" if isnan(change.low) else f", {change.low:+.1f} to {change.high:+.1f}"
        caption = f"TPOT p50 of {policy} against {first.policy}{interval}; p99 {in_words(figures['p99'])}"
        items.append(Tile(f"{change.percent:+.1f} %", f"{caption}, mean {in_words(figures['mean'])}", "accent"))
    before, after = first.active_experts_mean, last.active_experts_mean
    if before and after and first is not last:
        text = f"active experts per decode step and layer ({100 * (after / before - 1):+.0f} %)"
        items.append(Tile(f"{before:.1f} → {after:.1f}", f"{text}, {first.policy} → {last.policy}", "accent"))
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


def _line_in_words(line: StepLine) -> str:
    return (
        f"{line.base_ms:.2f} ms + {line.per_expert_ms:.4f} ms x active experts, summed over {line.layers} MoE layers, "
        f"+ {line.per_token_ms:.2f} ms x requests in the batch. R2 {line.r2:.4f}. expected-union weighs its decisions "
        "with this line, which the file cost.json holds for --cost."
    )


def _step_line(line: StepLine) -> Html:
    """The measured steps, and the line for each size of batch."""
    points: dict[str, list[tuple[float, float]]] = {}
    for step in line.steps:
        points.setdefault(f"batch of {step.batch}", []).append((step.active_experts, step.time_ms))
    most = 1.05 * max(step.active_experts for step in line.steps)
    fitted = {
        f"batch of {step.batch}": [(0.0, line.time_ms(0.0, step.batch)), (most, line.time_ms(most, step.batch))]
        for step in line.steps
    }
    return points_and_lines(points, fitted, "active experts of a step, all MoE layers", "ms")


def _rounds(runs: list[PolicyRun]) -> Html:
    names = [f"round {number}" for number in range(1, 1 + max(len(run.measured) for run in runs))]
    series = {run.policy: [percentile_ms(turn.tpot_s, 50) or 0.0 for turn in run.measured] for run in runs}
    return bars(series, names, "TPOT p50 (ms)")


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
    head += ["TPOT p50 (ms)", "TPOT p99 (ms)", "TPOT mean (ms)", "TTFT p50 (ms)", "ITL p50 (ms)", "duration (s)"]
    rows = [
        [
            run.policy,
            str(len(run.outcomes)),
            str(run.errors),
            "–" if run.active_experts_mean is None else f"{run.active_experts_mean:.2f}",
            _spread(run, result.workers),
            _ms(percentile_ms(run.tpot_s, 50)),
            _ms(percentile_ms(run.tpot_s, 99)),
            _ms(mean_ms(run.tpot_s)),
            _ms(percentile_ms(run.ttft_s, 50)),
            _ms(percentile_ms(run.itl_s, 50)),
            f"{run.duration_s:.1f}",
        ]
        for run in result.runs
    ]
    return Html(table(head, rows) + paragraph("Times are of the measured rounds, all others of the warm-up too."))


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
