"""The demo's metrics, against values worked out by hand."""

import json
import math
from pathlib import Path

import pytest

from eldr.demo.engine_metrics import parse_active_experts
from eldr.demo.measure import ActiveExperts, PolicyRun, Round, workers_per_kind
from eldr.demo.router_log import read_placements
from eldr.load.client import request_id
from eldr.load.outcome import Outcome, percentile_ms


def outcome(
    number: int, times: list[float], *, sent_s: float = 0.0, kind: str = "code", error: str | None = None
) -> Outcome:
    return Outcome(number, kind, sent_s, "", list(range(len(times))), list(times), error)


def test_ttft_runs_from_sending_to_the_first_token() -> None:
    assert outcome(0, [10.75, 11.0], sent_s=10.5).ttft_s == 0.25


def test_tpot_is_the_time_after_the_first_token_over_the_tokens_after_it() -> None:
    # Four tokens, 0.9 s from the first to the last: three gaps of 0.3 s on average.
    assert outcome(0, [1.0, 1.1, 1.2, 1.9]).tpot_s == pytest.approx(0.3)


def test_tokens_of_one_event_count_as_tokens() -> None:
    assert outcome(0, [1.0, 2.0, 2.0, 2.0]).tpot_s == pytest.approx(1 / 3)


def test_itl_are_the_gaps() -> None:
    assert outcome(0, [1.0, 1.5, 1.5, 4.5]).itl_s == [0.5, 0.0, 3.0]


def test_without_tokens_there_is_no_ttft_and_with_one_no_tpot() -> None:
    assert outcome(0, []).ttft_s is None
    assert outcome(0, []).tpot_s is None
    assert outcome(0, [1.0]).ttft_s == 1.0
    assert outcome(0, [1.0]).tpot_s is None


def test_percentiles_interpolate_linearly() -> None:
    assert percentile_ms([0.001, 0.002, 0.003, 0.004], 50) == pytest.approx(2.5)
    # Position 0.99 * (101 - 1) = 99 of 0, 1, ..., 100 ms.
    assert percentile_ms([n / 1000 for n in range(101)], 99) == pytest.approx(99.0)
    assert percentile_ms([], 50) is None


def test_a_run_measures_only_what_succeeded_and_counts_the_rest_as_errors() -> None:
    first = Round(outcomes=[outcome(0, [1.0, 2.0]), outcome(1, [1.0, 9.0], error="status 500")], duration_s=2.0)
    run = PolicyRun("jsq", [first, Round(outcomes=[outcome(2, [3.0])], duration_s=3.0)])
    assert run.errors == 1
    assert run.ttft_s == [1.0, 3.0]
    assert run.tpot_s == [1.0]
    assert run.duration_s == 5.0


def test_what_the_warm_up_measured_does_not_count_but_its_requests_do() -> None:
    warm_up = Round(False, [outcome(0, [9.0, 18.0]), outcome(1, [], error="late")], {"a": ActiveExperts(900, 9)}, 7.0)
    run = PolicyRun("jsq", [warm_up, Round(True, [outcome(2, [1.0, 2.5])], {"a": ActiveExperts(8, 2)}, 2.0)])
    assert (run.ttft_s, run.tpot_s, run.itl_s, run.duration_s) == ([1.0], [1.5], [1.5], 2.0)
    assert run.active_experts_mean == 4.0
    assert [outcome.number for outcome in run.succeeded] == [0, 2]
    assert (len(run.outcomes), run.errors) == (3, 1)


def test_active_experts_are_weighted_by_steps_not_by_workers() -> None:
    both = {"a": ActiveExperts(10, 1), "b": ActiveExperts(90, 30)}
    run = PolicyRun("jsq", [Round(active=both), Round(active={"b": ActiveExperts(5, 4)})])
    assert run.active == {"a": ActiveExperts(10, 1), "b": ActiveExperts(95, 34)}
    assert run.active_experts_mean == pytest.approx(105 / 35)
    assert PolicyRun("jsq").active_experts_mean is None
    assert (ActiveExperts(50, 10) - ActiveExperts(20, 4)) == ActiveExperts(30, 6)


def test_placement_counts_requests_of_a_kind_on_a_worker() -> None:
    outcomes = [outcome(n, [1.0], kind=kind) for n, kind in enumerate(["code", "law", "code", "code"])]
    run = PolicyRun("jsq", [Round(outcomes=outcomes[:1]), Round(outcomes=outcomes[1:])])
    run.served_by = {0: "http://a", 1: "http://b", 2: "http://a", 3: "http://elsewhere"}
    assert run.placement(["law", "code"], ["http://a", "http://b"]) == [[0, 1], [2, 0]]


def test_workers_per_kind_is_the_effective_number_of_workers() -> None:
    assert workers_per_kind([[5, 5, 5, 5]]) == pytest.approx(4.0)
    assert workers_per_kind([[0, 7, 0, 0], [3, 3, 0, 0]]) == pytest.approx((1 + 2) / 2)
    # Entropy of 3/4, 1/4 by hand.
    entropy = 0.75 * math.log(4 / 3) + 0.25 * math.log(4)
    assert workers_per_kind([[30, 10], [0, 0]]) == pytest.approx(math.exp(entropy))
    assert workers_per_kind([[0, 0]]) is None


def test_active_experts_are_read_from_the_workers_exposition() -> None:
    text = """# HELP vllm:eldr_active_experts Distinct experts.
# TYPE vllm:eldr_active_experts histogram
vllm:eldr_active_experts_bucket{engine="0",le="4.0"} 3.0
vllm:eldr_active_experts_bucket{engine="0",le="+Inf"} 5.0
vllm:eldr_active_experts_count{engine="0"} 5.0
vllm:eldr_active_experts_sum{engine="0"} 31.0
vllm:eldr_active_experts_count{engine="1"} 2.0
vllm:eldr_active_experts_sum{engine="1"} 9.0
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0"} 7.0
"""
    assert parse_active_experts(text) == ActiveExperts(40.0, 7.0)
    assert parse_active_experts("vllm:num_requests_running 7.0\n") is None


def test_placements_are_read_from_the_routers_log(tmp_path: Path) -> None:
    log = tmp_path / "router.log"
    lines = [
        "eldr: serving on http://127.0.0.1:1",
        json.dumps({"message": "worker is healthy", "level": "debug"}),
        json.dumps({"message": "request", "id": request_id("locality-band", 7), "decode": "http://a"}),
        json.dumps({"message": "request", "id": request_id("locality-band", 12), "decode": "http://b"}),
        json.dumps({"message": "request", "id": request_id("locality-band", 13), "status": 503}),
        '{"message": "request", "id": "locality-band-14", "dec',
    ]
    log.write_text("\n".join(lines))
    assert read_placements(log) == {7: "http://a", 12: "http://b"}
