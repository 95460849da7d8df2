"""Report section on aggregated serving: what is left of the gain where workers compute prompts too."""

from __future__ import annotations

from matplotlib.figure import Figure

from eldr.evaluate.aggregated import CHUNKS, MEDIAN_TOKENS, SIGNATURES, prompt_lengths
from eldr.report.evaluation.prompt_signatures import AGAINST_JSQ, KNOWN_BY
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
    values,
    words,
)
from eldr.report.plots import COLOURS
from eldr.report.style import GREY, INK, legend_below, make_panels

LOOKS = dict(zip(SIGNATURES, (GREY, *COLOURS), strict=False))


def aggregated_section(rows: Rows, prefix: str) -> Section:
    """The gain by chunk, load and what is known of a request."""
    picture = Picture(
        f"{prefix}-aggregated",
        f"Change of mean TPOT under expected-union against jsq, by tokens of a step. {_loads(rows)}. Bars are 95 % "
        f"intervals over {rows[0]['seeds']} paired seeds.",
        lambda: _aggregated(rows),
    )
    text = (
        "Here every worker computes the prompts of its requests too, in chunks that share steps with decodes. "
        f"{_shares(rows)}The lengths of prompts are drawn: {prompt_lengths().mean():.0f} tokens on average, log-normal "
        f"with median {MEDIAN_TOKENS:.0f}, which has the logarithms' mean and deviation of Azure's conversations of "
        f"2023. {_kept(rows)}A row whose tokens a step are "
        "“elsewhere” has prefill workers, at the same batch. Known by nothing, a request is placed by load "
        "and by the work of prompts alone. Counts are given to the policy as if they could be known before the prompt "
        "is computed."
    )
    columns = {
        "workers": words("workers"),
        "batch under jsq": number("batch_target", 0),
        "tokens a step": _chunk,
        "a request is known by": lambda row: KNOWN_BY[row["signature"]],
        "steps with a chunk %": lambda row: f"{100 * row['chunk_step_share']:.0f}",
        "time with a chunk %": lambda row: f"{100 * row['chunk_time_share']:.0f}",
        **AGAINST_JSQ,
        "TTFT of jsq, p50 / p99 ms": lambda row: (
            "–" if row["chunk"] is None else f"{row['ttft_jsq_p50_ms']:.0f} / {row['ttft_jsq_p99_ms']:.0f}"
        ),
        "TTFT p50 %": change("ttft_vs_jsq_p50"),
        "TTFT p99 %": change("ttft_vs_jsq_p99"),
    }
    return Section("Aggregated serving", f"{prefix}-aggregated", REPLAYED, text, (picture,), (Numbers(columns, rows),))


def _chunk(row: Row) -> str:
    return "elsewhere" if row["chunk"] is None else f"{row['chunk']:,}"


def _loads(rows: Rows) -> str:
    loads = dict.fromkeys((row["workers"], row["batch_target"]) for row in rows)
    return ", ".join(f"{workers} workers at batch {batch:g}" for workers, batch in loads)


def _shares(rows: Rows) -> str:
    with_chunk = [row for row in rows if row["chunk"] is not None]
    if not with_chunk:
        return ""
    low, high = (100 * end(row["jsq_chunk_step_share"] for row in with_chunk) for end in (min, max))
    return f"Under jsq, {low:.0f} to {high:.0f} % of the steps have a chunk. "


def _kept(rows: Rows) -> str:
    """How much of the mean gain with prefill elsewhere is left, over the loads and chunks, where there is a gain."""
    names = {"counts": "counts", "prompt": "words"}
    parts = []
    for signature, name in names.items():
        elsewhere = {row["batch_target"]: row["vs_jsq_mean"] for row in of(rows, signature=signature, chunk=None)}
        kept = [
            100 * row["vs_jsq_mean"] / elsewhere[row["batch_target"]]
            for row in of(rows, signature=signature)
            if row["chunk"] is not None and elsewhere.get(row["batch_target"], 0) < -1
        ]
        if kept:
            parts.append(f"{min(kept):.0f} to {max(kept):.0f} % with {name}")
    if not parts:
        return ""
    return f"Of the mean gain with prefill elsewhere, this much is left: {', '.join(parts)}. "


def _aggregated(rows: Rows) -> Figure:
    loads = values(rows, "batch_target")
    chunks = [chunk for chunk in CHUNKS if of(rows, chunk=chunk)]
    figure, axes = make_panels(len(loads), width=3.7, height=3.4, share_y=True)
    for axis, batch in zip(axes, loads, strict=True):
        at_load = of(rows, batch_target=batch)
        for place, signature in enumerate(dict.fromkeys(row["signature"] for row in rows)):
            line = [row for chunk in chunks for row in of(at_load, signature=signature, chunk=chunk)]
            x = [chunks.index(row["chunk"]) + 0.08 * (place - 1.5) for row in line]
            mean = [row["vs_jsq_mean"] for row in line]
            half = [(row["vs_jsq_mean_hi"] - row["vs_jsq_mean_lo"]) / 2 for row in line]
            axis.errorbar(x, mean, half, fmt="o", color=LOOKS[signature], markersize=5, label=KNOWN_BY[signature])
        axis.axhline(0, color=INK, linewidth=0.8)
        axis.set_xticks(range(len(chunks)), [_chunk({"chunk": chunk}) for chunk in chunks])
        axis.set_title(f"{at_load[0]['workers']} workers, batch {batch:g}")
        axis.set_xlabel("tokens a step")
        axis.grid(visible=True, axis="y")
    axes[0].set_ylabel("mean TPOT against jsq, %")
    legend_below(figure, axes[0], 2)
    return figure
