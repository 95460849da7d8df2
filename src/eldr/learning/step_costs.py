"""Learns how long the decode steps of each worker take, from what workers report of their steps now and then.

A step-time line says T = base + per_expert U + per_token B + per_context C. Workers report means over the steps since
the last look: T, the active experts U, and with them the batch B. C is known from the requests. Three things are
learned, the surest first:

- the *speed* of a worker: one factor on its configured line, the median over the last WINDOW_S seconds. So a pause does
  nothing. Reports before a clear change of speed, on which the newest agree, are dropped, so it is known after
  LEAST_REPORTS of them. Workers whose speeds noise cannot tell apart share one (`shared`): nobody is steered by noise.
- the *shape* of all workers: what share of a step the experts are. A worker's batch goes up and down, so its U and T do
  too. Least squares on these deviations, with forgetting, and drawn to the configured shape while there is little data.
  Deviations from a moving mean say nothing of speed, so that a change of speed does not bend the shape.
- how the shape of one worker differs: the same from its own reports alone, drawn to the shape of all.

Only ratios matter to decisions, so lines are given in the unit of the configured ones: the median worker keeps its
configured time, and a policy's other times stay comparable. What is absurd changes nothing, or little: a worker is at
most SPREAD times faster or slower than the median one, no part of a line is negative, and what was not heard of for
FORGET_S seconds is forgotten.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eldr.cost import StepCost
from eldr.policies.worker_costs import LearnedCost

# The speed of a worker is the median over this time, and at least over so many reports, if they are not too old.
WINDOW_S = 20.0
LEAST_REPORTS = 3
# A worker that reports nothing becomes an average one with this time constant: the router has to try it again.
FORGET_S = 60.0
# A worker is believed to be at most so many times faster or slower than the median one.
SPREAD = 8.0
# When all of the last LEAST_REPORTS are this much longer or shorter than those before, the speed has changed at once.
CHANGED = 0.2
# Speeds that differ by less are the same, whatever the noise.
ALIKE = 0.05
# Standard errors between two speeds that differ. With two, some worker of a large fleet would always seem to.
ERRORS = 3.0
# Standard deviation of a report's time, at least.
LEAST_NOISE = 0.02
# Time constant of the means that deviations are taken from, and of what is known of the shape.
MEAN_S, SHAPE_S = 30.0, 600.0
# Residuals beyond this are pauses and changes of speed. They say nothing about the shape.
OUTLIER = 0.25
# Standard deviations: of a report's time, of the fleet's shape around the configured one, and of a worker's around it.
REPORT_SD, FLEET_SD, WORKER_SD = 0.05, 0.5, 0.03
# No part of a line becomes more than so many times what it was configured to be, relative to the others.
BEND = 8.0
# The base is at least this share of a worker's mean step.
LEAST_BASE = 0.02
# A report whose steps computed more prompt tokens than this, each, tells the speed alone.
PROMPT_TOKENS = 1.0


@dataclass(frozen=True, slots=True)
class StepReport:
    """The mean step of a worker since the last report.

    step_s: the time of a step.
    experts: the distinct experts of a step, summed over the MoE layers. In reads, where missing ones cost more.
    batch: the requests of a step.
    context_tokens: the tokens of context of these requests.
    prompt_tokens: the tokens of prompts that a step computed in addition.
    """

    step_s: float
    experts: float
    batch: float
    context_tokens: float = 0.0
    prompt_tokens: float = 0.0

    @property
    def usable(self) -> bool:
        """Whether it can be true at all."""
        parts = (self.experts, self.batch, self.context_tokens, self.prompt_tokens)
        return 0 < self.step_s < math.inf and all(0 <= part < math.inf for part in parts)

    def parts_s(self, cost: StepCost) -> NDArray[np.float64]:
        """The time of such a step by its parts, float64 [4]: base, experts, tokens, context."""
        return np.array(
            [
                cost.base_s,
                cost.per_expert_s * self.experts,
                cost.per_token_s * (self.batch + self.prompt_tokens),
                cost.per_context_token_s * self.context_tokens,
            ]
        )


class CostLearner:
    """Learns the step-time lines of the workers of one model.

    Time is given, in seconds of a clock that never goes back.
    """

    def __init__(self) -> None:
        self._workers: dict[str, _Worker] = {}
        self._fleet = np.ones(3)  # the multipliers of all workers

    def heard(self, worker: str, configured: StepCost, report: StepReport, now_s: float) -> None:
        """Learn from a worker's report. One that cannot be true is ignored.

        configured: its line as configured, which is believed while there are no reports.
        """
        if not report.usable:
            return
        parts_s = report.parts_s(configured)
        if not 0 < parts_s.sum() < math.inf:
            return
        known = self._workers.get(worker)
        if known is None or known.configured != configured:
            known = self._workers[worker] = _Worker(configured)
        known.heard(parts_s, report, self._fleet, now_s)

    def forget(self, worker: str) -> None:
        """Forget a worker that has left."""
        self._workers.pop(worker, None)

    def learned(self, now_s: float) -> dict[str, LearnedCost]:
        """The line of each worker of which enough is known."""
        self._workers = {name: worker for name, worker in self._workers.items() if not worker.forgotten(now_s)}
        known = {name: worker for name, worker in self._workers.items() if worker.reports >= LEAST_REPORTS}
        if not known:
            return {}
        workers = list(known.values())
        squares, products = _sum_of([worker.squares for worker in workers]), _sum_of([w.products for w in workers])
        self._fleet = _solved(squares, products, np.ones(3), FLEET_SD)
        times = np.array([worker.time for worker in workers])
        noises = np.array([worker.noise for worker in workers])
        median, most = float(np.median(times)), math.log(SPREAD)
        heard = np.array([worker.heard_lately(now_s) for worker in workers])
        times = median + np.clip(times - median, -most, most) * heard
        # Few reports may agree by chance: the noise of a worker is at least that of the others.
        noises = np.maximum(noises, max(float(np.median(noises)), LEAST_NOISE))
        errors = 1.2533 * noises / np.sqrt([worker.reports for worker in workers])
        factors = np.exp(shared(times, errors) - median)
        shapes, parts_s = (np.array(rows) for rows in zip(*[(w.shape, w.mean_parts_s) for w in workers], strict=True))
        lines = factors[:, None] * shapes
        unit = math.exp(median)
        means_s = unit * (lines * parts_s).sum(axis=1)
        # Speeds are compared at the mean step of the fleet.
        at_point_s = lines @ parts_s.mean(axis=0)
        relative = at_point_s / np.median(at_point_s)
        return {
            name: LearnedCost(_scaled(worker.configured, line), of_median, unit, mean_s)
            for name, worker, line, of_median, mean_s in zip(
                known, workers, lines.tolist(), relative.tolist(), means_s.tolist(), strict=True
            )
        }


def _sum_of(arrays: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """The sum of arrays of one shape."""
    return np.asarray(np.sum(arrays, axis=0))


class _Worker:
    """What was heard of one worker.

    configured: its configured line.
    mean_parts_s: float64 [4], the moving mean of a step's parts by that line.
    squares, products: float64 [3, 3] and [3], the normal equations of the deviations, forgetting.
    shape: float64 [4], the factors on the parts of the configured line that leave its mean step as long as it is.
    time, noise: the logarithm of its time over that of the line with this shape: its median, and how far reports are
        from that.
    """

    def __init__(self, configured: StepCost) -> None:
        self.configured = configured
        self.mean_parts_s = np.zeros(4)
        self.squares = np.zeros((3, 3))
        self.products = np.zeros(3)
        self.shape = np.ones(4)
        self.time = self.noise = 0.0
        self._mean_s = 0.0
        self._multipliers = np.ones(3)
        self._window: deque[tuple[float, float, NDArray[np.float64]]] = deque()
        self._last_s = 0.0

    def heard(self, parts_s: NDArray[np.float64], report: StepReport, fleet: NDArray[np.float64], now_s: float) -> None:
        """Learn from a report. fleet: float64 [3], the multipliers of all workers."""
        window = self._window
        if not window:
            self.mean_parts_s, self._mean_s, self._last_s = parts_s, report.step_s, now_s
        elapsed_s = max(now_s - self._last_s, 0.0)
        if report.prompt_tokens <= PROMPT_TOKENS:
            self._learn_shape(parts_s, report.step_s, elapsed_s)
        share = 1 - math.exp(-elapsed_s / MEAN_S)
        self.mean_parts_s = self.mean_parts_s + share * (parts_s - self.mean_parts_s)
        self._mean_s += share * (report.step_s - self._mean_s)
        window.append((now_s, report.step_s, parts_s))
        self._last_s = now_s
        while len(window) > LEAST_REPORTS and window[0][0] <= now_s - WINDOW_S:
            window.popleft()
        self._multipliers = _solved(self.squares, self.products, fleet, WORKER_SD)
        self.shape = self._shape()
        self._measure()

    def _learn_shape(self, parts_s: NDArray[np.float64], step_s: float, elapsed_s: float) -> None:
        """Add an equation: T / mean T - 1 = sum of m (part - mean part) / mean T. If the line is right, m is 1."""
        kept = math.exp(-elapsed_s / SHAPE_S)
        self.squares, self.products = self.squares * kept, self.products * kept
        longer = step_s / self._mean_s - 1
        deviations = (parts_s - self.mean_parts_s)[1:] / self.mean_parts_s.sum()
        if abs(longer - self._multipliers @ deviations) <= OUTLIER:
            self.squares += np.outer(deviations, deviations)
            self.products += longer * deviations

    def _shape(self) -> NDArray[np.float64]:
        multipliers, mean = self._multipliers, self.mean_parts_s
        total_s, rest_s = float(mean.sum()), float(multipliers @ mean[1:])
        if mean[0] <= 0:  # a configured line without a base: there is nothing that could be longer or shorter
            return np.append(0.0, multipliers * (total_s / rest_s))
        base_s = min(max(total_s - rest_s, LEAST_BASE * total_s), BEND * float(mean[0]))
        shape = np.append(base_s / mean[0], multipliers)
        return shape * (total_s / float(shape @ mean))

    def _measure(self) -> None:
        window = self._window
        steps_s, parts_s = np.array([step_s for _, step_s, _ in window]), np.array([parts for _, _, parts in window])
        logs = np.log(steps_s / (parts_s @ self.shape))
        if _has_changed(logs):
            logs = logs[-LEAST_REPORTS:]
            while len(window) > LEAST_REPORTS:
                window.popleft()
        self.time = float(np.median(logs))
        self.noise = 1.4826 * float(np.median(np.abs(logs - self.time)))

    @property
    def reports(self) -> int:
        """How many reports tell its speed."""
        return len(self._window)

    def heard_lately(self, now_s: float) -> float:
        """1 as long as it reports, and then less and less."""
        return math.exp(-max(now_s - self._last_s - WINDOW_S, 0.0) / FORGET_S)

    def forgotten(self, now_s: float) -> bool:
        """Whether nothing is left of what was heard."""
        return now_s - self._last_s > 10 * FORGET_S


def _has_changed(logs: NDArray[np.float64]) -> bool:
    """Whether the newest LEAST_REPORTS all lie far beyond the others, on the same side. Then the others are stale."""
    older, newest = logs[:-LEAST_REPORTS], logs[-LEAST_REPORTS:]
    if len(older) < 1:
        return False
    apart = newest - float(np.median(older))
    return bool(apart.min() > CHANGED or apart.max() < -CHANGED)


def _solved(
    squares: NDArray[np.float64], products: NDArray[np.float64], centre: NDArray[np.float64], sd: float
) -> NDArray[np.float64]:
    """The multipliers that fit best, drawn to `centre` as far as data are few, and within their bounds."""
    strength = (REPORT_SD / sd) ** 2 * np.eye(3)
    found = centre + np.linalg.solve(squares + strength, products - squares @ centre)
    return np.asarray(np.clip(found, 1 / BEND, BEND))


def _scaled(cost: StepCost, factors: list[float]) -> StepCost:
    base, expert, token, context = factors
    return StepCost(
        cost.base_s * base,
        cost.per_expert_s * expert,
        cost.per_token_s * token,
        cost.per_context_token_s * context,
    )


def shared(values: NDArray[np.float64], errors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Give values that noise cannot tell apart their common mean. Both arrays and the result are float64 [W].

    The two nearest groups become one as long as their means differ by less than ALIKE, or by less than ERRORS standard
    errors of their difference.
    """
    order = np.argsort(values)
    means, weights = values[order], 1 / errors[order] ** 2
    members = [[at] for at in order.tolist()]
    while len(means) > 1:
        gaps = np.diff(means)
        limits = np.maximum(ALIKE, ERRORS * np.sqrt(1 / weights[:-1] + 1 / weights[1:]))
        first = int(np.argmin(gaps / limits))
        if gaps[first] >= limits[first]:
            break
        weight = weights[first] + weights[first + 1]
        means[first] = (means[first] * weights[first] + means[first + 1] * weights[first + 1]) / weight
        weights[first] = weight
        members[first] += members.pop(first + 1)
        means, weights = np.delete(means, first + 1), np.delete(weights, first + 1)
    result = np.empty(len(values))
    for mean, group in zip(means, members, strict=True):
        result[group] = mean
    return result
