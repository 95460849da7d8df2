"""Calibration files: everything a router needs to route on experts, fitted offline from a trace.

A calibration is one .npz file. It holds the signature model, one centroid per zone, the geometry of the model it was
fitted for, how well each transform predicts, its provenance, and a two-dimensional picture of the calibration requests.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eldr.activation import ActivationError, ActivationModel, effective_tokens
from eldr.activation_stored import SPECS as ACTIVATION_SPECS
from eldr.activation_stored import check_shapes as check_activation_shapes
from eldr.activation_stored import read_stored as read_activation
from eldr.activation_stored import stored as stored_activation
from eldr.counts import MAX_EXPERTS, MAX_LAYERS
from eldr.errors import EldrError
from eldr.fileio import ArraySpec, NpzError, parse_meta, read_npz, reason_of, write_npz
from eldr.prompt.fit import Choice, fit_prompt_model, held_out_profiles
from eldr.prompt.model import PromptModel
from eldr.prompt.stored import SPECS as PROMPT_SPECS
from eldr.prompt.stored import check_shapes as check_prompt_shapes
from eldr.prompt.stored import read_stored as read_prompts
from eldr.prompt.stored import stored as stored_prompts
from eldr.prompt.words import Words, words_of_text
from eldr.signature import DEFAULT_TRANSFORM, TRANSFORMS, SignatureError, SignatureModel
from eldr.trace import Trace
from eldr.zones import align_zones, balanced_kmeans

FORMAT = "eldr-calibration-v1"
# Workers report counts, not gate scores.
ROUTABLE = tuple(name for name, known in TRANSFORMS.items() if known.source == "counts")
# Requests in the picture: enough to show the zones, and small compared with the centroids.
PICTURE_REQUESTS = 1000
# With speculative decoding a decode step has several tokens. For each of these numbers of tokens, a calibration holds
# the equivalent number of independent tokens.
STEP_TOKENS = (2, 3, 4)

SPECS: Mapping[str, ArraySpec] = {
    "idf": ArraySpec(("f4",), 2),
    "layer_mask": ArraySpec(("b1",), 1),
    "centroids": ArraySpec(("f4",), 2),
    "prompt_centroids": ArraySpec(("f4",), 2, optional=True),
    "zone_sizes": ArraySpec(("i8",), 1),
    "picture_points": ArraySpec(("f4",), 2),
    "picture_zones": ArraySpec(("i8",), 1),
    "picture_labels": ArraySpec(("U",), 1),
    "picture_centroids": ArraySpec(("f4",), 2),
    **ACTIVATION_SPECS,
    **PROMPT_SPECS,
    "meta": ArraySpec(("U",), 0),
}


class CalibrationError(EldrError):
    """Raised when a calibration cannot be fitted, read or written.

    The message names the file, if any, and the reason.
    """


@dataclass(frozen=True, slots=True)
class Geometry:
    """The size of a model's MoE part: layers, experts per layer, and experts per token."""

    layers: int
    experts: int
    top_k: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.layers, self.experts, self.top_k

    def __str__(self) -> str:
        return f"{self.layers} layers x {self.experts} experts, top-{self.top_k}"


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """Calibration signatures projected on their two principal components, for plots.

    points: float32 [n, 2], at most PICTURE_REQUESTS requests.
    zones: int64 [n], the zone of each point.
    labels: str [n], the kind of each request.
    centroids: float32 [K, 2].
    """

    points: NDArray[np.float32]
    zones: NDArray[np.int64]
    labels: NDArray[np.str_]
    centroids: NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """A fitted signature model and its zones.

    signature: the model that turns expert counts into signatures.
    centroids: float32 [K, D], unit vectors, one per decode worker.
    zone_sizes: int64 [K], the number of calibration requests in each zone.
    geometry: the geometry of the model that it was fitted for.
    rho: maps each transform that the trace supports to its rho on the calibration requests.
    provenance: JSON-serialisable. Holds model, note, requests, seed, created_utc, trace_sha256 (None if the trace was
        not read from a file) and versions.
    picture: calibration signatures in two dimensions, for plots.
    predictor: predicts decode profiles from expert counts. None if the file has no predictor, or if the trace was too
        small to fit one.
    prompts: predicts them from the words of prompts. None if the trace held no prompts, or too few.
    prompt_centroids: float32 [K, D], the zones of signatures that are predicted from words. Predictions are more alike
        than what they predict, so the other zones would not divide them evenly. Zone k is the nearest to the other zone
        k. None without `prompts`.
    """

    signature: SignatureModel
    centroids: NDArray[np.float32]
    zone_sizes: NDArray[np.int64]
    geometry: Geometry
    rho: dict[str, float]
    provenance: dict[str, Any]
    picture: Picture
    predictor: ActivationModel | None = None
    prompts: PromptModel | None = None
    prompt_centroids: NDArray[np.float32] | None = None

    @property
    def workers(self) -> int:
        """K, the number of zones and so of decode workers."""
        return len(self.centroids)

    def expected_counts(self, profiles: NDArray[np.float32]) -> NDArray[np.float32]:
        """What the counts of prompts are expected to be, in proportion, if these are the profiles of their decodes.

        profiles: float32 [..., D]. The result is float32 [..., L, E]. Prompts use experts a little differently. Experts
        that no prompt of the calibration used are not expected: a profile is nowhere zero, and they have the largest
        weights of all. Models whose layers differ in experts have many of them.
        """
        predictor, geometry = self.predictor, self.geometry
        if predictor is not None:
            profiles = np.maximum(profiles + (predictor.mean_frequency - predictor.mean_profile), 0)
            profiles = profiles * (predictor.mean_frequency > 0)
        return np.asarray(profiles.reshape(*profiles.shape[:-1], geometry.layers, geometry.experts), dtype=np.float32)

    def save(self, path: str | Path) -> None:
        """Write the calibration to `path` atomically. Raises CalibrationError if it cannot be written."""
        meta = {
            "format": FORMAT,
            "transform": self.signature.transform_name,
            "top_k": self.geometry.top_k,
            "rho": self.rho,
            "provenance": self.provenance,
        }
        of_models: dict[str, NDArray[Any]] = {}
        if self.predictor is not None:
            of_models, meta["activation"] = stored_activation(self.predictor)
        if self.prompts is not None:
            of_prompts, meta["prompt"] = stored_prompts(self.prompts)
            of_models |= of_prompts
        arrays = {
            "idf": self.signature.idf,
            "layer_mask": self.signature.layer_mask,
            "centroids": self.centroids,
            "zone_sizes": self.zone_sizes,
            "picture_points": self.picture.points,
            "picture_zones": self.picture.zones,
            "picture_labels": self.picture.labels,
            "picture_centroids": self.picture.centroids,
            "meta": np.array(json.dumps(meta, allow_nan=False)),
        }
        if self.prompt_centroids is not None:
            arrays["prompt_centroids"] = self.prompt_centroids
        try:
            write_npz(Path(path), arrays | of_models)
        except OSError as error:
            raise CalibrationError(f"calibration {path}: {reason_of(error)}") from None


def fit_calibration(
    trace: Trace,
    workers: int,
    *,
    seed: int = 0,
    transform: str = DEFAULT_TRANSFORM,
    compare: bool = True,
    progress: Callable[[str], None] | None = None,
) -> Calibration:
    """Fit the signature model and the zones for a fleet of `workers` decode workers.

    The same trace and seed give the same calibration, except for its creation date.

    trace: the recorded requests to fit on.
    workers: the number of decode workers, K.
    seed: the seed of all random choices.
    transform: the transform that signatures use. It must work on counts.
    compare: whether to fit the other transforms too, to report their rho.
    progress: called once per stage with a description of it.
    Raises CalibrationError, SignatureError or ZonesError if the trace does not allow a fit.
    """
    tell = progress or (lambda stage: None)
    if transform not in ROUTABLE:
        raise CalibrationError(
            f"cannot route on transform {transform!r}: workers report only counts; use {', '.join(ROUTABLE)}"
        )
    profiles = trace.decode_profiles()
    models = {}
    for name in TRANSFORMS:
        source = _source(trace, name)
        if source is None or not (compare or name == transform):
            continue
        tell(f"layers for {name}")
        try:
            models[name] = SignatureModel.fit(source, profiles, transform=name, seed=seed)
        except SignatureError:
            if name == transform:  # the others are fitted only for their rho
                raise
    signature = models[transform]
    tell(f"zones for {workers} workers")
    signatures = signature.transform(trace.prefill_counts)
    zones = balanced_kmeans(signatures, workers, seed=seed)
    tell("predictor of decode profiles")
    fitted = Calibration(
        signature=signature,
        centroids=zones.centroids,
        zone_sizes=zones.sizes,
        geometry=Geometry(trace.meta.layers, trace.meta.experts, trace.meta.top_k),
        rho={name: model.rho for name, model in models.items()},
        provenance=_provenance(trace, profiles, seed),
        picture=_picture(signatures, zones.labels, trace.label, zones.centroids, seed),
        predictor=_fit_predictor(trace, profiles, seed),
    )
    if not trace.has_prompts:
        return fitted
    tell("prompt model")
    return with_prompt_zones(replace(fitted, prompts=_fit_prompts(trace, profiles, seed)), trace, profiles, seed)


def with_prompt_zones(calibration: Calibration, trace: Trace, profiles: NDArray[np.float32], seed: int) -> Calibration:
    """Add the zones of signatures that are predicted from words, one for each zone that there is.

    trace: what the calibration was fitted to. profiles: its decode profiles, float32 [N, L, E].
    """
    model = calibration.prompts
    if model is None:
        return calibration
    words, found = _with_decodes(trace, profiles)
    choice = Choice(model.strength, model.idf, model.rank, model.r2)
    predicted = held_out_profiles(words, found, *_layers_and_top_k(trace), choice, seed=seed)
    signatures = calibration.signature.transform(calibration.expected_counts(predicted))
    zones = balanced_kmeans(signatures, calibration.workers, seed=seed).centroids
    return replace(calibration, prompt_centroids=zones[align_zones(calibration.centroids, zones)])


def _with_decodes(trace: Trace, profiles: NDArray[np.float32]) -> tuple[list[Words], NDArray[np.float32]]:
    """The words and profiles, float32 [n, D], of the requests with decode steps."""
    decoded = np.flatnonzero(profiles.any(axis=(1, 2)))
    words = [words_of_text(trace.prompt(request)) for request in decoded.tolist()]
    return words, profiles[decoded].reshape(len(decoded), -1)


def _layers_and_top_k(trace: Trace) -> tuple[int, int]:
    return trace.meta.layers, trace.meta.top_k


def _fit_predictor(trace: Trace, profiles: NDArray[np.float32], seed: int) -> ActivationModel | None:
    try:
        return ActivationModel.fit(trace.prefill_counts, trace.prompt_tokens, profiles, trace.meta.top_k, seed=seed)
    except ActivationError:  # too few requests; policies then use the prompt's own frequencies
        return None


def _fit_prompts(trace: Trace, profiles: NDArray[np.float32], seed: int) -> PromptModel | None:
    words, found = _with_decodes(trace, profiles)
    try:
        return fit_prompt_model(words, found, *_layers_and_top_k(trace), seed=seed)
    except ActivationError:
        return None


def _source(trace: Trace, transform: str) -> NDArray[Any] | None:
    """Return the array that `transform` reads, or None if the trace does not have it."""
    source = TRANSFORMS[transform].source
    array: NDArray[Any] | None = trace.prefill_counts if source == "counts" else getattr(trace, source)
    return array


def _provenance(trace: Trace, profiles: NDArray[np.float32], seed: int) -> dict[str, Any]:
    versions = {"python": platform.python_version(), "numpy": np.__version__}
    try:
        versions["eldr"] = version("eldr")
    except PackageNotFoundError:  # run from a source tree that is not installed
        versions["eldr"] = "unknown"
    return {
        "model": trace.meta.model,
        "note": trace.meta.note,
        "requests": trace.requests,
        "seed": seed,
        "created_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "trace_sha256": trace.sha256,
        "versions": versions,
        "step_tokens": _step_tokens(trace, profiles),
    }


def _step_tokens(trace: Trace, profiles: NDArray[np.float32]) -> dict[str, float]:
    """Map a step's number of tokens to its equivalent number of independent tokens. Empty if unknown."""
    found = {
        str(tokens): effective_tokens(trace.decode_experts, trace.decode_offsets, profiles, tokens)
        for tokens in STEP_TOKENS
    }
    return {tokens: round(value, 3) for tokens, value in found.items() if np.isfinite(value)}


def _picture(
    signatures: NDArray[np.float32],
    zones: NDArray[np.int64],
    labels: NDArray[np.str_],
    centroids: NDArray[np.float32],
    seed: int,
) -> Picture:
    """Project signatures on their principal components.

    Uses the eigenvectors of the n x n Gram matrix, because D is much larger than n.
    """
    shown = np.arange(len(signatures))
    if len(shown) > PICTURE_REQUESTS:
        shown = np.sort(np.random.default_rng(seed).choice(shown, PICTURE_REQUESTS, replace=False))
    points = signatures[shown]
    mean = points.mean(axis=0)
    centred = points - mean
    values, vectors = np.linalg.eigh((centred @ centred.T).astype(np.float64))
    top = np.argsort(values)[::-1][:2]
    scale = np.sqrt(np.maximum(values[top], 1e-12))
    axes = (centred.T @ vectors[:, top]) / scale
    if axes.shape[1] < 2:  # a single request
        axes = np.pad(axes, ((0, 0), (0, 1)))
    axes *= np.where(axes[np.abs(axes).argmax(axis=0), [0, 1]] < 0, -1, 1)  # an eigenvector's sign is arbitrary
    return Picture(
        points=(centred @ axes).astype(np.float32),
        zones=zones[shown],
        labels=labels[shown],
        centroids=((centroids - mean) @ axes).astype(np.float32),
    )


def load_calibration(path: str | Path) -> Calibration:
    """Load the calibration in `path`.

    Raises CalibrationError with the file name and the reason if it cannot be used.
    """
    path = Path(path)
    try:
        arrays = read_npz(path, SPECS, _check_shapes)
        meta = _parse_meta(str(arrays["meta"]))
        layers, experts = arrays["idf"].shape
        if meta["top_k"] > experts:
            raise NpzError(f"top_k is {meta['top_k']} with {experts} experts")
        _check_values(arrays)
        predictor = read_activation(arrays, meta.get("activation"), layers, meta["top_k"])
        prompts = read_prompts(arrays, meta.get("prompt"), layers, experts, meta["top_k"])
    except (NpzError, OSError) as error:
        raise CalibrationError(f"calibration {path}: {reason_of(error)}") from None
    transform = meta["transform"]
    return Calibration(
        signature=SignatureModel(transform, arrays["idf"], arrays["layer_mask"], meta["rho"][transform]),
        centroids=arrays["centroids"],
        zone_sizes=arrays["zone_sizes"],
        geometry=Geometry(layers, experts, meta["top_k"]),
        rho=meta["rho"],
        provenance=meta["provenance"],
        picture=Picture(
            arrays["picture_points"], arrays["picture_zones"], arrays["picture_labels"], arrays["picture_centroids"]
        ),
        predictor=predictor,
        prompts=prompts,
        prompt_centroids=arrays.get("prompt_centroids"),
    )


def _check_shapes(shapes: Mapping[str, tuple[int, ...]]) -> None:
    check_prompt_shapes(shapes)
    layers, experts = shapes["idf"]
    zones, _ = shapes["centroids"]
    shown, _ = shapes["picture_points"]
    if not (1 <= layers <= MAX_LAYERS and 1 <= experts <= MAX_EXPERTS):
        raise NpzError(f"{layers} layers x {experts} experts is not a valid MoE geometry")
    if zones == 0:
        raise NpzError("it holds no zones")
    expected = {
        "layer_mask": (layers,),
        "zone_sizes": (zones,),
        "picture_points": (shown, 2),
        "picture_zones": (shown,),
        "picture_labels": (shown,),
        "picture_centroids": (zones, 2),
    }
    if "prompt_centroids" in shapes:
        expected["prompt_centroids"] = shapes["centroids"]
    for name, shape in expected.items():
        if shapes.get(name) != shape:
            raise NpzError(f"array {name} has shape {shapes.get(name)}, expected {shape}")
    check_activation_shapes(shapes, layers, experts)


def _parse_meta(text: str) -> dict[str, Any]:
    meta = parse_meta(text, FORMAT)
    transform, rho, top_k = meta.get("transform"), meta.get("rho"), meta.get("top_k")
    if transform not in ROUTABLE:
        raise NpzError(f"meta: cannot route on transform {transform!r}")
    if type(top_k) is not int or top_k < 1:
        raise NpzError(f"meta: top_k is {top_k!r}, expected a whole number of at least 1")
    if not isinstance(rho, dict) or transform not in rho:
        raise NpzError("meta: rho of the transform is missing")
    if not all(isinstance(value, float) and abs(value) <= 1 + 1e-9 for value in rho.values()):
        raise NpzError("meta: a rho is not a number from -1 to 1")
    if not isinstance(meta.get("provenance"), dict):
        raise NpzError("meta: provenance is missing")
    return meta


def _check_values(arrays: Mapping[str, NDArray[Any]]) -> None:
    present = [name for name in ("prompt_centroids",) if name in arrays]
    for name in ("idf", "centroids", "picture_points", "picture_centroids", *present):
        if not np.isfinite(arrays[name]).all():
            raise NpzError(f"array {name} holds NaN or infinity")
    if (arrays["idf"] < 0).any():
        raise NpzError("array idf holds negative weights")
    mask, centroids, zones = arrays["layer_mask"], arrays["centroids"], len(arrays["centroids"])
    dimension = int(mask.sum()) * arrays["idf"].shape[1]
    if dimension == 0:
        raise NpzError("no layer is selected")
    if centroids.shape[1] != dimension:
        raise NpzError(
            f"centroids have {centroids.shape[1]} entries, but {int(mask.sum())} layers x {arrays['idf'].shape[1]} "
            f"experts need {dimension}"
        )
    norms = np.linalg.norm(centroids, axis=1)
    if (np.abs(norms - 1) > 1e-3).any():
        zone = int(np.abs(norms - 1).argmax())
        raise NpzError(f"centroid {zone} has length {norms[zone]:.4g}, expected a unit vector")
    picture_zones = arrays["picture_zones"]
    if (arrays["zone_sizes"] < 0).any() or ((picture_zones < 0) | (picture_zones >= zones)).any():
        raise NpzError("zone sizes or zones of the picture are out of range")
