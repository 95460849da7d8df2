"""Report section on expert parallelism: placements of experts on ranks, redundant experts, and routing, together."""

from __future__ import annotations

from matplotlib.figure import Figure

from eldr.report.evaluation.section import (
    REPLAYED,
    Numbers,
    Picture,
    Row,
    Rows,
    Section,
    change,
    number,
    of,
    shown,
    values,
)
from eldr.report.style import INK, legend_below, make_panels, policy_order, policy_style

REPLICA = {"random": "at random", "lp": "by LP on tokens", "fewest": "by fewest active experts"}


def expert_parallel_section(rows: Rows, prefix: str) -> Section:
    """What placement and routing gain, each alone and together."""
    picture = Picture(
        f"{prefix}-expert-parallel",
        "Change of mean TPOT against jsq with contiguous experts. Bars are 95 % intervals over "
        f"{rows[0]['seeds']} paired seeds. In brackets: whose traffic places the experts.",
        lambda: _changes(rows),
    )
    text = (
        f"The experts of each of {rows[0]['workers']} workers are divided over ranks, and a layer ends with the rank "
        f"that reads the most. The batch is {rows[0]['batch_target']:g} under jsq with contiguous experts, and the "
        "rate is the same everywhere. MoE layers alone, without the time that ranks take to exchange tokens. The "
        "fleet's placement is fitted to the calibration requests. A worker's own follows what its last 1,000 steps "
        f"used, after 750 steps and then each 3,000, which is vLLM's default. {_left(rows)}{_copies(rows)}"
        "The policy is told the number of ranks and nothing of the placement."
    )
    columns = {
        "placement": _placement,
        "redundant experts": lambda row: str(row["redundant"] or "–"),
        "replica": lambda row: REPLICA[row["replica"]] if row["redundant"] else "–",
        "policy": lambda row: shown(row["policy"]),
        "mean ms": number("tpot_mean_ms"),
        "against jsq alike: p50 %": change("vs_jsq_p50"),
        "p99 %": change("vs_jsq_p99"),
        "mean %": change("vs_jsq_mean"),
        "against jsq, contiguous: mean %": change("vs_contiguous_mean"),
        "active experts": number("active_experts_mean"),
        "of the busiest rank": number("expert_reads_mean"),
    }
    numbers = tuple(Numbers(columns, of(rows, ranks=ranks), f"{ranks} ranks") for ranks in values(rows, "ranks"))
    return Section("Expert parallelism", f"{prefix}-expert-parallel", REPLAYED, text, (picture,), numbers)


def _placement(row: Row) -> str:
    own = "" if row["placement"] == "contiguous" else f" ({row['placement_of']})"
    return f"{row['placement'].replace('eplb', 'EPLB')}{own}"


def _layout(row: Row) -> str:
    copies = f", {row['redundant']} redundant, {REPLICA[row['replica']]}" if row["redundant"] else ""
    return _placement(row) + copies


def _left(rows: Rows) -> str:
    """What routing gains on top of every placement without redundant experts."""
    parts = []
    for ranks in values(rows, "ranks"):
        gains = [row["vs_jsq_mean"] for row in of(rows, ranks=ranks, policy="expected-union", redundant=0)]
        parts.append(f"{_percent(max(gains))} to {_percent(min(gains))} % at {ranks} ranks")
    return f"Against jsq with the same placement, expected-union changes mean TPOT by {' and '.join(parts)}. "


def _copies(rows: Rows) -> str:
    """What redundant experts do under jsq."""
    ranks = min(values(rows, "ranks"))
    by = {
        replica: of(rows, ranks=ranks, policy="jsq", placement_of="fleet", replica=replica)[-1] for replica in REPLICA
    }
    found = [f"{_percent(row['vs_contiguous_mean'])} % {REPLICA[replica]}" for replica, row in by.items()]
    return (
        f"Redundant experts change it by {', '.join(found)} ({ranks} ranks, jsq): a second copy that gets a token is "
        "one more expert to read, unless copies are chosen by active experts. "
    )


def _percent(value: float) -> str:
    return f"{value:+.1f}".replace("-", "−")


def _changes(rows: Rows) -> Figure:
    every = values(rows, "ranks")
    layouts = len({_layout(row) for row in of(rows, ranks=every[0])})
    figure, axes = make_panels(len(every), width=5.6, height=0.45 * layouts + 1.2)
    for axis, ranks in zip(axes, every, strict=True):
        here = of(rows, ranks=ranks)
        names = list(dict.fromkeys(_layout(row) for row in here))
        for place, policy in enumerate(policy_order({row["policy"] for row in rows})):
            line = of(here, policy=policy)
            y = [at + 0.22 * (place - 1) for at in range(len(line))]
            mean = [row["vs_contiguous_mean"] for row in line]
            half = [(row["vs_contiguous_mean_hi"] - row["vs_contiguous_mean_lo"]) / 2 for row in line]
            look = policy_style(policy)
            axis.errorbar(mean, y, xerr=half, fmt=look.marker, color=look.colour, markersize=5, label=look.shown)
        axis.axvline(0, color=INK, linewidth=0.8)
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.set_title(f"{ranks} ranks")
        axis.set_xlabel("change of mean TPOT, %")
        axis.grid(visible=True, axis="x")
    for axis in axes[1:]:
        axis.set_yticklabels([])
    legend_below(figure, axes[0], 3)
    return figure
