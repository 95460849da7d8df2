"""What was learned, in a file, so that it outlives a restart. It holds no lesson."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eldr import activation_stored
from eldr.activation import ActivationModel
from eldr.counts import MAX_EXPERTS, MAX_LAYERS
from eldr.errors import EldrError
from eldr.fileio import ArraySpec, NpzError, parse_meta, read_npz, reason_of, write_npz
from eldr.prompt import stored as prompt_stored
from eldr.prompt.model import PromptModel

FORMAT = "eldr-learned-v1"
SPECS: Mapping[str, ArraySpec] = {**prompt_stored.SPECS, **activation_stored.SPECS, "meta": ArraySpec(("U",), 0)}


class KeptError(EldrError):
    """Raised when the file cannot be read or written. The message names it."""


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """The models learned, each None if there is none yet."""

    prompts: PromptModel | None
    activation: ActivationModel | None

    @property
    def geometry(self) -> tuple[int, int, int] | None:
        """The layers, the experts and the top-k of the model. None if there is nothing."""
        if self.prompts is not None:
            profiles = self.prompts.profiles
            return profiles.layers, profiles.experts, profiles.top_k
        if self.activation is not None:
            layers = self.activation.layers
            return layers, len(self.activation.slope) // layers, self.activation.top_k
        return None

    def save(self, path: Path) -> None:
        """Write it atomically. Makes the folder. Raises KeptError."""
        layers, experts, top_k = self.geometry or (0, 0, 0)
        meta: dict[str, Any] = {"format": FORMAT, "layers": layers, "experts": experts, "top_k": top_k}
        arrays: dict[str, NDArray[Any]] = {}
        if self.prompts is not None:
            found, meta["prompt"] = prompt_stored.stored(self.prompts)
            arrays |= found
        if self.activation is not None:
            found, meta["activation"] = activation_stored.stored(self.activation)
            arrays |= found
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_npz(path, arrays | {"meta": np.array(json.dumps(meta, allow_nan=False))})
        except OSError as error:
            raise KeptError(f"learned models {path}: {reason_of(error)}") from None


def load_kept(path: Path) -> Kept:
    """Read what `Kept.save` wrote. Raises KeptError."""
    try:
        arrays = read_npz(path, SPECS, prompt_stored.check_shapes)
        meta = parse_meta(str(arrays["meta"]), FORMAT)
        layers, experts, top_k = (meta.get(name) for name in ("layers", "experts", "top_k"))
        if not (type(layers) is int and type(experts) is int and type(top_k) is int and 1 <= top_k <= experts):
            raise NpzError("meta: layers, experts or top_k is missing")
        if not (1 <= layers <= MAX_LAYERS and experts <= MAX_EXPERTS):
            raise NpzError(f"{layers} layers x {experts} experts is not a valid MoE geometry")
        activation_stored.check_shapes({name: array.shape for name, array in arrays.items()}, layers, experts)
        kept = Kept(
            prompt_stored.read_stored(arrays, meta.get("prompt"), layers, experts, top_k),
            activation_stored.read_stored(arrays, meta.get("activation"), layers, top_k),
        )
        if kept.geometry is None:
            raise NpzError("it holds no model")
        return kept
    except (NpzError, OSError) as error:
        raise KeptError(f"learned models {path}: {reason_of(error)}") from None
