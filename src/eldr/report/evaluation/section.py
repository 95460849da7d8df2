"""A section of an evaluation report: its text, its pictures and the numbers behind them. Also small drawing helpers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eldr.report.style import INK, make_panels, policy_style

Row = Mapping[str, Any]
Rows = Sequence[Row]

# Where the numbers of a section come from. A section shows one of these beside its title.
REPLAYED = "replayed: recorded experts, modelled step time"
RECORDED = "computed from the recording"
MEASURED = "measured on the machine that made this page"
SYNTHETIC = "replayed on synthetic traces: drawn experts, modelled step time"
COMPUTED = "computed from published model shapes"


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture of a section.

    name: the file name, without suffix.
    caption: the text below it.
    draw: draws the figure. Called under the project's plot style.
    """

    name: str
    caption: str
    draw: Callable[[], Figure]


@dataclass(frozen=True, slots=True)
class Numbers:
    """A table of numbers.

    columns: column heading -> function that formats the cell of a row.
    rows: the rows.
    caption: the text above it.
    """

    columns: Mapping[str, Callable[[Row], str]]
    rows: Rows
    caption: str = ""

    def cells(self) -> list[list[str]]:
        return [[read(row) for read in self.columns.values()] for row in self.rows]


@dataclass(frozen=True, slots=True)
class Section:
    """A section of the report.

    origin: where its numbers come from, one of the constants above.
    """

    title: str
    anchor: str
    origin: str
    text: str
    pictures: tuple[Picture, ...] = ()
    numbers: tuple[Numbers, ...] = ()


def words(key: str) -> Callable[[Row], str]:
    return lambda row: "–" if row.get(key) is None else str(row[key])


def number(key: str, digits: int = 2) -> Callable[[Row], str]:
    return lambda row: "–" if row.get(key) is None else f"{row[key]:.{digits}f}"


def change(key: str) -> Callable[[Row], str]:
    """Format a signed percent change, with half of its 95 % interval if it has one."""

    def read(row: Row) -> str:
        if row.get(key) is None:
            return "–"
        low, high = row.get(f"{key}_lo"), row.get(f"{key}_hi")
        half = "" if low is None or high is None else f"\u00a0±\u00a0{(high - low) / 2:.1f}"
        return f"{row[key]:+.1f}{half}"

    return read


def tpot_columns(against: str = "vs_best_baseline") -> dict[str, Callable[[Row], str]]:
    """The columns that every comparison of TPOT has."""
    return {
        "p50 ms": number("tpot_p50_ms"),
        "p95 ms": number("tpot_p95_ms"),
        "p99 ms": number("tpot_p99_ms"),
        "mean ms": number("tpot_mean_ms"),
        "p50 %": change(f"{against}_p50"),
        "p99 %": change(f"{against}_p99"),
        "mean %": change(f"{against}_mean"),
        "MoE mean %": change("moe_vs_best_baseline_mean"),
        "active experts": number("active_experts_mean"),
        "batch": number("batch_mean"),
    }


def shown(policy: str) -> str:
    return policy_style(policy).shown


def of(rows: Rows, **wanted: Any) -> list[Row]:
    """Return the rows that have all these values."""
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def values(rows: Iterable[Row], key: str) -> list[Any]:
    """The distinct values of a column, ascending."""
    return sorted({row[key] for row in rows})


def policy_line(axes: Axes, policy: str, x: Sequence[float], y: Sequence[float], **options: Any) -> None:
    """Draw a policy's curve in its colour, dash and marker."""
    look = policy_style(policy)
    quiet = policy in ("rr", "random", "p2c")
    axes.plot(
        x,
        y,
        look.dash,
        color=look.colour,
        marker=look.marker,
        markersize=4.5,
        linewidth=1.0 if quiet else 1.8,
        label=look.shown,
        **options,
    )


def change_by_workers(axes: Axes, rows: Rows, key: str, order: Sequence[str]) -> None:
    """Draw signed changes against the number of workers, one line for each policy in `order`, with their intervals."""
    sizes = values(rows, "workers")
    for policy in order:
        line = sorted(of(rows, policy=policy), key=lambda row: int(row["workers"]))
        x = [sizes.index(row["workers"]) for row in line]
        policy_line(axes, policy, x, [row[key] for row in line])
        if all(row.get(f"{key}_lo") is not None for row in line):
            low, high = [row[f"{key}_lo"] for row in line], [row[f"{key}_hi"] for row in line]
            axes.fill_between(x, low, high, color=policy_style(policy).colour, alpha=0.12, linewidth=0)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    axes.set_xlabel("decode workers")
    axes.grid(visible=True)


def change_dots(axes: Axes, names: Sequence[str], rows: Sequence[Row], key: str, colours: Sequence[str]) -> None:
    """Draw signed changes as dots with their 95 % intervals, one per line, with names at the left and zero marked."""
    for line, (row, colour) in enumerate(zip(rows, colours, strict=True)):
        value, low, high = row[key], row.get(f"{key}_lo"), row.get(f"{key}_hi")
        if low is not None and high is not None:
            axes.plot([low, high], [line, line], color=colour, linewidth=3.5, alpha=0.35, solid_capstyle="round")
        axes.plot(value, line, "o", color=colour, markersize=6)
        axes.annotate(
            f"{value:+.1f}", (value, line), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=8.5
        )
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.7)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(visible=True, axis="x")
    axes.margins(x=0.12)


def horizontal_bars(
    names: Sequence[str], lengths: Sequence[float], notes: Sequence[str], colours: Sequence[str], unit: str
) -> Figure:
    """A figure with one bar per line, its name at the left and its note after it."""
    figure, (axes,) = make_panels(1, width=10.8, height=0.33 * len(names) + 0.8)
    for line, (length, note, colour) in enumerate(zip(lengths, notes, colours, strict=True)):
        axes.barh(line, length, 0.7, color=colour)
        axes.annotate(note, (length, line), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8.5)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(unit)
    axes.margins(x=0.12)
    axes.grid(visible=True, axis="x")
    return figure
