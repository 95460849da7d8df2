"""Report section on experts in host memory: the gain by layout, and the frontier between the mean and the tail."""

from __future__ import annotations

from matplotlib.figure import Figure

from eldr.policies.expected_union import ANCHOR, TAIL_GUARD
from eldr.report.evaluation.prompt_signatures import AGAINST_JSQ
from eldr.report.evaluation.section import (
    REPLAYED,
    Numbers,
    Picture,
    Row,
    Rows,
    Section,
    number,
    of,
    shown,
    values,
    words,
)
from eldr.report.plots import COLOURS
from eldr.report.style import INK, legend_below, make_panels

COLUMNS = {
    "resident %": lambda row: f"{100 * row['resident']:.0f}",
    "a missing expert": words("miss_cost"),
    "cache": words("evict"),
    "batch": words("batch"),
}


def host_memory_section(rows: Rows, prefix: str) -> Section:
    """The gain of each policy by layout, and what the weights of expected-union choose between."""
    layouts, frontier = of(rows, frontier=False), of(rows, frontier=True)
    seeds = rows[0]["seeds"]
    pictures = [
        Picture(
            f"{prefix}-host-memory",
            f"Change of mean and of p99 TPOT against jsq in front of the same workers, {seeds} paired seeds. Times are "
            "those of the MoE layers.",
            lambda: _by_layout(layouts),
        )
    ]
    numbers = [
        Numbers(
            {
                **COLUMNS,
                "policy": _policy,
                "missing experts": number("missing"),
                "req/s": number("rate"),
                **AGAINST_JSQ,
            },
            layouts,
        )
    ]
    if frontier:
        pictures.append(
            Picture(
                f"{prefix}-host-memory-frontier",
                f"What the weights of expected-union choose between, {_layout(frontier[0])}. Each line has one weight "
                "of the guard; its points are weights of the anchor, written beside them.",
                lambda: _frontier(frontier),
            )
        )
        weights = {"anchor": number("anchor"), "tail guard": number("tail_guard", 0)}
        columns = {**weights, "missing experts": number("missing"), **AGAINST_JSQ}
        caption = f"Weights of expected-union that is told, {_layout(frontier[0])}."
        numbers.append(Numbers(columns, frontier, caption))
    text = (
        f"The devices of {_workers(layouts)} workers hold a share of the experts of each layer; the others are in the "
        "memory of the host. A step waits for one read of each of its experts, and for the copies of those that are "
        "missing (pcie5, pcie4), or each layer waits for the slower of device and host (cpu). So many requests are in "
        "flight that each worker has the given batch on average, and the next arrives when one ends. Expected-union is "
        f"shown as it is, and told what devices hold. {_told(layouts)}"
    )
    return Section("Experts in host memory", f"{prefix}-host-memory", REPLAYED, text, tuple(pictures), tuple(numbers))


def _policy(row: Row) -> str:
    return f"{shown(row['policy'])}, told" if row.get("told") else shown(row["policy"])


def _layout(row: Row) -> str:
    cache = "" if row["evict"] == "none" else f", {row['evict']}"
    return f"{100 * row['resident']:.0f} % resident, {row['miss_cost']}{cache}, batch {row['batch']}"


def _workers(rows: Rows) -> str:
    return " or ".join(map(str, values(rows, "workers")))


def _told(rows: Rows) -> str:
    """What telling changes, over the layouts."""
    more = [
        told["vs_jsq_mean"] - plain["vs_jsq_mean"]
        for told, plain in zip(
            of(rows, policy="expected-union", told=True), of(rows, policy="expected-union", told=False), strict=True
        )
    ]
    return f"Telling it changes the mean by {min(more):+.1f} to {max(more):+.1f} points."


def _by_layout(rows: Rows) -> Figure:
    layouts = list(dict.fromkeys(map(_layout, rows)))
    policies = [name for name in dict.fromkeys(map(_policy, rows)) if name != shown("jsq")]
    figure, axes = make_panels(2, width=5.4, height=0.5 * len(layouts) + 1.6, share_y=True)
    for axis, (statistic, name) in zip(axes, (("mean", "mean TPOT"), ("p99", "p99 TPOT")), strict=True):
        for place, (policy, colour) in enumerate(zip(policies, COLOURS, strict=False)):
            line = [row for row in rows if _policy(row) == policy]
            y = [layouts.index(_layout(row)) + 0.2 * (place - 1) for row in line]
            value = [row[f"vs_jsq_{statistic}"] for row in line]
            half = [
                0.0 if row[f"vs_jsq_{statistic}_lo"] is None else
                (row[f"vs_jsq_{statistic}_hi"] - row[f"vs_jsq_{statistic}_lo"]) / 2
                for row in line
            ]  # fmt: skip
            axis.errorbar(value, y, xerr=half, fmt="o", color=colour, markersize=5, label=policy)
        axis.axvline(0, color=INK, linewidth=0.8)
        axis.set_xlabel(f"{name} against jsq, %")
        axis.grid(visible=True, axis="x")
    axes[0].set_yticks(range(len(layouts)), layouts)
    axes[0].set_ylim(len(layouts) - 0.5, -0.5)
    legend_below(figure, axes[0], 3)
    return figure


def _frontier(rows: Rows) -> Figure:
    figure, (axis,) = make_panels(1, width=6.4, height=4.0)
    for guard, colour in zip(values(rows, "tail_guard"), COLOURS, strict=False):
        line = of(rows, tail_guard=guard)
        x, y = [row["vs_jsq_mean"] for row in line], [row["vs_jsq_p99"] for row in line]
        axis.plot(x, y, "o-", color=colour, markersize=5, label=f"guard {guard:g}")
        for row in line:
            default = row["anchor"] == ANCHOR and guard == TAIL_GUARD
            axis.annotate(
                f"{row['anchor']:g}" + (" (default)" if default else ""),
                (row["vs_jsq_mean"], row["vs_jsq_p99"]),
                xytext=(5, 4),
                textcoords="offset points",
                fontsize=8.5,
            )
    axis.axhline(0, color=INK, linewidth=0.8)
    axis.set_xlabel("mean TPOT against jsq, %")
    axis.set_ylabel("p99 TPOT against jsq, %")
    axis.grid(visible=True)
    legend_below(figure, axis, 2)
    return figure
