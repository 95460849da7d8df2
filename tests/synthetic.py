"""Small traces and calibrations that are true to the format: tokens of each kind of request prefer its experts."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from eldr.calibration import Calibration, Geometry, Picture
from eldr.signature import SignatureModel
from eldr.trace import Trace, TraceMeta


def draw(rng: np.random.Generator, weights: NDArray[np.float64], tokens: int, top_k: int) -> NDArray[np.int64]:
    """[tokens, L, k]: top-k of the weights plus Gumbel noise."""
    noisy = weights + rng.gumbel(size=(tokens, *weights.shape))
    return np.argsort(-noisy, axis=-1)[..., :top_k]


def make_trace(
    requests: int = 24,
    layers: int = 3,
    experts: int = 16,
    top_k: int = 2,
    kinds: int = 3,
    seed: int = 0,
    steps: int = 9,
    dtype: type[Any] = np.uint8,
    **extra: Any,
) -> Trace:
    rng = np.random.default_rng(seed)
    of_kind = rng.normal(0, 3, (kinds, layers, experts))
    counts = np.zeros((requests, layers, experts), dtype=np.uint32)
    prompt_tokens = rng.integers(5, 30, requests).astype(np.int32)
    lengths = rng.integers(1, steps + 1, requests)
    rows = []
    for request in range(requests):
        weights = of_kind[request % kinds]
        for token in draw(rng, weights, prompt_tokens[request], top_k):
            for layer in range(layers):
                counts[request, layer, token[layer]] += 1
        rows.append(draw(rng, weights, lengths[request], top_k))
    return Trace(
        prefill_counts=counts,
        prompt_tokens=prompt_tokens,
        decode_experts=np.concatenate(rows).astype(dtype),
        decode_offsets=np.concatenate(([0], np.cumsum(lengths))).astype(np.int64),
        label=np.array([f"kind {request % kinds}" for request in range(requests)]),
        meta=TraceMeta("tiny", layers, experts, top_k, "synthetic"),
        **extra,
    )


def packed(texts: list[bytes]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Prompts in the form of a trace: `prompt_text` and `prompt_text_offsets`."""
    ends = [sum(map(len, texts[:count])) for count in range(len(texts) + 1)]
    return np.frombuffer(b"".join(texts), dtype=np.uint8), np.array(ends, dtype=np.int64)


def prompts_of_kinds(requests: int, kinds: int = 3, seed: int = 0) -> dict[str, Any]:
    """Prompts for `make_trace` whose words tell the kind of each request, but for a word in four that all may have."""
    rng = np.random.default_rng([seed, 1])
    texts = []
    for request in range(requests):
        own = [f"{_spelled(request % kinds)}{_spelled(int(word))}" for word in rng.integers(0, 30, 18)]
        common = [f"the{_spelled(int(word))}" for word in rng.integers(0, 30, 6)]
        texts.append(" ".join(rng.permutation(own + common).tolist()).encode())
    text, offsets = packed(texts)
    return {"prompt_text": text, "prompt_text_offsets": offsets}


def _spelled(number: int) -> str:
    """A number in letters, since digits are words of their own."""
    return "".join(chr(ord("a") + int(digit)) for digit in str(number))


def make_calibration(
    zones: int = 4,
    layers: int = 3,
    experts: int = 8,
    top_k: int = 2,
    seed: int = 0,
    transform: str = "count_idf",
    layer_mask: NDArray[np.bool_] | None = None,
) -> Calibration:
    """A calibration with random centroids: for policies, which only need it to be valid."""
    rng = np.random.default_rng(seed)
    mask = np.ones(layers, dtype=bool) if layer_mask is None else np.array(layer_mask)
    idf = np.ones((layers, experts)) if transform != "count_idf" else rng.uniform(0.1, 2, (layers, experts))
    centroids = rng.uniform(0, 1, (zones, int(mask.sum()) * experts)) ** 3
    centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
    return Calibration(
        signature=SignatureModel(transform, idf.astype(np.float32), mask, 0.5),
        centroids=centroids.astype(np.float32),
        zone_sizes=np.full(zones, 3),
        geometry=Geometry(layers, experts, top_k),
        rho={transform: 0.5},
        provenance={"model": "tiny", "requests": 3 * zones, "seed": seed, "trace_sha256": None, "versions": {}},
        picture=Picture(
            points=rng.normal(size=(3 * zones, 2)).astype(np.float32),
            zones=np.repeat(np.arange(zones), 3),
            labels=np.array(["<b>kind</b>", "code", ""] * zones),
            centroids=rng.normal(size=(zones, 2)).astype(np.float32),
        ),
    )
