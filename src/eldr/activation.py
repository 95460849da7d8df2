"""Activation predictors: from the expert counts of a prompt, how likely one decode step activates each expert.

There are two. `own_frequencies` needs no fit: it takes the prompt's own expert frequencies, shrunk towards the fleet's
mean. `ActivationModel` corrects them by what recorded traffic taught: a linear map from prompt frequencies to the
decode activation profile. Most of that map is its diagonal, because decode tends to use the experts that the prompt
used. So the diagonal is fitted first, and a reduced-rank ridge regression (Mukherjee and Zhu 2011) fits the residual.
Ridge alone would shrink the diagonal towards zero. How much of the correction is applied is a number, the model's
trust. Vectors are flat: D = L * E.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eldr import kernels
from eldr.counts import ExpertCounts
from eldr.errors import EldrError

# Weight of the fleet's mean when it is mixed into a prompt's frequencies, in prompt tokens.
PRIOR_TOKENS = 4.0
# Probabilities are clipped to this range. A certain expert would set a worker's survival to zero for good.
LEAST, MOST = 1e-4, 0.98
FOLDS = 4
STRENGTHS = (0.1, 0.3, 1.0, 3.0)
RANKS = (0, 4, 8, 16)
# The share of its correction that a fitted map is trusted with before it is judged. Own frequencies err by the noise of
# a prompt, a map by what was special about its calibration. Their mean is better than either on traffic that was not
# recorded, and as good as the map on traffic that was.
TRUST = 0.5
# The weight of that share when lessons judge the map, in lessons.
TRUST_LESSONS = 20
# Overlaps are at most halved or doubled: a few requests can show any gain by chance.
LEAST_GAIN, MOST_GAIN = 2**-0.5, 2**0.5
# How strongly the slopes of the diagonal are pulled to their common value, in requests of average spread.
SLOPE_PRIOR_REQUESTS = 20.0

# A request needs this many rows for its profile to describe a single token. At most this many requests are examined.
WINDOWED_ROWS, WINDOWED_REQUESTS = 32, 64

Floats = NDArray[np.float32]


class ActivationError(EldrError):
    """Raised when a predictor cannot be fitted. The message gives the reason."""


def own_frequencies(counts: ExpertCounts, mean: Floats, prior_tokens: float = PRIOR_TOKENS) -> Floats:
    """A prompt's own expert frequencies, mixed with the mean: float32 [D].

    The result is (counts + prior_tokens * mean) / (prompt tokens + prior_tokens).

    counts: the expert counts of the prompt.
    mean: float32 [D], C-contiguous, the fleet's mean frequencies.
    prior_tokens: the weight of the mean, in prompt tokens.
    """
    frequencies = np.empty(counts.counts.size, dtype=np.float32)
    scale = 1 / (counts.prompt_tokens + prior_tokens)
    kernels.own_frequencies(counts.counts, mean, prior_tokens, scale, frequencies)
    return frequencies


def to_probabilities(scores: Floats, layers: int, top_k: int) -> Floats:
    """Turn scores into probabilities, float32 [..., D], clipped to LEAST..MOST, whose layers sum to `top_k`.

    One step activates exactly top_k experts per layer, so the probabilities of a layer should sum to top_k. The scores
    are expected to be close to that already. Clipping after the scaling leaves a second-order error in the sum.
    """
    scores = np.ascontiguousarray(scores, dtype=np.float32)
    probabilities = np.empty_like(scores)
    experts = scores.shape[-1] // layers
    kernels.to_probabilities(scores, scores.size // experts, LEAST, MOST, min(top_k, MOST * experts), probabilities)
    return probabilities


@dataclass(frozen=True, slots=True, eq=False)
class ActivationModel:
    """A fitted linear map from prompt frequencies to decode profiles, as a correction of the prompt's own frequencies.

    With x, the prompt's own frequencies minus the fleet's mean, the map alone says
    mean + mean_profile - mean_frequency + slope * x + up.T @ (down @ x). The fleet's mean is that of the traffic being
    served: the map was fitted to how requests differ from each other, and carries over to another mix better than the
    mean of the requests it was fitted to. The prediction is

        mean + mean_profile - mean_frequency + gain * (x + share * ((slope - 1) * x + up.T @ (down @ x)))

    where share is `trust`, and less if the fleet's requests differ more from each other than those of the fit did
    (`share`). At 1 it is the map, at 0 own frequencies with the mean shifted from prompts to decode steps. The gain
    makes up for what the least squared error takes away: a regression of each (layer, expert) shrinks it by all the
    noise of its prompt, but two requests share experts over all layers, where noise averages out. Shrunk predictions
    understate what similar requests save together, and routing lives on that.

    mean_frequency, mean_profile, slope: float32 [D].
    down, up: float32 [R, D]. R may be 0.
    layers: L, the number of MoE layers.
    top_k: experts per token.
    strength: the ridge strength, relative to the mean squared length of x.
    r2: the share of the variance of decode profiles that the map alone explains, cross-validated on the calibration
        requests.
    spread: the mean squared distance of the calibration's frequencies from their mean. Infinite if it is not known, as
        in files of 0.1.0.
    trust: the share of the correction that is applied, 0 to 1. `judged` sets it from lessons.
    gain: how much recorded deviations from the mean profile exceed those that the map predicts, by the overlaps of
        requests, cross-validated.
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
    spread: float = math.inf
    trust: float = TRUST
    gain: float = 1.0
    # What every prediction needs: slope - 1, and the shift of the mean from prompts to decode steps.
    _excess: Floats = field(init=False, repr=False)
    _shift: Floats = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_excess", self.slope - np.float32(1))
        object.__setattr__(self, "_shift", self.mean_profile - self.mean_frequency)

    def __reduce__(self) -> tuple[type[ActivationModel], tuple[Any, ...]]:
        # A compiled class cannot be unpickled otherwise, and fits run in a process of their own.
        return ActivationModel, tuple(getattr(self, part.name) for part in fields(self) if part.init)

    @property
    def rank(self) -> int:
        """R, the rank of the map beyond its diagonal."""
        return len(self.down)

    def share(self, fleet_spread: float | None) -> float:
        """The share of the correction to apply to a fleet whose requests differ this much from each other.

        Regression shrinks a difference between prompts by the part of it that is noise. Of a fleet with a larger spread
        than the calibration's, the excess is no noise that the map has seen. Let n be the noise, c = 1 - n / spread the
        slope fitted. The right slope for the fleet is 1 - n / fleet_spread, and it is that of own frequencies and the
        map, mixed in the proportion spread / fleet_spread.

        fleet_spread: the mean squared distance of the frequencies of the fleet's requests from their mean. None if it
            is not known.
        """
        if fleet_spread is None or fleet_spread <= self.spread:
            return self.trust
        return self.trust * self.spread / fleet_spread

    def predict(self, frequency: Floats, fleet_mean: Floats, share: float) -> Floats:
        """Predict the probability that one decode step activates each expert, float32 [D].

        frequency: float32 [D], the prompt's own frequencies, mixed with the fleet's mean.
        fleet_mean: float32 [D], the mean frequencies of the requests being served.
        share: the share of the correction to apply.
        """
        x = frequency - fleet_mean
        scores = self._excess * x
        if self.rank:
            # Multiply row by row and layer by layer: numpy passes products this small to BLAS one at a time, and BLAS
            # does not use threads for them. On busy cores threads take milliseconds to synchronise.
            latent = np.matmul(self.down[:, None, :], x[:, None]).reshape(1, -1)
            of_layer = self.up.reshape(self.rank, self.layers, -1).transpose(1, 0, 2)
            scores += np.matmul(latent, of_layer).reshape(-1)
        scores *= np.float32(share)
        scores += x
        scores *= np.float32(self.gain)
        scores += fleet_mean
        scores += self._shift
        return to_probabilities(scores, self.layers, self.top_k)

    def judged(self, frequencies: Floats, profiles: Floats) -> ActivationModel:
        """The same map with the trust that it deserves by n lessons, which it must not have been fitted on.

        frequencies: float32 [n, D], the own frequencies of requests.
        profiles: float32 [n, D], the profiles that their decode steps had.
        """
        x = frequencies - frequencies.mean(axis=0)
        return replace(self, trust=deserved_trust(x, self.corrections(x), profiles - profiles.mean(axis=0)))

    def corrections(self, x: Floats) -> Floats:
        """What the map adds to own frequencies if it is trusted in full, float32 [n, D].

        x: float32 [n, D], own frequencies less their mean.
        """
        return np.asarray(self._excess * x + (x @ self.down.T) @ self.up, dtype=np.float32)

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
        """Fit the model to N requests. Rank and strength are chosen by cross-validation.

        counts: [N, L, E].
        prompt_tokens: [N].
        decode_profiles: [N, L, E]. A request with an all-zero profile (no decode step was recorded) is left out.
        top_k: experts per token.
        seed: the seed of the cross-validation folds.
        ranks, strengths: the values to choose from.
        Raises ActivationError if fewer than FOLDS requests are left.
        """
        recorded = decode_profiles.any(axis=(1, 2))
        requests = int(recorded.sum())
        _check_enough(requests)
        flat_counts = counts[recorded].reshape(requests, -1).astype(np.float32)
        tokens = prompt_tokens[recorded].astype(np.float32)[:, None]
        profiles = decode_profiles[recorded].reshape(requests, -1)
        mean = (flat_counts / tokens).mean(axis=0)
        frequencies = (flat_counts + PRIOR_TOKENS * mean) / (tokens + PRIOR_TOKENS)
        return cls.fit_lessons(
            frequencies, profiles, counts.shape[1], top_k, seed=seed, ranks=ranks, strengths=strengths
        )

    @classmethod
    def fit_lessons(
        cls,
        frequencies: Floats,
        profiles: Floats,
        layers: int,
        top_k: int,
        *,
        seed: int = 0,
        ranks: Sequence[int] = RANKS,
        strengths: Sequence[float] = STRENGTHS,
    ) -> ActivationModel:
        """Fit the model to n requests of which both are known: float32 [n, D], own frequencies and decode profiles.

        The other parameters are those of `fit`. Raises ActivationError if they are fewer than two a fold.
        """
        _check_enough(len(frequencies))
        strength, rank, r2, gain = _cross_validate(frequencies, profiles, layers, top_k, seed, ranks, strengths)
        ridge = _Ridge(frequencies, profiles)
        down, up = ridge.reduced(strength, rank)
        spread = float((ridge.x * ridge.x).sum()) / len(frequencies)
        return cls(ridge.mean_x, ridge.mean_y, ridge.slope, down, up, layers, top_k, strength, r2, spread, gain=gain)


def deserved_trust(x: Floats, corrections: Floats, y: Floats) -> float:
    """The share of corrections with the least squared error on n requests, where TRUST counts as TRUST_LESSONS more.

    x, y: float32 [n, D], own frequencies and profiles, both less their means.
    corrections: float32 [n, D], from a map that was not fitted on these requests.
    """
    squares = float((corrections * corrections).sum())
    if squares == 0:
        return TRUST
    found = float(((y - x) * corrections).sum()) / squares
    share = (found * len(x) + TRUST * TRUST_LESSONS) / (len(x) + TRUST_LESSONS)
    return min(max(share, 0.0), 1.0)


def held_out_deviations(
    frequencies: Floats, profiles: Floats, strength: float, rank: int, seed: int
) -> tuple[Floats, Floats, Floats]:
    """Own frequencies, the corrections of a map of the other requests, and profiles, for each of n requests.

    frequencies, profiles: float32 [n, D]. strength, rank: those of the maps.
    Each result is float32 [n, D], less the means of the requests that the map was fitted to.
    """
    fold = np.random.default_rng(seed).permutation(len(frequencies)) % FOLDS
    x, corrections, y = np.empty_like(frequencies), np.empty_like(frequencies), np.empty_like(profiles)
    for held in range(FOLDS):
        train, test = fold != held, fold == held
        ridge = _Ridge(frequencies[train], profiles[train])
        down, up = ridge.reduced(strength, rank)
        x[test], y[test] = frequencies[test] - ridge.mean_x, profiles[test] - ridge.mean_y
        corrections[test] = (ridge.slope - 1) * x[test] + (x[test] @ down.T) @ up
    return x, corrections, y


def _check_enough(requests: int) -> None:
    if requests < 2 * FOLDS:
        raise ActivationError(
            f"{requests} requests with decode steps are too few to fit a predictor; record at least {2 * FOLDS}"
        )


class _Ridge:
    """Diagonal map plus dual ridge regression of its residual, from x [N, D] to y [N, D], for N much smaller than D."""

    def __init__(self, x: Floats, y: Floats) -> None:
        self.mean_x = x.mean(axis=0)
        self.mean_y = y.mean(axis=0)
        self.x = x - self.mean_x
        centred = y - self.mean_y
        self.slope = _slopes(self.x, centred)
        self._residual = centred - self.slope * self.x
        self._values, self._vectors = np.linalg.eigh((self.x @ self.x.T).astype(np.float64))

    def reduced(self, strength: float, rank: int) -> tuple[Floats, Floats]:
        """Project the ridge solution on the main axes of its fitted values. Returns down and up, float32 [rank, D]."""
        values = np.maximum(self._values, 0)
        ridge = values + strength * max(values.mean(), 1e-12)
        # fitted = x @ weights; its right singular vectors come from the N x N matrix of scalar products.
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
    """Least-squares slope of each entry of y on the same entry of x, pulled towards the common slope. float32 [D]."""
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
) -> tuple[float, int, float, float]:
    """Return the strength and rank with the least squared error on held-out profiles, their r2, and their gain."""
    fold = np.random.default_rng(seed).permutation(len(x)) % FOLDS
    errors = np.zeros((len(strengths), len(ranks)))
    # For each held-out fold its requests and what the diagonal says of them, and for each strength the rest of the map.
    held_out: list[tuple[NDArray[np.bool_], Floats]] = []
    rest: list[list[tuple[Floats, Floats]]] = [[] for _ in strengths]
    spread = 0.0
    for held in range(FOLDS):
        train, test = fold != held, fold == held
        ridge = _Ridge(x[train], y[train])
        x_test, y_test = x[test] - ridge.mean_x, y[test]
        spread += float(((y_test - ridge.mean_y) ** 2).sum())
        diagonal = ridge.mean_y + ridge.slope * x_test
        held_out.append((test, diagonal))
        for row, strength in enumerate(strengths):
            down, up = ridge.reduced(strength, max(ranks))
            latent = x_test @ down.T
            rest[row].append((latent, up))
            for column, rank in enumerate(ranks):
                scores = diagonal + latent[:, :rank] @ up[:rank]
                error = to_probabilities(scores, layers, top_k) - y_test
                errors[row, column] += float((error * error).sum())
    best_row, best_column = np.unravel_index(int(errors.argmin()), errors.shape)
    r2 = 1 - float(errors.min()) / spread if spread > 0 else 0.0
    rank = ranks[int(best_column)]
    predicted = np.empty_like(y)
    for (test, diagonal), (latent, up) in zip(held_out, rest[int(best_row)], strict=True):
        predicted[test] = to_probabilities(diagonal + latent[:, :rank] @ up[:rank], layers, top_k)
    return strengths[int(best_row)], rank, r2, overlap_gain(predicted, y)


def overlap_gain(predicted: Floats, recorded: Floats) -> float:
    """The factor by which predicted deviations from the mean must be stretched for overlaps to be right.

    The overlap of two requests is the scalar product of their deviations from the mean profile: to first order, the
    experts that they save by sharing a batch. The result is the square root of the least-squares slope of recorded on
    predicted overlaps, over all pairs. It is kept within LEAST_GAIN..MOST_GAIN, and is 1 if nothing varies.

    predicted, recorded: float32 [n, D]. Predictions must be held out.
    """
    overlaps = []
    for profiles in (predicted, recorded):
        deviations = profiles - profiles.mean(axis=0)
        products = (deviations @ deviations.T).astype(np.float64)
        np.fill_diagonal(products, 0.0)
        overlaps.append(products)
    squares = float((overlaps[0] * overlaps[0]).sum())
    if squares == 0:
        return 1.0
    slope = float((overlaps[0] * overlaps[1]).sum()) / squares
    return min(max(math.sqrt(max(slope, 0.0)), LEAST_GAIN), MOST_GAIN)


def of_a_step(profile: Floats, step_tokens: float) -> Floats:
    """Probability that one step activates each expert, float32 [D], from the probability that one token does.

    With speculative decoding a step has m tokens of a request. They count as `step_tokens` = alpha * m independent
    tokens. Adjacent tokens share experts, so alpha is below 1. `effective_tokens` measures it.
    """
    return profile if step_tokens == 1 else -np.expm1(np.float32(step_tokens) * np.log1p(-np.minimum(profile, MOST)))


def effective_tokens(
    decode_experts: NDArray[np.unsignedinteger[Any]],
    decode_offsets: NDArray[np.int64],
    profiles: Floats,
    tokens: int,
) -> float:
    """Measure how many independent tokens `tokens` adjacent tokens of a request count as: alpha * m of `of_a_step`.

    Counts the distinct experts in windows of adjacent rows, then finds by bisection the exponent with which the
    profiles give the same number. The result is nan if no request has enough rows to have a profile.

    decode_experts: [T, L, k].
    decode_offsets: [N + 1].
    profiles: [N, L, E], as from `Trace.decode_profiles`.
    tokens: the number of adjacent tokens, m.
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
    """Expected number of distinct experts per step and layer for a batch with these profiles, [B, D].

    Assumes that requests are independent of each other. The top-k constraint within a request does not matter, because
    expectations add.
    """
    survival = np.prod(1 - np.asarray(profiles, dtype=np.float64), axis=0)
    return float((1 - survival).sum()) / layers
