"""Report sections that compare policies: overall, over load, settings and pool size, and goodput."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from eldr.report.evaluation.section import (
    REPLAYED,
    Numbers,
    Picture,
    Row,
    Rows,
    Section,
    change_by_workers,
    change_dots,
    number,
    of,
    policy_line,
    shown,
    tpot_columns,
    values,
    words,
)
from eldr.report.style import INK, legend_below, make_panels, policy_order, policy_style

BALANCERS = ("rr", "random", "p2c", "jsq")
STATISTICS = {"p50": "median TPOT", "p99": "p99 TPOT", "mean": "mean TPOT"}
POLICY = {"policy": lambda row: shown(row["policy"])}
BEST = "Change in percent against the best of the four load balancers, 95 % interval over paired seeds."


def main_section(rows: Rows, prefix: str) -> Section:
    """The main comparison, with the oracles."""
    step = of(rows, cost_scope="step")
    pictures = [
        Picture(
            f"{prefix}-main-{workers}-workers",
            f"{workers} decode workers, mean batch {of(step, workers=workers)[0]['batch_target']:g} under jsq, whole "
            f"decode step. {BEST}",
            lambda workers=workers: changes_figure(of(step, workers=workers)),  # type: ignore[misc]
        )
        for workers in values(step, "workers")
    ]
    numbers = [
        Numbers(
            POLICY | tpot_columns(),
            of(rows, workers=workers, cost_scope=scope),
            f"{workers} workers, {_scope(scope)}",
        )
        for scope in ("step", "moe")
        for workers in values(of(rows, cost_scope=scope), "workers")
    ]
    text = (
        f"{_oracle_share(step)}The pictures show the whole decode step. It includes attention, dense layers and the "
        "output head, which routing cannot change. The tables also have the MoE layers alone, where the same saving "
        "is a larger share. Two policies know more than any router can. The purple one knows true decode profiles. "
        "The pink one knows every future step of all running requests, but it is greedy, so it is no upper bound."
    )
    return Section("Who is faster", f"{prefix}-main", REPLAYED, text, tuple(pictures), tuple(numbers))


def _scope(scope: str) -> str:
    return "whole decode step" if scope == "step" else "MoE layers alone"


def oracle_share(rows: Rows) -> float | None:
    """Mean TPOT reduction of expected-union relative to that with true profiles, in percent.

    None if there is no gain.
    """
    by_name = {row["policy"]: row for row in rows}
    if not {"expected-union", "expected-union-true"} <= by_name.keys():
        return None
    bound = float(by_name["expected-union-true"]["vs_best_baseline_mean"])
    return 100 * float(by_name["expected-union"]["vs_best_baseline_mean"]) / bound if bound < -1 else None


def _oracle_share(step: Rows) -> str:
    parts = []
    for workers in values(step, "workers"):
        share = oracle_share(of(step, workers=workers))
        if share is not None:
            parts.append(f"{share:.0f} % at {workers} workers")
    if not parts:
        return ""
    return f"Expected-union reaches {' and '.join(parts)} of the mean gain that true decode profiles would give. "


def changes_figure(rows: Rows) -> Figure:
    """Changes of median, p99 and mean against the best load balancer, one line per policy."""
    routed = [row for name in policy_order({row["policy"] for row in rows}) for row in of(rows, policy=name)]
    routed = [row for row in routed if row["policy"] not in BALANCERS]
    names = [shown(row["policy"]) for row in routed]
    colours = [policy_style(row["policy"]).colour for row in routed]
    figure, axes = make_panels(3, width=3.6, height=0.45 * len(names) + 1.0, share_y=True)
    for axis, (statistic, title) in zip(axes, STATISTICS.items(), strict=True):
        change_dots(axis, names, routed, f"vs_best_baseline_{statistic}", colours)
        axis.set_title(title)
        axis.set_xlabel("change, %")
    return figure


def workloads_section(rows: Rows, prefix: str) -> Section:
    names = values(rows, "workload")
    pictures = tuple(
        Picture(
            f"{prefix}-workload-{name}",
            f"{of(rows, workload=name)[0]['workers']} decode workers, mean batch "
            f"{of(rows, workload=name)[0]['batch_target']:.2g} under jsq. {BEST}",
            lambda name=name: changes_figure(of(rows, workload=name)),  # type: ignore[misc]
        )
        for name in names
    )
    mixes = "; ".join(f"{name}: {of(rows, workload=name)[0]['kinds']}" for name in names)
    text = f"The paper's workloads, mixed from this recording's requests of the same kinds. {mixes}."
    columns = {"workload": words("workload"), **POLICY, **tpot_columns()}
    return Section("Named workloads", f"{prefix}-workloads", REPLAYED, text, pictures, (Numbers(columns, rows),))


def load_section(rows: Rows, prefix: str) -> Section:
    workers = rows[0]["workers"]
    picture = Picture(
        f"{prefix}-load",
        f"{workers} decode workers. Left and middle: TPOT. Right: change of the median against the best load balancer.",
        lambda: _load(rows),
    )
    text = (
        "At each rate, every policy gets the same arrivals. When decode steps get shorter, requests leave earlier and "
        "batches shrink. Saved experts therefore make the next steps shorter too."
    )
    columns = {"rate /s": number("rate", 1), **POLICY, **tpot_columns()}
    return Section("TPOT against load", f"{prefix}-load", REPLAYED, text, (picture,), (Numbers(columns, rows),))


def _load(rows: Rows) -> Figure:
    figure, axes = make_panels(3, width=3.7, height=3.5)
    for policy in policy_order({row["policy"] for row in rows}):
        line = sorted(of(rows, policy=policy), key=lambda row: float(row["rate"]))
        rate = [row["rate"] for row in line]
        for axis, key in zip(axes, ("tpot_p50_ms", "tpot_p99_ms", "vs_best_baseline_p50"), strict=True):
            policy_line(axis, policy, rate, [row[key] for row in line])
    for axis, title, unit in zip(
        axes, ("median TPOT", "p99 TPOT", "change of median TPOT"), ("ms", "ms", "%"), strict=True
    ):
        axis.set_title(title)
        axis.set_xlabel("requests a second, whole fleet")
        axis.set_ylabel(unit)
        axis.grid(visible=True)
    axes[2].axhline(0, color=INK, linewidth=0.8)
    low = min(row["vs_best_baseline_p50"] for row in rows)
    axes[2].set_ylim(low - 2, 12)  # the far worse values of random would flatten the rest
    legend_below(figure, axes[0], 4)
    return figure


def goodput_section(rows: Rows, prefix: str) -> Section:
    workers = rows[0]["workers"]
    picture = Picture(
        f"{prefix}-goodput",
        f"{workers} decode workers. The highest rate at which p99 TPOT stays within the limit, by bisection to 1 %.",
        lambda: _goodput(rows),
    )
    cut = [row for row in rows if not row["reached"]]
    note = (
        f" The recording was too short for {len(cut)} of {len(rows)} searches. They never reached the limit, so their "
        "rates are lower bounds (marked with an arrow)."
        if cut
        else ""
    )
    text = (
        "How many requests per second can the fleet serve while p99 TPOT stays within a limit? The limits are "
        f"{' and '.join(f'{row:g}' for row in values(rows, 'relative_limit'))} times the p99 of jsq at mean batch "
        f"7, and rates are compared with those of jsq. The mean p99 of {rows[0]['seeds']} seeds decides. That is too "
        f"few for an interval, so read differences of a few percent as equal.{note}"
    )
    columns = {
        "limit ms": number("limit_ms"),
        **POLICY,
        "rate /s": number("rate", 1),
        "vs jsq %": number("vs_jsq", 1),
        "batch": number("batch_mean"),
        "limit reached": words("reached"),
    }
    return Section("Goodput", f"{prefix}-goodput", REPLAYED, text, (picture,), (Numbers(columns, rows),))


def _goodput(rows: Rows) -> Figure:
    limits = values(rows, "limit_ms")
    policies = [name for name in policy_order({row["policy"] for row in rows}) if name not in ("rr", "random", "p2c")]
    figure, (axis,) = make_panels(1, width=10.8, height=3.4)
    width = 0.8 / len(policies)
    for number_, policy in enumerate(policies):
        look = policy_style(policy)
        for group, limit in enumerate(limits):
            (row,) = of(rows, policy=policy, limit_ms=limit)
            x = group - 0.4 + (number_ + 0.5) * width
            rate = row["rate"] or 0.0
            axis.bar(x, rate, width * 0.92, color=look.colour, label=look.shown if not group else None)
            change = "" if row["vs_jsq"] is None else f"{row['vs_jsq']:+.0f} %"
            arrow = "" if row["reached"] else " ↑"
            axis.annotate(
                f"{rate:.0f}/s\n{change}{arrow}",
                (x, rate),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
    axis.set_xticks(range(len(limits)), [f"p99 TPOT ≤ {limit:.1f} ms" for limit in limits])
    axis.tick_params(axis="x", length=0)
    axis.set_ylabel("requests a second")
    axis.margins(y=0.16)
    axis.grid(visible=True, axis="y")
    legend_below(figure, axis, len(policies))
    return figure


KNOB_LOOKS = {  # knob -> (what it is called, policy, marker)
    "tail_guard": ("tail guard of expected-union", "expected-union", "^"),
    "others_weight": ("weight on others of expected-union", "expected-union-true", "o"),
    "anchor": ("anchor of expected-union", "clairvoyant", "D"),
    "tau": ("tau of locality-band", "locality-band", "s"),
}


def knobs_section(rows: Rows, prefix: str) -> Section:
    workers = rows[0]["workers"]
    picture = Picture(
        f"{prefix}-frontier",
        f"{workers} decode workers, mean batch 7 under jsq. Lower left is better. Rings mark the defaults, and numbers "
        "give the value of the knob (∞: off).",
        lambda: _frontier(rows),
    )
    text = "Each curve turns one knob and leaves the others at their defaults." + _better_than_defaults(rows)
    columns = {"knob": words("knob"), "value": _value, "default": words("default"), **tpot_columns()}
    return Section(
        "Median against tail: the knobs", f"{prefix}-knobs", REPLAYED, text, (picture,), (Numbers(columns, rows),)
    )


def _better_than_defaults(rows: Rows) -> str:
    """Say which values have a better p99 than the default, beyond both intervals, and no worse a median, or reverse."""
    found: dict[str, list[str]] = {"p99": [], "p50": []}
    for row in rows:
        (default,) = of(rows, knob=row["knob"], default=True)
        for better, other in (("p99", "p50"), ("p50", "p99")):
            key, same = f"vs_best_baseline_{better}", f"vs_best_baseline_{other}"
            apart = row[f"{key}_hi"] is not None and row[f"{key}_hi"] < default[f"{key}_lo"]
            if apart and row[same] <= default[same]:
                found[better].append(f"{row['knob'].replace('_', ' ')} {_value(row)}")
    named = {"p99": "p99 and no worse a median", "p50": "median and no worse a p99"}
    parts = [f"a better {named[key]} with {', '.join(names)}" for key, names in found.items() if names]
    if not parts:
        return " On this recording every value pays for what it gains, or differs by less than the intervals."
    return f" On this recording the defaults are not the best: there is {'; '.join(parts)}."


def _value(row: Row) -> str:
    return "∞" if row["value"] is None else f"{row['value']:g}"


def _frontier(rows: Rows) -> Figure:
    known = [knob for knob in KNOB_LOOKS if of(rows, knob=knob)]
    ours = [knob for knob in known if knob != "tau"]
    figure, axes = make_panels(2, width=5.2, height=4.2)
    for axis, chosen, title in ((axes[0], known, "all knobs"), (axes[1], ours, "expected-union alone")):
        for knob in chosen:
            name, policy, marker = KNOB_LOOKS[knob]
            colour = policy_style(policy).colour
            line = of(rows, knob=knob)
            x = [row["vs_best_baseline_p50"] for row in line]
            y = [row["vs_best_baseline_p99"] for row in line]
            axis.plot(x, y, "-", color=colour, marker=marker, markersize=5, linewidth=1.4, label=name)
            for row in of(line, default=True):
                point = (row["vs_best_baseline_p50"], row["vs_best_baseline_p99"])
                axis.plot(*point, "o", markersize=13, markerfacecolor="none", markeredgecolor=colour, linewidth=1.5)
            if axis is axes[1] and knob != "tail_guard":  # points lie close together, so only the ends are labelled
                _label_points(axis, [line[0], line[-1]], colour)
            elif axis is axes[1] or knob == "tau":
                _label_points(axis, line, colour)
        axis.set_title(title)
        axis.set_xlabel("change of median TPOT, %")
        axis.set_ylabel("change of p99 TPOT, %")
        axis.grid(visible=True)
        axis.margins(0.12)
    axes[0].axhline(0, color=INK, linewidth=0.8)
    legend_below(figure, axes[0], 2)
    return figure


def _label_points(axis: object, line: Sequence[Row], colour: str) -> None:
    for place, row in enumerate(line):
        axis.annotate(  # type: ignore[attr-defined]
            _value(row),
            (row["vs_best_baseline_p50"], row["vs_best_baseline_p99"]),
            xytext=(5, 5 if place % 2 else -11),
            textcoords="offset points",
            fontsize=8,
            color=colour,
        )


def pools_section(rows: Rows, prefix: str, in_flight_at_most: int) -> Section:
    picture = Picture(
        f"{prefix}-pools",
        "Change of TPOT against the best load balancer, by number of decode workers. "
        + BEST.split(",")[1].strip().capitalize(),
        lambda: _pools(rows),
    )
    short = "" if in_flight_at_most >= 280 else ". 40 workers at batch 7 would need 280, so they cannot be replayed"
    text = (
        "No request of the recording is ever in flight twice, because a copy would share all its experts with its "
        f"original. This recording allows at most {in_flight_at_most} requests in flight{short}. Each mean batch is "
        "shown for every pool that it can fill."
    )
    columns = {"batch under jsq": number("batch_target", 1), "workers": words("workers"), **POLICY, **tpot_columns()}
    return Section("Size of the pool", f"{prefix}-pools", REPLAYED, text, (picture,), (Numbers(columns, rows),))


def _pools(rows: Rows) -> Figure:
    batches = values(rows, "batch_target")
    figure, axes = make_panels(2 * len(batches), width=2.9, height=3.3, share_y=True)
    order = [name for name in policy_order({row["policy"] for row in rows}) if name not in BALANCERS]
    for place, axis in enumerate(axes):
        batch, statistic = batches[place // 2], ("p50", "p99")[place % 2]
        change_by_workers(axis, of(rows, batch_target=batch), f"vs_best_baseline_{statistic}", order)
        axis.set_title(f"{STATISTICS[statistic]}, batch {batch:g}")
    axes[0].set_ylabel("change, %")
    legend_below(figure, axes[0], len(order))
    return figure
