"""Report sections on signatures from prompts: their gain, learning while serving, a change of mix, and their cost."""

from __future__ import annotations

from matplotlib.figure import Figure

from eldr.evaluate.prompt_signatures import BUCKET, CHANGES, SIGNATURES
from eldr.report.evaluation.comparisons import STATISTICS
from eldr.report.evaluation.section import (
    MEASURED,
    REPLAYED,
    Numbers,
    Picture,
    Row,
    Rows,
    Section,
    change,
    change_dots,
    number,
    of,
    shown,
    values,
    words,
)
from eldr.report.plots import COLOURS
from eldr.report.style import GREY, INK, legend_below, make_panels

KNOWN_BY = {
    "none": "nothing: the fleet's mean for everybody",
    "label": "its label: the mean profile of the label",
    "prompt": "the words of its prompt",
    "counts": "the counts of its prompt",
    "both": "words and counts together",
    "true": "its true profile",
}
LOOKS = dict(zip(SIGNATURES, (GREY, *COLOURS), strict=False))
AGAINST_JSQ = {
    "p50 ms": number("tpot_p50_ms"),
    "p99 ms": number("tpot_p99_ms"),
    "mean ms": number("tpot_mean_ms"),
    "p50 %": change("vs_jsq_p50"),
    "p99 %": change("vs_jsq_p99"),
    "mean %": change("vs_jsq_mean"),
    "active experts": number("active_experts_mean"),
}
CHANGE = "Change in percent against jsq, 95 % interval over paired seeds."


def by_signature_section(rows: Rows, prefix: str) -> Section:
    """The gain of each policy by what it knows of a request."""
    pictures = tuple(
        Picture(
            f"{prefix}-prompt-signatures-{workers}-workers",
            f"{workers} decode workers, mean batch {rows[0]['batch_target']:g} under jsq. {CHANGE}",
            lambda workers=workers: _by_signature(of(rows, workers=workers)),  # type: ignore[misc]
        )
        for workers in values(rows, "workers")
    )
    kept = [text for workers in values(rows, "workers") if (text := _kept(of(rows, workers=workers)))]
    text = (
        "How much of the gain is left if the decode worker is chosen before the prefill, by the words of the prompt? "
        + (f"With expected-union, words keep {'; '.join(kept)}. " if kept else "")
        + "Every prediction is of requests that nothing was fitted to. A label is what a client could send that knows "
        "its own kind. Words and counts together are weighed by their errors on the calibration requests. Where the "
        "note on a recording says that generated tokens stand in for the prompt, counts know part of the answer and do "
        "better here than they could in service."
    )
    columns = {
        "policy": lambda row: shown(row["policy"]),
        "a request is known by": lambda row: KNOWN_BY[row["signature"]],
        **AGAINST_JSQ,
        "weight of words": number("prompt_share"),
    }
    numbers = tuple(
        Numbers(columns, of(rows, workers=workers), f"{workers} workers") for workers in values(rows, "workers")
    )
    return Section("Signatures from prompts", f"{prefix}-prompt-signatures", REPLAYED, text, pictures, numbers)


def kept_percent(rows: Rows, statistic: str) -> float | None:
    """The reduction of TPOT with words relative to that with counts, under expected-union, in percent.

    None without a gain to compare with.
    """
    gain = {row["signature"]: row[f"vs_jsq_{statistic}"] for row in of(rows, policy="expected-union")}
    return 100 * gain["prompt"] / gain["counts"] if gain.get("counts", 0) < -1 and "prompt" in gain else None


def _kept(rows: Rows) -> str:
    mean, tail = kept_percent(rows, "mean"), kept_percent(rows, "p99")
    if mean is None:
        return ""
    of_tail = "" if tail is None else f" and {tail:.0f} % of its p99 reduction"
    return f"{mean:.0f} % of the mean reduction of counts{of_tail} at {rows[0]['workers']} workers"


def _by_signature(rows: Rows) -> Figure:
    names = [f"{shown(row['policy'])}: {row['signature']}" for row in rows]
    figure, axes = make_panels(3, width=3.6, height=0.45 * len(rows) + 1.0, share_y=True)
    for axis, (statistic, title) in zip(axes, STATISTICS.items(), strict=True):
        change_dots(axis, names, rows, f"vs_jsq_{statistic}", [LOOKS[row["signature"]] for row in rows])
        axis.set_title(title)
        axis.set_xlabel("change, %")
    return figure


def learning_section(rows: Rows, prefix: str) -> Section:
    """Mean TPOT against the requests served since a fleet began to learn."""
    first = rows[0]
    picture = Picture(
        f"{prefix}-prompt-learning",
        f"expected-union by words, {first['workers']} decode workers, {first['rate']:.0f} requests per second. "
        f"Mean TPOT of {BUCKET} requests each, in order of arrival, against the same requests under jsq. Bands are "
        f"95 % intervals over {first['seeds']} paired seeds.",
        lambda: _learning(rows),
    )
    text = (
        "A fleet begins with no model at all and learns from the requests that finish. Nobody is predicted by a model "
        "that it has taught: the recording is divided into four parts, and a learner that the other three have taught "
        "predicts each. A learner thus hears of three quarters of what a router would hear of. A request "
        "teaches once, so that the recording runs out of lessons after some hundred requests, where real traffic would "
        f"go on. A fit takes the simulated time that it would take a router: 0.1 s at first, in which "
        f"{0.1 * first['rate']:.0f} requests arrive."
    )
    columns = {"requests that report": _share, "served": words("served"), "mean % vs jsq": change("vs_jsq_mean")}
    whole = {"requests that report": _share, **AGAINST_JSQ}
    return Section(
        "Learning while serving",
        f"{prefix}-prompt-learning",
        REPLAYED,
        text,
        (picture,),
        (Numbers(whole, of(rows, sort="all"), "the whole run"), Numbers(columns, of(rows, sort="curve"), "the curve")),
    )


def _share(row: Row) -> str:
    return "none: fitted before" if row["share"] is None else f"{100 * row['share']:.0f} %"


def _learning(rows: Rows) -> Figure:
    figure, (axis,) = make_panels(1, width=10.8, height=3.6)
    for place, share in enumerate(dict.fromkeys(row["share"] for row in rows)):
        line = of(rows, sort="curve", share=share)
        x, colour = [row["served"] for row in line], GREY if share is None else COLOURS[place]
        name = "fitted before, not learning" if share is None else f"{100 * share:.0f} % of requests report"
        axis.plot(
            x, [row["vs_jsq_mean"] for row in line], "--" if share is None else "o-", color=colour, markersize=4,
            label=name,
        )  # fmt: skip
        if share is not None:
            low, high = ([row[f"vs_jsq_mean_{end}"] for row in line] for end in ("lo", "hi"))
            axis.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
    axis.axhline(0, color=INK, linewidth=0.8)
    axis.set_xlabel("requests served")
    axis.set_ylabel("mean TPOT against jsq, %")
    axis.grid(visible=True)
    legend_below(figure, axis, 4)
    return figure


def change_section(rows: Rows, prefix: str) -> Section:
    """Other kinds of requests than those that the calibration was fitted to."""
    directions = list(dict.fromkeys(row["fitted"] for row in rows))
    pictures = tuple(
        Picture(
            f"{prefix}-prompt-change-{place + 1}",
            f"Fitted to {fitted}; served: {of(rows, fitted=fitted)[0]['served']}. {rows[0]['workers']} decode workers, "
            f"mean batch {of(rows, fitted=fitted)[0]['batch_target']:.2g} under jsq. {CHANGE}",
            lambda fitted=fitted: _change(of(rows, fitted=fitted)),  # type: ignore[misc]
        )
        for place, fitted in enumerate(directions)
    )
    text = (
        "The recording's kinds are cut in half along the main axis of their expert use. The fleet was fitted to one "
        f"half and serves the other. {_of_change(rows)}As above, nobody is predicted by a model that it has taught."
    )
    columns = {
        "fitted to": words("fitted"),
        "served": words("served"),
        "signature": words("signature"),
        **AGAINST_JSQ,
    }
    return Section(
        "Signatures from prompts when the mix changes",
        f"{prefix}-prompt-change",
        REPLAYED,
        text,
        pictures,
        (Numbers(columns, rows),),
    )


def _of_change(rows: Rows) -> str:
    """Mean TPOT of both directions, by what places requests."""
    names = {
        "counts, fitted to the others": "counts",
        "prompt, fitted to the others": "words",
        "prompt, fitted to the others, learning": "words that go on learning",
        "prompt, learning from nothing": "words learned from nothing",
    }
    found = {
        name: " and ".join(f"{row['vs_jsq_mean']:+.1f}" for row in of(rows, signature=signature))
        for signature, name in names.items()
        if of(rows, signature=signature)
    }
    changes = ", ".join(f"{values} % by {name}" for name, values in found.items())
    return f"Mean TPOT changes in the two directions: {changes}. " if found else ""


def _change(rows: Rows) -> Figure:
    names = [row["signature"] for row in rows]
    looks = dict(zip(CHANGES, COLOURS, strict=False))
    figure, axes = make_panels(3, width=3.6, height=0.45 * len(rows) + 1.0, share_y=True)
    for axis, (statistic, title) in zip(axes, STATISTICS.items(), strict=True):
        change_dots(axis, names, rows, f"vs_jsq_{statistic}", [looks[name] for name in names])
        axis.set_title(title)
        axis.set_xlabel("change, %")
    return figure


def costs_section(rows: Rows) -> Section:
    """What a prompt, a model and a fit take."""
    fits = of(rows, sort="fit")
    text = (
        f"For a model of 48 layers x 128 experts and prompts of 4 KB, with rank {rows[0]['rank']}. The times are CPU "
        f"time of one thread with loops in {rows[0]['loops']}, and a request takes all three. Fits are of "
        f"{fits[0]['lessons']} lessons, made up, and run in the router's second process. Most fits keep the choices of "
        "an earlier cross-validation."
    )
    times = {"step": words("what"), "p50 us": number("p50_us", 1), "p99 us": number("p99_us", 1)}
    memory = {"what": words("what"), "KB": lambda row: f"{row['bytes'] / 1000:.0f}"}
    cpu = {"what": words("what"), "lessons": words("lessons"), "CPU s": number("cpu_s", 1)}
    return Section(
        "Signatures from prompts",
        "prompt-costs",
        MEASURED,
        text,
        (),
        (
            Numbers(times, of(rows, sort="time"), "time of a prompt"),
            Numbers(memory, of(rows, sort="memory"), "memory"),
            Numbers(cpu, fits, "learning"),
        ),
    )
