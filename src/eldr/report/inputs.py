"""Turns result files into sections of a page. The content of a file tells its kind."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from eldr.calibration import load_calibration
from eldr.cost import FORMAT as COST_FORMAT
from eldr.cost import CostModel, load_cost
from eldr.errors import EldrError
from eldr.evaluate.results import FORMAT as EVALUATION_FORMAT
from eldr.evaluate.results import parse_results
from eldr.report import html
from eldr.report.calibration import calibration_blocks
from eldr.report.evaluation import evaluation_blocks
from eldr.report.evaluation.comparisons import POLICY, changes_figure
from eldr.report.evaluation.section import (
    MEASURED,
    REPLAYED,
    Numbers,
    Row,
    Rows,
    horizontal_bars,
    number,
    of,
    tpot_columns,
    values,
    words,
)
from eldr.report.html import Html
from eldr.report.style import as_svg, legend_below, make_panels, policy_style, style

MAX_FILE_BYTES = 2**27
TPOT_FIGURES = ("p50", "p99", "mean")
TOKENS_SHOWN = (1, 16, 64)


class ReportError(EldrError):
    """Raised when a file cannot be reported on. The message names the file and says why."""


def blocks_of(path: Path) -> list[Html]:
    """Return the sections of one result file. Raises ReportError, or the error of the file's own format."""
    if path.suffix == ".npz":
        return [
            html.part(path.name, "A calibration, made by eldr fit.", path.name),
            *calibration_blocks(load_calibration(path)),
        ]
    wire = _read_json(path)
    try:
        for recognise, make in _READERS:
            if recognise(wire):
                return make(wire, path)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, StopIteration) as error:
        detail = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ReportError(f"{path}: its rows are not complete: {detail}") from None
    raise ReportError(
        f"{path}: not a result file that this version knows; expected a file from eldr evaluate, eldr replay --json, "
        "eldr load --json, eldr calibrate-cost, eldr fit or eldr demo"
    )


def _read_json(path: Path) -> Any:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ReportError(f"{path}: larger than {MAX_FILE_BYTES} bytes")
        return json.loads(path.read_bytes())
    except OSError as error:
        raise ReportError(f"{path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{path}: not JSON ({error})") from None


def _is_rows(wire: Any, key: str) -> bool:
    return isinstance(wire, list) and bool(wire) and all(isinstance(row, dict) and key in row for row in wire)


def _has(wire: Any, **wanted: Any) -> bool:
    return isinstance(wire, dict) and all(wire.get(key) == value for key, value in wanted.items())


def _table(numbers: Numbers) -> Html:
    return html.table(list(numbers.columns), numbers.cells())


def _evaluation(wire: Any, path: Path) -> list[Html]:
    return evaluation_blocks(parse_results(wire, path))


def _replay(rows: Rows, path: Path) -> list[Html]:
    blocks = [html.part(path.name, "A comparison of policies, made by eldr replay.", path.name)]
    for workers in values(rows, "workers"):
        for rate in values(of(rows, workers=workers), "rate"):
            part = of(rows, workers=workers, rate=rate)
            title = f"{workers} decode workers, {rate:.4g} requests a second"
            with style():
                shown = [html.figure(as_svg(changes_figure(part)), "change against the best load balancer, percent")]
                if all("timeline_tpot_mean_ms" in row for row in part):
                    shown.append(html.figure(_timeline(part), "mean TPOT of each twentieth of the run"))
            table = _table(Numbers(POLICY | tpot_columns(), part))
            blocks.append(html.section(title, *shown, table, badge=REPLAYED))
    return blocks


def _timeline(rows: Rows) -> Html:
    figure, (axis,) = make_panels(1, width=10.8, height=3.3)
    for row in rows:
        look = policy_style(row["policy"])
        timeline = row["timeline_tpot_mean_ms"]
        axis.plot(range(1, len(timeline) + 1), timeline, look.dash, color=look.colour, label=look.shown)
    axis.set_xlabel("twentieth of the run")
    axis.set_ylabel("mean TPOT, ms")
    axis.grid(visible=True)
    legend_below(figure, axis, 4)
    return as_svg(figure)


def _goodput(rows: Rows, path: Path) -> list[Html]:
    columns: dict[str, Callable[[Row], str]] = {
        **POLICY,
        "workers": lambda row: str(row["workers"]),
        "limit of p99 TPOT, ms": number("goodput_limit_ms"),
        "requests a second": number("rate", 1),
        "against the best load balancer, %": number("goodput_vs_best_baseline", 1),
        "limit reached": lambda row: "yes" if row["goodput_reached"] else "no, the trace is too short",
    }
    with style():
        picture = html.figure(
            as_svg(
                horizontal_bars(
                    [f"{policy_style(row['policy']).shown}, {row['workers']} workers" for row in rows],
                    [row["rate"] for row in rows],
                    [f"{row['rate']:.1f}" for row in rows],
                    [policy_style(row["policy"]).colour for row in rows],
                    "requests a second",
                )
            )
        )
    return [html.section(f"Goodput, {path.name}", picture, _table(Numbers(columns, rows)), badge=REPLAYED)]


def _cost(wire: Any, path: Path) -> list[Html]:
    model = load_cost(path)
    layer = model.moe_layer
    terms = f"{layer.base_us:.3g} + {layer.per_expert_us:.4g} x experts + {layer.per_token_us:.3g} x tokens"
    facts = [
        ("device", model.device),
        ("source", model.source),
        ("one MoE layer", f"{terms} microseconds"),
        ("R2 of the fit", "–" if layer.r2 is None else f"{layer.r2:.4f}"),
        ("rest of a step", "not measured" if model.rest is None else "in the file"),
    ]
    with style():
        picture = html.figure(_layer_time(model), "the fitted time of one MoE layer")
    origin = "a fit to measurements"
    return [
        html.section(
            f"Cost of a step: {model.name}", html.row(picture, html.table(("", ""), facts, text=True)), badge=origin
        )
    ]


def _layer_time(model: CostModel) -> Html:
    figure, (axis,) = make_panels(1, width=5.4, height=3.4)
    layer = model.moe_layer
    experts = (0, 128)
    for tokens, dash in zip(TOKENS_SHOWN, (":", "--", "-"), strict=True):
        time_us = [layer.base_us + layer.per_expert_us * count + layer.per_token_us * tokens for count in experts]
        axis.plot(experts, time_us, dash, color="#2b8ae0", label=f"{tokens} tokens")
    axis.set_xlabel("distinct experts")
    axis.set_ylabel("microseconds")
    axis.set_ylim(bottom=0)
    axis.grid(visible=True)
    axis.legend()
    return as_svg(figure)


def _demo(wire: Mapping[str, Any], path: Path) -> list[Html]:
    policies: Mapping[str, Mapping[str, Any]] = wire["policies"]
    rows = [{"policy": name, **figures} for name, figures in policies.items()]
    columns: dict[str, Callable[[Row], str]] = {
        **POLICY,
        "requests": number("requests", 0),
        "errors": number("errors", 0),
        "active experts": number("active_experts_mean"),
        "TTFT p50 ms": number("ttft_p50_ms", 1),
        "TPOT p50 ms": number("tpot_p50_ms", 1),
        "TPOT p99 ms": number("tpot_p99_ms", 1),
    }
    text = f"{wire['outputs_equal']} of {wire['outputs_total']} outputs are those of one plain worker."
    changes: Mapping[str, Mapping[str, Mapping[str, float | None]]] | None = wire.get("tpot_change")
    if changes is None:  # of a version whose experts were too small for times to mean anything
        text += " Engines that share one machine's CPU: active experts mean something, times do not."
    else:
        rows = [row | _demo_changes(changes.get(str(row["policy"]))) for row in rows]
        columns |= {f"change of TPOT {name}, %": words(name) for name in TPOT_FIGURES}
    with style():
        experts = [float(row["active_experts_mean"] or 0) for row in rows]
        colours = [policy_style(name).colour for name in policies]
        names = [policy_style(name).shown for name in policies]
        notes = [f"{value:.2f}" for value in experts]
        picture = html.figure(
            as_svg(horizontal_bars(names, experts, notes, colours, "distinct experts a step and layer"))
        )
    return [
        html.section(
            f"Demo, {path.name}", html.paragraph(text), picture, _table(Numbers(columns, rows)), badge=MEASURED
        )
    ]


def _demo_changes(figures: Mapping[str, Mapping[str, float | None]] | None) -> dict[str, str]:
    """The cells of a policy's changes of TPOT, with their intervals. None for the first policy."""
    cells = {}
    for name, change in (figures or {}).items():
        low, high = change["low"], change["high"]
        interval = "" if low is None or high is None else f" ({low:+.1f} to {high:+.1f})"
        cells[name] = f"{change['percent']:+.1f}{interval}"
    return cells


def _load(wire: Mapping[str, Any], path: Path) -> list[Html]:
    rows = [{"of": kind, **figures} for kind, figures in [("all", wire), *wire["kinds"].items()]]
    columns: dict[str, Callable[[Row], str]] = {"kind": lambda row: str(row["of"]), "requests": number("requests", 0)}
    for key, shown in (("ttft_ms", "TTFT"), ("tpot_ms", "TPOT"), ("itl_ms", "ITL")):
        for percentile in ("p50", "p99"):
            columns[f"{shown} {percentile} ms"] = lambda row, key=key, at=percentile: number(at, 1)(row[key])  # type: ignore[misc]
    pace = f"{wire['rate']:g} requests a second" if wire["rate"] else f"{wire['in_flight']} requests in flight"
    text = f"{pace}, {wire['max_tokens']} generated tokens, prompts {wire['prompts']}; {wire['errors']} errors."
    table = _table(Numbers(columns, rows))
    return [
        html.section(f"Load {wire['workload']}, {path.name}", html.paragraph(text), table, badge="measured by a client")
    ]


_READERS: tuple[tuple[Callable[[Any], bool], Callable[[Any, Path], list[Html]]], ...] = (
    (lambda wire: _has(wire, format=EVALUATION_FORMAT), _evaluation),
    (lambda wire: _has(wire, format=COST_FORMAT), _cost),
    (lambda wire: _is_rows(wire, "goodput_limit_ms"), _goodput),
    (lambda wire: _is_rows(wire, "tpot_p50_ms"), _replay),
    (lambda wire: isinstance(wire, dict) and {"policies", "outputs_total"} <= wire.keys(), _demo),
    (lambda wire: isinstance(wire, dict) and {"workload", "ttft_ms"} <= wire.keys(), _load),
)
