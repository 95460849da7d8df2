"""Fits a prompt model: reduced-rank ridge regression from the words of prompts to the profiles of their decodes.

There are far more words and experts than requests, so everything is computed in the space of the requests: the
products of their words with each other, and of their profiles. Reduced-rank ridge regression is that of Mukherjee and
Zhu (2011).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
# Of subspace iteration: columns beyond those that are wanted, and multiplications.
MORE_AXES, ROUNDS = 8, 6

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Choice:
    """What cross-validation chose. rank: the numbers in a latent. All else is as in `PromptModel`."""

    strength: float
    idf: bool
    rank: int
    r2: float


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

    prompts: [N]. Those without words are left out.
    profiles: float32 [N, D].
    layers: L. top_k: experts per token.
    seed: the seed of the folds.
    choice: what to use in place of a cross-validation.
    Raises ActivationError if fewer than 2 * FOLDS requests have words.
    """
    worded = [request for request, words in enumerate(prompts) if len(words)]
    prompts, profiles = [prompts[request] for request in worded], profiles[worded]
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
    latents = np.array([words.latent(prompt) for prompt in prompts])
    words = WordTable(weight, codes, words.scale, latents.mean(axis=0).astype(np.float32))
    up = np.ascontiguousarray(up)
    return PromptModel(words, ProfileMap(mean, up, layers, top_k), chosen.strength, chosen.idf, chosen.r2, requests)


def held_out_profiles(
    prompts: Sequence[Words], profiles: Floats, layers: int, top_k: int, choice: Choice, *, seed: int = 0
) -> Floats:
    """Predict the profile of each prompt by a model of others, float32 [N, D]: as alike as those of new prompts are."""
    fold = np.random.default_rng(seed).permutation(len(prompts)) % FOLDS
    predicted = np.empty_like(profiles)
    for held in range(FOLDS):
        train, test = np.flatnonzero(fold != held).tolist(), np.flatnonzero(fold == held).tolist()
        model = fit_prompt_model([prompts[i] for i in train], profiles[train], layers, top_k, choice=choice)
        predicted[test] = [model.predict(prompts[i]) for i in test]
    return predicted


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
        value = np.sqrt(np.concatenate([words.counts for words in prompts]).astype(np.float64)) * weight[bucket]
        squares = np.bincount(request, value**2, self.requests)
        value /= np.sqrt(np.where(squares > 0, squares, 1))[request]
        order = np.argsort(bucket, kind="stable")
        self._request, self._value = request[order], value[order].astype(np.float32)
        self._used, self._column, self._prompts = np.unique(bucket[order], return_inverse=True, return_counts=True)
        self._length = (squares > 0).astype(np.float64)

    def _blocks(self) -> Iterator[tuple[slice, Floats]]:
        """Columns of X that are not zero, and what they hold, float32 [N, at most COLUMNS]."""
        for first in range(0, len(self._used), COLUMNS):
            start, end = np.searchsorted(self._column, (first, first + COLUMNS))
            columns = slice(first, min(first + COLUMNS, len(self._used)))
            block = np.zeros((self.requests, columns.stop - first), dtype=np.float32)
            block[self._request[start:end], self._column[start:end] - first] = self._value[start:end]
            yield columns, block

    def products(self) -> Doubles:
        """X @ X.T, float64 [N, N]."""
        total = np.zeros((self.requests, self.requests))
        for columns, block in self._blocks():
            shared = block[
                :, self._prompts[columns] > 1
            ]  # a word of one prompt says nothing about others, and most words are such
            total += shared @ shared.T
        np.fill_diagonal(total, self._length)
        return total

    def known_lengths(self, known: Indices) -> Doubles:
        """The length of each row over the words of these requests alone, float64 [N]."""
        there = np.zeros(self.requests, dtype=bool)
        there[known] = True
        seen = np.bincount(self._column[there[self._request]], minlength=len(self._used)) > 0
        value = np.where(seen[self._column], self._value, 0).astype(np.float64)
        return np.asarray(np.sqrt(np.bincount(self._request, value**2, self.requests)))

    def transposed_times(self, dual: Doubles) -> Doubles:
        """X.T @ dual, float64 [65536, R]. dual: [N, R]."""
        table = np.zeros((kernels.WORD_BUCKETS, dual.shape[1]))
        for columns, block in self._blocks():
            table[self._used[columns]] = block.T @ dual
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
        spread, axes = _leading(shrunk[:, None] * self._profiles * shrunk, rank)
        some = spread > 1e-9 * max(spread.max(), 1e-30)
        spread, kept = spread[some], axes[:, some]
        # Fitted profiles are H Y, with H = V shrunk V.T, and their main axes in the space of profiles are v.T H Y / s.
        up = self._vectors @ (shrunk[:, None] * kept) / np.sqrt(spread)
        inverse = 1 / (values + strength * max(values.mean(), 1e-12))
        # Latents are X W axis = K (K + lambda)^-1 Y axis, and their dual is without the first K.
        down = self._vectors @ (inverse[:, None] * (self._profiles @ (self._vectors.T @ up)))
        return down, up


def _leading(matrix: Doubles, count: int) -> tuple[Doubles, Doubles]:
    """The `count` largest eigenvalues of a positive semidefinite matrix, and their vectors as columns.

    Subspace iteration (Halko, Martinsson and Tropp 2011, algorithm 4.4) for a large matrix, of which few are wanted.
    """
    size = count + MORE_AXES
    if len(matrix) <= 4 * size:
        values, vectors = np.linalg.eigh(matrix)
    else:
        basis = np.linalg.qr(matrix @ np.random.default_rng(0).standard_normal((len(matrix), size)))[0]
        for _ in range(ROUNDS):
            basis = np.linalg.qr(matrix @ basis)[0]
        values, inner = np.linalg.eigh(basis.T @ matrix @ basis)
        vectors = basis @ inner
    return values[::-1][:count], vectors[:, ::-1][:, :count]


class _Held:
    """One fold of a cross-validation: predictions of held-out requests by a model of all others, as products.

    rows: the words of all N requests. words, profiles: float64 [N, N], their products.
    held: the requests of the fold. train: the others.
    """

    def __init__(self, rows: WordRows, words: Doubles, profiles: Doubles, train: Indices, held: Indices) -> None:
        about = _about(profiles, train)
        of_train = words[np.ix_(train, train)]
        self._ridge = _Ridge(of_train, about[np.ix_(train, train)])
        # A model looks at the words that it knows. A request with none of them is predicted the mean.
        known = rows.known_lengths(train)[held]
        mean = of_train.mean(axis=0)
        found = words[np.ix_(held, train)] / np.where(known > 0, known, 1)[:, None]
        found = np.where(known[:, None] > 0, found, mean)
        self._words = found - found.mean(axis=1)[:, None] + of_train.mean() - mean
        self.true = about[np.ix_(held, held)]
        self._cross = about[np.ix_(held, train)]
        self._inner = about[np.ix_(train, train)]

    def predict(self, strength: float, rank: int) -> tuple[Doubles, Doubles, Doubles]:
        """Predict with the `rank` main axes, at most R of them.

        Returns latents [n, R], their products with the true profiles [n, R], and the products of the axes [R, R].
        """
        down, up = self._ridge.reduced(strength, rank)
        return self._words @ down, self._cross @ up, up.T @ self._inner @ up


def choose(
    prompts: Sequence[Words],
    profiles: Floats,
    *,
    seed: int = 0,
    ranks: Sequence[int] = RANKS,
    strengths: Sequence[float] = STRENGTHS,
) -> Choice:
    """Choose strength, rank and weights of words with the least squared error on held-out profiles."""
    fold = np.random.default_rng(seed).permutation(len(prompts)) % FOLDS
    parts = [(np.flatnonzero(fold != held), np.flatnonzero(fold == held)) for held in range(FOLDS)]
    centred = profiles - profiles.mean(axis=0)
    of_profiles = (centred @ centred.T).astype(np.float64)
    best: Choice | None = None
    for idf in (False, True):
        # The weights of words know the held-out prompts too, but not their profiles.
        rows = WordRows(prompts, word_weights(prompts, idf))
        of_words = rows.products()
        folds = [_Held(rows, of_words, of_profiles, *part) for part in parts]
        spread = sum(float(np.trace(one.true)) for one in folds)
        errors = np.zeros((len(strengths), len(ranks)))
        for row, strength in enumerate(strengths):
            for one in folds:
                latent, cross, inner = one.predict(strength, max(ranks))
                for column, rank in enumerate(ranks):
                    kept = latent[:, :rank]
                    square = float(((kept @ inner[:rank, :rank]) * kept).sum())
                    errors[row, column] += square - 2 * float((kept * cross[:, :rank]).sum())
        row, column = (int(at) for at in np.unravel_index(int(errors.argmin()), errors.shape))
        r2 = -float(errors[row, column]) / spread if spread > 0 else 0.0
        if best is None or r2 > best.r2:
            best = Choice(strengths[row], idf, ranks[column], r2)
    assert best is not None
    return best


def _about(products: Doubles, train: Indices) -> Doubles:
    """The products of vectors less the mean of some of them."""
    mean = products[:, train].mean(axis=1)
    return np.asarray(products - mean[:, None] - mean + products[np.ix_(train, train)].mean())
