"""Plots as SVG elements for a page: transparent, with text in the page's own colour, so they suit light and dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from eldr.report.html import Html
from eldr.report.style import INK, as_svg, make_panels, style

# Distinguishable with the common kinds of colour blindness, on light and dark backgrounds.
COLOURS = ("#e08a00", "#2b8ae0", "#12a37a", "#c567a8", "#8a73d6", "#d6552e", "#7d8794", "#b5a300")


def distributions(panels: Mapping[str, Mapping[str, Sequence[float]]], unit: str) -> Html:
    """Cumulative distributions: one panel per quantity, one curve per series.

    panels: quantity -> series -> values, in `unit`. The axis ends at the 99.5th percentile of all values.
    """
    with style():
        figure, axes = make_panels(len(panels), width=3.7, height=2.9)
        for axis, (quantity, series) in zip(axes, panels.items(), strict=True):
            for colour, (name, values) in zip(COLOURS, series.items(), strict=False):
                if len(values):
                    axis.ecdf(list(values), label=name, color=colour, linewidth=1.8)
            everything = np.concatenate([np.asarray(values, dtype=float) for values in series.values()])
            if everything.size:
                axis.set_xlim(0, max(float(np.percentile(everything, 99.5)) * 1.05, 1e-9))
            axis.set_title(quantity)
            axis.set_xlabel(unit)
            axis.grid(visible=True)
        axes[0].set_ylabel("share of all")
        if axes[0].get_legend_handles_labels()[0]:
            axes[0].legend(loc="lower right")
        return as_svg(figure)


def heat_map(counts: Sequence[Sequence[int]], rows: Sequence[str], columns: Sequence[str], colour: str) -> Html:
    """A matrix of counts. The strength of a cell is its share of its row."""
    with style():
        figure, (axis,) = make_panels(1, width=0.62 * len(columns) + 1.6, height=0.4 * len(rows) + 0.5)
        for y, cells in enumerate(counts):
            for x, count in enumerate(cells):
                share = count / max(1, sum(cells))
                axis.add_patch(Rectangle((x - 0.47, y - 0.46), 0.94, 0.92, facecolor=colour, alpha=0.05 + 0.95 * share))
                axis.text(x, y, str(count), ha="center", va="center")
        axis.set_xlim(-0.5, len(columns) - 0.5)
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.set_xticks(range(len(columns)), columns)
        axis.set_yticks(range(len(rows)), rows)
        axis.xaxis.tick_top()
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        return as_svg(figure)


def bars(series: Mapping[str, Sequence[float]], groups: Sequence[str], label: str) -> Html:
    """Grouped bars: one group per name in `groups`, one bar per series in it, with values on top."""
    with style():
        figure, (axis,) = make_panels(1, width=max(5.0, 0.7 * len(groups) + 1.5), height=3.4)
        width = 0.8 / max(1, len(series))
        for number, (name, values) in enumerate(series.items()):
            left = np.arange(len(groups)) - 0.4 + (number + 0.5) * width
            drawn = axis.bar(left, values, width * 0.94, color=COLOURS[number % len(COLOURS)], label=name)
            axis.bar_label(drawn, fmt="%.1f", fontsize=8, padding=2)
        axis.set_xticks(range(len(groups)), groups)
        axis.set_ylabel(label)
        axis.margins(y=0.12)
        axis.grid(visible=True, axis="y")
        axis.set_axisbelow(True)
        axis.tick_params(axis="x", length=0)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=max(1, len(series)))
        return as_svg(figure)


def points_and_lines(
    points: Mapping[str, Sequence[tuple[float, float]]],
    lines: Mapping[str, Sequence[tuple[float, float]]],
    x_label: str,
    y_label: str,
) -> Html:
    """Measured points and, in the same colour, the fitted line of each series. Both axes begin at zero."""
    with style():
        figure, (axis,) = make_panels(1, width=6.4, height=3.6)
        for number, (name, measured) in enumerate(points.items()):
            colour = COLOURS[number % len(COLOURS)]
            x, y = zip(*measured, strict=True)
            axis.plot(x, y, "o", markersize=5, color=colour, label=name)
            x, y = zip(*lines[name], strict=True)
            axis.plot(x, y, color=colour, linewidth=1)
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=0)
        axis.set_xlabel(x_label)
        axis.set_ylabel(y_label)
        axis.grid(visible=True)
        axis.legend(loc="upper left", bbox_to_anchor=(1, 1), handletextpad=0.2)
        return as_svg(figure)


def scatter(points: NDArray[Any], labels: Sequence[str], centres: NDArray[Any], centre_names: Sequence[str]) -> Html:
    """Labelled points in the plane, coloured by label, and named centres. points: [n, 2]. centres: [K, 2]."""
    with style():
        figure, (axis,) = make_panels(1, width=5.0, height=3.4)
        kinds = list(dict.fromkeys(labels))
        for number, kind in enumerate(kinds):
            chosen = points[np.asarray(labels) == kind]
            axis.scatter(
                chosen[:, 0],
                chosen[:, 1],
                s=26,
                alpha=0.75,
                linewidths=0,
                color=COLOURS[number % len(COLOURS)],
                label=kind,
            )
        axis.scatter(centres[:, 0], centres[:, 1], s=110, marker="P", color=INK)
        for centre, name in zip(centres, centre_names, strict=True):
            axis.annotate(name, centre, xytext=(6, 6), textcoords="offset points", weight="bold")
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
        axis.margins(0.1)
        axis.legend(loc="upper left", bbox_to_anchor=(1, 1), handletextpad=0.2)
        return as_svg(figure)
