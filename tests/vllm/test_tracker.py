"""RequestTracker and ExpertCounter under a small scheduler that does everything to blocks that vLLM's does.

The scheduler shares prefix blocks, prefills in chunks, preempts, evicts, loads KV from elsewhere, fails loads, aborts
requests in any state and may let tokens be drafted. It knows for every slot which token was computed there, so it knows
what the counts of a prompt must be, and when there can be none.
"""

from __future__ import annotations

import random
import zlib
from collections import deque
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from eldr.counts import ExpertCounts, decode_counts
from eldr.engines.vllm.scheduler import RequestTracker
from eldr.engines.vllm.table import BlockTable
from eldr.engines.vllm.worker import ExpertCounter
from eldr.expert_rows import decode_rows

LAYERS, EXPERTS, TOP_K = 2, 6, 2
BLOCK_SIZE, BLOCKS, STEP_TOKENS = 4, 20, 11
OTHER_GROUP = [99]  # blocks of a sliding-window group, which come first


def experts_of(prefix: tuple[int, ...]) -> NDArray[np.int32]:
    """What the last token of `prefix` chooses: [L, k]."""
    rng = np.random.default_rng(zlib.crc32(repr(prefix).encode()))
    return np.stack([rng.permutation(EXPERTS)[:TOP_K] for _ in range(LAYERS)]).astype(np.int32)


@dataclass
class Job:
    name: str
    prompt: list[int]
    output: list[int]  # what it will generate
    load: bool
    generated: int = 0
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    countable: bool | None = None
    restarted: bool = False
    recorded: bool = True
    drafts: list[int] = field(default_factory=list)  # computed in this step after the other tokens, right or wrong

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.output[: self.generated]


class Capture:
    """What the model's hooks would have seen."""

    layers, experts, top_k = LAYERS, EXPERTS, TOP_K

    def __init__(self) -> None:
        self.slots = torch.full((STEP_TOKENS,), -1)
        self.device_buffer = torch.zeros((STEP_TOKENS, LAYERS, TOP_K), dtype=torch.int32)

    def complete(self, tokens: int) -> bool:
        return tokens <= STEP_TOKENS


class Reports:
    """Keeps what it is told, of most requests."""

    def __init__(self) -> None:
        self.told: dict[str, ExpertCounts] = {}
        self.missing = 0

    def draws(self, request_id: str) -> bool:
        return not request_id.endswith("7")

    def put(self, request_id: str, counts: ExpertCounts) -> None:
        assert request_id not in self.told
        self.told[request_id] = counts

    def incomplete(self) -> None:
        self.missing += 1


class Simulation:
    def __init__(self, rng: random.Random, draft_tokens: int = 0) -> None:
        self.rng = rng
        self.draft_tokens = draft_tokens
        self.drafted: set[int] = set()  # blocks
        self.reports = Reports()
        self.tracker = RequestTracker(group=1, block_size=BLOCK_SIZE, draft_tokens=draft_tokens, reports=self.reports)
        self.capture = Capture()
        self.counter = ExpertCounter(self.capture, BlockTable(BLOCKS, BLOCK_SIZE, LAYERS, EXPERTS, device="cpu"))  # type: ignore[arg-type]
        self.free = deque(range(BLOCKS))
        self.users = dict.fromkeys(range(BLOCKS), 0)
        self.cache: dict[tuple[int, ...], int] = {}  # prefix that ends with a full block -> the block
        self.computed_here: dict[int, bool] = {}  # slot -> whether its token was computed rather than loaded
        self.waiting: deque[Job] = deque()
        self.loading: list[Job] = []
        self.running: list[Job] = []
        self.outcomes: list[str] = []
        self.active: list[int] = []

    # ---- blocks ----

    def take(self, count: int) -> list[int] | None:
        if count > len(self.free):
            return None
        taken = [self.free.popleft() for _ in range(count)]
        self.cache = {prefix: block for prefix, block in self.cache.items() if block not in taken}
        self.drafted -= set(taken)
        for block in taken:
            self.users[block] = 1
        return taken

    def release(self, job: Job) -> None:
        for block in reversed(job.blocks):
            self.users[block] -= 1
            if self.users[block] == 0:
                self.free.append(block)
        job.blocks, job.computed = [], 0

    def hits(self, job: Job) -> list[int]:
        found = []
        for end in range(BLOCK_SIZE, len(job.tokens), BLOCK_SIZE):  # never the last token
            block = self.cache.get(tuple(job.tokens[:end]))
            if block is None:
                break
            found.append(block)
        return found

    def publish(self, job: Job, computed: int) -> None:
        for end in range(BLOCK_SIZE, computed + 1, BLOCK_SIZE):
            self.cache.setdefault(tuple(job.tokens[:end]), job.blocks[end // BLOCK_SIZE - 1])

    def missing(self, job: Job, tokens: int) -> int:
        return -(-tokens // BLOCK_SIZE) - len(job.blocks)

    # ---- one step ----

    def step(self) -> None:
        self.finish_loads()
        budget = STEP_TOKENS
        scheduled: dict[str, tuple[Job, int]] = {}
        new, cached, fresh = [], [], {}
        for job in list(self.running):
            if job not in self.running:
                continue
            count = min(len(job.tokens) - job.computed, budget)
            if job.computed + count == len(job.tokens) > len(job.prompt):
                job.drafts = self.draft(job, budget - count)
                count += len(job.drafts)
            while count and (got := self.take(max(0, self.missing(job, job.computed + count)))) is None:
                victim = self.running.pop()
                self.release(victim)
                victim.restarted = True
                self.waiting.appendleft(victim)
                victim.drafts = []
                if victim is job:
                    count = 0
            if count:
                assert got is not None
                fresh[job.name] = got
                job.blocks += got
                scheduled[job.name] = (job, count)
                cached.append(job)
                budget -= count
        while self.waiting and budget and len(self.running) < 4:
            job = self.waiting[0]
            if len(scheduled) == len(self.running):  # vLLM does not fill up after a prefill in the same step
                job.drafts = [-1] * self.draft_tokens
            admitted = self.admit(job, budget)
            if admitted is None:
                job.drafts = []
                break
            count = admitted
            self.waiting.popleft()
            if count:
                self.running.append(job)
                scheduled[job.name] = (job, count)
                new.append(job)
                budget -= count
        self.compute(scheduled, self.output(scheduled, new, cached, fresh))

    def admit(self, job: Job, budget: int) -> int | None:
        """Tokens to compute, 0 if a load starts instead, None if there are too few blocks."""
        if job.computed == 0:
            found = self.hits(job)
            self.tracker.looked_up(job.name, len(found) * BLOCK_SIZE)
            # One load at a time: whatever holds blocks without running must leave enough for one job to finish.
            holding = self.loading or any(other.blocks for other in self.waiting)
            load = job.load and not holding and len(found) * BLOCK_SIZE < len(job.prompt)
            for block in found:
                if self.users[block] == 0:
                    self.free.remove(block)
                self.users[block] += 1
            job.blocks, job.computed = found, len(found) * BLOCK_SIZE
            end = len(job.prompt) if load else self.first_step_end(job, budget)
            got = self.take(max(0, self.missing(job, end)))
            if got is None:
                self.release(job)
                return None
            job.blocks += got
            self.tracker.allocated(job.name, job.blocks, load=load)
            if load:
                job.load = False
                self.loading.append(job)
                return 0
        else:
            end = self.first_step_end(job, budget)
            got = self.take(max(0, self.missing(job, end)))
            if got is None:
                return None
            job.blocks += got
            self.tracker.allocated(job.name, job.blocks, load=False)
        return end - job.computed

    def first_step_end(self, job: Job, budget: int) -> int:
        """A step that computes a single token is filled up with placeholders of drafts, if it has none."""
        count = len(job.tokens) - job.computed
        if count != 1 or job.computed == 0 or budget < 1 + len(job.drafts):
            job.drafts = []
        return job.computed + min(count, budget) + len(job.drafts)

    def draft(self, job: Job, budget: int) -> list[int]:
        """Drafts for the next step, so few that the job cannot end with one."""
        count = max(0, min(self.rng.randint(0, self.draft_tokens), budget, len(job.output) - job.generated - 1))
        right = job.output[job.generated : job.generated + count]
        return [token if self.rng.random() < 0.7 else self.rng.randrange(3) for token in right]

    def finish_loads(self) -> None:
        for job in list(self.loading):
            if self.rng.random() < 0.5:
                continue
            self.loading.remove(job)
            if self.rng.random() < 0.3:  # the load failed
                self.release(job)
            else:
                for position in range(job.computed, len(job.prompt)):
                    self.computed_here[self.slot(job, position)] = False
                self.publish(job, len(job.prompt))
                job.computed = min(len(job.prompt), len(job.tokens) - 1)
            if self.rng.random() < 0.2:
                self.finish(job)  # aborted between load and first step: its blocks stay cached
            else:
                self.waiting.appendleft(job)

    def slot(self, job: Job, position: int) -> int:
        return job.blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE

    def output(self, scheduled: dict[str, Any], new: list[Job], cached: list[Job], fresh: dict[str, Any]) -> Any:
        # vLLM's first model runner hears of a preempted request as "resumed", its second as new again.
        resumed = [job for job in new if job.restarted and self.rng.random() < 0.5]
        new = [job for job in new if job not in resumed]
        known = cached + resumed
        return SimpleNamespace(
            total_num_scheduled_tokens=sum(count for _, count in scheduled.values()),
            num_scheduled_tokens={name: count for name, (_, count) in scheduled.items()},
            scheduled_spec_decode_tokens={name: job.drafts for name, (job, _) in scheduled.items() if job.drafts},
            scheduled_new_reqs=[
                SimpleNamespace(
                    req_id=job.name, block_ids=(OTHER_GROUP, list(job.blocks)), num_computed_tokens=job.computed
                )
                for job in new
            ],
            scheduled_cached_reqs=SimpleNamespace(
                req_ids=[job.name for job in known],
                resumed_req_ids={job.name for job in resumed},
                new_block_ids=[
                    (OTHER_GROUP, list(job.blocks))
                    if job in resumed
                    else ((OTHER_GROUP, fresh[job.name]) if fresh[job.name] else None)
                    for job in known
                ],
                num_computed_tokens=[job.computed for job in known],
            ),
        )

    def compute(self, scheduled: dict[str, tuple[Job, int]], output: Any) -> None:
        plan = self.tracker.plan(output)
        batch = [(job, p) for job, count in scheduled.values() for p in range(job.computed, job.computed + count)]
        self.rng.shuffle(batch)
        self.capture.slots.fill_(-1)
        decoding = []
        for row, (job, position) in enumerate(batch):
            self.capture.slots[row] = self.slot(job, position)
            tokens = job.tokens + job.drafts
            self.capture.device_buffer[row] = torch.from_numpy(experts_of(tuple(tokens[: position + 1])))
            if position < len(job.tokens):
                self.computed_here[self.slot(job, position)] = True
            if job.computed >= len(job.prompt) or len(job.prompt) <= position < len(job.tokens):
                decoding.append(self.capture.device_buffer[row].numpy().copy())
        self.counter.count(plan)
        if decoding:
            self.active += [len(set(np.stack(decoding)[:, layer].ravel().tolist())) for layer in range(LAYERS)]
        ended = []
        for job, count in scheduled.values():
            if job.drafts and job.computed >= len(job.prompt):
                self.drafted |= set(job.blocks[job.computed // BLOCK_SIZE : -(-(job.computed + count) // BLOCK_SIZE)])
            accepted = 0
            while accepted < len(job.drafts) and job.drafts[accepted] == job.output[job.generated]:
                job.generated += 1
                accepted += 1
            job.computed += count - len(job.drafts) + accepted
            job.drafts = []
            self.publish(job, job.computed)
            if job.computed >= len(job.prompt) and job.countable is None:
                used = job.blocks[: -(-len(job.prompt) // BLOCK_SIZE)]
                job.countable = not self.drafted & set(used) and all(
                    self.computed_here[self.slot(job, p)] for p in range(len(job.prompt))
                )
            if job.computed == len(job.tokens):
                job.generated += 1
                if job.generated == len(job.output):
                    ended.append(job)
        answers = [(job, self.finish(job)) for job in ended]
        if result := self.counter.take_result():
            self.tracker.received(result)
        for job, answer in answers:
            self.check(job, answer)

    def finish(self, job: Job) -> dict[str, Any] | None:
        if job in self.running:
            self.running.remove(job)
        answer = self.tracker.finished(job.name, job.generated, None)
        self.release(job)
        return answer

    def check(self, job: Job, answer: dict[str, Any] | None) -> None:
        self.check_report(job)
        if not job.recorded:
            assert answer is None
            return
        assert answer is not None
        # A job that could not be counted may be preempted, and counted when its prompt is computed again.
        if job.countable or "unavailable" not in answer["eldr_counts"]:
            counts = decode_counts(answer["eldr_counts"])
            expected = np.zeros((LAYERS, EXPERTS), dtype=np.int64)
            for end in range(1, len(job.prompt) + 1):
                for layer, chosen in enumerate(experts_of(tuple(job.prompt[:end]))):
                    expected[layer, chosen] += 1
            np.testing.assert_array_equal(counts.counts, expected)
            self.outcomes.append("counted")
        else:
            assert answer["eldr_counts"]["unavailable"] == "kv_load" or job.restarted or self.draft_tokens
            self.outcomes.append("unavailable")
        if self.draft_tokens:
            assert answer["eldr_decode_experts"]["unavailable"] == "speculative_decoding"
            return
        everything = job.prompt + job.output
        expected_rows = [experts_of(tuple(everything[: len(job.prompt) + i])) for i in range(1, len(job.output))]
        rows = decode_rows(answer["eldr_decode_experts"])
        assert rows.shape == (len(job.output) - 1, LAYERS, TOP_K)
        np.testing.assert_array_equal(rows.reshape(-1), np.array(expected_rows, dtype=int).reshape(-1))

    def check_report(self, job: Job) -> None:
        """Each decode row counts once, however often it was computed."""
        told = self.reports.told.pop(job.name, None)
        if self.draft_tokens or not self.reports.draws(job.name) or len(job.output) == 1:
            assert told is None
            return
        assert told is not None
        expected = np.zeros((LAYERS, EXPERTS), dtype=np.int64)
        for end in range(1, len(job.output)):
            for layer, chosen in enumerate(experts_of(tuple(job.prompt + job.output[:end]))):
                expected[layer, chosen] += 1
        np.testing.assert_array_equal(told.counts, expected)
        assert told.prompt_tokens == len(job.output) - 1
        told.check()
        self.outcomes.append("reported")


def simulate(seed: int, jobs: int, draft_tokens: int = 0) -> Simulation:
    rng = random.Random(seed)
    simulation = Simulation(rng, draft_tokens)
    stems: list[list[int]] = [[]]
    submitted = 0
    while submitted < jobs or simulation.waiting or simulation.running or simulation.loading:
        while submitted < jobs and rng.random() < 0.4:
            stem = rng.choice(stems)
            prompt = stem + [rng.randrange(3) for _ in range(rng.randrange(1, 14))]
            prompt = prompt[:24]
            stems.append(prompt)
            output = [rng.randrange(3) for _ in range(rng.randrange(1, 12))]
            job = Job(f"job{submitted}", prompt, output, load=rng.random() < 0.25)
            job.recorded = rng.random() < 0.8
            simulation.tracker.arrived(job.name, len(prompt), {"eldr_record": True} if job.recorded else None)
            simulation.waiting.append(job)
            submitted += 1
        if simulation.running and rng.random() < 0.03:
            simulation.finish(rng.choice(simulation.running))
        simulation.step()
    assert simulation.reports.missing == 0
    return simulation


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), jobs=st.integers(1, 40), draft_tokens=st.sampled_from([0, 0, 1, 3]))
def test_counts_are_exact_or_said_to_be_missing(seed: int, jobs: int, draft_tokens: int) -> None:
    simulation = simulate(seed, jobs, draft_tokens)
    assert simulation.counter.take_distinct() == simulation.active


@pytest.mark.parametrize("draft_tokens", [0, 3])
def test_the_simulation_reaches_both_outcomes(draft_tokens: int) -> None:
    outcomes = [outcome for seed in range(5) for outcome in simulate(seed, 40, draft_tokens).outcomes]
    assert outcomes.count("counted") > 50
    assert outcomes.count("unavailable") > 10
    assert (outcomes.count("reported") > 50) == (draft_tokens == 0)


def test_blocks_beyond_the_hit_that_vllm_settled_on_are_emptied() -> None:
    """A hybrid model's cache may offer the connector a deeper hit than the request starts with in the end."""
    tracker = RequestTracker(group=0, block_size=4)
    tracker.arrived("r", 14, None)
    tracker.looked_up("r", 12)
    tracker.allocated("r", [5, 6, 7, 8], load=False)
    step = SimpleNamespace(
        total_num_scheduled_tokens=6,
        num_scheduled_tokens={"r": 6},
        scheduled_spec_decode_tokens={},
        scheduled_new_reqs=[SimpleNamespace(req_id="r", block_ids=([5, 6, 7, 8],), num_computed_tokens=8)],
        scheduled_cached_reqs=SimpleNamespace(req_ids=[]),
    )
    plan = tracker.plan(step)
    assert set(plan.taken) == {7, 8}
    assert not plan.loaded


def test_drafts_that_turn_out_to_be_rejected_after_the_next_step_was_scheduled() -> None:
    """With asynchronous scheduling, the generated tokens are at lower positions than the scheduler assumes."""
    tracker = RequestTracker(group=0, block_size=4, draft_tokens=3)
    tracker.arrived("decode", 6, None)
    tracker.arrived("prefill", 2, None)

    def step(**scheduled: tuple[int, int]) -> list[int] | None:
        new = {"decode": [5, 6, 7, 8], "prefill": [9]}
        fresh = [name for name, (computed, _) in scheduled.items() if computed == 0]
        known = [name for name in scheduled if name not in fresh]
        return tracker.plan(
            SimpleNamespace(
                total_num_scheduled_tokens=sum(tokens for _, tokens in scheduled.values()),
                num_scheduled_tokens={name: tokens for name, (_, tokens) in scheduled.items()},
                scheduled_spec_decode_tokens={name: [-1, -1, -1] for name in known},
                scheduled_new_reqs=[
                    SimpleNamespace(req_id=name, block_ids=(new[name],), num_computed_tokens=0) for name in fresh
                ],
                scheduled_cached_reqs=SimpleNamespace(
                    req_ids=known,
                    resumed_req_ids=set(),
                    new_block_ids=[None for _ in known],
                    num_computed_tokens=[scheduled[name][0] for name in known],
                ),
            )
        ).decode_slots

    assert step(decode=(0, 6)) == []
    assert step(decode=(6, 4)) is None  # all tokens are generated ones
    slots = step(decode=(10, 4), prefill=(0, 2))
    assert slots is not None
    prompt = {5 * 4, 5 * 4 + 1, 5 * 4 + 2, 5 * 4 + 3, 6 * 4, 6 * 4 + 1}
    assert not prompt & set(slots)
    for rejected in range(4):
        assert {[5, 6, 7, 8][p // 4] * 4 + p % 4 for p in range(10 - rejected, 14 - rejected)} <= set(slots)


def test_requests_that_ask_for_nothing_get_nothing() -> None:
    tracker = RequestTracker(group=0, block_size=4)
    tracker.arrived("plain", 5, None)
    tracker.arrived("decode", 5, {"do_remote_prefill": True})
    assert tracker.finished("plain", 3, None) is None
    assert tracker.finished("decode", 3, None) is None
    assert tracker.finished("unknown", 3, None) is None


def test_an_aborted_prefill_is_answered_as_vllm_answers() -> None:
    tracker = RequestTracker(group=0, block_size=4)
    tracker.arrived("r", 5, {"do_remote_decode": True})
    assert tracker.finished("r", 0, None) is None


def test_a_hand_off_without_a_result_says_so() -> None:
    tracker = RequestTracker(group=0, block_size=4)
    tracker.arrived("r", 5, {"do_remote_decode": True})
    answer = tracker.finished("r", 1, {"do_remote_prefill": True})
    assert answer == {"do_remote_prefill": True, "eldr_counts": {"v": 2, "unavailable": "not_counted"}}


def test_a_recording_without_a_result_says_so() -> None:
    tracker = RequestTracker(group=0, block_size=4)
    tracker.arrived("r", 5, {"eldr_record": True})
    nothing = {"v": 2, "unavailable": "not_counted"}
    assert tracker.finished("r", 2, None) == {"eldr_counts": nothing, "eldr_decode_experts": nothing}


@pytest.mark.parametrize("value", ["true", 1, None, {}])
def test_only_true_asks_for_a_recording(value: object) -> None:
    tracker = RequestTracker(group=0, block_size=4)
    tracker.arrived("r", 5, {"eldr_record": value})
    assert tracker.finished("r", 1, None) is None
