"""Expert counts of one prompt, and their wire format.

The prefill worker counts how many prompt tokens chose each expert in their top-k (ELDR, arXiv 2607.00466, section on
expert signatures). It sends the counts to the router in the JSON of `kv_transfer_params`. Counts of a real prompt are
small integers with a long tail, so they are packed as in patched frame-of-reference coding (Zukowski et al.,
Super-Scalar RAM-CPU Cache Compression, ICDE 2006): every count is written with the same number of bits, chosen to fit
most of them, and the higher bits of larger counts follow. The result is about as small as deflate, and unpacks in a
third of the time.
"""

from __future__ import annotations

import binascii
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eldr import kernels
from eldr.errors import EldrError

try:  # from the router's extra: the same functions, ten times as fast
    import pybase64 as base64
except ImportError:
    import base64  # type: ignore[no-redef]

WIRE_VERSION = 2
COUNTS_KEYS = ("v", "layers", "experts", "top_k", "prompt_tokens", "low_bits", "high_bits", "data")
# The largest geometry accepted from the wire: twice the layers and experts of any published model. It limits the
# memory that one hostile or damaged answer can use.
MAX_LAYERS = 512
MAX_EXPERTS = 4096
# Numbers with higher bits are unpacked one by one. Avoiding this many of them is worth one more byte.
LARGER_PER_BYTE = 4


class CountsError(EldrError):
    """Raised for expert counts that cannot be used: malformed, inconsistent, or declared unavailable by the worker.

    reason: a short snake_case word, suitable as a metric label.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class ExpertCounts:
    """How many prompt tokens chose each expert. Treat it as immutable.

    counts: uint32 [L, E], C-contiguous. Every row sums to prompt_tokens * top_k, because each token picks top_k experts
        per layer.
    """

    __slots__ = ("counts", "experts", "layers", "prompt_tokens", "top_k")

    def __init__(self, counts: NDArray[np.uint32], prompt_tokens: int, top_k: int) -> None:
        self.counts = np.ascontiguousarray(counts, dtype=np.uint32)
        self.layers, self.experts = int(counts.shape[0]), int(counts.shape[1])
        self.prompt_tokens = prompt_tokens
        self.top_k = top_k

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
    """Encode `counts` as a JSON-serialisable dict. At 48 x 128 and 500 prompt tokens it takes under 8 KiB."""
    counts.check()
    low_bits, high_bits, data = pack(counts.counts.reshape(-1))
    return {
        "v": WIRE_VERSION,
        "layers": counts.layers,
        "experts": counts.experts,
        "top_k": counts.top_k,
        "prompt_tokens": counts.prompt_tokens,
        "low_bits": low_bits,
        "high_bits": high_bits,
        "data": base64.b64encode(data).decode("ascii"),
    }


def pack(numbers: NDArray[np.uint32]) -> tuple[int, int, bytes]:
    """Pack uint32 [N] into (low_bits, high_bits, data), with the split of bits that is cheap in both space and time.

    `data` first holds the low bits of every number. Unless high_bits is 0, a bitmap of the numbers that have higher
    bits follows, and then the higher bits of those numbers. Each part starts on a byte boundary, lowest bit first.
    """
    # The exponent that frexp gives for an integer is its bit length.
    of_bits = np.bincount(np.frexp(numbers.astype(np.float64))[1], minlength=33)
    most = int(np.flatnonzero(of_bits)[-1])
    size = numbers.size
    larger = size - np.cumsum(of_bits)
    costs = [
        _bytes(size * low)
        + _bytes(size)
        + _bytes(int(larger[low]) * (most - low))
        + int(larger[low]) // LARGER_PER_BYTE
        for low in range(most)
    ]
    low = int(np.argmin([*costs, _bytes(size * most)]))
    parts: list[NDArray[Any]] = [_bits(numbers, low)]
    if low < most:
        high = numbers >> np.uint32(low)
        marked = high > 0
        parts += [marked, _bits(high[marked], most - low)]
    return low, most - low, b"".join(np.packbits(part, bitorder="little").tobytes() for part in parts)


def _bits(numbers: NDArray[np.uint32], bits: int) -> NDArray[np.uint8]:
    """The lowest `bits` bits of uint32 [N] as zeros and ones, uint8 [N, bits]."""
    in_bytes = numbers.astype("<u4").view(np.uint8).reshape(-1, 4)[:, : -(-bits // 8)]
    return np.unpackbits(in_bytes, axis=1, bitorder="little", count=bits)


def _bytes(bits: int) -> int:
    return -(-bits // 8)


def encode_unavailable(reason: str) -> dict[str, Any]:
    """Encode the fact that a worker has no counts or decode experts. `reason` is a short snake_case word."""
    return {"v": WIRE_VERSION, "unavailable": reason}


def decode_counts(wire: object) -> ExpertCounts:
    """Decode expert counts and check them.

    Raises CountsError, and no other exception, for anything but consistent counts in this wire version.
    """
    wire = versioned(wire, "expert counts")
    layers = bounded_int(wire, "layers", 1, MAX_LAYERS)
    experts = bounded_int(wire, "experts", 1, MAX_EXPERTS)
    top_k = bounded_int(wire, "top_k", 1, experts)
    prompt_tokens = bounded_int(wire, "prompt_tokens", 1, 2**31 - 1)
    low_bits = bounded_int(wire, "low_bits", 0, 32)
    high_bits = bounded_int(wire, "high_bits", 0, 32 - low_bits)
    data = wire.get("data")
    if not isinstance(data, str):
        raise CountsError("malformed", "expert counts have no data")
    try:
        packed = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise CountsError("malformed", f"expert counts cannot be decoded: {error}") from None
    counts = np.empty((layers, experts), dtype=np.uint32)
    fit = kernels.unpack_counts(
        packed, low_bits, high_bits, layers, experts, prompt_tokens * top_k, prompt_tokens, counts
    )
    if fit < 0:
        raise CountsError("malformed", f"expert counts have the wrong data length for {layers} x {experts}")
    found = ExpertCounts(counts, prompt_tokens, top_k)
    if not fit:
        found.check()  # says what is wrong
    return found


def versioned(wire: object, what: str) -> dict[str, Any]:
    """Return `wire` if it is an object of a readable version that contains data.

    what: names the data in error messages.
    Raises CountsError if it is no object, has another version, or says that the worker had no data.
    """
    if not isinstance(wire, dict):
        raise CountsError("malformed", f"{what}: a {type(wire).__name__}, not an object")
    version = wire.get("v")
    if type(version) is not int or version != WIRE_VERSION:
        raise CountsError("version", f"{what}: wire version {version!r}; this eldr reads version {WIRE_VERSION}")
    if "unavailable" in wire:
        raise CountsError("unavailable", f"{what}: the worker has no exact ones: {str(wire['unavailable'])[:80]}")
    return wire


def bounded_int(wire: dict[str, Any], key: str, least: int, most: int) -> int:
    """Return `wire[key]` if it is an integer from `least` to `most`. Raises CountsError otherwise."""
    value = wire.get(key)
    if type(value) is not int or not least <= value <= most:
        raise CountsError("malformed", f"{key} is {value!r}, expected a whole number from {least} to {most}")
    return value
