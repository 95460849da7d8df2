"""`eldr calibrate-cost`: measures a MoE layer, fits its cost and plots both."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from eldr.cost_measure import GEOMETRIES, REPEATS, LayerGeometry

if TYPE_CHECKING:
    from eldr.cost import CostModel
    from eldr.cost_measure import Measurements

SUMMARY = "measure how the time of a MoE layer grows with active experts on this device"
EXAMPLES = """examples:
  eldr calibrate-cost --geometry qwen3-30b-a3b --device cuda -o qwen3-h100.cost.json --plot qwen3-h100.svg
  eldr calibrate-cost --layer 2048,768,128,8 --device cpu -o my-model.cost.json

Run it in an environment that has PyTorch, such as that of vLLM. The cost file holds the fitted model in microseconds.

exit codes: 0 success, 2 bad input.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `eldr calibrate-cost`."""
    flag = parser.add_argument
    geometry = parser.add_mutually_exclusive_group()
    geometry.add_argument(
        "--geometry", choices=tuple(GEOMETRIES), default="qwen3-30b-a3b", help="layer of a known model (qwen3-30b-a3b)"
    )
    geometry.add_argument("--layer", type=_layer, metavar="HIDDEN,EXPERT_HIDDEN,EXPERTS,TOP_K", help="any other layer")
    flag("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA if available, else CPU (auto)")
    flag(
        "--repeats",
        type=int,
        default=REPEATS,
        metavar="N",
        help=f"runs per measurement, of which the fastest counts ({REPEATS})",
    )
    flag("--plot", type=Path, metavar="OUT.svg", help="plot the measurements and the fit (needs eldr[report])")
    flag("-o", "--output", required=True, type=Path, metavar="FILE",
         help="the cost file to write, for --cost of `eldr serve` and `eldr replay`")  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Run `eldr calibrate-cost` and return the exit code."""
    from eldr.cost_measure import calibrate_cost, cuda_available, measure

    name = arguments.geometry if arguments.layer is None else "layer"
    geometry = GEOMETRIES[name] if arguments.layer is None else arguments.layer
    device = arguments.device
    if device == "auto":
        device = "cuda" if cuda_available() else "cpu"
    measurements = measure(geometry, device, repeats=arguments.repeats, progress=_tell)
    model = calibrate_cost(name, measurements, device)
    model.save(arguments.output)
    if arguments.plot is not None:
        _plot(model, measurements, arguments.plot)
    layer = model.moe_layer
    print(f"{model.device}, {name}, {len(measurements.time_us)} measurements")
    print(
        f"{layer.base_us:.3g} + {layer.per_expert_us:.4g} x active experts + {layer.per_token_us:.3g} x tokens us, "
        f"R2 {layer.r2:.4f}"
    )
    print(f"{arguments.output}: written")
    return 0


def _tell(stage: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[Kmeasuring {stage}", end="", file=sys.stderr, flush=True)


def _plot(model: CostModel, measurements: Measurements, path: Path) -> None:
    """Plot time against active experts, with one line of the fit per token count (the paper's figure 2)."""
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    layer = model.moe_layer
    for index, tokens in enumerate(np.unique(measurements.tokens)):
        chosen = measurements.tokens == tokens
        experts = measurements.active_experts[chosen]
        colour = f"C{index}"
        axis.plot(experts, measurements.time_us[chosen], "o", color=colour, label=f"{tokens:.0f} tokens")
        fitted = layer.base_us + layer.per_expert_us * experts + layer.per_token_us * tokens
        axis.plot(experts, fitted, "-", color=colour, linewidth=1)
    axis.set_xlabel("active experts")
    axis.set_ylabel("time of one MoE layer, us")
    axis.set_title(f"{model.name} on {model.device}, R2 {layer.r2:.4f}")
    axis.set_ylim(bottom=0)
    axis.legend()
    figure.savefig(path)


def _layer(text: str) -> LayerGeometry:
    numbers = [int(part) for part in text.split(",")]
    if len(numbers) != 4 or min(numbers) < 1 or numbers[3] > numbers[2]:
        raise argparse.ArgumentTypeError(f"{text!r} is not HIDDEN,EXPERT_HIDDEN,EXPERTS,TOP_K")
    return LayerGeometry(*numbers)
