"""What is learned from finished requests, as an event that a policy is told of like any other."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from eldr.prompt.model import ProfileMap, WordTable


@dataclass(frozen=True, slots=True, eq=False)
class Learned:
    """A prompt model, in the halves that a decision needs.

    profiles: turns latents into profiles.
    words: turns words into latents. None in a log, which has the latents.
    """

    profiles: ProfileMap
    words: WordTable | None

    def to_wire(self) -> dict[str, Any]:
        """Return a JSON-serialisable form, without the words."""
        profiles = self.profiles
        return {
            "layers": profiles.layers,
            "top_k": profiles.top_k,
            "rank": len(profiles.up),
            "mean": encode_floats(profiles.mean),
            "up": encode_floats(profiles.up),
        }

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Learned:
        """Build it from its wire form. Raises KeyError, TypeError or ValueError if that is not valid."""
        layers, top_k = wire["layers"], wire["top_k"]
        mean, up = decode_floats(wire["mean"]), decode_floats(wire["up"])
        if type(layers) is not int or type(top_k) is not int or layers < 1 or len(mean) % layers:
            raise ValueError(f"{len(mean)} experts in all, top-{top_k!r}, cannot be those of {layers!r} layers")
        if not 1 <= top_k <= len(mean) // layers:
            raise ValueError(f"top-{top_k} of {len(mean) // layers} experts")
        return cls(ProfileMap(mean, up.reshape(wire["rank"], len(mean)), layers, top_k), None)


def encode_floats(values: np.ndarray[Any, np.dtype[np.float32]]) -> str:
    """The bytes of an array as text: every bit counts where a decision is to be repeated."""
    return base64.b64encode(np.ascontiguousarray(values, dtype="<f4").tobytes()).decode("ascii")


def decode_floats(text: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The inverse of `encode_floats`, flat. Raises TypeError or ValueError."""
    try:
        return np.frombuffer(base64.b64decode(text, validate=True), dtype="<f4").astype(np.float32)
    except binascii.Error as error:
        raise ValueError(str(error)) from None
