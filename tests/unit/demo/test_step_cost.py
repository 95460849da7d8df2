"""The line of a decode step: fitted to steps that have one, and as a cost that the policies read the same."""

from pathlib import Path

import numpy as np
import pytest

from eldr.cost import CostError, load_cost
from eldr.demo.step_cost import Step, fit_line

LAYERS = 4


def steps(noise_ms: float = 0.0) -> list[Step]:
    """Steps of 2 ms + 0.1 ms for each active expert + 0.3 ms for each request, and noise."""
    rng = np.random.default_rng(0)
    return [
        Step(batch, experts, 2 + 0.1 * experts + 0.3 * batch + noise_ms * rng.standard_normal())
        for batch, experts in ((1, 16.0), (2, 20.0), (2, 28.0), (4, 53.0), (4, 30.0), (8, 91.0), (8, 35.0), (12, 30.0))
    ]


def test_the_line_is_found() -> None:
    line = fit_line(steps(), LAYERS)
    assert (line.base_ms, line.per_expert_ms, line.per_token_ms) == pytest.approx((2.0, 0.1, 0.3))
    assert line.r2 == pytest.approx(1.0)
    assert line.time_ms(50.0, 6) == pytest.approx(2 + 5 + 1.8)


def test_with_noise_it_is_that_of_least_squares() -> None:
    noisy = steps(noise_ms=0.5)
    x = np.array([[1.0, step.active_experts, step.batch] for step in noisy])
    y = np.array([step.time_ms for step in noisy])
    expected, residuals, *_ = np.linalg.lstsq(x, y, rcond=None)
    line = fit_line(noisy, LAYERS)
    assert (line.base_ms, line.per_expert_ms, line.per_token_ms) == pytest.approx(tuple(expected))
    assert line.r2 == pytest.approx(1 - residuals[0] / ((y - y.mean()) ** 2).sum())


def test_steps_without_a_line_are_refused() -> None:
    with pytest.raises(CostError, match="too few different measurements"):
        fit_line([Step(1, 16.0, 4.0)] * 8, LAYERS)


def test_the_policies_read_the_same_step_time_from_the_cost_file(tmp_path: Path) -> None:
    line = fit_line(steps(), LAYERS)
    line.cost_model(6_291_456).save(tmp_path / "cost.json")
    cost = load_cost(tmp_path / "cost.json").step_cost(LAYERS, "step")
    for step in steps():
        assert 1000 * cost.step_s(step.active_experts, step.batch, 999.0) == pytest.approx(step.time_ms)
