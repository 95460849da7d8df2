"""Fits a prompt model: reduced-rank ridge regression from the words of prompts to the profiles of their decodes.

There are far more words and experts than requests, so everything is computed in the space of the requests: the products
of their words with each other, and of their profiles. Reduced-rank ridge regression is that of Mukherjee and Zhu (2011).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eldr import kernels
from eldr.activation import ActivationError
from eldr.prompt.model import ProfileMap, PromptModel, WordTable
from eldr.prompt.words import Words, vocabulary

FOLDS = 4
RANKS = (4, 8, 16, 32)
STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
# Columns of the matrix of words that are filled at a time: 16 MB for 1,024 requests.
COLUMNS = 4096
INT8 = 127.0

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Choice:
    """What cross-validation chose. strength, idf, rank, r2: as in `PromptModel`. gain: the map is this much stretched."""

    strength: float
    idf: bool
    rank: int
    r2: float
    gain: float


def fit_prompt_model(
    prompts: Sequence[Words],
    profiles: Floats,
    layers: int,
    top_k: int,
    *,
    seed: int = 0,
    choice: Choice | None = None,
) -> PromptModel:
    """Fit a model to the words of N prompts and the profiles of their decodes.

    prompts: [N].
    profiles: float32 [N, D].
    layers: L. top_k: experts per token.
    seed: the seed of the folds.
    choice: what to use in place of a cross-validation.
    Raises ActivationError if there are fewer than 2 * FOLDS requests.
    """
    requests = len(prompts)
    if requests < 2 * FOLDS:
        raise ActivationError(f"{requests} prompts with decode steps are too few to fit a model to their words")
    chosen = choose(prompts, profiles, seed=seed) if choice is None else choice
    weight = word_weights(prompts, chosen.idf)
    rows = WordRows(prompts, weight)
    mean = profiles.mean(axis=0)
    centred = profiles - mean
    ridge = _Ridge(rows.products(), (centred @ centred.T).astype(np.float64))
    dual, axes = ridge.reduced(chosen.strength, chosen.rank)
    up = axes.T.astype(np.float32) @ centred
    table = rows.transposed_times(dual - dual.mean(axis=0))
    scale = np.maximum(np.abs(table).max(axis=0), 1e-12) / INT8
    codes = np.rint(table / scale).astype(np.int8)
    words = WordTable(weight, codes, scale.astype(np.float32), np.zeros(len(scale), dtype=np.float32))
    latents = np.array([words.latent(prompt) for prompt in prompts if len(prompt)])
    words = WordTable(weight, codes, words.scale, latents.mean(axis=0).astype(np.float32))
    up = np.ascontiguousarray(up * np.float32(chosen.gain))
    return PromptModel(
        words, ProfileMap(mean, up, layers, top_k), chosen.strength, chosen.idf, chosen.r2, requests
    )


def word_weights(prompts: Sequence[Words], idf: bool) -> Floats:
    """The weight of each bucket, float32 [65536]: 0 for buckets without a word."""
    seen = vocabulary(prompts)
    weights = np.log((1 + len(prompts)) / (1 + seen)) + 1 if idf else np.ones(len(seen))
    return np.where(seen > 0, weights, 0).astype(np.float32)


class WordRows:
    """The weighted words of N prompts as the rows of a matrix X [N, 65536], each of length one."""

    def __init__(self, prompts: Sequence[Words], weight: Floats) -> None:
        self.requests = len(prompts)
        sizes = np.array([len(words) for words in prompts])
        request = np.repeat(np.arange(self.requests), sizes)
        bucket = np.concatenate([words.buckets for words in prompts]).astype(np.int64)
        value = np.sqrt(np.concatenate([words.counts for words in prompts]).astype(np.float32)) * weight[bucket]
        squares = np.bincount(request, value.astype(np.float64) ** 2, self.requests)
        value = value / np.sqrt(np.where(squares > 0, squares, 1))[request]
        order = np.argsort(bucket, kind="stable")
        self._request, self._bucket, self._value = request[order], bucket[order], value[order].astype(np.float32)
        self._used, self._column = np.unique(self._bucket, return_inverse=True)

    def _blocks(self) -> Sequence[tuple[NDArray[np.int64], Floats]]:
        """Buckets and their columns of X, float32 [N, at most COLUMNS]."""
        blocks = []
        for first in range(0, len(self._used), COLUMNS):
            start, end = np.searchsorted(self._column, (first, first + COLUMNS))
            used = self._used[first : first + COLUMNS]
            block = np.zeros((self.requests, len(used)), dtype=np.float32)
            block[self._request[start:end], self._column[start:end] - first] = self._value[start:end]
            blocks.append((used, block))
        return blocks

    def products(self) -> Doubles:
        """X @ X.T, float64 [N, N]."""
        total = np.zeros((self.requests, self.requests))
        for _, block in self._blocks():
            total += block @ block.T
        return total

    def transposed_times(self, dual: Doubles) -> Doubles:
        """X.T @ dual, float64 [65536, R]. dual: [N, R]."""
        table = np.zeros((kernels.WORD_BUCKETS, dual.shape[1]))
        for used, block in self._blocks():
            table[used] = block.T @ dual
        return table


class _Ridge:
    """Ridge regression of centred profiles on centred words, by the products of each.

    words: float64 [N, N], X @ X.T. profiles: float64 [N, N], Y @ Y.T with centred Y.
    """

    def __init__(self, words: Doubles, profiles: Doubles) -> None:
        centred = words - words.mean(axis=0) - words.mean(axis=1)[:, None] + words.mean()
        values, self._vectors = np.linalg.eigh(centred)
        self._values = np.maximum(values, 0)
        self._profiles = self._vectors.T @ profiles @ self._vectors

    def reduced(self, strength: float, rank: int) -> tuple[Doubles, Doubles]:
        """Project the ridge solution on the main axes of its fitted profiles.

        Returns dual [N, R] and axes [N, R], such that X.T @ dual @ axes.T @ Y is the map from words to profiles.
        """
        values = self._values
        shrunk = values / (values + strength * max(values.mean(), 1e-12))
        spread, axes = np.linalg.eigh(shrunk[:, None] * self._profiles * shrunk)
        top = np.argsort(spread)[::-1][:rank]
        top = top[spread[top] > 1e-9 * max(spread.max(), 1e-30)]
        # Fitted profiles are H Y, with H = V shrunk V.T. Their r-th main axis in the space of profiles is v_r.T H Y / s_r.
        kept = axes[:, top]
        up = self._vectors @ (shrunk[:, None] * kept) / np.sqrt(spread[top])
        inverse = 1 / (values + strength * max(values.mean(), 1e-12))
        # Latents are X W axis = K (K + lambda)^-1 Y axis, and their dual is without the first K.
        down = self._vectors @ (inverse[:, None] * (self._profiles @ (self._vectors.T @ up)))
        return down, up


def choose(
    prompts: Sequence[Words],
    profiles: Floats,
    *,
    seed: int = 0,
    ranks: Sequence[int] = RANKS,
    strengths: Sequence[float] = STRENGTHS,
) -> Choice:
    """Choose strength, rank and weights of words by the squared error on held-out profiles."""
    requests = len(prompts)
    fold = np.random.default_rng(seed).permutation(requests) % FOLDS
    centred = profiles - profiles.mean(axis=0)
    of_profiles = (centred @ centred.T).astype(np.float64)
    best: Choice | None = None
    for idf in (False, True):
        # Weights look at held-out prompts too, but not at their profiles.
        of_words = WordRows(prompts, word_weights(prompts, idf)).products()
        errors = np.zeros((len(strengths), len(ranks)))
        spread = 0.0
        along = np.zeros((len(strengths), len(ranks), 2))
        for held in range(FOLDS):
            train, test = np.flatnonzero(fold != held), np.flatnonzero(fold == held)
            ridge = _Ridge(*(_part(products, train, train) for products in (of_words, _centre(of_profiles, train)[0])))
            y = _centre(of_profiles, train)[0]
            spread += float(np.trace(_part(y, test, test)))
            k = _part(of_words, test, train)
            k = k - k.mean(axis=1)[:, None] - _part(of_words, train, train).mean(axis=0) + _part(of_words, train, train).mean()
            for row, strength in enumerate(strengths):
                down, up = ridge.reduced(strength, max(ranks))
                latent = k @ down
                cross = _part(y, test, train) @ up
                inner = up.T @ _part(y, train, train) @ up
                for column, rank in enumerate(ranks):
                    part = latent[:, :rank]
                    dot = float((part * cross[:, :rank]).sum())
                    square = float(((part @ inner[:rank, :rank]) * part).sum())
                    errors[row, column] += square - 2 * dot
                    along[row, column] += dot, square
        row, column = np.unravel_index(int(errors.argmin()), errors.shape)
        r2 = -float(errors[row, column]) / spread if spread > 0 else 0.0
        if best is None or r2 > best.r2:
            best = Choice(strengths[int(row)], idf, ranks[int(column)], r2, 1.0)
    assert best is not None
    return best


def _part(products: Doubles, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> Doubles:
    return products[np.ix_(rows, columns)]


def _centre(products: Doubles, about: NDArray[np.int64]) -> tuple[Doubles]:
    """Products of vectors less the mean of some of them."""
    mean = products[:, about].mean(axis=1)
    return (products - mean[:, None] - mean + _part(products, about, about).mean(),)
