"""The kernels in numpy. They run if the compiled kernels are missing, and their docstrings describe both."""

from __future__ import annotations

from typing import cast

import numpy as np
from numpy.typing import NDArray

from eldr.kernels._types import CERTAIN, Counts, Doubles, FleetState, Floats, PlacementWeights, PrefillTerms


def unpack_counts(
    data: bytes, low_bits: int, high_bits: int, layers: int, experts: int, total: int, most: int, out: Counts
) -> int:
    """Unpack the data of `counts.pack` into `out`, uint32 [L, E].

    Returns 1 if every layer sums to `total` and no number exceeds `most`, 0 if not, and -1 if `data` has the wrong
    length.
    """
    size = layers * experts
    stream = np.frombuffer(data, dtype=np.uint8)
    low_bytes, mark_bytes = -(-size * low_bits // 8), -(-size // 8) if high_bits else 0
    marked = np.unpackbits(stream[low_bytes : low_bytes + mark_bytes], bitorder="little")
    marks = int(marked.sum())
    if len(data) != low_bytes + mark_bytes + -(-marks * high_bits // 8):
        return -1
    numbers = _of_bits(stream[:low_bytes], low_bits, size)
    if high_bits:
        where = np.flatnonzero(marked[:size])
        numbers[where] |= _of_bits(stream[low_bytes + mark_bytes :], high_bits, len(where)) << np.uint64(low_bits)
    out[:] = numbers.reshape(layers, experts)
    return int((out.sum(axis=1, dtype=np.uint64) == total).all() and int(out.max()) <= most)


def _of_bits(stream: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.uint64]:
    """Read `count` integers of `bits` bits each, lowest bit first: uint64 [count]."""
    each = np.unpackbits(stream, bitorder="little")[: count * bits].reshape(count, bits)
    return each @ (np.uint64(1) << np.arange(bits, dtype=np.uint64))


def own_frequencies(counts: Counts, mean: Floats, prior: float, scale: float, out: Floats) -> None:
    """Write (counts + prior * mean) * scale to `out`. All arrays are [D]. Counts are below 2^31."""
    out[:] = counts.reshape(-1)
    out += np.float32(prior) * mean
    out *= np.float32(scale)


def to_probabilities(scores: Floats, layers: int, least: float, most: float, target: float, out: Floats) -> None:
    """Clip `scores` [layers * E] to least..most, scale each layer to sum to `target`, clip again.

    The result goes to `out`.
    """
    rows = out.reshape(layers, -1)
    np.clip(scores.reshape(layers, -1), np.float32(least), np.float32(most), out=rows)
    rows *= np.float32(target) / rows.sum(axis=-1, keepdims=True)
    np.clip(rows, np.float32(least), np.float32(most), out=rows)


def encode_signature(signature: Floats, out: NDArray[np.uint8]) -> None:
    """Encode numbers x in 0..1 as codes with x = (code / 255)^2, and write them to `out`. Both arrays are [D]."""
    out[:] = np.sqrt(signature) * np.float32(255) + np.float32(0.5)


def encode_exposure(profile: Floats, most: float, scale: float, out: NDArray[np.uint8]) -> None:
    """Encode exposures -log2(1 - p) as codes whose squares are exposure * `scale`, and write them to `out`.

    Both are [D].

    Probabilities above `most`, which is at most 0.99, are encoded as `most`.
    """
    exposure = -np.log2(1 - np.minimum(profile, np.float32(most)))
    out[:] = np.sqrt(exposure * np.float32(scale)) + np.float32(0.5)


def from_fractions(survival: NDArray[np.uint16]) -> Floats:
    """Turn fractions of CERTAIN into probabilities."""
    return survival.astype(np.float32) / np.float32(CERTAIN)


def shift_exposure(
    codes: NDArray[np.uint8],
    sign: int,
    unit: float,
    exposures: NDArray[np.uint32],
    survivals: NDArray[np.uint16],
    row: int,
) -> float:
    """Add (sign 1) or subtract (sign -1) the squares of `codes` [D] to one row of `exposures` [W, D].

    The same row of `survivals` is set to 2^-(exposure * unit), as a fraction of CERTAIN. Returns D minus the sum of the
    survival probabilities.
    """
    exposure, survival = exposures[row], survivals[row]
    shift = codes.astype(np.uint32) ** 2
    if sign > 0:
        exposure += shift
    else:
        exposure -= shift
    alive = exposure * np.float32(-unit)
    np.exp2(alive, out=alive)
    survival[:] = alive * np.float32(CERTAIN) + np.float32(0.5)
    return len(alive) - float(alive.sum(dtype=np.float64))


def move_towards(own: Floats, target: Floats, share: float) -> float:
    """Do own += (target - own) * share, both [D]. Returns the new length of `own`."""
    own += (target - own) * np.float32(share)
    return float(np.sqrt(own @ own))


def unit_direction(own: Floats, mean: Floats, layers: int, every: int, out: Floats) -> bool:
    """Write own - mean to `out`, taking only every `every`-th layer and scaling to unit length. Both are [layers * E].

    Returns False, with `out` zero, if the difference has no length.
    """
    np.subtract(
        own.reshape(layers, -1)[::every], mean.reshape(layers, -1)[::every], out=out.reshape(-1, len(own) // layers)
    )
    length = np.sqrt(out @ out)
    if length > 0:
        out /= length
    return bool(length > 0)


def row_products(rows: Floats | NDArray[np.uint16], vector: Floats, out: Doubles) -> None:
    """Write the scalar product of each row [W, D] and the vector [D] to `out` [W].

    Rows are floats or fractions of CERTAIN.

    The product is written as W products of 1 x D and D x 1, because numpy then calls BLAS once per row and BLAS uses no
    threads. On busy cores threads take milliseconds to synchronise for a product this small.
    """
    if rows.dtype == np.uint16:
        rows = from_fractions(cast(NDArray[np.uint16], rows))
    out[:] = np.matmul(rows[:, None, :], vector[:, None]).reshape(len(rows))


def placement_cost(
    fleet: FleetState,
    weights: PlacementWeights,
    added: Doubles,
    products: Doubles,
    at_random: Doubles,
    rows: NDArray[np.int64],
    load: list[int],
    context_tokens: float,
    allowed_s: float,
    out: Doubles,
) -> tuple[int, float]:
    """Write the cost that expected-union minimises to `out` [N], in seconds per step.

    The cost is infinity for a worker that the tail guard rules out. Returns the index of the lowest cost, and the
    longest step in seconds that the guard would let pass without `allowed_s`.

    fleet: the state of all workers.
    weights: the weights of the cost's terms.
    added: [W], the experts that the request adds to each worker's union.
    products: [W], scalar products of the request's direction and each worker's. Divided by `fleet.length` they are
        similarities.
    at_random: [batch + 1], the experts of a batch of each size drawn at random.
    rows: [N], the workers to choose from.
    load: [N], the load of those workers.
    context_tokens: the tokens of the request's prompt.
    allowed_s: the guard never rules out a step that is not longer than this, in seconds.
    """
    loads, contexts = np.array(load, dtype=np.float64), np.array(fleet.context, dtype=np.float64)
    base_s, expert_s, token_s, context_s = fleet.columns[:, rows]
    similarity = products[rows] / np.maximum(fleet.length[rows], np.float32(1e-6))
    added = added[rows]
    then = fleet.union[rows] + added
    added_s = expert_s * added + token_s + context_s * context_tokens
    longer_s = base_s + expert_s * then + token_s * (loads + 1) + context_s * (contexts[rows] + context_tokens)
    expert_time_s = float((expert_s * then).sum()) / len(rows)
    out[:] = longer_s + weights.others * loads * added_s
    out += weights.anchor * (float(loads.sum()) / len(rows) + 1) * expert_time_s * (similarity.max() - similarity)
    random_experts = at_random[np.array(load) + 1]
    saved_s = max(float((expert_s * (random_experts - then)).sum()) / len(rows), 0.0)
    margin_s = weights.tail_guard * (saved_s + weights.guard_share * expert_time_s) + 1e-12
    limit_s = float(longer_s.sum()) / len(rows) + margin_s
    out[longer_s > max(limit_s, allowed_s)] = np.inf
    return int(out.argmin()), limit_s


def add_prefill(
    fleet: FleetState,
    terms: PrefillTerms,
    rows: NDArray[np.int64],
    load: list[int],
    waiting: list[int],
    uncached: list[int],
    prompt_tokens: float,
    scale: float,
    out: Doubles,
) -> int:
    """Add to `out` [N] what a prompt costs the newcomer and the requests there, in seconds, times `scale`.

    Returns the index of the lowest sum. `eldr.policies.prefill` explains the price.

    fleet: the state of all workers.
    terms: what it depends on.
    rows: [N], the workers to choose from.
    load: [N], the load of those workers.
    waiting, uncached: [N], the tokens of other prompts, and of this one, that each of them has to compute.
    prompt_tokens: the length of this prompt.
    """
    loads, queued, own = (np.array(numbers, dtype=np.float64) for numbers in (load, waiting, uncached))
    base_s, expert_s, token_s, context_s = fleet.columns[:, rows]
    union, context = fleet.union[rows], np.array(fleet.context, dtype=np.float64)[rows]
    unused = np.maximum(terms.experts - union, 0.0)
    room = np.maximum(terms.chunk_tokens - loads, 1.0)

    def chunks_s(tokens: Doubles) -> tuple[Doubles, Doubles]:
        """The chunks that so many tokens take, and the time that they add to the steps that they are part of."""
        chunks = np.ceil(tokens / room)
        activated = unused * (1 - terms.missed ** np.minimum(tokens, room))
        return chunks, token_s * tokens + chunks * expert_s * activated

    own_chunks, own_s = chunks_s(own)
    chunks, until_first_token_s = chunks_s(queued + own)
    # Every chunk reads what was computed before it: the cached part and, on average, half of the rest.
    read_s = context_s * (prompt_tokens + (own_chunks - 1) * (prompt_tokens - own / 2))
    decode_s = base_s + expert_s * union + token_s * loads + context_s * context
    newcomer_s = chunks * decode_s + until_first_token_s + read_s
    out += scale * (newcomer_s + terms.others * loads * (own_s + read_s))
    return int(out.argmin())


def cache_experts(
    active: NDArray[np.uint64],
    layers: int,
    experts: int,
    now: int,
    halve_every: int,
    priority: NDArray[np.uint64],
    resident: NDArray[np.uint8],
    out: NDArray[np.int64],
) -> None:
    """Let a cache of experts make steps. `eldr.replay.host_memory` says what it is.

    All active experts of a step are needed at once. Each that is missing takes the place of the resident one with the
    lowest priority, of equals the first. Those that the step uses are dropped last.

    active: [S, ceil(D / 64)], the experts that each step activates, as bit sets.
    layers, experts: D is their product.
    now: the number of the first step.
    halve_every: 0 for the priority of the last use. Otherwise that of the number of uses, which are halved before every
        step whose number is a multiple of this, and among equals that of the last use.
    priority: [D], changed. Its low 32 bits are the number of the step that used the expert last, the others its uses.
    resident: [D], changed. 1 for an expert that is in the cache, else 0.
    out: [S], the missing experts of each step.
    """
    last_use, one_use, in_use = np.uint64(2**32 - 1), np.uint64(2**32), np.uint64(2**63)
    bits = np.unpackbits(active.view(np.uint8), axis=1, bitorder="little", count=layers * experts)
    priorities, residents = priority.reshape(layers, experts), resident.reshape(layers, experts)
    for step, used in enumerate(bits.reshape(len(active), layers, experts).astype(np.bool_)):
        if halve_every and (now + step) % halve_every == 0:
            priorities[:] = (priorities & last_use) | (priorities >> np.uint64(33) << np.uint64(32))
        missing = (used & (residents == 0)).sum(axis=1)
        uses = (priorities[used] & ~last_use) + one_use if halve_every else np.uint64(0)
        priorities[used] = uses | np.uint64(now + step)
        residents[used] = 1
        order = np.argsort(np.where(residents, priorities | used * in_use, ~np.uint64(0)), axis=1, kind="stable")
        dropped = np.arange(experts) < missing[:, None]
        np.put_along_axis(residents, order, np.take_along_axis(residents, order, axis=1) * ~dropped, axis=1)
        out[step] = missing.sum()
