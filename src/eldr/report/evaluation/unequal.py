"""Report section on unequal workers: what it is worth to know the step time of each, and to learn it."""

from __future__ import annotations

from matplotlib.figure import Figure

from eldr.evaluate.unequal import BANDWIDTH, LEARNED_S, LONGER_BASE, MIXES, SLOW
from eldr.report.evaluation.prompt_signatures import AGAINST_JSQ
from eldr.report.evaluation.section import (
    REPLAYED,
    Numbers,
    Picture,
    Row,
    Rows,
    Section,
    change,
    change_dots,
    of,
    words,
)
from eldr.report.plots import COLOURS
from eldr.report.style import GREY, make_panels

SCOPES = {"moe": "MoE layers", "step": "whole steps"}
COSTS = {"equal": "equal costs", "own": "own costs", "learned": "learned costs"}
LOOKS = dict(zip(COSTS, (GREY, COLOURS[0], COLOURS[1]), strict=True))


def unequal_section(rows: Rows, prefix: str) -> Section:
    """The gain of each policy by what it believes of the workers, for each mix of hardware."""
    moe = of(rows, cost_scope="moe")
    pictures = (
        Picture(
            f"{prefix}-unequal",
            f"Change of mean TPOT of the MoE layers against jsq, {rows[0]['workers']} workers at batch "
            f"{rows[0]['batch_target']:g}. Bars are 95 % intervals over {rows[0]['seeds']} paired seeds.",
            lambda: _dots(moe),
        ),
    ) * bool(moe)
    devices = ", ".join(f"{kind} {bandwidth:g}" for kind, bandwidth in BANDWIDTH.items())
    longer = ", ".join(f"{kind} by {factor:g}" for kind, factor in LONGER_BASE.items())
    text = (
        "Workers differ in hardware. Their step times are assumed: those of the modelled device by the ratio of memory "
        f"bandwidths (TB/s by data sheet: {devices}), with longer fixed times for some ({longer}). Kinds take turns "
        f"among the workers. “One slows down”: the steps of {SLOW.worker} take {SLOW.factor:g} times as long "
        f"from {100 * SLOW.begins:.0f} to {100 * SLOW.ends:.0f} % of the run. With equal costs a policy takes all "
        "workers for the modelled device, with own costs it is told the step time of each at the start, and with "
        "learned costs it begins with equal ones and learns from what workers report every two seconds, 3 % off at "
        "random. jsq-speed is "
        f"jsq with queues weighed by speed.{_learned(rows)} Runs take {_seconds(rows)} s and begin before anything is "
        f"learned; the columns “later” leave out requests of the first {LEARNED_S:g} s."
    )
    columns = {
        "workers": words("mix"),
        "policy": words("policy"),
        "believes in": lambda row: COSTS[row["belief"]],
        **AGAINST_JSQ,
        "later p99 %": change("later_vs_jsq_p99"),
        "later mean %": change("later_vs_jsq_mean"),
    }
    numbers = tuple(
        Numbers(columns, of(rows, cost_scope=scope), name)
        for scope, name in SCOPES.items()
        if of(rows, cost_scope=scope)
    )
    return Section("Unequal workers", f"{prefix}-unequal", REPLAYED, text, pictures, numbers)


def _seconds(rows: Rows) -> str:
    low, high = (f"{end(row['run_s'] for row in rows):.0f}" for end in (min, max))
    return low if low == high else f"{low} to {high}"


def _learned(rows: Rows) -> str:
    """How learned costs compare with own ones, where workers differ."""
    pairs = []
    for mix in MIXES:
        if len(MIXES[mix]) > 1:
            at = {
                row["belief"]: row["vs_jsq_mean"]
                for row in of(rows, mix=mix, cost_scope="moe", policy="expected-union")
            }
            if {"own", "learned"} <= at.keys():
                pairs.append(f"{at['learned']:+.1f} and {at['own']:+.1f} % ({mix})")
    return f" With learned and with own costs, expected-union's mean is {', '.join(pairs)}." if pairs else ""


def _dots(rows: Rows) -> Figure:
    mixes = [mix for mix in MIXES if of(rows, mix=mix)]
    figure, axes = make_panels(len(mixes), width=4.0, height=3.2, share_y=True)
    for axis, mix in zip(axes, mixes, strict=True):
        chosen: list[Row] = of(rows, mix=mix)
        names = [f"{row['policy']}, {COSTS[row['belief']]}" for row in chosen]
        change_dots(axis, names, chosen, "vs_jsq_mean", [LOOKS[row["belief"]] for row in chosen])
        axis.set_title(mix)
        axis.set_xlabel("mean TPOT against jsq, %")
    return figure
