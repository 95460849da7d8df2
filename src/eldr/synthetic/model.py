"""A model of how requests use experts, and traces drawn from it.

Every token of a request chooses, in each layer, the k experts with the largest scores. A score is the sum of

- the popularity of the expert, the same for all requests, and such that each expert is used as often as it should be by
  the mix of all: models are trained to use their experts evenly, so what one kind uses, the others avoid;
- what the request is about: a point in a space of few dimensions, near the centre of its kind, which all layers read;
- what is special about the request, for each expert on its own;
- what the token is: one of some hundred sorts, some of which come often, and a moving point, of which a part stays for
  a few steps and another for many. All layers read both;
- noise of Gumbel's distribution, so that without the rest the choice is a draw without replacement in proportion to
  the exponentials of the scores (Plackett and Luce; Kool et al., Stochastic Beams and Where to Find Them, ICML 2019).

Nothing in it is bound to a number of layers or experts. For another geometry scores keep their distributions: the most
popular tenth of the experts takes the same share of the choices, and a layer is like those as deep in the recorded
model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eldr.counts import MAX_EXPERTS, MAX_LAYERS
from eldr.errors import EldrError
from eldr.trace import Trace, TraceMeta

# In the name and the note of every synthetic trace, and what reports look for.
NOTE = "synthetic"
# Dimensions of what a token is: of its sort, and of each part of the moving point.
TOKEN_AXES = 6
# The sorts of tokens. The i-th comes as often as 1 / i, as words do.
SORTS = 256
# What the two parts of the moving point keep from one step to the next.
KEPT = (0.6, 0.99)
# Tokens over which the mix uses experts as often as it should, and rounds to find how popular they must be for it.
BALANCED_TOKENS = 256
BALANCE_ROUNDS = 12
# No expert is chosen by more than this share of the tokens.
MOST_USED = 0.98
# Scores are made for so many (token, layer, expert) at a time, to bound the working memory.
SCORES_AT_ONCE = 2**22

_SORT_SHARES = 1 / np.arange(1, SORTS + 1) / (1 / np.arange(1, SORTS + 1)).sum()

Floats = NDArray[np.float32]


class SyntheticError(EldrError):
    """Raised when a model cannot be fitted to a trace, or a trace cannot be drawn. The message gives the reason."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """L MoE layers of E experts, of which a token chooses top_k."""

    layers: int
    experts: int
    top_k: int

    def check(self) -> None:
        """Raise SyntheticError unless a model can have this geometry, and a choice."""
        if not (1 <= self.layers <= MAX_LAYERS and 2 <= self.experts <= MAX_EXPERTS and 1 <= self.top_k < self.experts):
            raise SyntheticError(
                f"{self.layers} layers x {self.experts} experts, top-{self.top_k} leave nothing to choose: at most "
                f"{MAX_LAYERS} layers and {MAX_EXPERTS} experts, and fewer chosen than there are"
            )


@dataclass(frozen=True, slots=True, eq=False)
class Kind:
    """A kind of requests.

    label: its name in the trace.
    share: of all requests.
    centre: float64 [A], the mean of its requests along the main axes.
    points: float64 [n, A], its requests along them, less the centre.
    spread: float64 [A, A], a root of their covariance.
    lengths: int64 [n, 2], the prompt tokens and decode steps that requests of it had.
    """

    label: str
    share: float
    centre: NDArray[np.float64]
    points: NDArray[np.float64]
    spread: NDArray[np.float64]
    lengths: NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class TrafficModel:
    """The fitted model. Scales are standard deviations of scores, in units of the Gumbel noise.

    source: the name of the recorded model, and what its trace was called.
    geometry: the recorded geometry.
    kinds: the kinds of requests.
    use: float64 [L, E], how often each layer uses its experts, ascending, relative to an even use.
    request_of_layer: float64 [L], how much the requests differ in each layer, around 1.
    kindness: how far the centres of kinds are apart, relative to the trace's.
    about: float64 [A], the scales of what a request is about along each main axis.
    special: the scale of what is special about it.
    token: the scales of the sort of a token, and of the two parts of the moving point.
    scatter: how much of what a request is about within its kind is its own, 0 to 1. The rest is that of a recorded one,
        which keeps the subjects within a kind apart.
    prompt_own: the correlation of what a request is about in prompt and decode.
    prompt_popular: the correlation of the popularity of experts in prompts and decodes.
    """

    source: str
    geometry: Geometry
    kinds: tuple[Kind, ...]
    use: NDArray[np.float64]
    request_of_layer: NDArray[np.float64]
    about: NDArray[np.float64]
    kindness: float = 1.0
    special: float = 0.5
    token: tuple[float, float, float] = (0.5, 0.5, 0.5)
    scatter: float = 0.8
    prompt_own: float = 0.9
    prompt_popular: float = 0.95


def is_synthetic(note: str) -> bool:
    """Whether the note of a trace says that it was drawn from a model."""
    return note.startswith(f"{NOTE}:")


class _Loadings:
    """How the experts of one geometry read what requests and tokens are about. Drawn once for a trace.

    popular, of_prompts: float32 [L * E], the popularity of experts in decodes and prompts.
    request: float32 [A, L * E].
    token: float32 [3 * TOKEN_AXES, L * E].
    sorts: float32 [SORTS, TOKEN_AXES], what each sort of token is.
    special: float32 [L * E], the scale of what is special about a request.
    """

    def __init__(self, model: TrafficModel, geometry: Geometry, rng: np.random.Generator) -> None:
        layers, experts = geometry.layers, geometry.experts
        of_layer = np.repeat(_of_depth(model.request_of_layer, layers), experts)
        directions = rng.standard_normal((len(model.about), len(of_layer)))
        self.request = (directions * of_layer * model.about[:, None]).astype(np.float32)
        self.special = (of_layer * model.special).astype(np.float32)
        scales = np.repeat(model.token, TOKEN_AXES)[:, None] / math.sqrt(TOKEN_AXES)
        self.token = (rng.standard_normal((3 * TOKEN_AXES, len(of_layer))) * scales).astype(np.float32)
        self.sorts = rng.standard_normal((SORTS, TOKEN_AXES), dtype=np.float32)
        use = np.stack([rng.permutation(layer) for layer in _use(model.use, geometry)])
        self.popular = self._popular(model, geometry, use, rng)
        other = np.stack([rng.permutation(layer) for layer in self.popular.reshape(layers, experts)]).reshape(-1)
        kept = model.prompt_popular
        self.of_prompts = (kept * self.popular + math.sqrt(1 - kept * kept) * other).astype(np.float32)

    def walk(self, tokens: int, rng: np.random.Generator) -> Floats:
        """What successive tokens are, float32 [tokens, 3 * TOKEN_AXES]. Each entry has variance 1."""
        sorts = self.sorts[rng.choice(SORTS, tokens, p=_SORT_SHARES)]
        kept = np.repeat(np.array(KEPT, dtype=np.float32), TOKEN_AXES)
        moved = np.sqrt(1 - kept * kept)
        point = rng.standard_normal((tokens, len(kept)), dtype=np.float32)
        for at in range(1, tokens):
            point[at] = kept * point[at - 1] + moved * point[at]
        return np.concatenate((sorts, point), axis=1)

    def _popular(
        self, model: TrafficModel, geometry: Geometry, use: NDArray[np.float64], rng: np.random.Generator
    ) -> Floats:
        """The popularity with which the mix uses experts as often as `use`, [L, E], says. float32 [L * E]."""
        shares = np.array([kind.share for kind in model.kinds])
        kinds = rng.choice(len(shares), BALANCED_TOKENS, p=shares / shares.sum()).tolist()
        tokens = np.stack(
            [
                _about(model, model.kinds[at], rng).astype(np.float32) @ self.request
                + rng.standard_normal(len(self.special), dtype=np.float32) * self.special
                + self.walk(1, rng)[0] @ self.token
                for at in kinds
            ]
        ).reshape(BALANCED_TOKENS, geometry.layers, geometry.experts)
        popular = np.log(use)
        for _ in range(BALANCE_ROUNDS):
            mean = _inclusion(tokens + popular.astype(np.float32), geometry.top_k).mean(axis=0)
            popular += np.log(use / np.maximum(mean, 1e-9))
        return popular.reshape(-1).astype(np.float32)


def _use(known: NDArray[np.float64], geometry: Geometry) -> NDArray[np.float64]:
    """How often each expert of a layer is used per token, ascending, float64 [L, E]: each layer sums to top_k."""
    of_depth = np.stack([_of_depth(quantile, geometry.layers) for quantile in known.T], axis=1)
    use = np.stack([_of_depth(layer, geometry.experts) for layer in of_depth])
    for _ in range(50):  # no expert can be chosen twice by a token
        use = np.minimum(use * (geometry.top_k / use.sum(axis=1, keepdims=True)), MOST_USED)
    return use


def _inclusion(scores: Floats, top_k: int) -> Floats:
    """The probability that each expert is among the k largest scores with Gumbel noise, float32 [..., E].

    With exponential times, the k first are those before some time, which varies little for many experts. It is taken to
    be the one before which k are expected.
    """
    rates = np.exp(scores - scores.max(axis=-1, keepdims=True))
    until = np.full((*rates.shape[:-1], 1), 1.0, dtype=np.float32)
    for _ in range(30):  # concave in the time: Newton's steps from the left do not overshoot
        missed = np.exp(-until * rates)
        until += (top_k - (1 - missed).sum(axis=-1, keepdims=True)) / np.maximum(
            (rates * missed).sum(axis=-1, keepdims=True), 1e-12
        )
        until = np.clip(until, 0, 1e9)
    return np.asarray(1 - np.exp(-until * rates), dtype=np.float32)


def _about(model: TrafficModel, kind: Kind, rng: np.random.Generator) -> NDArray[np.float64]:
    """What a request of a kind is about, float64 [A]."""
    recorded = kind.points[rng.integers(len(kind.points))]
    own = kind.spread @ rng.standard_normal(len(kind.centre))
    return np.asarray(model.kindness * kind.centre + math.sqrt(1 - model.scatter**2) * recorded + model.scatter * own)


def _of_depth(values: NDArray[np.float64], layers: int) -> NDArray[np.float64]:
    """The values of layers [L], read at as many other depths."""
    places, known = ((np.arange(n) + 0.5) / n for n in (layers, len(values)))
    return np.interp(places, known, values)


def draw_trace(
    model: TrafficModel,
    requests: int,
    geometry: Geometry | None = None,
    *,
    seed: int = 0,
    max_steps: int | None = None,
) -> Trace:
    """Draw a trace of `requests` requests, which says in its model name and note that it is synthetic.

    geometry: of the model that it pretends to be. None for the recorded one.
    seed: the same model, geometry and seed give the same trace.
    max_steps: cuts each decode after so many steps. None for the recorded lengths.
    Raises SyntheticError for a geometry that no model has, or without requests.
    """
    geometry = geometry or model.geometry
    geometry.check()
    if requests < 1:
        raise SyntheticError(f"{requests} requests: at least one is needed")
    rng = np.random.default_rng(seed)
    loadings = _Loadings(model, geometry, rng)
    shares = np.array([kind.share for kind in model.kinds])
    kinds = [model.kinds[at] for at in rng.choice(len(shares), requests, p=shares / shares.sum()).tolist()]
    lengths = np.stack([kind.lengths[rng.integers(len(kind.lengths))] for kind in kinds])
    if max_steps is not None:
        lengths[:, 1] = np.minimum(lengths[:, 1], max_steps)
    dtype = np.uint8 if geometry.experts <= 256 else np.uint16
    offsets = np.concatenate(([0], np.cumsum(lengths[:, 1]))).astype(np.int64)
    rows = np.empty((int(offsets[-1]), geometry.layers, geometry.top_k), dtype=dtype)
    counts = np.empty((requests, geometry.layers, geometry.experts), dtype=np.uint32)
    for at, kind in enumerate(kinds):
        decode, prompt = _scores(model, loadings, kind, rng)
        rows[offsets[at] : offsets[at + 1]] = _choices(decode, loadings, int(lengths[at, 1]), geometry, rng)
        counts[at] = _count(_choices(prompt, loadings, int(lengths[at, 0]), geometry, rng), geometry)
    size = f"{geometry.layers} layers x {geometry.experts} experts, top-{geometry.top_k}"
    return Trace(
        prefill_counts=counts,
        prompt_tokens=lengths[:, 0].astype(np.int32),
        decode_experts=rows,
        decode_offsets=offsets,
        label=np.array([kind.label for kind in kinds], dtype=np.str_),
        meta=TraceMeta(
            f"{NOTE} {size}, like {model.source}",
            geometry.layers,
            geometry.experts,
            geometry.top_k,
            f"{NOTE}: drawn with seed {seed} from a model that was fitted to a trace of {model.source}",
        ),
    )


def _scores(model: TrafficModel, loadings: _Loadings, kind: Kind, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """The scores that all tokens of a request share, float32 [L * E], in its decode and in its prompt."""
    own, left = model.prompt_own, math.sqrt(1 - model.prompt_own**2)
    here, other = (_about(model, kind, rng) for _ in range(2))
    special, apart = (rng.standard_normal(len(loadings.special), dtype=np.float32) for _ in range(2))
    centre = model.kindness * kind.centre
    there = centre + own * (here - centre) + left * (other - centre)
    changed = np.float32(own) * special + np.float32(left) * apart
    decode = loadings.popular + here.astype(np.float32) @ loadings.request + special * loadings.special
    prompt = loadings.of_prompts + there.astype(np.float32) @ loadings.request + changed * loadings.special
    return decode, prompt


def _choices(
    scores: Floats, loadings: _Loadings, tokens: int, geometry: Geometry, rng: np.random.Generator
) -> NDArray[np.int64]:
    """The experts of successive tokens, int64 [tokens, L, k]."""
    about = loadings.walk(tokens, rng)
    at_once = max(1, SCORES_AT_ONCE // len(scores))
    parts = []
    for start in range(0, tokens, at_once):
        raised = scores + about[start : start + at_once] @ loadings.token
        # Gumbel noise is the negative logarithm of exponential times.
        with np.errstate(divide="ignore"):  # a time of zero comes before all others
            times = np.log(rng.standard_exponential(raised.shape, dtype=np.float32)) - raised
        times = times.reshape(len(raised), geometry.layers, geometry.experts)
        parts.append(np.argpartition(times, geometry.top_k - 1, axis=-1)[..., : geometry.top_k])
    return np.concatenate(parts) if parts else np.empty((0, geometry.layers, geometry.top_k), dtype=np.int64)


def _count(rows: NDArray[np.int64], geometry: Geometry) -> NDArray[np.int64]:
    index = rows + np.arange(geometry.layers)[:, None] * geometry.experts
    size = geometry.layers * geometry.experts
    return np.bincount(index.reshape(-1), minlength=size).reshape(geometry.layers, geometry.experts)
