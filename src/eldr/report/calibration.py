"""What a calibration holds, for people: a table for the terminal, JSON, and one HTML page with plots."""

from __future__ import annotations

import html
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from eldr.calibration import Calibration
from eldr.errors import EldrError
from eldr.fileio import reason_of, write_atomically
from eldr.signature import TRANSFORMS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BAR_WIDTH = 40
# More kinds than this are no longer told apart by colour.
MAX_KINDS = 24
RHO_NOTE = (
    "rho: rank correlation of signature distance and decode-profile distance on the calibration requests themselves; "
    "expect less on new ones."
)


def calibration_as_json(calibration: Calibration) -> dict[str, Any]:
    """Everything `render_calibration` shows, as JSON-able values."""
    geometry = calibration.geometry
    return {
        "geometry": {"layers": geometry.layers, "experts": geometry.experts, "top_k": geometry.top_k},
        "transform": calibration.signature.transform_name,
        "layers_kept": np.flatnonzero(calibration.signature.layer_mask).tolist(),
        "rho": calibration.rho,
        "workers": calibration.workers,
        "zone_sizes": calibration.zone_sizes.tolist(),
        "provenance": calibration.provenance,
    }


def render_calibration(calibration: Calibration) -> RenderableType:
    """Facts, rho of each transform, layers kept and zone sizes, for a terminal."""
    facts = Table.grid(padding=(0, 2))
    for name, fact in _facts(calibration):
        facts.add_row(Text(name, style="bold"), Text(fact))
    rho = Table.grid(padding=(0, 2))
    for name in TRANSFORMS:
        value = calibration.rho.get(name)
        used = "cyan" if name == calibration.signature.transform_name else ""
        if value is None:
            rho.add_row(Text(name), Text("-", justify="right"), Text("not in the trace, or not defined", style="dim"))
        else:
            rho.add_row(Text(name, style=used), f"{value:.3f}", Text(_bar(value, 1), style=used))
    zones = Table.grid(padding=(0, 2))
    largest = max(1, int(calibration.zone_sizes.max()))
    for zone, size in enumerate(calibration.zone_sizes.tolist()):
        zones.add_row(f"zone {zone}", str(size), Text(_bar(size, largest)))
    return Group(
        facts,
        Text("\nrho by transform", style="bold"),
        rho,
        Text(RHO_NOTE, style="dim"),
        Text("\nrequests by zone", style="bold"),
        zones,
    )


def calibration_page(calibration: Calibration, path: Path) -> None:
    """Write one self-contained HTML page with plots. Raises EldrError where it cannot be written."""
    kinds, kind_of = np.unique(calibration.picture.labels, return_inverse=True)
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in _facts(calibration)
    )
    plots = [
        ("Calibration requests by zone", _points_plot(calibration, calibration.picture.zones, calibration.workers), ""),
        ("Requests by zone", _sizes_plot(calibration), ""),
        ("rho by transform", _rho_plot(calibration), RHO_NOTE),
    ]
    if 1 < len(kinds) <= MAX_KINDS:
        legend = "".join(
            f'<span><b style="color:{colour}">&#9679;</b> {html.escape(_printable(kind) or "no label")}</span> '
            for kind, colour in zip(kinds.tolist(), _colours(len(kinds)), strict=True)
        )
        plots.insert(1, ("Calibration requests by kind", _points_plot(calibration, kind_of, len(kinds)), legend))
    figures = "".join(
        f"<figure><h2>{title}</h2>{_svg(figure)}<figcaption>{caption}</figcaption></figure>"
        for title, figure, caption in plots
    )
    page = PAGE.format(title=f"Calibration of {html.escape(_model(calibration))}", rows=rows, figures=figures)
    try:
        write_atomically(path, lambda file: file.write(page.encode()))
    except OSError as error:
        raise EldrError(f"page {path}: {reason_of(error)}") from None


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; color: #222; }}
th {{ text-align: left; padding-right: 1.5rem; vertical-align: top; font-weight: 600; }}
td {{ overflow-wrap: anywhere; }}
main {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: 1rem; }}
figure {{ margin: 0; }} h2 {{ font-size: 1.05rem; }} svg {{ max-width: 100%; height: auto; }}
figcaption span {{ white-space: nowrap; margin-right: .8rem; }}
</style></head><body><h1>{title}</h1><table>{rows}</table><main>{figures}</main></body></html>
"""


def _facts(calibration: Calibration) -> list[tuple[str, str]]:
    provenance = calibration.provenance
    mask = calibration.signature.layer_mask
    sizes = calibration.zone_sizes
    versions = provenance.get("versions")
    facts = {
        "model": _model(calibration),
        "geometry": str(calibration.geometry),
        "signature": f"{calibration.signature.transform_name}, rho {calibration.signature.rho:.3f}",
        "layers kept": f"{int(mask.sum())} of {len(mask)}  " + "".join("■" if kept else "·" for kept in mask),
        "zones": f"{calibration.workers}, of {sizes.min()} to {sizes.max()} requests",
        "requests": provenance.get("requests"),
        "recording": provenance.get("note"),
        "trace sha256": provenance.get("trace_sha256"),
        "seed": provenance.get("seed"),
        "fitted": provenance.get("created_utc"),
        "versions": ", ".join(f"{name} {number}" for name, number in versions.items())
        if isinstance(versions, dict)
        else None,
    }
    return [(name, _printable(str(value))) for name, value in facts.items() if value not in (None, "")]


def _model(calibration: Calibration) -> str:
    return _printable(str(calibration.provenance.get("model") or "an unnamed model"))


def _printable(text: str) -> str:
    """Text of a file without the control characters that could steer a terminal."""
    return "".join(character if character.isprintable() else "�" for character in text)


def _bar(value: float, full: float) -> str:
    return "█" * round(BAR_WIDTH * max(0.0, value) / full)


def _colours(count: int) -> list[str]:
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colour) for colour in colormaps["turbo"](np.linspace(0.05, 0.95, count))]


def _figure(height_inch: float) -> Figure:
    # Figure and not pyplot: no global state, no display.
    from matplotlib.figure import Figure

    return Figure(figsize=(6, height_inch), layout="constrained")


def _svg(figure: Figure) -> str:
    from matplotlib import rc_context

    text = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "eldr"}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def _points_plot(calibration: Calibration, groups: NDArray[np.integer[Any]], count: int) -> Figure:
    """Main axes of the signatures: a dot for each request, coloured by group, a cross for each centroid."""
    picture = calibration.picture
    figure = _figure(4.5)
    axes = figure.add_subplot()
    colours = np.array(_colours(count))
    axes.scatter(picture.points[:, 0], picture.points[:, 1], s=12, c=colours[groups], alpha=0.7, linewidths=0)
    axes.scatter(picture.centroids[:, 0], picture.centroids[:, 1], s=70, c="black", marker="x")
    for zone, (x, y) in enumerate(picture.centroids.tolist()):
        axes.annotate(str(zone), (x, y), textcoords="offset points", xytext=(5, 5))
    axes.set(xlabel="first principal component", ylabel="second")
    return figure


def _sizes_plot(calibration: Calibration) -> Figure:
    figure = _figure(3)
    axes = figure.add_subplot()
    axes.bar(range(calibration.workers), calibration.zone_sizes, color=_colours(calibration.workers))
    axes.set(xlabel="zone", ylabel="requests")
    axes.locator_params(axis="x", integer=True)
    return figure


def _rho_plot(calibration: Calibration) -> Figure:
    figure = _figure(3)
    axes = figure.add_subplot()
    names = [name for name in TRANSFORMS if name in calibration.rho]
    used = calibration.signature.transform_name
    bars = axes.barh(
        names,
        [calibration.rho[name] for name in names],
        color=["tab:blue" if name == used else "lightgrey" for name in names],
    )
    axes.bar_label(bars, fmt="%.3f", padding=3)
    axes.set(xlabel="rho", xlim=(min(0, *calibration.rho.values()), 1.1))
    axes.invert_yaxis()
    return figure
