"""Report section on synthetic traces: how they compare with the recording, and pools that no recording fills."""

from __future__ import annotations

from matplotlib.figure import Figure

from eldr.evaluate.scaling import REQUESTS, STEPS
from eldr.report.evaluation.comparisons import POLICY
from eldr.report.evaluation.section import (
    SYNTHETIC,
    Numbers,
    Picture,
    Row,
    Rows,
    Section,
    change,
    change_by_workers,
    number,
    of,
    shown,
    values,
    words,
)
from eldr.report.style import legend_below, make_panels, policy_order

# What is shown below the lowest point and above the highest, in percent.
MARGIN = 6.0


def scaling_section(rows: Rows, prefix: str) -> Section:
    """Larger pools and more experts than were recorded."""
    scaled = of(rows, trace="scaled")
    pictures: tuple[Picture, ...] = ()
    if scaled:
        pictures = (
            Picture(
                f"{prefix}-scaling",
                f"Synthetic: {_geometry(scaled[0])}. Change of TPOT against jsq, by decode workers. "
                f"95 % intervals over {scaled[0]['seeds']} paired seeds.",
                lambda: _scaling(scaled),
            ),
        )
    columns = {
        "trace": words("trace"),
        "layers x experts, top-k": _geometry,
        "workers": words("workers"),
        "batch under jsq": number("batch_target", 0),
        **POLICY,
        "p50 %": change("vs_best_baseline_p50"),
        "p99 %": change("vs_best_baseline_p99"),
        "mean %": change("vs_best_baseline_mean"),
        "MoE mean %": change("moe_vs_best_baseline_mean"),
        "active experts": number("active_experts_mean"),
        "batch": number("batch_mean"),
    }
    text = (
        "No recording has enough requests for 40 workers, or 128 experts with labelled kinds. These traces are "
        "synthetic: they are drawn from a model of this recording (docs/synthetic.md), and nobody has measured a model "
        f"of that size. {_compared(rows)}The larger ones have {REQUESTS:,} requests. All decodes are cut after {STEPS} "
        "steps, the recorded ones too. Changes are against jsq."
    )
    return Section(
        "More workers and experts, on synthetic traces",
        f"{prefix}-scaling",
        SYNTHETIC,
        text,
        pictures,
        (Numbers(columns, rows),),
    )


def _geometry(row: Row) -> str:
    return f"{row['layers']} x {row['experts']}, top-{row['top_k']}"


def _compared(rows: Rows) -> str:
    """What the policies gain on the recording and on a synthetic trace of its size."""
    parts = []
    for policy in ("locality-band", "expected-union"):
        found = [of(rows, trace=trace, policy=policy) for trace in ("recorded", "synthetic")]
        if all(found):
            real, drawn = (one[0]["vs_best_baseline_mean"] for one in found)
            parts.append(f"{shown(policy)} {real:+.1f} % and {drawn:+.1f} %")
    if not parts:
        return ""
    row = of(rows, trace="synthetic")[0]
    return (
        f"At the recorded size, with {row['workers']} workers at batch {row['batch_target']:g}, mean TPOT changes on "
        f"the recording and on a synthetic trace by: {'; '.join(parts)}. "
    )


def _scaling(rows: Rows) -> Figure:
    batches = values(rows, "batch_target")
    figure, axes = make_panels(2 * len(batches), width=2.5, height=3.3, share_y=True)
    order = [name for name in policy_order({row["policy"] for row in rows}) if name != "jsq"]
    for place, axis in enumerate(axes):
        batch, statistic = batches[place // 2], ("mean", "p99")[place % 2]
        change_by_workers(axis, of(rows, batch_target=batch), f"vs_best_baseline_{statistic}", order)
        axis.set_title(f"{statistic}, batch {batch:g}")
    axes[0].set_ylabel("TPOT against jsq, %")
    shown_at = [row[f"vs_best_baseline_{statistic}"] for row in rows for statistic in ("mean", "p99")]
    axes[0].set_ylim(min(shown_at) - MARGIN, max(shown_at) + MARGIN)  # few seeds have wide intervals
    legend_below(figure, axes[0], len(order))
    return figure
