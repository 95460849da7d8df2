"""Wire format of the experts chosen for generated tokens. A worker returns it for a recorded request."""

from __future__ import annotations

import base64
import binascii
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eldr.counts import MAX_EXPERTS, MAX_LAYERS, WIRE_VERSION, CountsError, bounded_int, versioned

# 64 Mi expert ids: 170,000 tokens of a 48-layer top-8 model. It limits what a damaged answer can allocate.
MAX_IDS = 2**26


def encode_rows(rows: NDArray[np.integer[Any]]) -> dict[str, Any]:
    """Encode `rows`, expert ids [T, L, k], one row per forward pass of a generated token."""
    tokens, layers, top_k = rows.shape
    dtype = "u1" if rows.size == 0 or int(rows.max()) < 256 else "u2"
    data = np.ascontiguousarray(rows, dtype=f"<{dtype}").tobytes()
    return {
        "v": WIRE_VERSION,
        "tokens": tokens,
        "layers": layers,
        "top_k": top_k,
        "dtype": dtype,
        "data": base64.b64encode(zlib.compress(data, 1)).decode("ascii"),
    }


def decode_rows(wire: object) -> NDArray[np.uint16]:
    """Decode expert ids, uint16 [T, L, k]. Raises CountsError for anything but rows in this wire version."""
    wire = versioned(wire, "decode experts")
    tokens = bounded_int(wire, "tokens", 0, 2**31 - 1)
    layers = bounded_int(wire, "layers", 1, MAX_LAYERS)
    top_k = bounded_int(wire, "top_k", 1, MAX_EXPERTS)
    dtype, data = wire.get("dtype"), wire.get("data")
    if dtype not in ("u1", "u2") or not isinstance(data, str):
        raise CountsError("malformed", "decode experts have no data or an unknown dtype")
    if tokens * layers * top_k > MAX_IDS:
        raise CountsError("malformed", f"decode experts of {tokens} x {layers} x {top_k} are too large")
    size = tokens * layers * top_k * int(dtype[1])
    try:
        inflate = zlib.decompressobj()
        raw = inflate.decompress(base64.b64decode(data, validate=True), size + 1)
    except (binascii.Error, ValueError, zlib.error) as error:
        raise CountsError("malformed", f"decode experts cannot be decoded: {error}") from None
    if len(raw) != size or not inflate.eof or inflate.unused_data:
        raise CountsError("malformed", f"decode experts have the wrong data length for {tokens} x {layers} x {top_k}")
    return np.frombuffer(raw, dtype=f"<{dtype}").reshape(tokens, layers, top_k).astype(np.uint16)
