"""Expert counts of one prompt, and their wire form.

The prefill worker counts how many prompt tokens chose each expert in their top-k (ELDR, arXiv 2607.00466,
section on expert signatures) and hands the counts to the router inside the JSON of `kv_transfer_params`.
Counts of a real prompt are small, skewed integers: the codec splits them into byte planes (all low bytes, then
all second bytes, ...), so that the nearly empty high planes cost almost nothing, and deflates them.
"""

from __future__ import annotations

import binascii
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eldr import kernels
from eldr.errors import EldrError

try:  # of the router's extra: the same functions, in half the time and in a tenth
    import pybase64 as base64
    from zlib_ng import zlib_ng as zlib
except ImportError:
    import base64  # type: ignore[no-redef]
    import zlib  # type: ignore[no-redef]

WIRE_VERSION = 1
COUNTS_KEYS = ("v", "layers", "experts", "top_k", "prompt_tokens", "planes", "data")
# The largest geometry accepted from the wire: twice the layers and experts of any published model. It bounds the
# memory that one hostile or damaged answer can take.
MAX_LAYERS = 512
MAX_EXPERTS = 4096


class CountsError(EldrError):
    """Expert counts that cannot be used: malformed, inconsistent, or declared unavailable by the worker.

    `reason` is a short snake_case word, fit for a metric label.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True, eq=False)
class ExpertCounts:
    """How many prompt tokens chose each expert.

    counts: uint32 [L, E]; every row sums to prompt_tokens * top_k, because each token picks top_k experts per layer.
    """

    counts: NDArray[np.uint32]
    prompt_tokens: int
    top_k: int

    @property
    def layers(self) -> int:
        return int(self.counts.shape[0])

    @property
    def experts(self) -> int:
        return int(self.counts.shape[1])

    def check(self) -> None:
        """Raise CountsError unless every layer sums to prompt_tokens * top_k and no expert exceeds prompt_tokens."""
        expected = self.prompt_tokens * self.top_k
        sums = self.counts.sum(axis=1, dtype=np.uint64)
        if (sums != expected).any():
            layer = int(np.flatnonzero(sums != expected)[0])
            raise CountsError(
                "inconsistent",
                f"layer {layer} counts {int(sums[layer])} selections, expected {self.prompt_tokens} prompt tokens x "
                f"top-{self.top_k} = {expected}",
            )
        if int(self.counts.max()) > self.prompt_tokens:
            raise CountsError("inconsistent", "an expert was counted more often than there are prompt tokens")


def encode_counts(counts: ExpertCounts) -> dict[str, Any]:
    """Wire form of `counts`: a JSON-able dict. At 48 x 128 and 500 prompt tokens it takes under 8 KiB."""
    counts.check()
    flat = np.ascontiguousarray(counts.counts, dtype="<u4").reshape(-1)
    planes = flat.view(np.uint8).reshape(-1, 4).T
    used = 1 + max((p for p in range(1, 4) if planes[p].any()), default=0)
    # Z_RLE keeps runs of zeros cheap and spends no time on matches that count data does not have.
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_RLE)
    data = deflate.compress(np.ascontiguousarray(planes[:used]).tobytes()) + deflate.flush()
    return {
        "v": WIRE_VERSION,
        "layers": counts.layers,
        "experts": counts.experts,
        "top_k": counts.top_k,
        "prompt_tokens": counts.prompt_tokens,
        "planes": used,
        "data": base64.b64encode(data).decode("ascii"),
    }


def encode_unavailable(reason: str) -> dict[str, Any]:
    """Wire form of counts or decode experts that the worker could not give; `reason` is a short snake_case word."""
    return {"v": WIRE_VERSION, "unavailable": reason}


def decode_counts(wire: object) -> ExpertCounts:
    """Expert counts from their wire form, checked.

    Raises CountsError, and nothing else, for whatever is not a consistent version-1 form.
    """
    wire = versioned(wire, "expert counts")
    layers = bounded_int(wire, "layers", 1, MAX_LAYERS)
    experts = bounded_int(wire, "experts", 1, MAX_EXPERTS)
    top_k = bounded_int(wire, "top_k", 1, experts)
    prompt_tokens = bounded_int(wire, "prompt_tokens", 1, 2**31 - 1)
    planes = bounded_int(wire, "planes", 1, 4)
    data = wire.get("data")
    if not isinstance(data, str):
        raise CountsError("malformed", "expert counts have no data")
    size = planes * layers * experts
    try:
        inflate = zlib.decompressobj(-15)
        raw = inflate.decompress(base64.b64decode(data, validate=True), size + 1)
    except (binascii.Error, ValueError, zlib.error) as error:  # type: ignore[misc]
        raise CountsError("malformed", f"expert counts cannot be decoded: {error}") from None
    if len(raw) != size or not inflate.eof or inflate.unused_data:
        raise CountsError("malformed", f"expert counts are not {planes} planes of {layers} x {experts}")
    counts = ExpertCounts(np.empty((layers, experts), dtype=np.uint32), prompt_tokens, top_k)
    if not kernels.unpack_counts(raw, planes, layers, experts, prompt_tokens * top_k, prompt_tokens, counts.counts):
        counts.check()  # says what is wrong
    return counts


def versioned(wire: object, what: str) -> dict[str, Any]:
    """`wire` if it is an object of the version that this eldr reads and the worker had `what` to put into it.

    Raises CountsError if not.
    """
    if not isinstance(wire, dict):
        raise CountsError("malformed", f"{what}: a {type(wire).__name__}, not an object")
    version = wire.get("v")
    if type(version) is not int or version != WIRE_VERSION:
        raise CountsError("version", f"{what}: wire version {version!r}; this eldr reads version {WIRE_VERSION}")
    if "unavailable" in wire:
        raise CountsError("unavailable", f"{what}: the worker has none that are exact: {str(wire['unavailable'])[:80]}")
    return wire


def bounded_int(wire: dict[str, Any], key: str, least: int, most: int) -> int:
    """`wire[key]` if it is a whole number from `least` to `most`; raises CountsError if not."""
    value = wire.get(key)
    if type(value) is not int or not least <= value <= most:
        raise CountsError("malformed", f"{key} is {value!r}, expected a whole number from {least} to {most}")
    return value
