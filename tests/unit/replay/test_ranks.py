"""Expert parallelism in a replay: what a step waits for, by hand, and when a worker moves its experts to where."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from eldr.cli.main import main
from eldr.expert_ranks.replicas import ReplicaChoice
from eldr.policies import PolicyOptions
from eldr.replay.errors import ReplayError
from eldr.replay.experiment import Laboratory, Settings
from eldr.replay.packed import PackedTrace, pack_trace, request_rows, union_rows
from eldr.replay.ranks import ExpertParallel, OwnRanks, Ranks, ranks_of, sampled_tokens
from eldr.replay.split import Mix
from eldr.trace import Trace, write_trace
from tests.synthetic import make_trace

LAYERS, EXPERTS = 3, 40
NOBODY = np.array([], dtype=np.int64)


def packed_trace(seed: int = 1, requests: int = 4, steps: int = 9) -> tuple[Trace, PackedTrace]:
    trace = make_trace(requests=requests, layers=LAYERS, experts=EXPERTS, seed=seed, steps=steps)
    return trace, pack_trace(trace)


def tokens_by_hand(trace: Trace, rows: list[int], steps: int) -> NDArray[np.int64]:
    tokens = np.zeros((steps, LAYERS, EXPERTS), dtype=np.int64)
    for step in range(steps):
        for row in rows:
            for layer in range(LAYERS):
                for expert in trace.decode_experts[row + step, layer].tolist():
                    tokens[step, layer, expert] += 1
    return tokens


@pytest.mark.parametrize("ranks", [2, 5])
def test_a_step_waits_for_the_busiest_rank(ranks: int) -> None:
    trace, packed = packed_trace()
    rows = [int(row) for row in trace.decode_offsets[:3]]
    share = EXPERTS // ranks
    active = tokens_by_hand(trace, rows, 4) > 0
    expected = [
        sum(max(layer[rank * share : (rank + 1) * share].sum() for rank in range(ranks)) for layer in step)
        for step in active
    ]
    reading = ranks_of(packed, ranks, ExpertParallel(), NOBODY, 7.0, 0)(0)
    assert reading.of_requests(union_rows(packed.words, rows, 4), request_rows(packed.words, rows, 4)).tolist() == (
        expected
    )
    likely = np.random.default_rng(1).random((5, LAYERS * EXPERTS))
    shares = [
        sum(max(row[layer * EXPERTS + r * share :][:share].sum() for r in range(ranks)) for layer in range(LAYERS))
        for row in likely
    ]
    assert reading.of_expected(likely) == pytest.approx(shares, rel=1e-5)


class Spy(ReplicaChoice):
    """Keeps the tokens that it is asked about."""

    of_tokens = True

    def __init__(self) -> None:
        self.asked: list[NDArray[np.uint8]] = []

    def reads(self, tokens: NDArray[np.uint8]) -> NDArray[np.float64]:
        self.asked.append(tokens)
        return np.zeros(len(tokens))

    def expected(self, active: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.zeros(len(active))


def test_a_choice_that_needs_tokens_gets_those_of_the_whole_batch() -> None:
    trace, packed = packed_trace()
    rows = [int(trace.decode_offsets[0])] * 2 + [int(trace.decode_offsets[2])]  # the first request twice
    spy = Spy()
    Ranks(LAYERS, EXPERTS, spy).of_requests(union_rows(packed.words, rows, 4), request_rows(packed.words, rows, 4))
    assert spy.asked[0].tolist() == tokens_by_hand(trace, rows, 4).tolist()
    assert spy.asked[0].max() >= 2


def test_tokens_of_very_large_batches_do_not_overflow() -> None:
    trace, packed = packed_trace()
    rows = [int(trace.decode_offsets[0])] * 300
    spy = Spy()
    Ranks(LAYERS, EXPERTS, spy).of_requests(union_rows(packed.words, rows, 2), request_rows(packed.words, rows, 2))
    once = tokens_by_hand(trace, rows[:1], 2)
    assert spy.asked[0].tolist() == (255 * once).tolist()


def test_a_worker_moves_its_experts_when_vllm_would() -> None:
    """First after 750 steps, then each 3,000, by every fourth of the last 1,000 steps."""
    trace, packed = packed_trace(requests=2, steps=400)
    placed: list[NDArray[np.uint8]] = []
    moves: list[int] = []

    def place(tokens: NDArray[np.uint8]) -> ReplicaChoice:
        placed.append(tokens)
        moves.append(made)
        return Spy()

    reading = OwnRanks(LAYERS, EXPERTS, Spy(), place)
    rng = np.random.default_rng(0)
    made = 0
    every: list[NDArray[np.int64]] = []
    while made < 7000:
        planned = int(rng.integers(2, 60))
        first = int(rng.integers(100))
        rows = [int(trace.decode_offsets[0]) + first, int(trace.decode_offsets[1]) + first]
        union = union_rows(packed.words, rows, planned)
        reading.of_requests(union, request_rows(packed.words, rows, planned))
        steps = int(rng.integers(1, planned + 1))  # the rest is cut off
        made += steps
        every.extend(tokens_by_hand(trace, rows, steps))
        reading.made(union[:steps])
    assert len(moves) == 3
    for move, wanted in zip(moves, (750, 3750, 6750), strict=True):
        assert wanted <= move < wanted + 60
    for move, tokens in zip(moves, placed, strict=True):
        seen = [every[step] for step in range(0, move, 4)][-250:]
        assert tokens.tolist() == np.array(seen).tolist()


def test_the_fleet_is_placed_by_the_traffic_of_the_calibration_requests() -> None:
    trace, packed = packed_trace(requests=20)
    chosen = np.arange(0, 20, 2)
    rng = np.random.default_rng(3)
    tokens = sampled_tokens(packed, chosen, 3, 50, rng)
    assert (tokens.sum(axis=2) == 3 * trace.meta.top_k).all()
    rows = {
        trace.decode_experts[row, 0].astype(int).tobytes()
        for request in chosen
        for row in range(trace.decode_offsets[request], trace.decode_offsets[request + 1])
    }
    single = sampled_tokens(packed, chosen, 1, 200, rng)
    for step in single:
        found = {key for key in rows if set(np.frombuffer(key, dtype=int)) == set(np.flatnonzero(step[0]))}
        assert found, "a row of no request to calibrate on"


@pytest.mark.parametrize("placement_of", ["fleet", "worker"])
@pytest.mark.parametrize(("redundant", "replica"), [(0, "random"), (8, "random"), (8, "lp"), (8, "fewest")])
@pytest.mark.parametrize("placement", ["eplb", "union-aware"])
def test_every_layout_replays(placement: str, redundant: int, replica: str, placement_of: str) -> None:
    trace = make_trace(requests=60, layers=2, experts=16, seed=2, steps=30)
    how = ExpertParallel(placement, placement_of, redundant, replica)
    options = PolicyOptions(expert_parallel=4, cost_scope="moe")
    laboratory = Laboratory(trace, Settings(requests=40, options=options, ranks=how))
    results = [laboratory.run("expected-union", 2, 50.0, 2.0, 0) for _ in range(2)]
    assert results[0].tpot_s.tolist() == results[1].tpot_s.tolist(), "a replay is the same each time"
    distinct = results[0].active_experts_mean
    if not redundant:
        assert distinct / 4 <= results[0].expert_reads_mean <= distinct
    elif replica == "fewest":
        plain = Laboratory(trace, Settings(requests=40, options=options)).run("expected-union", 2, 50.0, 2.0, 0)
        assert results[0].expert_reads_mean < plain.expert_reads_mean


@pytest.mark.parametrize(("redundant", "replica"), [(0, "random"), (8, "random"), (8, "lp"), (8, "fewest")])
def test_workers_that_compute_prompts_have_ranks_too(redundant: int, replica: str) -> None:
    trace = make_trace(requests=60, layers=2, experts=16, seed=2, steps=900)
    how = ExpertParallel("eplb", "worker", redundant, replica)
    settings = Settings(
        requests=30, options=PolicyOptions(expert_parallel=4, prefill_chunk=300), ranks=how, aggregated=True
    )
    result = Laboratory(trace, settings).run("expected-union", 2, 5.0, 2.0, 0)
    assert result.chunk_step_share > 0
    assert result.active_experts_mean / 4 <= result.expert_reads_mean <= (16 + redundant) / 4


def test_the_command_says_what_the_layout_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace.npz"
    write_trace(make_trace(requests=60, layers=2, experts=16, seed=2, steps=30), path)
    command = ["replay", str(path), "--workers", "2", "--rate", "50", "--requests", "20", "--seeds", "1"]
    command += ["--expert-parallel", "4", "--placement", "union-aware", "--redundant", "8", "--replica", "fewest"]
    assert main([*command, "--policies", "jsq"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "4 ranks, union-aware by the fleet's traffic, 8 redundant experts, replica fewest" in shown
    assert main([*command[:-4], "--replica", "lp"]) == 2
    assert "--replica needs --redundant" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ranks", "how", "message"),
    [
        (3, ExpertParallel(), "40 experts cannot be divided over 3 ranks; --redundant 2"),
        (1, ExpertParallel("eplb"), "need --expert-parallel"),
        (4, ExpertParallel("contiguous", "worker"), "--placement-of worker needs another"),
        (4, ExpertParallel("eplb", redundant=3), "40 experts and 3 redundant ones cannot be divided over 4 ranks"),
    ],
)
def test_layouts_that_do_not_exist_are_refused(ranks: int, how: ExpertParallel, message: str) -> None:
    trace, _ = packed_trace()
    with pytest.raises(ReplayError, match=message):
        Laboratory(trace, Settings(options=PolicyOptions(expert_parallel=ranks), ranks=how))


def test_the_fleets_placement_needs_traffic() -> None:
    trace = make_trace(requests=20, layers=2, experts=16, seed=2, steps=30)
    settings = Settings(
        requests=10,
        mix=Mix(calibrate_fraction=0),
        options=PolicyOptions(expert_parallel=4),
        ranks=ExpertParallel("eplb"),
    )
    with pytest.raises(ReplayError, match="needs requests to calibrate on"):
        Laboratory(trace, settings).run("jsq", 2, 50.0, 2.0, 0)
