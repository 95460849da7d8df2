"""The experts of a request's tokens as engines state them in their answers, without eldr inside the engine.

vLLM (`--enable-return-routed-experts`, vllm/entrypoints/openai/*/protocol.py): base64 of a .npy file, [rows, layers, k]
in uint8, uint16 or int32. SGLang (`--enable-return-routed-experts`): base64 of int32, without a shape.

There is one row for each token of prompt and answer but the last, which is never an input. Both engines keep room for
all layers of a model, so layers without experts are in the rows too, filled with one number.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
from math import prod

import numpy as np
from numpy.typing import NDArray

from eldr.counts import MAX_EXPERTS, MAX_LAYERS, CountsError, ExpertCounts
from eldr.expert_rows import MAX_IDS

DTYPES = ("|u1", "<u2", "<i4")
# The header of a .npy file with three dimensions has 128 bytes.
MAX_HEADER_BYTES = 1024
GEOMETRY = re.compile(r"([0-9]{1,4})x([0-9]{1,4})x([0-9]{1,4})")


def decode_npy(text: bytes) -> NDArray[np.int32]:
    """Decode vLLM's form, the base64 text of a .npy file, to int32 [rows, layers, k]. Nothing is unpickled.

    Raises CountsError, and no other exception, for anything else.
    """
    raw = _bytes_of(text)
    file = io.BytesIO(raw)
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("another version than 1.0")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file, max_header_size=MAX_HEADER_BYTES)
    except Exception as error:  # a malformed header can break numpy's parser in many ways
        raise CountsError("malformed", f"routed experts: no readable .npy header: {str(error)[:80]}") from None
    if dtype.str not in DTYPES or fortran or len(shape) != 3:
        raise CountsError("malformed", f"routed experts of dtype {dtype.str[:20]} and {len(shape)} dimensions")
    _check_shape(shape)
    if prod(shape) * dtype.itemsize != len(raw) - file.tell():
        raise CountsError("malformed", f"routed experts declare the shape {shape}, which does not fit their length")
    return np.frombuffer(raw, dtype, offset=file.tell()).reshape(shape).astype(np.int32)


def decode_ids(text: bytes, rows: int, top_k: int) -> NDArray[np.int32]:
    """Decode SGLang's form, the base64 text of int32 ids, to int32 [rows, layers, k]. Only the layers may be unknown.

    Raises CountsError, and no other exception, for anything that does not have this shape.
    """
    ids = _bytes_of(text)
    per_layer = rows * top_k * 4
    if per_layer <= 0 or len(ids) % per_layer:
        raise CountsError("malformed", f"routed experts of {len(ids)} bytes are not {rows} rows of top-{top_k}")
    shape = (rows, len(ids) // per_layer, top_k)
    _check_shape(shape)
    return np.frombuffer(ids, "<i4").reshape(shape).astype(np.int32)


def moe_rows(rows: NDArray[np.int32], layers: int, experts: int, top_k: int) -> NDArray[np.uint16]:
    """Return the rows of the MoE layers alone, uint16 [rows, layers, top_k], all checked.

    A token never chooses an expert twice. So a layer that has one number everywhere has no experts. With top-1 routing
    this cannot be seen: all layers must have experts then.
    Raises CountsError if anything is left that a model of this geometry cannot choose.
    """
    if rows.shape[2] != top_k:
        raise CountsError("geometry", f"routed experts are top-{rows.shape[2]}, expected top-{top_k}")
    if rows.shape[1] > layers and top_k > 1 and len(rows):
        flat = rows.transpose(1, 0, 2).reshape(rows.shape[1], -1)
        rows = rows[:, (flat != flat[:, :1]).any(axis=1)]
    if rows.shape[1] != layers:
        raise CountsError("geometry", f"routed experts have {rows.shape[1]} layers with experts, expected {layers}")
    if rows.size and (int(rows.min()) < 0 or int(rows.max()) >= experts):
        raise CountsError(
            "geometry", f"routed experts name {int(rows.min())} to {int(rows.max())} of {experts} experts"
        )
    found = rows.astype(np.uint16)
    # Much faster than to sort the few numbers of each token.
    chosen = np.ascontiguousarray(found.reshape(-1, top_k).T)
    for at in range(1, top_k):
        if (chosen[:at] == chosen[at]).any():
            raise CountsError("inconsistent", "a token has chosen an expert twice in one layer")
    return found


def split_rows(
    rows: NDArray[np.int32], prompt_tokens: int, generated_tokens: int, geometry: tuple[int, int, int]
) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    """Split the rows of all tokens but the last into those of the prompt, and the decode rows.

    geometry: layers, experts and top-k, of the MoE layers alone.
    Raises CountsError if they are not the rows of so many tokens of such a model.
    """
    expected = prompt_tokens + generated_tokens - 1
    if prompt_tokens < 1 or len(rows) != expected:
        raise CountsError("incomplete", f"there are {len(rows)} rows of experts for {expected} tokens")
    checked = moe_rows(rows, *geometry)
    return checked[:prompt_tokens], checked[prompt_tokens:]


def count_rows(rows: NDArray[np.uint16], experts: int) -> ExpertCounts:
    """Count how many of `rows`, [T, L, k], chose each expert. T is at least 1."""
    tokens, layers, top_k = rows.shape
    index = rows.astype(np.int64) + np.arange(layers)[:, None] * experts
    counts = np.bincount(index.reshape(-1), minlength=layers * experts).reshape(layers, experts)
    return ExpertCounts(counts.astype(np.uint32), tokens, top_k)


def parse_geometry(text: str) -> tuple[int, int, int]:
    """Parse LAYERSxEXPERTSxTOP_K, the MoE layers of a model. Raises CountsError."""
    found = GEOMETRY.fullmatch(text)
    layers, experts, top_k = map(int, found.groups()) if found else (0, 0, 0)
    if not (1 <= layers <= MAX_LAYERS and 1 <= experts <= MAX_EXPERTS and 1 <= top_k <= experts):
        raise CountsError("geometry", f"{text!r} is no geometry: expected LAYERSxEXPERTSxTOP_K, such as 48x128x8")
    return layers, experts, top_k


def _bytes_of(text: bytes) -> bytes:
    if len(text) > MAX_IDS * 4 * 4 // 3 + MAX_HEADER_BYTES:
        raise CountsError("malformed", f"routed experts of {len(text)} characters are too large")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise CountsError("malformed", f"routed experts cannot be decoded: {error}") from None


def _check_shape(shape: tuple[int, ...]) -> None:
    rows, layers, top_k = shape
    if rows < 0 or not 1 <= layers <= MAX_LAYERS or not 1 <= top_k <= MAX_EXPERTS or rows * layers * top_k > MAX_IDS:
        raise CountsError("malformed", f"routed experts of {rows} x {layers} x {top_k} are no model's or too large")
