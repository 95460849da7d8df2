"""Report sections on overhead: memory, capture and decisions."""

from __future__ import annotations

from matplotlib.figure import Figure

from eldr.report.evaluation.section import (
    COMPUTED,
    MEASURED,
    Numbers,
    Picture,
    Rows,
    Section,
    horizontal_bars,
    number,
    of,
    values,
    words,
)
from eldr.report.plots import COLOURS
from eldr.report.style import make_panels, policy_style


def memory_section(rows: Rows) -> Section:
    picture = Picture(
        "memory",
        "Memory of the counts relative to a KV cache in bfloat16, at one byte per (layer, expert) and KV block.",
        lambda: _memory(rows),
    )
    text = (
        "Each KV-cache block has one row of counts, which lives as long as the block's content. In larger blocks, more "
        "tokens share a row."
    )
    columns = {
        "model": words("model"),
        "tokens a block": words("block_tokens"),
        "row, bytes": words("row_bytes"),
        "KV block, bytes": words("kv_block_bytes"),
        "share %": number("share_percent", 3),
    }
    return Section("Memory of the signature cache", "memory", COMPUTED, text, (picture,), (Numbers(columns, rows),))


def _memory(rows: Rows) -> Figure:
    figure, (axis,) = make_panels(1, width=10.8, height=3.0)
    for place, model in enumerate(dict.fromkeys(row["model"] for row in rows)):
        line = of(rows, model=model)
        axis.plot(
            [row["block_tokens"] for row in line],
            [row["share_percent"] for row in line],
            "o-",
            color=COLOURS[place],
            label=model,
        )
    axis.set_xscale("log", base=2)
    blocks = values(rows, "block_tokens")
    axis.set_xticks(blocks, [str(block) for block in blocks])
    axis.set_xlabel("tokens in a KV block")
    axis.set_ylabel("% of KV memory")
    axis.set_ylim(bottom=0)
    axis.grid(visible=True)
    axis.legend()
    return figure


def capture_section(rows: Rows) -> Section:
    text = (
        "The connector's own operations at 48 layers x 128 experts, top-8, on one CPU core of this machine. On a GPU "
        "they are kernels queued beside the forward pass. Their cost there has not been measured."
    )
    columns = {"operation": words("what"), "prompt tokens": words("prompt_tokens"), "median us": number("p50_us", 0)}
    return Section("Capture", "capture", MEASURED, text, (), (Numbers(columns, rows),))


def decisions_section(rows: Rows, prefix: str) -> Section:
    picture = Picture(
        f"{prefix}-decisions",
        f"Time of the router's steps for one request, with {rows[0]['workers']} decode workers and this recording's "
        "prompts. Bars show the median, numbers the median / p99.",
        lambda: _decisions(rows),
    )
    text = (
        "CPU time of one Python thread, without anything else that the machine did. Each request takes every step of "
        f"its policy once. Inner loops ran in {rows[0]['loops']}."
    )
    columns = {
        "step": words("what"),
        "calls": words("calls"),
        "p50 us": number("p50_us", 1),
        "p99 us": number("p99_us", 1),
    }
    return Section("Time of a decision", f"{prefix}-decisions", MEASURED, text, (picture,), (Numbers(columns, rows),))


def _decisions(rows: Rows) -> Figure:
    long = [row for row in rows if row["p50_us"] >= 0.5]
    return horizontal_bars(
        [row["what"] for row in long],
        [row["p50_us"] for row in long],
        [f"{row['p50_us']:.0f} / {row['p99_us']:.0f}" for row in long],
        [policy_style(row["what"].partition(":")[0]).colour for row in long],
        "microseconds",
    )
