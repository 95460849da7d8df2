"""Shows the contents of a calibration: a table for the terminal, JSON, or an HTML page with plots."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from eldr.calibration import Calibration
from eldr.errors import EldrError
from eldr.fileio import reason_of
from eldr.report.terminal import printable
from eldr.signature import TRANSFORMS

if TYPE_CHECKING:
    from eldr.report.html import Html

BAR_WIDTH = 40
# Colours repeat after eight groups. With more groups than this they are of no use.
MAX_COLOURED = 24
RHO_NOTE = (
    "rho is the rank correlation of signature distance and decode-profile distance, on the calibration requests "
    "themselves. Expect less on new requests."
)
PICTURE_NOTE = (
    "Signatures on their two main axes. Crosses mark the centroids. Zones that overlap here may be separate in other "
    "dimensions."
)


def calibration_as_json(calibration: Calibration) -> dict[str, Any]:
    """Return everything that `render_calibration` shows, as JSON-serialisable values."""
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
    """Render facts, the rho of each transform, the layers kept and the zone sizes for a terminal."""
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
    """Write a self-contained HTML page with plots. Raises EldrError if it cannot be written."""
    # The page needs matplotlib (eldr[report]). The terminal output does not.
    from eldr.report.html import page, write_page

    title = f"Calibration of {_model(calibration)}"
    blocks = calibration_blocks(calibration)
    try:
        write_page(page(title, f"{calibration.geometry}, {calibration.workers} zones", *blocks), path)
    except OSError as error:
        raise EldrError(f"page {path}: {reason_of(error)}") from None


def calibration_blocks(calibration: Calibration) -> list[Html]:
    """Return the sections of that page."""
    from eldr.report.html import figure, paragraph, row, section, table
    from eldr.report.plots import bars, scatter

    picture, workers = calibration.picture, calibration.workers
    numbers = [str(zone) for zone in range(workers)]
    zones = [f"zone {number}" for number in numbers]
    order = np.argsort(picture.zones, kind="stable")  # legends name zones in order
    by_zone = [zones[zone] for zone in picture.zones[order].tolist()]
    by_kind = [printable(kind) or "no label" for kind in picture.labels[order].tolist()]
    plots = [
        figure(scatter(picture.points[order], labels, picture.centroids, numbers), caption)
        for labels, caption in ((by_zone, "by zone"), (by_kind, "by kind"))
        if len(set(labels)) <= MAX_COLOURED
    ]
    return [
        section("Contents", table(("", ""), _facts(calibration), text=True)),
        section("Calibration requests", paragraph(PICTURE_NOTE), row(*plots)),
        section(
            "Zones and transforms",
            row(
                figure(bars({"requests": calibration.zone_sizes.tolist()}, numbers, "requests"), "requests by zone"),
                table(("transform", "rho"), [(name, f"{value:.3f}") for name, value in calibration.rho.items()]),
            ),
            paragraph(RHO_NOTE),
        ),
    ]


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
    steps = provenance.get("step_tokens")
    if isinstance(steps, dict):
        facts["independent tokens"] = ", ".join(f"{value} in a step of {tokens}" for tokens, value in steps.items())
    return [(name, printable(str(value))) for name, value in facts.items() if value not in (None, "")]


def _model(calibration: Calibration) -> str:
    return printable(str(calibration.provenance.get("model") or "an unnamed model"))


def _bar(value: float, full: float) -> str:
    return "█" * round(BAR_WIDTH * max(0.0, value) / full)
