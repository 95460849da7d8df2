"""Report sections on the recordings: prefill against decode, one kind against mixed, signatures, and the predictor."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from eldr.report.evaluation.comparisons import POLICY
from eldr.report.evaluation.section import (
    RECORDED,
    REPLAYED,
    Numbers,
    Picture,
    Rows,
    Section,
    number,
    of,
    policy_line,
    values,
    words,
)
from eldr.report.plots import COLOURS
from eldr.report.style import GREY, INK, make_panels, policy_order

REQUESTS = {"mixed": (GREY, "o", "drawn at random"), "one kind": ("#2b8ae0", "s", "of one label"),
            "alike": ("#e08a00", "^", "most alike in their decode")}  # fmt: skip
PREDICTORS = {"fitted": "#e08a00", "own frequencies": "#2b8ae0"}
MAX_COLOURED = 16


def kinds_section(rows: Rows, load: Rows, prefix: str) -> Section:
    """load: rows of the comparison over load, whose batches and active experts are shown alongside."""
    picture = Picture(
        f"{prefix}-experts",
        "Left: distinct experts per decode step and layer against batch size. Middle: change against random batches. "
        "Right: experts that each policy's batches activate in the replay over load.",
        lambda: _experts(rows, load),
    )
    seven = of(rows, batch=7, requests="one kind")
    alike = of(rows, batch=7, requests="alike")
    text = "Batches of similar requests activate fewer distinct experts. All gains come from this. "
    if seven and alike:
        text += (
            f"At batch 7, requests of one label activate {-seven[0]['vs_mixed']:.0f} % fewer than mixed ones. Labels "
            f"tell only part of it: requests most alike in their decoding activate {-alike[0]['vs_mixed']:.0f} % fewer."
        )
    columns = {
        "batch": words("batch"),
        "requests": lambda row: REQUESTS[row["requests"]][2],
        "active experts": number("active_experts"),
        "vs random %": number("vs_mixed", 1),
    }
    replayed = {
        **POLICY,
        "rate /s": number("rate", 1),
        "batch": number("batch_mean"),
        "active experts": number("active_experts_mean"),
    }
    return Section(
        "Active experts against batch",
        f"{prefix}-kinds",
        f"{RECORDED}; right: {REPLAYED}",
        text,
        (picture,),
        (Numbers(columns, rows), Numbers(replayed, load, "replayed")),
    )


def _experts(rows: Rows, load: Rows) -> Figure:
    figure, axes = make_panels(3, width=3.7, height=3.6)
    for name, (colour, marker, shown) in REQUESTS.items():
        line = of(rows, requests=name)
        batch = [row["batch"] for row in line]
        look: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1.8}
        axes[0].plot(batch, [row["active_experts"] for row in line], label=shown, **look)
        if name != "mixed":
            axes[1].plot(batch, [row["vs_mixed"] for row in line], **look)
    axes[1].axhline(0, color=INK, linewidth=0.8)
    for axis, unit in ((axes[0], "distinct experts"), (axes[1], "change, %")):
        axis.set_xlabel("requests in the batch")
        axis.set_ylabel(unit)
    axes[0].legend(loc="lower right", fontsize=9)
    for policy in policy_order({row["policy"] for row in load}):
        line = sorted(of(load, policy=policy), key=lambda row: float(row["batch_mean"]))
        policy_line(axes[2], policy, [row["batch_mean"] for row in line], [row["active_experts_mean"] for row in line])
    axes[2].set_xlabel("mean batch")
    axes[2].set_ylabel("distinct experts")
    if load:
        axes[2].legend(loc="lower right", fontsize=7.5)
    for axis in axes:
        axis.grid(visible=True)
    return figure


def correlation_section(rows: Rows, prefix: str) -> Section:
    (total,) = of(rows, sort="all")
    picture = Picture(
        f"{prefix}-correlation",
        "Pearson's r over requests, for each (layer, expert), between its share of the prompt's tokens and its share "
        "of the decoded tokens. Left: by layer, with a band from the 10th to the 90th percentile of experts. Right: "
        "all experts.",
        lambda: _correlation(rows),
    )
    text = (
        f"A prompt predicts which experts its answer will use. Over {total['experts']} experts, the median of r is "
        f"{total['r_p50']:.2f}, and the 10th to 90th percentile is {total['r_p10']:.2f} to {total['r_p90']:.2f}."
    )
    columns = {"layer": words("layer"), "r p10": number("r_p10"), "r median": number("r_p50"), "r p90": number("r_p90")}
    return Section(
        "Prefill against decode",
        f"{prefix}-correlation",
        RECORDED,
        text,
        (picture,),
        (Numbers(columns, [*of(rows, sort="layer"), {**total, "layer": "all"}]),),
    )


def _correlation(rows: Rows) -> Figure:
    colour = "#2b8ae0"
    figure, axes = make_panels(2, width=5.0, height=3.0)
    layers = of(rows, sort="layer")
    x = [row["layer"] for row in layers]
    axes[0].fill_between(
        x, [row["r_p10"] for row in layers], [row["r_p90"] for row in layers], color=colour, alpha=0.2, linewidth=0
    )
    axes[0].plot(x, [row["r_p50"] for row in layers], "o-", color=colour, markersize=4)
    axes[0].set_xlabel("MoE layer")
    axes[0].set_ylabel("r")
    axes[0].set_ylim(top=1)
    bins = of(rows, sort="histogram")
    left, width = [row["r_from"] for row in bins], bins[0]["r_to"] - bins[0]["r_from"]
    axes[1].bar(left, [100 * row["share"] for row in bins], width * 0.92, align="edge", color=colour)
    axes[1].set_xlabel("r")
    axes[1].set_ylabel("% of experts")
    lowest = min(row["r_from"] for row in bins if row["share"] > 0)
    axes[1].set_xlim(lowest - width, 1)
    for axis in axes:
        axis.grid(visible=True)
    return figure


def signatures_section(rows: Rows, prefix: str) -> Section:
    (layers,) = of(rows, sort="layers")
    picture = Picture(
        f"{prefix}-signatures",
        "Signatures of all requests on their two main axes (PCA). Left: coloured by zone, with numbered centroids. "
        "Right: coloured by label. Zones that overlap here may be separate in other dimensions.",
        lambda: _signatures(rows),
    )
    text = f"Layer selection keeps {layers['kept']} of {layers['of']} layers. The rho of each transform is in-sample."
    columns = {"transform": words("transform"), "rho (in-sample)": number("rho_in_sample", 3)}
    zones = {"zone": words("zone"), "requests": words("requests")}
    return Section(
        "Signatures and zones",
        f"{prefix}-signatures",
        RECORDED,
        text,
        (picture,),
        (Numbers(columns, of(rows, sort="rho")), Numbers(zones, of(rows, sort="centroid"))),
    )


def _signatures(rows: Rows) -> Figure:
    figure, axes = make_panels(2, width=5.2, height=3.7)
    points, centroids = of(rows, sort="request"), of(rows, sort="centroid")
    for axis, key in zip(axes, ("zone", "kind"), strict=True):
        groups = values(points, key)
        coloured = len(groups) <= MAX_COLOURED
        for place, group in enumerate(groups):
            members = of(points, **{key: group})
            axis.scatter(
                [row["x"] for row in members],
                [row["y"] for row in members],
                s=18,
                alpha=0.75,
                linewidths=0,
                color=COLOURS[place % len(COLOURS)] if coloured else GREY,
                marker="o" if place < len(COLOURS) else "^",
                label=str(group)[:24] or "no label",
            )
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
    for row in centroids:
        axes[0].plot(row["x"], row["y"], "P", color=INK, markersize=9)
        axes[0].annotate(
            str(row["zone"]), (row["x"], row["y"]), xytext=(6, 5), textcoords="offset points", weight="bold"
        )
    axes[0].set_title("by zone")
    axes[1].set_title("by label")
    if len(values(points, "kind")) <= MAX_COLOURED:
        axes[1].legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8, handletextpad=0.2)
    return figure


def predictors_section(rows: Rows, share: str, prefix: str) -> Section:
    """share: a sentence on how much of the gain with true profiles the predictor keeps."""
    judged = of(rows, sort="judgement")
    picture = Picture(
        f"{prefix}-predictor",
        "Held-out requests. Left and middle: distinct experts per layer of whole batches of 2 to 16. Each point is one "
        "batch, and on the line the prediction is right. Right: single probabilities.",
        lambda: _reliability(rows),
    )
    parts = []
    for name in PREDICTORS:
        mine = of(judged, predictor=name)
        if mine:
            bias = {
                draw: sum(row[f"{draw}_predicted"] - row[f"{draw}_recorded"] for row in mine) / len(mine)
                for draw in ("random", "alike")
            }
            r2 = sum(row["r2"] for row in mine) / len(mine)
            parts.append(
                f"{name.capitalize()}: R2 {r2:.2f}; predicted minus recorded experts of a batch of 7: "
                f"{bias['random']:+.2f} (random), {bias['alike']:+.2f} (alike)"
            )
    text = f"Routing needs unions of whole batches, so predictors are judged on them. {'. '.join(parts)}. {share}"
    columns = {
        "predictor": words("predictor"),
        "seed": words("seed"),
        "R2 of profiles": number("r2"),
        "random: predicted": number("random_predicted"),
        "from true profiles": number("random_from_true_profiles"),
        "recorded": number("random_recorded"),
        "alike: predicted": number("alike_predicted"),
        "from true profiles (alike)": number("alike_from_true_profiles"),
        "recorded (alike)": number("alike_recorded"),
    }
    probabilities = {
        "predictor": words("predictor"),
        "predicted": number("predicted", 3),
        "recorded": number("recorded", 3),
        "entries": words("entries"),
    }
    return Section(
        "How reliable the predictor is",
        f"{prefix}-predictor",
        RECORDED,
        text,
        (picture,),
        (Numbers(columns, judged), Numbers(probabilities, of(rows, sort="probability"), "single probabilities")),
    )


def _reliability(rows: Rows) -> Figure:
    figure, axes = make_panels(3, width=3.7, height=3.7)
    unions = of(rows, sort="union")
    low = min(min(row["predicted"], row["recorded"]) for row in unions) - 0.5
    high = max(max(row["predicted"], row["recorded"]) for row in unions) + 0.5
    for axis, name in zip(axes[:2], PREDICTORS, strict=True):
        for draw, marker in (("random", "o"), ("alike", "^")):
            chosen = of(unions, predictor=name, requests=draw)
            axis.plot(
                [row["predicted"] for row in chosen],
                [row["recorded"] for row in chosen],
                marker,
                color=PREDICTORS[name],
                alpha=0.55 if draw == "random" else 0.9,
                markersize=4.5,
                markerfacecolor="none" if draw == "random" else PREDICTORS[name],
                label=f"{draw} batches",
            )
        axis.plot([low, high], [low, high], color=INK, linewidth=0.8)
        axis.set_title(name)
        axis.set_xlabel("predicted experts")
        axis.set_ylabel("recorded experts")
        axis.legend(loc="upper left", fontsize=8.5)
    for name, colour in PREDICTORS.items():
        line = of(rows, sort="probability", predictor=name)
        axes[2].plot(
            [row["predicted"] for row in line], [row["recorded"] for row in line], "o-", color=colour, markersize=4,
            label=name,
        )  # fmt: skip
    axes[2].plot([0, 1], [0, 1], color=INK, linewidth=0.8)
    axes[2].set_title("probability of an expert")
    axes[2].set_xlabel("predicted")
    axes[2].set_ylabel("recorded frequency")
    axes[2].legend(loc="upper left", fontsize=8.5)
    for axis in axes:
        axis.grid(visible=True)
    return figure
