import pytest

from eldr.learning.step_counters import StepCounters
from eldr.learning.step_reports import layers_of, report_of
from eldr.policies.base import ExpectedStep

EXPECTED = ExpectedStep(experts=480.0, layers=24, experts_per_layer=32, context_tokens=3000)
# 100 steps of 8 requests, 10 ms each, with 20 of 32 experts in each of 24 layers.
COUNTED = StepCounters(gaps=800, gaps_s=8.0, steps=100, experts=48000, expert_steps=2400)


def test_the_mean_step() -> None:
    report = report_of(COUNTED, EXPECTED, running=7, chunk_tokens=2048)
    assert report is not None
    assert report.step_s == pytest.approx(0.01)
    assert report.batch == pytest.approx(8)
    assert report.experts == pytest.approx(480)
    assert report.context_tokens == 3000
    assert report.prompt_tokens == 0


def test_a_policy_without_expectations_may_not_know_the_layers() -> None:
    report = report_of(COUNTED, None, running=7, chunk_tokens=2048)
    assert report is not None
    assert report.experts == pytest.approx(20 * layers_of(None))


def test_without_a_connector_the_expectation_counts() -> None:
    report = report_of(StepCounters(gaps=800, gaps_s=8.0), EXPECTED, running=5, chunk_tokens=2048)
    assert report is not None
    assert report.experts == pytest.approx(480)
    assert report.batch == 5


@pytest.mark.parametrize("counted", [COUNTED, StepCounters(gaps=800, gaps_s=8.0)])
def test_experts_that_are_fetched_count_as_more_reads(counted: StepCounters) -> None:
    """A line has a price for reads. Distinct experts would make it dearer by the misses, which are priced already."""
    expected = ExpectedStep(experts=480.0, layers=24, experts_per_layer=32, context_tokens=0, reads_per_expert=12.5)
    report = report_of(counted, expected, running=8, chunk_tokens=2048)
    assert report is not None
    assert report.experts == pytest.approx(6000)


def test_without_a_connector_an_idle_worker_tells_nothing() -> None:
    idle = ExpectedStep(experts=0.0, layers=24, experts_per_layer=32, context_tokens=0)
    assert report_of(StepCounters(gaps=800, gaps_s=8.0), idle, running=0, chunk_tokens=2048) is None
    assert report_of(COUNTED, idle, running=0, chunk_tokens=2048) is not None


@pytest.mark.parametrize(("claimed", "believed"), [(10.0, 240), (20.0, 480), (32.0, 768), (900.0, 768)])
def test_no_worker_is_believed_that_has_far_other_experts_than_expected(claimed: float, believed: float) -> None:
    counted = StepCounters(gaps=800, gaps_s=8.0, steps=100, experts=2400 * claimed, expert_steps=2400)
    report = report_of(counted, EXPECTED, running=7, chunk_tokens=2048)
    assert report is not None
    assert report.experts == pytest.approx(believed)


def test_steps_with_prompts_read_more_experts() -> None:
    counted = StepCounters(
        gaps=800, gaps_s=9.0, steps=100, experts=48000, expert_steps=2400, prompt_tokens=40960, prompts=10
    )
    report = report_of(counted, EXPECTED, running=7, chunk_tokens=2048)
    assert report is not None
    assert report.prompt_tokens == pytest.approx(409.6)
    # 20 chunks, each of which reads all 768.
    assert report.experts == pytest.approx(480 + 0.2 * (768 - 480))


@pytest.mark.parametrize(
    "counted",
    [
        StepCounters(),
        StepCounters(gaps=7, gaps_s=0.1, steps=7),
        StepCounters(gaps=800, gaps_s=0.0, steps=100),
        StepCounters(gaps=800, gaps_s=8.0, steps=100, preemptions=1),
    ],
)
def test_what_says_nothing_of_steps(counted: StepCounters) -> None:
    assert report_of(counted, EXPECTED, running=7, chunk_tokens=2048) is None


def test_counters_of_a_restarted_worker_go_back() -> None:
    assert StepCounters(gaps=5, gaps_s=0.1).since(StepCounters(gaps=800, gaps_s=8.0)) is None
    assert StepCounters(gaps=900, gaps_s=9.0).since(StepCounters(gaps=800, gaps_s=8.0)) == StepCounters(
        gaps=100, gaps_s=1.0
    )
