"""What is learned from finished requests, as an event that a policy is told of like any other."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from eldr.activation import ActivationModel
from eldr.activation_stored import SPECS, check_shapes, read_stored, stored
from eldr.fileio import NpzError
from eldr.prompt.model import ProfileMap, PromptModel, WordTable


@dataclass(frozen=True, slots=True, eq=False)
class Learned:
    """The models to predict by from now on. A policy goes on with the one that it was made with where there is none.

    profiles: the half of a prompt model that turns latents into profiles.
    words: the half that turns words into latents. None in a log too, which has the latents.
    activation: corrects what the counts of prompts say.
    """

    profiles: ProfileMap | None
    words: WordTable | None
    activation: ActivationModel | None = None

    @classmethod
    def of(cls, prompts: PromptModel | None, activation: ActivationModel | None) -> Learned:
        """Make it of whole models, each None if none was learned."""
        if prompts is None:
            return cls(None, None, activation)
        return cls(prompts.profiles, prompts.words, activation)

    def to_wire(self) -> dict[str, Any]:
        """Return a JSON-serialisable form, without the words."""
        profiles, activation = self.profiles, self.activation
        return {
            "prompts": None if profiles is None else _profiles_to_wire(profiles),
            "activation": None if activation is None else _activation_to_wire(activation),
        }

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Learned:
        """Build it from its wire form. Raises KeyError, TypeError or ValueError if that is not valid."""
        prompts, activation = wire["prompts"], wire["activation"]
        return cls(
            None if prompts is None else _profiles_from_wire(prompts),
            None,
            None if activation is None else _activation_from_wire(activation),
        )


def _profiles_to_wire(profiles: ProfileMap) -> dict[str, Any]:
    return {
        "layers": profiles.layers,
        "top_k": profiles.top_k,
        "rank": len(profiles.up),
        "mean": encode_floats(profiles.mean),
        "up": encode_floats(profiles.up),
    }


def _profiles_from_wire(wire: Mapping[str, Any]) -> ProfileMap:
    layers, top_k, mean = _geometry(wire, "mean")
    return ProfileMap(mean, decode_floats(wire["up"]).reshape(wire["rank"], len(mean)), layers, top_k)


def _activation_to_wire(model: ActivationModel) -> dict[str, Any]:
    arrays, numbers = stored(model)
    wire: dict[str, Any] = {name: encode_floats(array) for name, array in arrays.items()}
    return wire | numbers | {"layers": model.layers, "top_k": model.top_k, "rank": model.rank}


def _activation_from_wire(wire: Mapping[str, Any]) -> ActivationModel:
    layers, top_k, mean = _geometry(wire, "activation_mean_profile")
    arrays = {name: decode_floats(wire[name]) for name in SPECS}
    for name, spec in SPECS.items():
        if spec.ndim == 2:
            arrays[name] = arrays[name].reshape(wire["rank"], len(mean))
    try:
        check_shapes({name: array.shape for name, array in arrays.items()}, layers, len(mean) // layers)
        model = read_stored(arrays, wire, layers, top_k)
    except NpzError as error:
        raise ValueError(str(error)) from None
    assert model is not None
    return model


def _geometry(wire: Mapping[str, Any], mean_name: str) -> tuple[int, int, np.ndarray[Any, np.dtype[np.float32]]]:
    """The layers and the top-k of a model, and the mean that it has under this name."""
    layers, top_k, mean = wire["layers"], wire["top_k"], decode_floats(wire[mean_name])
    if type(layers) is not int or type(top_k) is not int or layers < 1 or len(mean) % layers:
        raise ValueError(f"{len(mean)} experts in all, top-{top_k!r}, cannot be those of {layers!r} layers")
    if not 1 <= top_k <= len(mean) // layers:
        raise ValueError(f"top-{top_k} of {len(mean) // layers} experts")
    return layers, top_k, mean


def encode_floats(values: np.ndarray[Any, np.dtype[np.float32]]) -> str:
    """The bytes of an array as text: every bit counts where a decision is to be repeated."""
    return base64.b64encode(np.ascontiguousarray(values, dtype="<f4").tobytes()).decode("ascii")


def decode_floats(text: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The inverse of `encode_floats`, flat. Raises TypeError or ValueError."""
    try:
        return np.frombuffer(base64.b64decode(text, validate=True), dtype="<f4").astype(np.float32)
    except binascii.Error as error:
        raise ValueError(str(error)) from None
