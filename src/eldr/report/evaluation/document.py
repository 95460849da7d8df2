"""Assembles the report of an evaluation: HTML page, PNG pictures and README.md from the same sections."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eldr.evaluate.results import Results, TraceResults
from eldr.fileio import write_atomically
from eldr.report import html
from eldr.report.evaluation import (
    aggregated,
    comparisons,
    expert_parallel,
    host_memory,
    method,
    overhead,
    prompt_signatures,
    prompt_texts,
    recordings,
    scaling,
    unequal,
)
from eldr.report.evaluation.section import SYNTHETIC, Numbers, Picture, Rows, Section, of, values
from eldr.report.html import Html, Tile
from eldr.report.style import as_png, as_svg, style
from eldr.synthetic import is_synthetic

HOW_TO_READ = (
    "Recorded: the experts that real models chose, token by token. Replayed: a simulated fleet of decode workers on "
    "those recordings. The distinct experts of every step are exact, and every policy is the code that the router "
    "runs. Modelled: the time of a step, from its distinct experts, batch and context ({cost}). Absolute milliseconds "
    "belong to the modelled device, so look at the changes between policies instead. Prefill is only in the sections "
    "on aggregated serving. Not in the replay: transfer of KV caches, failures. Measured: only the sections that are "
    "marked as measured. Intervals are over seeds, which are other splits, arrivals and orders of the same recording. "
    "So they tell what chance does to these requests, not what other requests would do."
)


@dataclass(frozen=True, slots=True)
class TracePart:
    """The sections of one trace."""

    about: dict[str, Any]
    sections: list[Section]
    skipped: dict[str, str]

    @property
    def anchor(self) -> str:
        return f"trace-{self.about['name']}"

    @property
    def title(self) -> str:
        return f"{self.about['model'] or self.about['name']}"

    @property
    def text(self) -> str:
        about = self.about
        kinds = ", ".join(f"{kind} ({count})" for kind, count in list(about["kinds"].items())[:12])
        note = f" {about['note'].strip().rstrip('.').capitalize()}." if about["note"] else ""
        return (
            f"{about['name']}: {about['requests']} {_kind(about)} requests, {about['layers']} MoE layers x "
            f"{about['experts']} experts, top-{about['top_k']}. Medians: prompts of {about['prompt_tokens_p50']:.0f} "
            f"tokens, {about['decode_steps_p50']:.0f} decode steps. Labels: {kinds}.{note} Half of the requests "
            "calibrate and the other half are served. Each seed makes a new split."
        )


def evaluation_sections(results: Results) -> tuple[list[TracePart], list[Section]]:
    """Return the sections of each trace, and those that belong to no trace.

    Experiments without rows have no section.
    """
    parts = [TracePart(trace.about, _sections(trace), trace.skipped) for trace in results.traces]
    common: list[Section] = []
    if results.common.get("memory"):
        common.append(overhead.memory_section(results.common["memory"]))
    if results.common.get("capture"):
        common.append(overhead.capture_section(results.common["capture"]))
    if results.common.get("prompt-costs"):
        common.append(prompt_signatures.costs_section(results.common["prompt-costs"]))
    return parts, common


def _kind(about: dict[str, Any]) -> str:
    return "synthetic" if is_synthetic(about["note"]) else "recorded"


def _sections(trace: TraceResults) -> list[Section]:
    sections = list(_of_trace(trace))
    if is_synthetic(trace.about["note"]):  # whatever they say of recorded experts was not recorded here
        return [replace(section, origin=SYNTHETIC) for section in sections]
    return sections


def _of_trace(trace: TraceResults) -> Iterable[Section]:
    rows, prefix = trace.experiments, str(trace.about["name"])
    main = rows.get("main", [])
    if main:
        yield comparisons.main_section(main, prefix)
    if rows.get("workloads"):
        yield comparisons.workloads_section(rows["workloads"], prefix)
    if rows.get("load"):
        yield comparisons.load_section(rows["load"], prefix)
    if rows.get("goodput"):
        yield comparisons.goodput_section(rows["goodput"], prefix)
    if rows.get("kinds"):
        yield recordings.kinds_section(rows["kinds"], rows.get("load", []), prefix)
    if rows.get("knobs"):
        yield comparisons.knobs_section(rows["knobs"], prefix)
    if rows.get("drift"):
        yield method.drift_section(rows["drift"], prefix)
    if rows.get("prompt-signatures"):
        yield prompt_signatures.by_signature_section(rows["prompt-signatures"], prefix)
    if rows.get("prompt-learning"):
        yield prompt_signatures.learning_section(rows["prompt-learning"], prefix)
    if rows.get("prompt-change"):
        yield prompt_signatures.change_section(rows["prompt-change"], prefix)
    if rows.get("prompt-texts"):
        yield prompt_texts.texts_section(rows["prompt-texts"], prefix)
    if rows.get("aggregated"):
        yield aggregated.aggregated_section(rows["aggregated"], prefix)
    if rows.get("expert-parallel"):
        yield expert_parallel.expert_parallel_section(rows["expert-parallel"], prefix)
    if rows.get("host-memory"):
        yield host_memory.host_memory_section(rows["host-memory"], prefix)
    if rows.get("unequal"):
        yield unequal.unequal_section(rows["unequal"], prefix)
    if rows.get("pools"):
        yield comparisons.pools_section(rows["pools"], prefix, trace.about["in_flight_at_most"])
    if rows.get("scaling"):
        yield scaling.scaling_section(rows["scaling"], prefix)
    if rows.get("ablations"):
        yield method.ablations_section(rows["ablations"], prefix)
    if rows.get("correlation"):
        yield recordings.correlation_section(rows["correlation"], prefix)
    if rows.get("predictors"):
        yield recordings.predictors_section(rows["predictors"], _shares(main), prefix)
    if rows.get("signatures"):
        yield recordings.signatures_section(rows["signatures"], prefix)
    if rows.get("decisions"):
        yield overhead.decisions_section(rows["decisions"], prefix)


def _shares(main: Rows) -> str:
    step = of(main, cost_scope="step")
    found = {workers: comparisons.oracle_share(of(step, workers=workers)) for workers in values(step, "workers")}
    known = [f"{share:.0f} % at {workers} workers" for workers, share in found.items() if share is not None]
    return (
        f"The fitted predictor gives {' and '.join(known)} of the gain in mean TPOT with true profiles."
        if known
        else ""
    )


def evaluation_blocks(results: Results) -> list[Html]:
    """Return the body of a page."""
    parts, common = evaluation_sections(results)
    targets = [(part.title, part.anchor) for part in parts] + ([("What it costs", "costs")] if common else [])
    blocks = [html.links(targets)]
    if results.traces:
        blocks.append(_tiles(results.traces[0]))
        cost = results.traces[0].about["cost_source"]
        blocks.append(html.section("How to read this", html.paragraph(HOW_TO_READ.format(cost=cost), note=True)))
    for part in parts:
        blocks.append(html.part(part.title, part.text, part.anchor))
        blocks.append(html.links([(section.title, section.anchor) for section in part.sections]))
        blocks += [_section(section) for section in part.sections]
        blocks += [html.paragraph(f"Left out, {name}: {reason}", note=True) for name, reason in part.skipped.items()]
    if common:
        blocks.append(html.part("What it costs", "These figures do not depend on the recordings.", "costs"))
        blocks += [_section(section) for section in common]
    return blocks


def _section(section: Section) -> Html:
    with style():
        pictures = [html.figure(as_svg(picture.draw()), picture.caption) for picture in section.pictures]
    tables = [
        Html(
            (html.paragraph(numbers.caption) if numbers.caption else "")
            + html.table(list(numbers.columns), numbers.cells())
        )
        for numbers in section.numbers
    ]
    blocks = [html.paragraph(section.text), *pictures]
    if pictures:
        blocks.append(html.details("every number", *tables))
    else:
        blocks += tables
    return html.section(section.title, *blocks, badge=section.origin, anchor=section.anchor)


def _tiles(trace: TraceResults) -> Html:
    """The key figures, from the largest fleet of the main comparison."""
    step = of(trace.experiments.get("main", []), cost_scope="step")
    if not step:
        return html.tiles([])
    workers = max(values(step, "workers"))
    rows = {row["policy"]: row for row in of(step, workers=workers)}
    ours, paper, jsq = rows["expected-union"], rows["locality-band"], rows["jsq"]

    def both(row: Any) -> str:
        return f"{row['vs_best_baseline_p50']:+.1f} / {row['vs_best_baseline_p99']:+.1f} %".replace("-", "−")

    experts = f"{jsq['active_experts_mean']:.1f} → {ours['active_experts_mean']:.1f}"
    against = f"against the best load balancer, {workers} workers, replayed"
    items = [
        Tile(both(ours), f"median / p99 TPOT of expected-union {against}", "accent"),
        Tile(both(paper), "the same of locality-band, the paper's policy"),
        Tile(experts, f"distinct experts of {trace.about['experts']} per step and layer, jsq → expected-union"),
    ]
    share = comparisons.oracle_share(list(rows.values()))
    if share is not None:
        items.append(Tile(f"{share:.0f} %", "of the gain that true decode profiles would give"))
    return html.tiles(items)


def write_evaluation(results: Results, folder: Path) -> None:
    """Write report.html, README.md and the pictures to `folder`. Raises OSError."""
    title = "Evaluation of eldr"
    subtitle = (
        f"{_models(results)}. The main comparison has {results.made['seeds']} paired runs of "
        f"{results.made['requests']} measured requests each{_by_version(results)}."
    )
    html.write_page(html.page(title, subtitle, *evaluation_blocks(results)), folder / "report.html")
    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    parts, common = evaluation_sections(results)
    written = set()
    for section in [*(section for part in parts for section in part.sections), *common]:
        for picture in section.pictures:
            _write_picture(picture, pictures)
            written.add(f"{picture.name}.png")
    for old in pictures.glob("*.png"):
        if old.name not in written:  # belongs to a trace that is no longer evaluated
            old.unlink()
    text = _readme(title, subtitle, results, parts, common)
    write_atomically(folder / "README.md", lambda file: file.write(text.encode()))


def _models(results: Results) -> str:
    drawn = sum(is_synthetic(trace.about["note"]) for trace in results.traces)
    return f"Recorded models: {len(results.traces) - drawn}" + (f", synthetic ones: {drawn}" if drawn else "")


def _by_version(results: Results) -> str:
    version = results.made.get("version")
    return f", by version {version}" if version else ""


def _write_picture(picture: Picture, folder: Path) -> None:
    with style():
        data = as_png(picture.draw())
    write_atomically(folder / f"{picture.name}.png", lambda file: file.write(data))


def _readme(title: str, subtitle: str, results: Results, parts: list[TracePart], common: list[Section]) -> str:
    lines = [f"# {title}", "", subtitle, ""]
    lines += ["`make evaluate` makes this page. [report.html](report.html) has the same content as a web page, and "
              "[results.json](results.json) as data.", ""]  # fmt: skip
    if results.traces:
        lines += [HOW_TO_READ.format(cost=results.traces[0].about["cost_source"]), ""]
    for part in parts:
        lines += [f"## {part.title}", "", part.text, ""]
        for section in part.sections:
            lines += _readme_section(section)
        lines += [f"Left out, {name}: {reason}\n" for name, reason in part.skipped.items()]
    if common:
        lines += ["## What it costs", ""]
        for section in common:
            lines += _readme_section(section)
    return "\n".join(lines).rstrip() + "\n"


def _readme_section(section: Section) -> list[str]:
    lines = [f"### {section.title}", "", f"*{section.origin}*", "", section.text, ""]
    for picture in section.pictures:
        lines += [f"![{picture.caption}](pictures/{picture.name}.png)", "", f"*{picture.caption}*", ""]
    for numbers in section.numbers:
        lines += _readme_table(numbers)
    return lines


def _readme_table(numbers: Numbers) -> list[str]:
    head = list(numbers.columns)
    table = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    table += ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in numbers.cells()]
    summary = numbers.caption or "every number"
    return [f"<details><summary>{html.escape(summary)}</summary>", "", *table, "", "</details>", ""]
