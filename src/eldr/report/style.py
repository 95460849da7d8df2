"""The common look of all plots: one colour, dash and marker per policy, and rendering to SVG and PNG."""

from __future__ import annotations

import io
from contextlib import AbstractContextManager
from dataclasses import dataclass

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eldr.report.html import Html

# A placeholder for the page's text colour, which matplotlib does not know. It is replaced when an SVG is written. In a
# PNG it is black.
INK = "#0a0b0c"
GREY = "#8a94a3"


@dataclass(frozen=True, slots=True)
class PolicyStyle:
    """The look of one policy in plots.

    Hues also differ in lightness, and markers differ, so that neither colour blindness nor a grey print merges two
    policies. Load balancers are grey. Highlighted policies have colour.

    shown: the policy's name in legends.
    colour, marker, dash: matplotlib's names.
    """

    shown: str
    colour: str
    marker: str
    dash: str = "-"


POLICY_STYLES: dict[str, PolicyStyle] = {
    "rr": PolicyStyle("rr", GREY, "|", ":"),
    "random": PolicyStyle("random", GREY, "x", ":"),
    "p2c": PolicyStyle("p2c", GREY, "+", "--"),
    "jsq": PolicyStyle("jsq", GREY, "o"),
    "locality-band": PolicyStyle("locality-band", "#2b8ae0", "s"),
    "locality-band-refit": PolicyStyle("locality-band, zones refitted", "#12a37a", "D"),
    "expected-union": PolicyStyle("expected-union", "#e08a00", "^"),
    "expected-union-own": PolicyStyle("expected-union, no calibration", "#d6552e", "v", "--"),
    "expected-union-true": PolicyStyle("expected-union, true profiles", "#8a73d6", "P", "--"),
    "clairvoyant": PolicyStyle("clairvoyant, greedy", "#c567a8", "*", "--"),
}
_UNKNOWN = PolicyStyle("", "#b5a300", "d")


def policy_style(name: str) -> PolicyStyle:
    """Return the style of a policy. Policies that this module does not know share one style."""
    return POLICY_STYLES.get(name, PolicyStyle(name, _UNKNOWN.colour, _UNKNOWN.marker))


def policy_order(names: set[str]) -> list[str]:
    """Sort policies in legend order: load balancers, the paper's, ours, the replay's own, others."""
    return [name for name in POLICY_STYLES if name in names] + sorted(names - POLICY_STYLES.keys())


def style() -> AbstractContextManager[None]:
    """Return the settings under which figures are drawn and saved."""
    return mpl.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "eldr",
            "font.family": "sans-serif",
            "font.size": 10,
            "text.color": INK,
            "text.parse_math": False,  # names may contain dollar signs
            "axes.edgecolor": INK,
            "axes.labelcolor": INK,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.linewidth": 0.6,
            "axes.titlesize": 11,
            "axes.axisbelow": True,
            "xtick.color": INK,
            "ytick.color": INK,
            "legend.frameon": False,
            "grid.color": INK,
            "grid.alpha": 0.12,
            "grid.linewidth": 0.6,
        }
    )


def make_panels(count: int, *, width: float, height: float, share_y: bool = False) -> tuple[Figure, list[Axes]]:
    """Make a figure with `count` panels side by side, each `width` x `height` inches."""
    figure = Figure(figsize=(width * count, height), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False, sharey=share_y)[0])


def legend_below(figure: Figure, axes: Axes, columns: int) -> None:
    """Draw one legend for all panels, below them."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def as_svg(figure: Figure) -> Html:
    """Render an SVG element: transparent, with text in the page's own colour, so it suits light and dark."""
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
    )
    text = buffer.getvalue()
    return Html(text[text.index("<svg") :].replace(INK, "currentColor"))


def as_png(figure: Figure, dots_per_inch: int = 110) -> bytes:
    """Render a picture on white, for use outside a page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dots_per_inch, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()
