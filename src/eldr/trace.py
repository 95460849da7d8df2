"""Trace files, `eldr-trace-v1`: the experts that recorded requests used, in the prompt and in every decode step.

A trace is one .npz file with the arrays of `Trace`. A request that generates G tokens has G - 1 decode rows, one for
each forward pass of tokens 1..G-1. The pass of the last prompt token belongs to the prompt's counts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from eldr.counts import MAX_EXPERTS, MAX_LAYERS
from eldr.errors import EldrError
from eldr.fileio import ArraySpec, NpzError, parse_meta, read_npz, reason_of, write_npz

FORMAT = "eldr-trace-v1"
# Decode experts are checked this many rows at a time, to bound the working memory.
ROWS_AT_ONCE = 2**15

SPECS: Mapping[str, ArraySpec] = {
    "prefill_counts": ArraySpec(("u4",), 3),
    "prompt_tokens": ArraySpec(("i4",), 1),
    "decode_experts": ArraySpec(("u1", "u2"), 3),
    "decode_offsets": ArraySpec(("i8",), 1),
    "label": ArraySpec(("U",), 1),
    "meta": ArraySpec(("U",), 0),
    "arrival_s": ArraySpec(("f8",), 1, optional=True),
    "prefill_gate_prob": ArraySpec(("f4",), 3, optional=True),
    "prefill_gate_logit": ArraySpec(("f4",), 3, optional=True),
    "prompt_text": ArraySpec(("u1",), 1, optional=True),
    "prompt_text_offsets": ArraySpec(("i8",), 1, optional=True),
}
OPTIONAL_FLOATS = ("arrival_s", "prefill_gate_prob", "prefill_gate_logit")


class TraceError(EldrError):
    """Raised when a trace cannot be read, written or used. The message names the file, if any, and the reason."""


@dataclass(frozen=True, slots=True)
class TraceMeta:
    """The recorded model and how it was recorded."""

    model: str
    layers: int
    experts: int
    top_k: int
    note: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """N recorded requests to one model with L MoE layers of E experts, top-k routing, and T decode rows in total.

    prefill_counts: uint32 [N, L, E], the prompt tokens that chose each expert. Each row sums to prompt_tokens * top_k.
    prompt_tokens: int32 [N].
    decode_experts: uint8 or uint16 [T, L, k], the experts of every decode row, with the requests concatenated.
    decode_offsets: int64 [N + 1]. Request i has the rows decode_offsets[i]:decode_offsets[i + 1].
    label: str [N], the kind of each request, empty if unknown.
    meta: the recorded model and its geometry.
    arrival_s: float64 [N], seconds since the start of the recording.
    prefill_gate_prob, prefill_gate_logit: float32 [N, L, E], the MoE router's softmax probability and logit for each
        expert, summed over the prompt's tokens. Workers do not report them. They serve to compare kinds of signatures.
    prompt_text: uint8, the texts of the prompts, concatenated. It should be UTF-8, but any bytes are allowed.
    prompt_text_offsets: int64 [N + 1]. Request i has the bytes prompt_text_offsets[i]:prompt_text_offsets[i + 1]. There
        are either both of these arrays or neither.
    sha256: the digest of the file that the trace was read from. None if it was not read from a file.
    """

    prefill_counts: NDArray[np.uint32]
    prompt_tokens: NDArray[np.int32]
    decode_experts: NDArray[np.uint8 | np.uint16]
    decode_offsets: NDArray[np.int64]
    label: NDArray[np.str_]
    meta: TraceMeta
    arrival_s: NDArray[np.float64] | None = None
    prefill_gate_prob: NDArray[np.float32] | None = None
    prefill_gate_logit: NDArray[np.float32] | None = None
    prompt_text: NDArray[np.uint8] | None = None
    prompt_text_offsets: NDArray[np.int64] | None = None
    sha256: str | None = field(default=None, compare=False)

    @property
    def requests(self) -> int:
        """N, the number of requests."""
        return len(self.prompt_tokens)

    @property
    def has_prompts(self) -> bool:
        """Whether the texts of the prompts were kept."""
        return self.prompt_text is not None

    def prompt(self, request: int) -> bytes:
        """The text of a request's prompt. Raises TraceError if the trace has no prompts."""
        text, offsets = self.prompt_text, self.prompt_text_offsets
        if text is None or offsets is None:
            raise TraceError("the trace has no prompts; record it with --keep-prompts")
        return text[offsets[request] : offsets[request + 1]].tobytes()

    def decode_profile(self, request: int) -> NDArray[np.float32]:
        """Share of a request's decode rows that activate each expert, float32 [L, E]. All zero without decode rows."""
        rows = self.decode_experts[self.decode_offsets[request] : self.decode_offsets[request + 1]]
        profile: NDArray[np.float32] = self._profiles(rows, np.zeros(len(rows), dtype=np.int64), 1)[0]
        return profile

    def decode_profiles(self) -> NDArray[np.float32]:
        """The `decode_profile` of every request, float32 [N, L, E]."""
        owner = np.repeat(np.arange(self.requests), np.diff(self.decode_offsets))
        return self._profiles(self.decode_experts, owner, self.requests)

    def _profiles(
        self, rows: NDArray[np.uint8 | np.uint16], owner: NDArray[np.int64], requests: int
    ) -> NDArray[np.float32]:
        layers, experts = self.meta.layers, self.meta.experts
        steps = np.maximum(np.bincount(owner, minlength=requests), 1).astype(np.float32)
        profiles = np.empty((requests, layers, experts), dtype=np.float32)
        first = (owner * experts)[:, None]
        for layer in range(layers):  # one layer at a time bounds the memory of the index
            index = (first + rows[:, layer]).reshape(-1)
            profiles[:, layer] = np.bincount(index, minlength=requests * experts).reshape(requests, experts)
        profiles /= steps[:, None, None]
        return profiles


def read_trace(path: str | Path) -> Trace:
    """Read the trace in `path`. Raises TraceError with the file name and the reason if it cannot be used."""
    path = Path(path)
    try:
        arrays = read_npz(path, SPECS, _check_shapes)
        meta = _parse_meta(str(arrays.pop("meta")))
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        trace = Trace(meta=meta, sha256=sha256, **arrays)
        _check(trace)
    except (NpzError, OSError) as error:
        raise TraceError(f"trace {path}: {reason_of(error)}") from None
    return trace


def write_trace(trace: Trace, path: str | Path) -> None:
    """Write `trace` to `path` atomically. Raises TraceError if the trace is invalid or the write fails."""
    path = Path(path)
    meta = trace.meta
    text = json.dumps(
        {
            "format": FORMAT,
            "model": meta.model,
            "layers": meta.layers,
            "experts": meta.experts,
            "top_k": meta.top_k,
            "note": meta.note,
        }
    )
    arrays = {name: getattr(trace, name) for name in SPECS if name != "meta"}
    arrays = {name: array for name, array in arrays.items() if array is not None} | {"meta": np.array(text)}
    try:
        for name, array in arrays.items():
            if not SPECS[name].accepts(array.dtype) or array.ndim != SPECS[name].ndim:
                raise NpzError(f"array {name} is {array.dtype} {array.shape}")
        _check_shapes({name: array.shape for name, array in arrays.items()})
        _parse_meta(text)
        _check(trace)
        write_npz(path, arrays)
    except (NpzError, OSError) as error:
        raise TraceError(f"trace {path}: {reason_of(error)}") from None


def _check_shapes(shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise NpzError unless all arrays describe the same requests and layers."""
    requests, layers, experts = shapes["prefill_counts"]
    _, decode_layers, top_k = shapes["decode_experts"]
    if requests == 0:
        raise NpzError("it holds no requests")
    if not (1 <= layers <= MAX_LAYERS and 1 <= experts <= MAX_EXPERTS and 1 <= top_k <= experts):
        raise NpzError(f"{layers} layers x {experts} experts, top-{top_k} is not a valid MoE geometry")
    if decode_layers != layers:
        raise NpzError(f"prefill_counts has {layers} layers, decode_experts {decode_layers}")
    expected = {
        "prompt_tokens": (requests,),
        "decode_offsets": (requests + 1,),
        "label": (requests,),
        "arrival_s": (requests,),
        "prefill_gate_prob": (requests, layers, experts),
        "prefill_gate_logit": (requests, layers, experts),
        "prompt_text_offsets": (requests + 1,),
    }
    if ("prompt_text" in shapes) != ("prompt_text_offsets" in shapes):
        raise NpzError("of prompt_text and prompt_text_offsets it has only one")
    for name, shape in expected.items():
        if shapes.get(name, shape) != shape:
            raise NpzError(f"array {name} has shape {shapes[name]}, expected {shape}")


def _parse_meta(text: str) -> TraceMeta:
    meta = parse_meta(text, FORMAT)
    for key in ("layers", "experts", "top_k"):
        if type(meta.get(key)) is not int:
            raise NpzError(f"meta: {key} is {meta.get(key)!r}, expected a whole number")
    for key in ("model", "note"):
        if not isinstance(meta.get(key, ""), str):
            raise NpzError(f"meta: {key} is not text")
    return TraceMeta(meta.get("model", ""), meta["layers"], meta["experts"], meta["top_k"], meta.get("note", ""))


def _check(trace: Trace) -> None:
    """Raise NpzError unless the values are consistent. Shapes and dtypes are already checked."""
    declared = (trace.meta.layers, trace.meta.experts, trace.meta.top_k)
    found = (*trace.prefill_counts.shape[1:], trace.decode_experts.shape[2])
    if declared != found:
        raise NpzError(f"meta says (layers, experts, top_k) = {declared}, the arrays say {found}")
    _check_prompts(trace)
    _check_decode(trace)
    if trace.prompt_text is not None and trace.prompt_text_offsets is not None:
        _check_offsets("prompt_text_offsets", trace.prompt_text_offsets, len(trace.prompt_text))
    for name in OPTIONAL_FLOATS:
        values = getattr(trace, name)
        if values is None:
            continue
        if not np.isfinite(values).all():
            raise NpzError(f"array {name} holds NaN or infinity")
        if name != "prefill_gate_logit" and (values < 0).any():
            raise NpzError(f"array {name} holds negative values")


def _check_prompts(trace: Trace) -> None:
    if (trace.prompt_tokens < 1).any():
        request = int(np.flatnonzero(trace.prompt_tokens < 1)[0])
        raise NpzError(f"request {request} has {int(trace.prompt_tokens[request])} prompt tokens")
    expected = trace.prompt_tokens.astype(np.uint64) * np.uint64(trace.meta.top_k)
    sums = trace.prefill_counts.sum(axis=2, dtype=np.uint64)
    wrong = np.argwhere(sums != expected[:, None])
    if len(wrong):
        request, layer = (int(index) for index in wrong[0])
        raise NpzError(
            f"request {request} counts {int(sums[request, layer])} selections in layer {layer}, expected "
            f"{int(trace.prompt_tokens[request])} prompt tokens x top-{trace.meta.top_k}"
        )
    if (trace.prefill_counts.max(axis=(1, 2)) > trace.prompt_tokens).any():
        raise NpzError("an expert is counted more often than there are prompt tokens")


def _check_decode(trace: Trace) -> None:
    _check_offsets("decode_offsets", trace.decode_offsets, len(trace.decode_experts))
    for start in range(0, len(trace.decode_experts), ROWS_AT_ONCE):
        rows: NDArray[np.uint8 | np.uint16] = np.sort(trace.decode_experts[start : start + ROWS_AT_ONCE], axis=-1)
        if rows.max() >= trace.meta.experts:
            row = start + int(np.argwhere(rows >= trace.meta.experts)[0][0])
            raise NpzError(f"decode row {row} names expert {int(rows.max())} of {trace.meta.experts}")
        twice = rows[..., 1:] == rows[..., :-1]
        if twice.any():
            raise NpzError(f"decode row {start + int(np.argwhere(twice)[0][0])} names an expert twice in one layer")


def _check_offsets(name: str, offsets: NDArray[np.int64], end: int) -> None:
    if offsets[0] != 0 or offsets[-1] != end or (offsets[1:] < offsets[:-1]).any():
        raise NpzError(f"{name} do not rise from 0 to {end}")
