"""Report sections on ablations of the paper's method, and on a change of mix during the run."""

from __future__ import annotations

from matplotlib.figure import Figure

from eldr.report.evaluation.comparisons import POLICY
from eldr.report.evaluation.section import (
    REPLAYED,
    Numbers,
    Picture,
    Rows,
    Section,
    change,
    change_dots,
    number,
    of,
    policy_line,
    tpot_columns,
    values,
    words,
)
from eldr.report.style import INK, legend_below, make_panels, policy_order

REFERENCE = "reference"
COLOURS = {
    "transform": "#2b8ae0",
    "layers": "#12a37a",
    "balance": "#d6552e",
    "tau": "#8a73d6",
    "two-nearest": "#e08a00",
}


def ablations_section(rows: Rows, prefix: str) -> Section:
    reference = of(rows, ablation=REFERENCE)[0]
    picture = Picture(
        f"{prefix}-ablations",
        f"locality-band, {reference['workers']} decode workers. Change of TPOT against the unchanged method "
        "(count x IDF, selected layers, balanced zones, tau 0.1, two-nearest), with 95 % intervals over paired seeds. "
        "Right: rho on held-out requests. The line marks the unchanged method.",
        lambda: _ablations(rows),
    )
    text = (
        "Each row changes one step of the paper's method. rho is the rank correlation of signature distance and "
        "decode-profile distance. It tells how well prompts predict which requests will share experts."
    )
    columns = {
        "changed": words("ablation"),
        "to": words("variant"),
        "rho held out": number("rho_held_out", 3),
        "largest zone / mean": number("largest_zone"),
        "p50 % vs unchanged": change("vs_paper_p50"),
        "p99 % vs unchanged": change("vs_paper_p99"),
        "mean % vs unchanged": change("vs_paper_mean"),
        **tpot_columns(),
    }
    return Section("Ablations", f"{prefix}-ablations", REPLAYED, text, (picture,), (Numbers(columns, rows),))


def _ablations(rows: Rows) -> Figure:
    reference = of(rows, ablation=REFERENCE)[0]
    changed = [row for row in rows if row["ablation"] != REFERENCE]
    names = [row["variant"] for row in changed]
    colours = [COLOURS.get(row["ablation"], INK) for row in changed]
    figure, axes = make_panels(3, width=3.6, height=0.42 * len(names) + 1.1, share_y=True)
    for axis, statistic, title in ((axes[0], "p50", "median TPOT"), (axes[1], "p99", "p99 TPOT")):
        change_dots(axis, names, changed, f"vs_paper_{statistic}", colours)
        axis.set_title(title)
        axis.set_xlabel("change, %")
    for line, (row, colour) in enumerate(zip(changed, colours, strict=True)):
        axes[2].plot(row["rho_held_out"], line, "o", color=colour, markersize=6)
    axes[2].axvline(reference["rho_held_out"], color=INK, linewidth=0.8)
    axes[2].set_title("rho, held out")
    axes[2].grid(visible=True, axis="x")
    axes[2].tick_params(axis="y", length=0)
    axes[2].spines["left"].set_visible(False)
    axes[2].margins(x=0.15)
    return figure


def drift_section(rows: Rows, prefix: str) -> Section:
    pictures = tuple(
        Picture(
            f"{prefix}-drift-{grouping}",
            _caption(of(rows, grouping=grouping)),
            lambda grouping=grouping: _timeline(of(rows, grouping=grouping, sort="timeline")),  # type: ignore[misc]
        )
        for grouping in sorted(values(rows, "grouping"), reverse=True)
    )
    kinds = of(rows, grouping="labels", sort="change", policy="jsq")
    named = "".join(f" {row['phase'].capitalize()} the switch: {row['kinds']}." for row in kinds if row.get("kinds"))
    text = (
        "All policies are calibrated on the requests served before the switch. The requests after it were not part of "
        "calibration. Refitted zones follow the last seconds of traffic. The switch by labels exchanges whole kinds of "
        "the recording."
        + named
        + " The switch by main axis serves one side of the median of the main axis of expert use, then the other. No "
        "real traffic is known to change like that."
    )
    columns = {
        "switch by": words("grouping"),
        "phase": words("phase"),
        **POLICY,
        "p50 ms": number("tpot_p50_ms"),
        "p99 ms": number("tpot_p99_ms"),
        "mean ms": number("tpot_mean_ms"),
        "p50 % vs jsq": change("vs_jsq_p50"),
        "p99 % vs jsq": change("vs_jsq_p99"),
        "mean % vs jsq": change("vs_jsq_mean"),
    }
    timeline = {
        "switch by": words("grouping"),
        **POLICY,
        "s since the switch": number("since_switch_s", 1),
        "p50 ms": number("tpot_p50_ms"),
        "p99 ms": number("tpot_p99_ms"),
        "mean ms": number("tpot_mean_ms"),
    }
    return Section(
        "When the mix changes",
        f"{prefix}-drift",
        REPLAYED,
        text,
        pictures,
        (Numbers(columns, of(rows, sort="change")), Numbers(timeline, of(rows, sort="timeline"), "over time")),
    )


def _caption(rows: Rows) -> str:
    row = rows[0]
    by = "labels" if row["grouping"] == "labels" else "main axis of expert use"
    return (
        f"Switch by {by}. {row['workers']} decode workers, {row['rate']:.0f} requests per second. TPOT of the requests "
        f"that arrive in each interval, mean of {row['seeds']} runs."
    )


def _timeline(rows: Rows) -> Figure:
    figure, axes = make_panels(2, width=5.3, height=3.5)
    for axis, key, title in zip(axes, ("tpot_p50_ms", "tpot_p99_ms"), ("median TPOT", "p99 TPOT"), strict=True):
        for policy in policy_order({row["policy"] for row in rows}):
            line = of(rows, policy=policy)
            policy_line(axis, policy, [row["since_switch_s"] for row in line], [row[key] for row in line], markevery=3)
        axis.axvline(0, color=INK, linewidth=0.8)
        axis.margins(y=0.12)  # room for the note above the curves
        axis.annotate(
            "the mix changes",
            (0, 1),
            xycoords=("data", "axes fraction"),
            xytext=(4, -2),
            textcoords="offset points",
            fontsize=8.5,
            va="top",
        )
        axis.set_title(title)
        axis.set_xlabel("seconds since the switch")
        axis.set_ylabel("ms")
        axis.grid(visible=True)
    legend_below(figure, axes[0], 3)
    return figure
