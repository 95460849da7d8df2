"""Report section on other texts in a prompt: shared instructions, and earlier turns of a conversation."""

from __future__ import annotations

from matplotlib.figure import Figure

from eldr.evaluate.prompt_texts import FITTED, TEXTS_OF, TURNS, UNKNOWN
from eldr.report.evaluation.comparisons import STATISTICS
from eldr.report.evaluation.prompt_signatures import AGAINST_JSQ, CHANGE
from eldr.report.evaluation.section import (
    REPLAYED,
    Numbers,
    Picture,
    Row,
    Rows,
    Section,
    change_dots,
    number,
)
from eldr.report.plots import COLOURS
from eldr.report.style import make_panels

LOOKS = {FITTED: COLOURS[0], UNKNOWN: COLOURS[1]}
FIT = {FITTED: "yes", UNKNOWN: "no"}


def texts_section(rows: Rows, prefix: str) -> Section:
    """The gain by words where prompts hold more than the request."""
    rows = [row for name in TEXTS_OF for row in rows if row["text"] == name]
    picture = Picture(
        f"{prefix}-prompt-texts",
        f"expected-union by words, {rows[0]['workers']} decode workers, mean batch {rows[0]['batch_target']:g} under "
        f"jsq. {CHANGE}",
        lambda: _texts(rows),
    )
    text = (
        "System messages are left out before words are counted. Other texts are not: instructions in a user's message, "
        "documents, examples, earlier turns. Here they are put around the recorded prompts. The experts are still "
        "those of the prompt alone, so this shows how well a model finds a request in a longer text. The instructions "
        "are made up. “Unknown” texts are new to the model, as after a change of an application; learning "
        f"while serving would fit it again. Earlier turns are {TURNS} prompts of other requests. Where a label has "
        "many topics, turns of the same label are a conversation that jumps between them."
    )
    columns = {
        "prompts": lambda row: TEXTS_OF[row["text"]],
        "fitted with it": lambda row: FIT[row["fit"]],
        "squared correlation": number("explained"),
        **AGAINST_JSQ,
    }
    return Section(
        "Shared instructions and conversations",
        f"{prefix}-prompt-texts",
        REPLAYED,
        text,
        (picture,),
        (Numbers(columns, rows),),
    )


def _name(row: Row) -> str:
    return row["text"] if row["text"] == "plain" else f"{row['text']}, {row['fit']}"


def _texts(rows: Rows) -> Figure:
    figure, axes = make_panels(3, width=3.6, height=0.4 * len(rows) + 1.0, share_y=True)
    for axis, (statistic, title) in zip(axes, STATISTICS.items(), strict=True):
        names, colours = [_name(row) for row in rows], [LOOKS[row["fit"]] for row in rows]
        change_dots(axis, names, rows, f"vs_jsq_{statistic}", colours)
        axis.set_title(title)
        axis.set_xlabel("change, %")
    return figure
