import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eldr.cost import StepCost
from eldr.learning.step_costs import ALIKE, SPREAD, CostLearner, StepReport, shared
from eldr.policies.worker_costs import LearnedCost

CONFIGURED = StepCost(1.3e-3, 6.2e-6, 2e-5, 3e-8)
FAST = StepCost(0.45e-3, 2.3e-6, 1e-5, 2e-8)
SLOW = StepCost(0.45e-3, 3.3e-6, 1e-5, 3e-8)
LAYERS, EXPERTS = 24, 32
INTERVAL_S = 2.0


class Reporting:
    """Workers whose batches go up and down, and which report the times of their true lines with some noise."""

    def __init__(self, noise: float, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)
        self._noise = noise
        self.learner = CostLearner()
        self.now_s = 0.0

    def look(self, lines: dict[str, StepCost]) -> None:
        """Let every worker report, an interval later."""
        self.now_s += INTERVAL_S * self._rng.uniform(0.8, 1.2)
        for worker, line in lines.items():
            self.report(worker, line)

    def report(self, worker: str, line: StepCost) -> None:
        batch = max(1.0, self._rng.gamma(8.0))
        experts = LAYERS * EXPERTS * (1 - (1 - 4 / EXPERTS) ** batch) * self._rng.normal(1, 0.05)
        step_s = line.step_s(experts, 0, 400.0 * batch) + line.per_token_s * batch
        step_s *= math.exp(self._rng.normal(0, self._noise))
        self.learner.heard(worker, CONFIGURED, StepReport(step_s, experts, batch, 400.0 * batch), self.now_s)

    def learned(self) -> dict[str, LearnedCost]:
        return self.learner.learned(self.now_s)


def true_time(line: StepCost) -> float:
    """The step of a mean batch."""
    return line.step_s(500.0, 8, 3200.0)


def learned_time(learned: LearnedCost) -> float:
    return learned.unit * true_time(learned.cost)


def test_lines_are_found_though_others_were_configured() -> None:
    fleet = Reporting(noise=0.03)
    lines = {f"fast{n}": FAST for n in range(4)} | {f"slow{n}": SLOW for n in range(4)}
    for _ in range(150):
        fleet.look(lines)
    learned = fleet.learned()
    for worker, line in lines.items():
        found = learned[worker]
        assert learned_time(found) == pytest.approx(true_time(line), rel=0.03)
        assert found.unit * found.cost.per_expert_s == pytest.approx(line.per_expert_s, rel=0.1)
        assert found.unit * found.cost.base_s == pytest.approx(line.base_s, rel=0.35)
    ratio = learned["slow0"].relative / learned["fast0"].relative
    assert ratio == pytest.approx(true_time(SLOW) / true_time(FAST), rel=0.03)


def test_speeds_are_known_after_a_few_reports() -> None:
    fleet = Reporting(noise=0.03)
    lines = {"a": FAST, "b": FAST, "c": SLOW}
    fleet.look(lines)
    assert fleet.learned() == {}
    for _ in range(4):
        fleet.look(lines)
    learned = fleet.learned()
    assert learned["c"].relative / learned["a"].relative == pytest.approx(true_time(SLOW) / true_time(FAST), rel=0.1)


def test_workers_that_differ_by_noise_end_with_nearly_one_line() -> None:
    fleet = Reporting(noise=0.03)
    lines = {f"w{n}": FAST for n in range(8)}
    worst = 0.0
    for look in range(200):
        fleet.look(lines)
        if look > 20:
            relative = [learned.relative for learned in fleet.learned().values()]
            worst = max(worst, max(relative) / min(relative) - 1)
    assert worst < 0.03
    costs = [learned_time(learned) for learned in fleet.learned().values()]
    assert max(costs) / min(costs) < 1.02


@pytest.mark.parametrize("factor", [2.0, 0.5, 1.4])
def test_a_change_of_speed_is_seen_within_thirty_seconds_and_so_is_its_end(factor: float) -> None:
    fleet = Reporting(noise=0.03)
    as_ever = {f"w{n}": FAST for n in range(4)}
    changed = as_ever | {"w1": FAST.times(factor)}

    def seconds_until(lines: dict[str, StepCost], wanted: float) -> float:
        began_s = fleet.now_s
        for _ in range(30):
            fleet.look(lines)
            learned = fleet.learned()
            if learned["w1"].relative / learned["w0"].relative == pytest.approx(wanted, rel=0.1):
                break
        return fleet.now_s - began_s

    for _ in range(50):
        fleet.look(as_ever)
    assert seconds_until(changed, factor) < 30
    for _ in range(20):
        fleet.look(changed)
    assert seconds_until(as_ever, 1.0) < 30


def test_a_pause_changes_nothing() -> None:
    fleet = Reporting(noise=0.0)
    lines = {f"w{n}": FAST for n in range(4)}
    for _ in range(30):
        fleet.look(lines)
    before = fleet.learned()["w2"]
    fleet.look(lines | {"w2": FAST.times(50)})
    after = fleet.learned()["w2"]
    assert after.relative == pytest.approx(before.relative, rel=0.01)
    assert learned_time(after) == pytest.approx(learned_time(before), rel=0.01)


def test_a_worker_that_claims_to_take_no_time_is_believed_to_be_eight_times_faster_at_most() -> None:
    fleet = Reporting(noise=0.0)
    lines = {f"w{n}": FAST for n in range(4)} | {"liar": FAST.times(1e-9)}
    for _ in range(30):
        fleet.look(lines)
    learned = fleet.learned()
    for worker in lines:
        assert learned[worker].relative >= 1 / SPREAD / 1.01
    assert learned["w0"].relative == pytest.approx(1, rel=0.01)
    # It bends the lines of the others no more than they would differ by noise.
    assert learned_time(learned["w0"]) == pytest.approx(true_time(FAST), rel=0.03)


def test_a_configured_difference_is_kept_where_reports_bear_it_out() -> None:
    learner = CostLearner()
    for look in range(20):
        for worker, line in (("a", FAST), ("b", SLOW)):
            experts = 400.0 + 10 * (look % 7)
            learner.heard(worker, line, StepReport(7 * line.step_s(experts, 8, 0.0), experts, 8), 2.0 * look)
    learned = learner.learned(40.0)
    assert learned["a"].cost.per_expert_s == pytest.approx(FAST.per_expert_s, rel=0.01)
    assert learned["b"].cost.per_expert_s == pytest.approx(SLOW.per_expert_s, rel=0.01)
    assert learned["a"].unit == pytest.approx(7, rel=0.01)


def test_a_silent_worker_becomes_an_average_one_and_is_forgotten() -> None:
    fleet = Reporting(noise=0.0)
    lines = {f"w{n}": FAST for n in range(3)}
    for _ in range(20):
        fleet.look(lines | {"slow": FAST.times(3)})
    first = fleet.learned()["slow"].relative
    for _ in range(70):
        fleet.look(lines)
    later = fleet.learned()["slow"].relative
    assert first == pytest.approx(3, rel=0.05)
    assert 1 < later < 1.5
    for _ in range(300):
        fleet.look(lines)
    assert "slow" not in fleet.learned()


def test_a_worker_that_has_left_is_forgotten_at_once() -> None:
    fleet = Reporting(noise=0.0)
    for _ in range(5):
        fleet.look({"a": FAST, "b": SLOW})
    fleet.learner.forget("b")
    assert list(fleet.learned()) == ["a"]


def test_steps_with_prompts_tell_the_speed_but_not_the_shape() -> None:
    learner = CostLearner()
    for look in range(60):
        for worker in ("a", "b"):
            prompt = 500.0 * (look % 5) + 100
            parts = StepReport(1.0, 500.0, 8.0, 0.0, prompt)
            # What a prompt costs here has nothing to do with the line.
            step_s = float(parts.parts_s(CONFIGURED).sum()) * (1 + 0.02 * (look % 5))
            learner.heard(worker, CONFIGURED, StepReport(step_s, 500.0, 8.0, 0.0, prompt), 2.0 * look)
    cost = learner.learned(120.0)["a"].cost
    ratio = cost.per_expert_s / cost.base_s
    assert ratio == pytest.approx(CONFIGURED.per_expert_s / CONFIGURED.base_s, rel=1e-6)


numbers = st.one_of(st.floats(), st.floats(0, 1e4))


def lines_of(learned: dict[str, LearnedCost]) -> Iterator[float]:
    for one in learned.values():
        cost = one.cost
        yield from (cost.base_s, cost.per_expert_s, cost.per_token_s, cost.per_context_token_s)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), numbers, numbers, numbers, numbers, numbers, st.floats(0, 100)), max_size=40
    )
)
def test_no_report_breaks_anything(reports: list[tuple[str, float, float, float, float, float, float]]) -> None:
    learner = CostLearner()
    now_s = 0.0
    for worker, step_s, experts, batch, context, prompt, elapsed_s in reports:
        now_s += elapsed_s
        learner.heard(worker, CONFIGURED, StepReport(step_s, experts, batch, context, prompt), now_s)
        learned = learner.learned(now_s)
        assert all(0 <= part < math.inf for part in lines_of(learned))
        for one in learned.values():
            assert 0 < one.relative < math.inf
            assert one.cost.step_s(500.0, 8, 0.0) > 0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(-3, 3), st.floats(0.001, 0.5)), min_size=1, max_size=20))
def test_shared_values_keep_their_order_and_differ_visibly(given_values: list[tuple[float, float]]) -> None:
    values, errors = (np.array(part) for part in zip(*given_values, strict=True))
    result = shared(values, errors)
    order = np.argsort(values)
    assert (np.diff(result[order]) >= 0).all()
    kinds = np.unique(result)
    assert (np.diff(kinds) >= ALIKE * (1 - 1e-9)).all()
    assert values.min() - 1e-9 <= result.min()
    assert result.max() <= values.max() + 1e-9


def test_clear_differences_stay() -> None:
    errors = np.full(4, 0.005)
    assert shared(np.array([0.0, 0.5, 0.01, 0.51]), errors).tolist() == pytest.approx([0.005, 0.505, 0.005, 0.505])


def test_a_vague_value_joins_a_sure_one() -> None:
    result = shared(np.array([0.0, 0.5]), np.array([0.001, 0.5]))
    assert result[0] == result[1]
    assert abs(result[0]) < 1e-4
