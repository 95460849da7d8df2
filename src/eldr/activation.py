"""Predicts, from the expert counts of a prompt, how likely one decode step of the request activates each expert.

Two predictors. `own_frequencies` needs no fit: the prompt's own expert frequencies, shrunk towards the fleet's mean.
`ActivationModel` is fitted to recorded traffic: a linear map from prompt frequencies to the decode activation profile.
Most of such a map is its diagonal (an expert that the prompt used, its decode uses), so the diagonal is fitted first
and a reduced-rank ridge regression (Mukherjee and Zhu 2011) of what it leaves open adds the rest; ridge alone would
pull that diagonal towards zero. Vectors are flat: D = L * E.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eldr import kernels
from eldr.counts import ExpertCounts
from eldr.errors import EldrError

# Prompt tokens' worth of the mean that a prompt's frequencies are mixed with.
PRIOR_TOKENS = 4.0
# A probability never leaves this range: a certain expert would make a worker's survival zero for good.
LEAST, MOST = 1e-4, 0.98
FOLDS = 4
STRENGTHS = (0.1, 0.3, 1.0, 3.0)
RANKS = (0, 4, 8, 16)
# How strongly the diagonal's slopes are pulled to their common value, in requests of mean spread.
SLOPE_PRIOR_REQUESTS = 20.0

# Rows that a request must have for its profile to say what one of its tokens activates, and requests looked at.
WINDOWED_ROWS, WINDOWED_REQUESTS = 32, 64

Floats = NDArray[np.float32]


class ActivationError(EldrError):
    """A predictor that cannot be fitted; says why."""


def own_frequencies(counts: ExpertCounts, mean: Floats, prior_tokens: float = PRIOR_TOKENS) -> Floats:
    """float32 [D]: (counts + prior_tokens * mean) / (prompt tokens + prior_tokens); `mean` is float32 [D],
    C-contiguous."""
    frequencies = np.empty(counts.counts.size, dtype=np.float32)
    scale = 1 / (counts.prompt_tokens + prior_tokens)
    kernels.own_frequencies(counts.counts, mean, prior_tokens, scale, frequencies)
    return frequencies


def to_probabilities(scores: Floats, layers: int, top_k: int) -> Floats:
    """float32 [..., D] within LEAST..MOST whose layers sum to `top_k`, from scores near that. One step activates
    exactly top_k experts a layer, so the probabilities of a layer sum to it; what the scaling pushes out of the range
    is an error of second order in the sum."""
    scores = np.ascontiguousarray(scores, dtype=np.float32)
    probabilities = np.empty_like(scores)
    experts = scores.shape[-1] // layers
    kernels.to_probabilities(scores, scores.size // experts, LEAST, MOST, min(top_k, MOST * experts), probabilities)
    return probabilities


@dataclass(frozen=True, slots=True, eq=False)
class ActivationModel:
    """profile = mean_profile + slope * x + up.T @ (down @ x), with x = own frequencies - mean_frequency.

    mean_frequency, mean_profile, slope: float32 [D]. down, up: float32 [R, D], R may be 0.
    strength: of the ridge, relative to the mean squared length of x. r2: share of the variance of decode profiles
    that it predicts, by cross-validation on the calibration requests.
    """

    mean_frequency: Floats
    mean_profile: Floats
    slope: Floats
    down: Floats
    up: Floats
    layers: int
    top_k: int
    strength: float
    r2: float

    @property
    def rank(self) -> int:
        """R."""
        return len(self.down)

    def predict(self, counts: ExpertCounts) -> Floats:
        """float32 [D]: probability that one decode step activates each expert."""
        x = own_frequencies(counts, self.mean_frequency) - self.mean_frequency
        scores = self.slope * x + self.mean_profile
        if self.rank:
            # Row by row and layer by layer: products this small numpy gives to BLAS one by one, and BLAS does not
            # spread them over threads. On busy cores threads take milliseconds to meet.
            latent = np.matmul(self.down[:, None, :], x[:, None]).reshape(1, -1)
            of_layer = self.up.reshape(self.rank, self.layers, -1).transpose(1, 0, 2)
            scores += np.matmul(latent, of_layer).reshape(-1)
        return to_probabilities(scores, self.layers, self.top_k)

    @classmethod
    def fit(
        cls,
        counts: NDArray[np.uint32],
        prompt_tokens: NDArray[np.int32],
        decode_profiles: NDArray[np.float32],
        top_k: int,
        *,
        seed: int = 0,
        ranks: Sequence[int] = RANKS,
        strengths: Sequence[float] = STRENGTHS,
    ) -> ActivationModel:
        """Fit to N requests; rank and strength by cross-validation.

        counts: [N, L, E]; prompt_tokens: [N]; decode_profiles: [N, L, E], requests whose profile is all zero (no
        decode step was recorded) are left out. Raises ActivationError where fewer than FOLDS requests are left.
        """
        recorded = decode_profiles.any(axis=(1, 2))
        requests = int(recorded.sum())
        if requests < 2 * FOLDS:
            raise ActivationError(
                f"{requests} requests with decode steps are too few to fit a predictor; record at least {2 * FOLDS}"
            )
        layers = counts.shape[1]
        flat_counts = counts[recorded].reshape(requests, -1).astype(np.float32)
        tokens = prompt_tokens[recorded].astype(np.float32)[:, None]
        profiles = decode_profiles[recorded].reshape(requests, -1)
        mean = (flat_counts / tokens).mean(axis=0)
        frequencies = (flat_counts + PRIOR_TOKENS * mean) / (tokens + PRIOR_TOKENS)
        strength, rank, r2 = _cross_validate(frequencies, profiles, layers, top_k, seed, ranks, strengths)
        ridge = _Ridge(frequencies, profiles)
        down, up = ridge.reduced(strength, rank)
        return cls(ridge.mean_x, ridge.mean_y, ridge.slope, down, up, layers, top_k, strength, r2)


class _Ridge:
    """Diagonal map plus dual ridge regression of its residual: x [N, D] to y [N, D], N much smaller than D."""

    def __init__(self, x: Floats, y: Floats) -> None:
        self.mean_x = x.mean(axis=0)
        self.mean_y = y.mean(axis=0)
        self.x = x - self.mean_x
        centred = y - self.mean_y
        self.slope = _slopes(self.x, centred)
        self._residual = centred - self.slope * self.x
        self._values, self._vectors = np.linalg.eigh((self.x @ self.x.T).astype(np.float64))

    def reduced(self, strength: float, rank: int) -> tuple[Floats, Floats]:
        """down and up, float32 [rank, D]: the ridge solution projected on the main axes of what it fits."""
        values = np.maximum(self._values, 0)
        ridge = values + strength * max(values.mean(), 1e-12)
        # fitted = x @ weights; its right singular vectors from the N x N matrix of scalar products.
        rotated = self._vectors.T.astype(np.float32) @ self._residual
        fitted = (values / ridge).astype(np.float32)[:, None] * rotated
        spread, axes = np.linalg.eigh((fitted @ fitted.T).astype(np.float64))
        top = np.argsort(spread)[::-1][:rank]
        top = top[spread[top] > 1e-9 * max(spread.max(), 1e-30)]
        up = (axes[:, top] / np.sqrt(spread[top])).T.astype(np.float32) @ fitted
        dual = self._vectors.astype(np.float32) @ ((rotated @ up.T) / ridge[:, None].astype(np.float32))
        down = dual.T @ self.x
        return np.ascontiguousarray(down, dtype=np.float32), np.ascontiguousarray(up, dtype=np.float32)


def _slopes(x: Floats, y: Floats) -> Floats:
    """float32 [D]: least-squares slope of each entry of y on the same entry of x, pulled to the common slope."""
    products = (x * y).sum(axis=0)
    squares = (x * x).sum(axis=0)
    total = float(squares.sum())
    common = float(products.sum()) / total if total > 0 else 0.0
    prior = max(SLOPE_PRIOR_REQUESTS / len(x) * float(squares.mean()), 1e-12)
    return np.asarray((products + prior * common) / (squares + prior), dtype=np.float32)


def _cross_validate(
    x: Floats,
    y: Floats,
    layers: int,
    top_k: int,
    seed: int,
    ranks: Sequence[int],
    strengths: Sequence[float],
) -> tuple[float, int, float]:
    """(strength, rank, r2) with the least squared error of held-out profiles."""
    fold = np.random.default_rng(seed).permutation(len(x)) % FOLDS
    errors = np.zeros((len(strengths), len(ranks)))
    spread = 0.0
    for held in range(FOLDS):
        train, test = fold != held, fold == held
        ridge = _Ridge(x[train], y[train])
        x_test, y_test = x[test] - ridge.mean_x, y[test]
        spread += float(((y_test - ridge.mean_y) ** 2).sum())
        diagonal = ridge.mean_y + ridge.slope * x_test
        for row, strength in enumerate(strengths):
            down, up = ridge.reduced(strength, max(ranks))
            latent = x_test @ down.T
            for column, rank in enumerate(ranks):
                scores = diagonal + latent[:, :rank] @ up[:rank]
                error = to_probabilities(scores, layers, top_k) - y_test
                errors[row, column] += float((error * error).sum())
    best_row, best_column = np.unravel_index(int(errors.argmin()), errors.shape)
    r2 = 1 - float(errors.min()) / spread if spread > 0 else 0.0
    return strengths[int(best_row)], ranks[int(best_column)], r2


def busiest_rank_experts(active: NDArray[Any], layers: int, ranks: int) -> NDArray[Any]:
    """[...]: experts that a step waits for, of probabilities [..., D] that an expert is active (or of 0 and 1).

    With expert parallelism rank r of R holds the experts r * E / R up to (r + 1) * E / R of every layer, and a layer
    is done when its busiest rank is: the sum over layers of the most active experts on one rank. The expectation of
    a maximum is above the maximum of expectations, by about as much for every batch; this is the latter.
    """
    return np.asarray(active.reshape(*active.shape[:-1], layers, ranks, -1).sum(axis=-1).max(axis=-1).sum(axis=-1))


def of_a_step(profile: Floats, step_tokens: float) -> Floats:
    """float32 [D]: probability that a step activates each expert, from that of one token.

    A step of m tokens of a request (speculative decoding) counts as `step_tokens` = alpha * m independent ones:
    tokens beside each other share experts, so that alpha is below 1 (`effective_tokens` measures it).
    """
    return profile if step_tokens == 1 else -np.expm1(np.float32(step_tokens) * np.log1p(-np.minimum(profile, MOST)))


def effective_tokens(
    decode_experts: NDArray[np.unsignedinteger[Any]],
    decode_offsets: NDArray[np.int64],
    profiles: Floats,
    tokens: int,
) -> float:
    """Independent tokens that count as `tokens` adjacent ones of a request: alpha * m of `of_a_step`.

    decode_experts: [T, L, k]; decode_offsets: [N + 1]; profiles: [N, L, E], as `Trace.decode_profiles` gives them. The
    experts of windows of adjacent rows are counted, and the exponent found, by bisection, with which the profiles
    give as many. nan where no request has enough rows to have a profile.
    """
    layers, experts = profiles.shape[1:]
    distinct, windows, survival = 0, [], []
    for request in np.flatnonzero(np.diff(decode_offsets) >= WINDOWED_ROWS)[:WINDOWED_REQUESTS].tolist():
        count = int(decode_offsets[request + 1] - decode_offsets[request]) // tokens
        start = int(decode_offsets[request])
        rows = decode_experts[start : start + count * tokens].astype(np.int64)
        ids = rows + np.arange(layers)[:, None] * experts
        active = np.zeros((count, layers * experts), dtype=bool)
        np.put_along_axis(active, ids.reshape(count, -1), True, axis=1)
        distinct += int(active.sum())
        windows.append(count)
        survival.append(np.log1p(-np.minimum(profiles[request].reshape(-1), MOST)))
    if not windows:
        return float("nan")
    low, high = 0.0, float(tokens) * 2
    logs, weights = np.array(survival), np.array(windows)
    for _ in range(24):
        middle = (low + high) / 2
        found = float(weights @ -np.expm1(middle * logs).sum(axis=1))
        low, high = (middle, high) if found < distinct else (low, middle)
    return (low + high) / 2


def expected_union(profiles: NDArray[Any], layers: int) -> float:
    """Distinct experts a step and layer of a batch with these profiles [B, D] activates, in expectation.

    Assumes that requests are independent of each other; within a request the layers' top-k constraint does no harm,
    because expectations add.
    """
    survival = np.prod(1 - np.asarray(profiles, dtype=np.float64), axis=0)
    return float((1 - survival).sum()) / layers
