"""Expected-union routing: send a request to the worker where it adds the least decode time.

The added time follows from the experts that the request will activate. Let p[r] be the probabilities that a decode step
of request r activates each (layer, expert). A worker with the requests R then activates U = sum(1 - q) distinct experts
per step in expectation, where q = prod over R of (1 - p[r]). One more request adds dU = q . p. The step time
T = a + b U + c B + d context grows by dT = b dU + c + d context(r). The newcomer pays T + dT in every step, and each of
the B requests already there pays dT.

A worker that also computes the prompt (aggregated serving) asks for more: time once for the prompt, which
`eldr.policies.prefill` prices. Divided by the steps that the request will probably make, it is added to the cost.

Two more terms look beyond the time added now:

- The *self-anchor* rewards sending a request where similar ones went recently. Every worker keeps a moving average of
  the direction in which the profiles of its requests differ from the fleet's mean. A request pays for its distance to
  the nearest direction. In this way workers find their own zones without a fit, and the zones follow the traffic.
- The *tail guard* leaves out a worker if its step would become longer than the mean step elsewhere by more than
  locality saves on that mean. Without it locality may fill one worker with its kind of request, and such workers make
  the tail of TPOT. The saving is known: the mean profile tells how many experts random batches would activate. The tail
  is made at the fleet's busiest times, so at all others a step may be as long as it could be then.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from eldr import kernels
from eldr.activation import ActivationModel, own_frequencies
from eldr.cost import DEFAULT_PRESET, PRESETS, CostModel
from eldr.counts import ExpertCounts
from eldr.policies.base import Decision, DecodeRequest, ExpectedStep, Picture, Policy
from eldr.policies.learned import Learned
from eldr.policies.placement import Placement
from eldr.policies.prefill import Backlog, OutputLength
from eldr.policies.prefix_affinity import most_cached
from eldr.policies.request_model import Arrival, CountsPredictor, PromptPredictor, first_means
from eldr.policies.residents import HostShare
from eldr.policies.rows import WorkerRows
from eldr.policies.shares import Share
from eldr.policies.unions import Geometry, Unions
from eldr.policies.worker_costs import LearnedCost, WorkerCosts
from eldr.prompt.model import ProfileMap, PromptModel

# Weight of the self-anchor per unit of cosine similarity, relative to the expert time of an average worker's batch.
ANCHOR = 0.1
# How much longer than the mean a step may become, in units of what locality saves on the mean step: at 1, up to the
# mean step of a fleet routed by load alone. GUARD_EXPERT_SHARE of the expert time is allowed in addition, because steps
# differ that much by chance even if nothing can be saved.
TAIL_GUARD = 1.0
GUARD_EXPERT_SHARE = 0.01
# Weight of the time that a prompt costs. 1 is its true share at once. More finds more cached prefixes, which the next
# requests find again, and costs nothing in TPOT up to about here.
PREFILL_WEIGHT = 4.0
# Tokens of a step of an aggregated worker, decodes included. vLLM's default of max_num_batched_tokens on most GPUs.
PREFILL_CHUNK = 2048


class ExpectedUnion(Policy):
    """Sends each request to the worker where it adds the least decode time.

    predictor: a fitted activation model. Without one the prompt's own expert frequencies are used.
    prompts: a fitted prompt model, for requests without counts. It can be learned later (`learned`).
    signature: one of SIGNATURES: what requests are known by.
    cost, scope: the step-time model of every worker.
    worker_costs: step-time models of single workers, if hardware differs. Learned ones (`cost_learned`) replace them.
    others_weight: the weight of the time added to the requests already there. 1 is their true share in steady state.
        0.5 favours the tail of TPOT, 2 its median. With a tail guard it matters little.
    anchor: the weight of the self-anchor. 0 turns it off.
    tail_guard: the margin of the tail guard, in units of what locality saves. At 1 hardly any step becomes longer than
        the mean of a fleet routed by load. Larger favours the median, smaller the tail. Infinity turns it off.
    step_tokens: the number of independent tokens that a request gains per step. More than 1 with speculative decoding
        (`eldr.activation.of_a_step`).
    ranks: expert-parallel ranks per worker. They share its experts, so that a step waits for 1/R of them. Which rank
        is the busiest does not matter to the choice (docs/composition.md).
    host: how much of each layer the workers' devices hold. Missing experts then cost what they take to be copied or
        computed (`eldr.policies.residents`). None if they hold all.
    prefill_weight: the weight of the time that a prompt costs if its worker computes it. 1 is its true share. More
        favours TTFT.
    prefill_chunk: the tokens that an aggregated worker computes in a step, at most, decodes included.
    seed: the seed of random choices.

    A request without usable counts goes where the fleet's mean profile adds least. The state is exact: after any number
    of starts and finishes it depends only on the running requests and the workers.

    Requests that other routers started count as its own do. They count from when their worker has joined and the model
    is known here, whatever came first. Unions and waiting prompts are then the same in all routers. The moving averages
    are nearly so: the fleet's mean profile and the anchor learn from all requests, but of those of other routers they
    see the codes. The mean frequencies of prompts, the length of outputs and the memory of the tail guard are those of
    the router's own requests, which are a sample of all.
    """

    name = "expected-union"

    def __init__(
        self,
        predictor: ActivationModel | None = None,
        *,
        prompts: PromptModel | None = None,
        signature: str = "auto",
        cost: CostModel = PRESETS[DEFAULT_PRESET],
        scope: str = "step",
        worker_costs: Mapping[str, CostModel] | None = None,
        others_weight: float = 1.0,
        anchor: float = ANCHOR,
        tail_guard: float = TAIL_GUARD,
        step_tokens: float = 1.0,
        ranks: int = 1,
        host: HostShare | None = None,
        prefill_weight: float = PREFILL_WEIGHT,
        prefill_chunk: int = PREFILL_CHUNK,
        seed: int = 0,
    ) -> None:
        self._predictor = predictor
        self._step_tokens = step_tokens
        self._by_counts = CountsPredictor(predictor, step_tokens)
        self._by_prompt = PromptPredictor(prompts, step_tokens)
        self._prompts = prompts
        self._uses_counts = signature != "prompt"
        self._uses_prompts = signature != "counts"
        self._worker_costs = WorkerCosts(cost, scope, worker_costs or {}, step_tokens, ranks)
        self._weights = kernels.PlacementWeights(others_weight, anchor, tail_guard, GUARD_EXPERT_SHARE)
        self._host = host
        self._prefill_weight = prefill_weight
        self._prefill_chunk = prefill_chunk
        self._backlog = Backlog()
        self._length = OutputLength()
        self._rng = random.Random(seed)
        self._rows = WorkerRows()
        self._running: dict[tuple[str, str], Share] = {}
        # By worker, which need not have joined, in the order of hearing: averages depend on it.
        self._elsewhere: dict[str, dict[Share, None]] = {}
        self._latest: Arrival | None = None
        self._placement: Placement | None = None
        if predictor is not None:
            experts = len(predictor.mean_profile) // predictor.layers
            self._make_placement(predictor.layers, experts, predictor.top_k)
        elif prompts is not None and self._uses_prompts:
            self._adopt(prompts.profiles)

    def _make_placement(self, layers: int, experts: int, top_k: int) -> Placement:
        geometry = Geometry(layers, experts)
        means = first_means(geometry, top_k, self._predictor, self._by_prompt.profiles, self._step_tokens)
        self._placement = placement = Placement(geometry, top_k, self._weights, means, self._prefill_chunk, self._host)
        for worker in self._rows.names:
            self._append(placement, worker)
        return placement

    def _append(self, placement: Placement, worker: str) -> None:
        """Add a row for a worker that has joined, with what runs there already."""
        placement.append_worker(self._worker_costs.step_cost(worker, placement.shape[0]))
        row = self._rows.row_of[worker]
        for (_, where), share in self._running.items():
            if where == worker:
                placement.add(row, share)
        for share in self._elsewhere.get(worker, ()):
            placement.add(row, share)

    def _adopt(self, profiles: ProfileMap) -> None:
        if self._placement is None:
            self._make_placement(profiles.layers, profiles.experts, profiles.top_k)

    def wants_words(self, with_counts: bool) -> bool:
        return self._uses_prompts and not (with_counts and self._uses_counts)

    @property
    def prompts(self) -> PromptModel | None:
        return self._prompts

    @property
    def corrects_counts(self) -> bool:
        return self._uses_counts

    @property
    def predictor(self) -> ActivationModel | None:
        return self._predictor

    def learned(self, learned: Learned) -> None:
        if self._uses_counts:
            self._by_counts.learned(learned)
        if self._uses_prompts:
            self._by_prompt.learned(learned)
            if learned.profiles is not None:
                self._adopt(learned.profiles)

    def _placement_for(self, counts: ExpertCounts | None) -> Placement | None:
        """The placement. A model or the first usable counts make it; until then it is None."""
        if self._placement is None and self._uses_counts and counts is not None:
            return self._make_placement(counts.layers, counts.experts, counts.top_k)
        return self._placement

    def choose(self, request: DecodeRequest, in_flight: Mapping[str, int]) -> Decision:
        placement = self._placement_for(request.counts)
        if placement is None:
            return Decision(most_cached(request, in_flight, self._rng), _why_unusable(request.counts))
        self._latest = arrival = self._look_at(request, placement)
        workers = list(in_flight)
        best, _ = self._costs(request, arrival, placement, in_flight)
        return Decision(workers[best], arrival.reason)

    def costs(self, request: DecodeRequest, in_flight: Mapping[str, int]) -> dict[str, float] | None:
        """Return the costs that `choose` compares, or None while the model is unknown.

        A cost is the seconds of decode time per step that `request` would add on a worker, anchor and prefill
        included. It is infinity for a worker that the tail guard rules out.
        """
        placement = self._placement_for(request.counts)
        if placement is None:
            return None
        _, costs = self._costs(request, self._look_at(request, placement), placement, in_flight)
        return dict(zip(in_flight, costs.tolist(), strict=True))

    def _costs(
        self, request: DecodeRequest, arrival: Arrival, placement: Placement, in_flight: Mapping[str, int]
    ) -> tuple[int, NDArray[np.float64]]:
        """The position of the best of the W eligible workers, and the cost of each, float64 [W]."""
        workers, load = list(in_flight), list(in_flight.values())
        rows = self._rows.rows(workers)
        best, costs = placement.costs(arrival, rows, load)
        if request.computes_prompt:
            waiting = self._backlog.tokens
            best = placement.add_prefill(
                costs,
                request.prompt_tokens,
                rows,
                load,
                [waiting.get(worker, 0) for worker in workers],
                [request.uncached_tokens(worker) for worker in workers],
                self._prefill_weight / self._length.steps(request.max_tokens),
            )
        return best, costs

    @property
    def unions(self) -> Unions | None:
        """The experts that each worker's running requests activate together. None while the model is unknown."""
        return None if self._placement is None else self._placement.unions

    def row(self, worker: str) -> int:
        """The worker's row in `unions`."""
        return self._rows.row_of[worker]

    def _look_at(self, request: DecodeRequest, placement: Placement) -> Arrival:
        """Return the request with its profile. If nothing is known of it, that is the fleet's mean profile."""
        counts, means = request.counts, placement.means
        if self._uses_counts and counts is not None and _shape(counts) == placement.shape:
            frequency = own_frequencies(counts, means.frequency)
            profile = self.predict(request, counts, frequency)
            direction = placement.anchor.direction(profile, means.profile)
            return Arrival(request, profile, frequency, direction, "expected_union", True, self._by_counts.has_learned)
        latent = self._by_prompt.latent(request) if self._uses_prompts else None
        predicted = None if latent is None else self._by_prompt.profile(latent)
        if predicted is not None and len(predicted) == len(means.profile):
            direction = placement.anchor.direction(predicted, means.profile)
            return Arrival(request, predicted, None, direction, "expected_union_prompt", True, True)
        return Arrival(request, means.profile.copy(), None, None, _why_unusable(counts), False)

    def predict(
        self, request: DecodeRequest, counts: ExpertCounts, frequency: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Predict the probability that one decode step of `request` activates each expert, float32 [D].

        request: the request.
        counts: its expert counts.
        frequency: float32 [D], its own expert frequencies, mixed with the fleet's mean.
        """
        means = None if self._placement is None else self._placement.means
        return self._by_counts.profile(counts, frequency, means)

    def started(self, request: DecodeRequest, worker: str) -> None:
        row, placement = self._rows.row_of[worker], self._placement_for(request.counts)
        codes, known = None, False
        if placement is not None:
            arrival = self._latest
            if arrival is None or arrival.request_id != request.request_id:
                arrival = self._look_at(request, placement)
            codes, known = placement.start(row, arrival), arrival.known
        computes = request.computes_prompt
        uncached = request.uncached_tokens(worker) if computes else 0
        share = Share(codes, request.prompt_tokens, known, computes, uncached)
        self._running[request.request_id, worker] = share
        if computes:
            self._backlog.add(worker, share)

    def prompt_computed(self, request: DecodeRequest, worker: str) -> None:
        share = self._running.get((request.request_id, worker))
        if share is not None:
            self._backlog.remove(worker, share)

    def finished(self, request: DecodeRequest, worker: str) -> None:
        if request.computes_prompt:
            self._length.ended(request.generated_tokens)
        share = self._running.pop((request.request_id, worker), None)
        if share is not None:
            self._ended(worker, share)

    def _ended(self, worker: str, share: Share) -> None:
        """A running request has ended, which may have been another router's."""
        if share.computes_prompt:
            self._backlog.remove(worker, share)
        row = self._rows.row_of.get(worker)
        if row is not None and self._placement is not None:
            self._placement.remove(row, share)

    def share(self, request: DecodeRequest, worker: str) -> Share | None:
        return self._running.get((request.request_id, worker))

    def elsewhere_started(self, worker: str, share: Share) -> None:
        there = self._elsewhere.setdefault(worker, {})
        if share in there:
            return
        there[share] = None
        if share.computes_prompt:
            self._backlog.add(worker, share)
        row = self._rows.row_of.get(worker)
        if row is not None and self._placement is not None:
            self._placement.add(row, share)

    def elsewhere_prompt_computed(self, worker: str, share: Share) -> None:
        self._backlog.remove(worker, share)

    def elsewhere_finished(self, worker: str, share: Share) -> None:
        there = self._elsewhere.get(worker)
        if there is None or share not in there:
            return
        del there[share]
        if not there:
            del self._elsewhere[worker]
        self._ended(worker, share)

    def joined(self, worker: str) -> None:
        self._rows.append(worker)
        if self._placement is not None:
            self._append(self._placement, worker)

    @property
    def prices_steps(self) -> bool:
        return True

    def expected_step(self, worker: str) -> ExpectedStep | None:
        placement = self._placement
        if placement is None:
            return None
        layers, experts, _ = placement.shape
        row = self._rows.row_of[worker]
        unions = placement.unions
        return ExpectedStep(
            float(unions.union[row]), layers, experts, unions.context[row], placement.reads_per_expert(row)
        )

    def cost_learned(self, worker: str, learned: LearnedCost) -> None:
        self._worker_costs.learn(worker, learned.cost)
        if self._placement is not None:
            self._placement.set_cost(self._rows.row_of[worker], learned.cost)

    def left(self, worker: str) -> None:
        self._worker_costs.forget(worker)
        row = self._rows.remove(worker)
        if self._placement is not None:
            self._placement.remove_worker(row)

    def picture(self) -> Picture | None:
        if self._placement is None:
            return None
        _, experts, _ = self._placement.shape
        rows = self._placement.unions.by_layer().tolist()
        return Picture("expected_union", dict(zip(self._rows.names, rows, strict=True)), experts)


def _shape(counts: ExpertCounts) -> tuple[int, int, int]:
    return counts.layers, counts.experts, counts.top_k


def _why_unusable(counts: ExpertCounts | None) -> str:
    """The reason to give for a decision without counts that fit the model."""
    return "no_signature" if counts is None else "wrong_geometry"
