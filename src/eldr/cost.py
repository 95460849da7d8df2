"""Step-time models: how long one decode step takes, given the experts its batch activates.

A decode step reads the weights of every distinct expert in its batch once. The time of a MoE layer is therefore
a + b * active experts + c * tokens (ELDR, arXiv 2607.00466, figure 2). Dense layers, the head and attention add a part
that depends only on the batch and its context. Times in Python are in seconds; a cost file holds microseconds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from eldr.errors import EldrError
from eldr.fileio import write_atomically

FORMAT = "eldr-cost-v1"
SCOPES = ("step", "moe")
MAX_FILE_BYTES = 2**20
_US = 1e-6

FloatOrArray = TypeVar("FloatOrArray", float, NDArray[np.float64])


class CostError(EldrError):
    """Raised when a cost model cannot be read, written or fitted.

    The message names the file, if any, and the reason.
    """


@dataclass(frozen=True, slots=True)
class StepCost:
    """The time of one decode step on one worker, as a linear function.

    base_s: the fixed time of every step.
    per_expert_s: the time per distinct expert, summed over the MoE layers.
    per_token_s: the time per running request.
    per_context_token_s: the time per token of context that attention reads.
    """

    base_s: float
    per_expert_s: float
    per_token_s: float
    per_context_token_s: float = 0.0

    def step_s(self, active_experts: FloatOrArray, batch: int, context_tokens: FloatOrArray) -> FloatOrArray:
        """Seconds for one step that activates `active_experts` (summed over layers) for `batch` requests."""
        fixed_s = self.base_s + self.per_token_s * batch
        return fixed_s + self.per_expert_s * active_experts + self.per_context_token_s * context_tokens

    def times(self, factor: float) -> StepCost:
        """The cost of steps that take `factor` times as long."""
        return StepCost(
            self.base_s * factor,
            self.per_expert_s * factor,
            self.per_token_s * factor,
            self.per_context_token_s * factor,
        )


@dataclass(frozen=True, slots=True)
class MoeLayerCost:
    """The time of one MoE layer in microseconds: base + per_expert * active experts + per_token * tokens.

    r2: the R2 of the fit. None if unknown.
    """

    base_us: float
    per_expert_us: float
    per_token_us: float
    r2: float | None = None


@dataclass(frozen=True, slots=True)
class RestCost:
    """The time of everything in a step outside the MoE layers, in microseconds.

    layer_base_us, layer_per_token_us: norms, projections and rotary embedding of one layer.
    head_base_us, head_per_token_us: embedding, last norm, output head and sampler, once per step.
    context_token_us: attention of one layer over one token of context.
    """

    layer_base_us: float
    layer_per_token_us: float
    head_base_us: float
    head_per_token_us: float
    context_token_us: float


@dataclass(frozen=True, slots=True)
class CostModel:
    """The measured cost of one model on one device.

    name: the name of the preset or file.
    device: the device it was measured on.
    source: where the measurements come from.
    moe_layer: the cost of one MoE layer.
    rest: the cost of everything else. None if only the MoE layer was measured.
    """

    name: str
    device: str
    source: str
    moe_layer: MoeLayerCost
    rest: RestCost | None = None

    def step_cost(self, layers: int, scope: str) -> StepCost:
        """Cost of one step of a model with `layers` MoE layers.

        scope: "moe" for the MoE layers alone, "step" for the whole step.
        Raises CostError for scope "step" if the rest of a step was not measured.
        """
        moe = self.moe_layer
        if scope == "moe":
            return StepCost(layers * moe.base_us * _US, moe.per_expert_us * _US, layers * moe.per_token_us * _US)
        if scope != "step":
            raise CostError(f"there is no cost scope {scope!r}; choose from {', '.join(SCOPES)}")
        rest = self.rest
        if rest is None:
            raise CostError(f"cost {self.name} covers only the MoE layers; use the scope moe or another cost")
        return StepCost(
            base_s=(layers * (moe.base_us + rest.layer_base_us) + rest.head_base_us) * _US,
            per_expert_s=moe.per_expert_us * _US,
            per_token_s=(layers * (moe.per_token_us + rest.layer_per_token_us) + rest.head_per_token_us) * _US,
            per_context_token_s=layers * rest.context_token_us * _US,
        )

    def to_wire(self) -> dict[str, Any]:
        """Return a JSON-serialisable form, which `cost_from_wire` reads."""
        return {"format": FORMAT, **asdict(self)}

    def save(self, path: str | Path) -> None:
        """Write the model to `path` as JSON, atomically. Raises CostError if it cannot be written."""
        text = json.dumps(self.to_wire(), indent=2, allow_nan=False) + "\n"
        try:
            write_atomically(Path(path), lambda file: _write_text(file, text))
        except OSError as error:
            raise CostError(f"cost {path}: {error.strerror or error}") from None


def _write_text(file: Any, text: str) -> None:
    file.write(text.encode())


# Coefficients fitted to measurements published with LLMServingSim (github.com/casys-kaist/LLMServingSim, MIT licence,
# copyright 2024 CASYS Lab at KAIST), Qwen3-30B-A3B in bfloat16 on an NVIDIA RTX PRO 6000, at most 64 tokens a step.
# The measurements leave out attention over the context, so context_token_us is modelled: a token has 2 KiB of keys and
# values per layer (4 heads of 128, bfloat16), read at the bandwidth at which the same device reads expert weights
# (9 MiB in per_expert_us: 1.5 TB/s).
PRESETS: Mapping[str, CostModel] = {
    "qwen3-30b-a3b-rtxpro6000": CostModel(
        name="qwen3-30b-a3b-rtxpro6000",
        device="NVIDIA RTX PRO 6000",
        source="fitted to measurements of LLMServingSim (MIT, CASYS Lab at KAIST); attention over the context modelled",
        moe_layer=MoeLayerCost(base_us=18.74, per_expert_us=6.263, per_token_us=0.1925, r2=0.998),
        rest=RestCost(
            layer_base_us=30.87,
            layer_per_token_us=0.0016,
            head_base_us=434.0,
            head_per_token_us=0.996,
            context_token_us=0.00136,
        ),
    ),
}
DEFAULT_PRESET = "qwen3-30b-a3b-rtxpro6000"


def find_cost(name_or_path: str) -> CostModel:
    """Return the preset with this name, or load the cost file at this path. Raises CostError if it is neither."""
    if name_or_path in PRESETS:
        return PRESETS[name_or_path]
    try:
        found = Path(name_or_path).exists()
    except OSError:  # such as a name that is too long
        found = False
    if not found:
        raise CostError(f"cost {name_or_path!r} is neither a file nor a preset; the presets are {', '.join(PRESETS)}")
    return load_cost(name_or_path)


def load_cost(path: str | Path) -> CostModel:
    """Load the cost model in `path`. Raises CostError with the file name and the reason if it cannot be used."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise ValueError("too large for a cost file")
        return cost_from_wire(json.loads(data))
    except OSError as error:
        raise CostError(f"cost {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise CostError(f"cost {path}: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return f"not JSON ({reason})" if isinstance(error, json.JSONDecodeError | UnicodeDecodeError) else reason


def cost_from_wire(wire: object) -> CostModel:
    """Build a cost model from the form that `CostModel.to_wire` returns. Raises ValueError if it is not valid."""
    if not isinstance(wire, dict) or wire.get("format") != FORMAT:
        found = wire.get("format") if isinstance(wire, dict) else None
        raise ValueError(f"not an {FORMAT} file (its format: {found!r})")
    moe = _section(wire, "moe_layer")
    rest = None if wire.get("rest") is None else _section(wire, "rest")
    r2 = moe.get("r2")
    if r2 is not None and (type(r2) not in (int, float) or not -np.inf < r2 <= 1):
        raise ValueError(f"moe_layer: r2 is {r2!r}, expected a number of at most 1")
    model = CostModel(
        name=_text(wire, "name"),
        device=_text(wire, "device"),
        source=_text(wire, "source"),
        moe_layer=MoeLayerCost(
            _time_us(moe, "base_us"), _time_us(moe, "per_expert_us"), _time_us(moe, "per_token_us"), r2
        ),
        rest=None if rest is None else RestCost(*(_time_us(rest, key) for key in RestCost.__slots__)),
    )
    if model.moe_layer.base_us + model.moe_layer.per_expert_us + model.moe_layer.per_token_us == 0:
        raise ValueError("moe_layer: a layer takes no time at all")
    return model


def _section(wire: dict[str, Any], key: str) -> dict[str, Any]:
    section = wire.get(key)
    if not isinstance(section, dict):
        raise ValueError(f"{key} is missing")
    return section


def _text(wire: dict[str, Any], key: str) -> str:
    value = wire.get(key)
    if not isinstance(value, str):
        raise ValueError(f"{key} is {value!r}, expected text")
    return value


def _time_us(section: dict[str, Any], key: str) -> float:
    value = section.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < np.inf:
        raise ValueError(f"{key} is {value!r}, expected a number of microseconds, 0 or more")
    return float(value)


def fit_moe_layer(
    active_experts: NDArray[np.float64], tokens: NDArray[np.float64], time_us: NDArray[np.float64]
) -> MoeLayerCost:
    """Fit the cost of a MoE layer to measured times by least squares. All arrays are [M].

    The model is base + per_expert * active_experts + per_token * tokens. If noise would make a coefficient negative, it
    is held at zero and the others are fitted again.
    Raises CostError for fewer than four measurements, or if they cannot tell the coefficients apart.
    """
    columns = np.stack([np.ones_like(time_us), active_experts, tokens], axis=1)
    if len(time_us) < 4 or np.linalg.matrix_rank(columns) < 3:
        raise CostError("too few different measurements to fit a MoE layer; vary both active experts and tokens")
    used = [0, 1, 2]
    coefficients = np.zeros(3)
    while used:
        fitted = np.linalg.lstsq(columns[:, used], time_us, rcond=None)[0]
        if (fitted >= 0).all():
            coefficients[used] = fitted
            break
        used.remove(used[int(fitted.argmin())])
    residual = time_us - columns @ coefficients
    spread = time_us - time_us.mean()
    r2 = 1 - float(residual @ residual) / float(spread @ spread)
    return MoeLayerCost(float(coefficients[0]), float(coefficients[1]), float(coefficients[2]), r2)
