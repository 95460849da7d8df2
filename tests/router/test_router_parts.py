"""The parts that do no IO: fleet, configuration, prefill choice, lease, admission."""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest
from fake_worker import counts_wire
from harness import interpreted
from hypothesis import given, settings
from hypothesis import strategies as st

from eldr.cost import DEFAULT_PRESET, PRESETS, CostModel, MoeLayerCost
from eldr.errors import EldrError
from eldr.router.config.groups import QueueLimits
from eldr.router.config.settings import ConfigError, RouterConfig, read_key
from eldr.router.fleet.workers import Fleet, FleetError, Worker
from eldr.router.http.limits import ConnectionWatch
from eldr.router.observe.counters import Metrics
from eldr.router.placement.admission import Admission, Claim, NoWorkerError
from eldr.router.placement.prefill import LOAD_FACTOR, PrefillRing
from eldr.router.protocols.handoff import UNKNOWN_LEASE_S, Lease
from eldr.router.protocols.openai import CHAT, COMPLETIONS, prompt_start
from eldr.router.protocols.vllm_nixl import VllmNixl
from eldr.router.request.answer import DecodeAnswer, TokenTimes

TWO = {"prefill": ["http://p:1"], "decode": ["http://d:1"]}
THREE = {"prefill": ("http://p0:8100",), "decode": ("http://d0:8200", "http://d1:8200")}


# Fleet.


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=80))
def test_the_eligible_view_is_what_a_fresh_look_gives(steps):
    fleet = Fleet()
    workers = [fleet.add(f"http://d:{n}", "decode", 2) for n in range(4)]
    for action, index in steps:
        worker = workers[index]
        if action == 0:
            fleet.set_healthy(worker, True)
        elif action == 1:
            fleet.set_healthy(worker, False)
        elif action == 2 and worker.in_flight < 2:
            fleet.started(worker)
        elif action == 3 and worker.in_flight > 0:
            fleet.finished(worker)
        elif action in (4, 5):
            fleet.set_draining(worker, action == 4)
        expected = {w.url: w.in_flight for w in workers if w.healthy and not w.draining and w.in_flight < 2}
        assert fleet.eligible == expected
        assert fleet.decode_slots == sum(2 for w in workers if w.healthy and not w.draining)


def test_a_removed_worker_is_gone_even_when_its_last_request_ends_later():
    fleet = Fleet()
    worker = fleet.add("http://d:1", "decode", 2)
    fleet.set_healthy(worker, True)
    fleet.started(worker)
    fleet.remove(worker)
    fleet.finished(worker)
    assert fleet.eligible == {}
    with pytest.raises(FleetError):
        fleet.remove(worker)


def test_one_url_may_have_both_roles_but_not_one_twice():
    fleet = Fleet()
    fleet.add("http://w:1", "prefill", 1)
    fleet.add("http://w:1", "decode", 1)
    with pytest.raises(FleetError, match="http://w:1"):
        fleet.add("http://w:1", "decode", 1)


# Configuration.


def test_options_of_policies_from_a_file_and_flags(tmp_path):
    cost = CostModel("measured", "cpu", "made up", MoeLayerCost(10.0, 2.0, 0.5))
    cost.save(tmp_path / "d1.json")
    file = tmp_path / "eldr.toml"
    file.write_text(
        'prefill = ["http://p0:8100"]\ndecode = ["http://d0:8200", "http://d1:8200"]\n'
        'cost_scope = "moe"\ntail_guard = inf\nanchor = 0\nothers_weight = 2\n'
        f'[worker_costs]\n"http://d1:8200/" = "{tmp_path / "d1.json"}"\n'
    )
    options = RouterConfig.load(file, {"anchor": 0.2}).placement.options
    assert (options.cost_scope, options.tail_guard, options.anchor, options.others_weight) == ("moe", math.inf, 0.2, 2)
    assert options.cost == PRESETS[DEFAULT_PRESET]
    assert options.worker_costs == {"http://d1:8200": cost}
    of_flags = RouterConfig.of(**THREE, cost_scope="moe", worker_costs=[("http://d0:8200", str(tmp_path / "d1.json"))])
    assert of_flags.placement.options.worker_costs == {"http://d0:8200": cost}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"others_weight": -1}, "others_weight is -1"),
        ({"anchor": math.inf}, "anchor is inf"),
        ({"tail_guard": math.nan}, "tail_guard is nan"),
        ({"tail_guard": "none"}, "tail_guard is 'none'"),
        ({"refit_interval_s": 0}, "refit_interval_s is 0"),
        ({"refit_interval_s": "often"}, "refit_interval_s is 'often'"),
        ({"refit_window_s": 0}, "refit_window_s is 0"),
        ({"cost": 3}, "cost is 3, expected text"),
        ({"cost": "h200"}, "cost 'h200' is neither a file nor a preset; the presets are qwen3"),
        ({"cost_scope": "layer"}, "cost_scope is 'layer', expected one of step, moe"),
        ({"worker_costs": "x"}, "worker_costs is 'x', expected a table"),
        (
            {"worker_costs": {"http://d7:8200": DEFAULT_PRESET}},
            "worker_costs names http://d7:8200, which is no decode worker",
        ),
        ({"worker_costs": {"http://d0:8200": 1}}, "worker_costs of http://d0:8200 is 1, expected text"),
        ({"worker_costs": {"d0": "x"}}, "'d0' is not a worker's URL"),
    ],
)
def test_options_of_policies_that_cannot_be_used(changed, message):
    with pytest.raises(EldrError, match=message):
        RouterConfig.of(**THREE, **changed)


def test_configuration_from_a_file_and_flags(tmp_path):
    file = tmp_path / "eldr.toml"
    file.write_text(
        'prefill = ["http://p0:8100/"]\ndecode = ["https://d0:8200", "http://[::1]:8201"]\n'
        'policy = "rr"\ntau = 1\ncalibration = "zones.npz"\nmax_inflight = 7\n'
    )
    config = RouterConfig.load(file, {"policy": "p2c", "port": 1})
    assert config.workers.prefill == ("http://p0:8100",)
    assert config.workers.decode == ("https://d0:8200", "http://[::1]:8201")
    assert (config.placement.policy, config.listen.port, config.workers.max_inflight) == ("p2c", 1, 7)
    assert config.placement.options.tau == 1
    assert config.placement.calibration.name == "zones.npz"


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"prefill": []}, "prefill"),
        ({"decode": "http://d:1"}, "decode"),
        ({"decode": [1]}, "decode"),
        ({"decode": ["d:1"]}, "decode"),
        ({"decode": ["ftp://d:1"]}, "decode"),
        ({"decode": ["http://d:99999"]}, "decode"),
        ({"decode": ["http://user:word@d:1"]}, "decode"),
        ({"decode": ["http://d:1/v1"]}, "decode"),
        ({"decode": ["http://d:1", "http://d:1/"]}, "decode"),
        ({"decode": ["http://d:1\r\nx: y"]}, "decode"),
        ({"policy": ""}, "policy"),
        ({"tau": "wide"}, "tau"),
        ({"tau": -1}, "tau"),
        ({"two_nearest": 1}, "two_nearest"),
        ({"port": 65536}, "port"),
        ({"port": True}, "port"),
        ({"max_inflight": 0}, "max_inflight"),
        ({"health_interval_s": 0}, "health_interval_s"),
        ({"grace_s": float("nan")}, "grace_s"),
        ({"log_level": "loud"}, "log_level"),
        ({"calibration": 4}, "calibration"),
    ],
)
def test_a_bad_setting_is_refused_by_name(change, key):
    with pytest.raises(ConfigError, match=key):
        RouterConfig.of(**{**TWO, **change})


def test_bad_files(tmp_path):
    file = tmp_path / "eldr.toml"
    with pytest.raises(ConfigError, match=r"eldr\.toml"):
        RouterConfig.load(file, {})
    file.write_text("prefill = [")
    with pytest.raises(ConfigError, match="TOML"):
        RouterConfig.load(file, {})
    file.write_text("prefil = []")
    with pytest.raises(ConfigError, match=r"eldr\.toml.*prefil"):
        RouterConfig.load(file, {})
    key = tmp_path / "key"
    for text in ("", "two words", "a\nb", "ä"):
        key.write_text(text)
        with pytest.raises(ConfigError, match="key"):
            read_key(key)
    key.write_text("  secret\n")
    assert read_key(key) == b"secret"


# Prefill choice.


def ring_of(workers: int) -> tuple[Fleet, PrefillRing]:
    fleet = Fleet()
    ring = PrefillRing(fleet)
    fleet.on_change(ring.fleet_changed)
    for n in range(workers):
        fleet.set_healthy(fleet.add(f"http://p:{n}", "prefill", 2**31), True)
    return fleet, ring


def start(path: bytes, body: dict) -> bytes:
    return prompt_start(path, body, 1024)


def chat(*contents: str, system: str | None = None) -> dict:
    messages = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return {"messages": messages + [{"role": roles[n % 2], "content": text} for n, text in enumerate(contents)]}


def test_keys_spread_evenly_and_keep_their_worker_when_another_leaves():
    fleet, ring = ring_of(8)
    keys = [start(COMPLETIONS, {"prompt": f"prompt {n}"}) for n in range(8000)]
    before = [ring.choose(key)[0].url for key in keys]
    shares = Counter(before).values()
    assert len(shares) == 8
    assert max(shares) < 1.35 * 1000
    gone = next(iter(fleet.workers("prefill").values()))
    fleet.set_healthy(gone, False)
    after = [ring.choose(key)[0].url for key in keys]
    assert gone.url not in after
    assert all(b == a for b, a in zip(before, after, strict=True) if b != gone.url)


def test_load_is_bounded_and_spills_go_to_one_next_worker():
    fleet, ring = ring_of(4)
    key = start(COMPLETIONS, {"prompt": "all the same"})
    spills = 0
    for sent in range(400):
        worker, spilled = ring.choose(key)
        spills += spilled
        fleet.started(worker)
        most = max(w.in_flight for w in fleet.workers("prefill").values())
        assert most <= -(-LOAD_FACTOR * (sent + 1) // 4)
    loads = sorted(w.in_flight for w in fleet.workers("prefill").values())
    assert loads[-1] == 125
    assert spills == 400 - 125


def test_the_same_start_has_the_same_key_within_the_window():
    start = partial(prompt_start, window_bytes=16)
    assert start(COMPLETIONS, {"prompt": "x" * 16 + "a"}) == start(COMPLETIONS, {"prompt": "x" * 16 + "b"})
    assert start(COMPLETIONS, {"prompt": "x" * 15 + "a"}) != start(COMPLETIONS, {"prompt": "x" * 15 + "b"})
    assert start(COMPLETIONS, {"prompt": "ä" * 8 + "a"}) == start(COMPLETIONS, {"prompt": "ä" * 8 + "b"})
    assert start(COMPLETIONS, {"prompt": ["x"]}) == start(COMPLETIONS, {"prompt": "x"})
    assert start(COMPLETIONS, {"prompt": [1, 2, 3, 4, 5]}) == start(COMPLETIONS, {"prompt": [1, 2, 3, 4, 9]})
    assert start(COMPLETIONS, {"prompt": [1, 2]}) != start(COMPLETIONS, {"prompt": [1, 3]})


def test_a_long_shared_system_prompt_does_not_collapse_onto_one_worker():
    fleet, ring = ring_of(4)
    system = "You are a helpful assistant. " * 500
    chosen = [ring.choose(start(CHAT, chat(f"question {n}", system=system)))[0].url for n in range(400)]
    assert max(Counter(chosen).values()) < 200
    assert len(set(chosen)) == len(fleet.workers("prefill"))


def test_a_conversation_stays_when_it_grows_beyond_the_window():
    start = partial(prompt_start, window_bytes=64)
    first = chat("tell me a story about " + "a" * 80, system="be brief")
    later = chat("tell me a story about " + "a" * 80, "once", "go on", system="be brief")
    assert start(CHAT, first) == start(CHAT, later)
    assert start(CHAT, first) != start(CHAT, chat("tell me a story about " + "a" * 80, system="be long"))


def test_the_order_of_keys_in_a_message_does_not_matter():
    a = {"messages": [{"role": "user", "content": "x"}]}
    b = {"messages": [{"content": "x", "role": "user"}]}
    assert start(CHAT, a) == start(CHAT, b)


@settings(max_examples=50, deadline=None)
@given(st.recursive(st.none() | st.integers(0, 9) | st.text(max_size=5), lambda s: st.lists(s, max_size=3)))
def test_any_json_has_a_key(value):
    start(COMPLETIONS, {"prompt": value})
    start(CHAT, {"messages": [value]})


# Hand-off and lease.

SOURCE = Worker("http://p:1", "prefill", 1)


def answer(**params):
    return {"kv_transfer_params": {"do_remote_prefill": True, **params}, "usage": {"prompt_tokens": 4}}


@pytest.mark.parametrize("skew_s", [-3600.0, -1.0, 0.0, 1.0, 3600.0])
def test_a_lease_survives_any_clock(skew_s):
    sent_s, received_s, now_unix_s = 100.0, 102.0, 5000.0
    wire = {"left_s": 30.0, "unix_s": now_unix_s - 0.5 + skew_s}  # said half a second before it was received
    lease = Lease.from_wire(wire, sent_s, received_s, now_unix_s)
    # Whatever the clock says, the answer is between zero and two seconds old.
    assert 28.0 <= lease.left_at(received_s) <= 30.0
    if skew_s == 0.0:
        assert lease.left_at(received_s) == pytest.approx(29.5)
    assert lease.left_at(received_s + 7) == pytest.approx(lease.left_at(received_s) - 7)


@pytest.mark.parametrize("wire", [None, 3, {}, {"left_s": "x", "unix_s": 1}, {"left_s": 1}])
def test_a_lease_that_is_not_stated_is_short(wire):
    handoff = VllmNixl().read_handoff(answer(eldr_lease=wire), SOURCE, time.monotonic())
    assert handoff.lease is None
    assert UNKNOWN_LEASE_S - 1 < handoff.left_s(time.monotonic()) <= UNKNOWN_LEASE_S
    assert "eldr_lease" not in handoff.spend(record=False)


def test_a_handoff_can_be_spent_once():
    handoff = VllmNixl().read_handoff(
        answer(eldr_counts=counts_wire(4), remote_block_ids=[1]), SOURCE, time.monotonic()
    )
    assert handoff.counts.prompt_tokens == 4
    assert handoff.spend(record=True) == {"do_remote_prefill": True, "remote_block_ids": [1], "eldr_record": True}
    with pytest.raises(AssertionError):
        handoff.spend(record=False)


@pytest.mark.parametrize(
    "value", [None, [], {}, {"kv_transfer_params": None}, {"kv_transfer_params": {"do_remote_prefill": 1}}]
)
def test_an_answer_without_a_handoff(value):
    assert VllmNixl().read_handoff(value, SOURCE, 0.0) is None


@pytest.mark.parametrize("raw", [b'{"a":1}', b'["kv"]', b'{"text":"kv_transfer_params","kv_transfer_params":null}'])
def test_an_answer_without_transfer_parameters_is_left_as_it_is(raw):
    assert json.loads(VllmNixl().for_client(raw)) == json.loads(raw)


@pytest.mark.parametrize("colon", [b":", b" : "])
@pytest.mark.parametrize("key", [b"kv_transfer_params", b"ec_transfer_params"])
def test_transfer_parameters_are_taken_out(key, colon):
    raw = b'{"text":"x","%b"%b{"remote_host":"10.0.0.1"}}' % (key, colon)
    assert json.loads(VllmNixl().for_client(raw)) == {"text": "x", key.decode(): None}


# Time per output token.


class Silent:
    """A client connection that takes everything."""

    def begin_stream(self, content_type, extra):
        pass

    def write(self, data, framed=None):
        pass

    def end_stream(self):
        pass


@interpreted
@pytest.mark.parametrize(
    ("usage", "expected_s"),
    [(False, (3.0 - 1.0) / (3 - 1)), (True, (4.0 - 1.0) / (7 - 1))],
)
def test_time_per_output_token_is_taken_over_tokens(monkeypatch, usage, expected_s):
    """Seven tokens in three events, a second apart; only the usage tells that there were seven."""

    async def run():
        metrics = Metrics()
        times = TokenTimes(metrics, 0.0, usage)
        answer = DecodeAnswer(Silent(), times, b"", bool, True)
        answer.on_head(200, {b"content-type": b"text/event-stream"})
        pieces = [b'data: {"choices":[{"text":"%b"}]}\n\n' % text for text in (b"a", b"bcd", b"efg")]
        if usage:
            pieces.append(b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":7}}\n\n')
        pieces.append(b"data: [DONE]\n\n")
        clock = iter(float(n) for n in range(1, 20))
        now_s = 0.0
        monkeypatch.setattr("eldr.router.request.answer.time", SimpleNamespace(monotonic=lambda: now_s))
        for piece in pieces:
            now_s = next(clock)
            answer.on_body(piece)
        answer.on_done()
        times.observe(1, whole=True)
        assert metrics.stream_events == len(pieces)
        return metrics.tpot

    tpot = asyncio.run(run())
    assert sum(tpot.counts) == 1
    assert tpot.sum == pytest.approx(expected_s)


# Admission.


def test_admission_under_random_load_and_cancellation():
    async def run():
        fleet = Fleet()
        worker = fleet.add("http://d:1", "decode", 5)
        fleet.set_healthy(worker, True)
        admission = Admission(fleet, QueueLimits(2**31, 2**31, 60.0, 0.0))
        rng = random.Random(0)
        inside, most = 0, 0
        entered = []

        async def request(n):
            nonlocal inside, most
            await admission.enter(Claim(b"", 1, 1))
            inside += 1
            most = max(most, inside)
            entered.append(n)
            try:
                await asyncio.sleep(rng.random() / 1000)
            finally:
                inside -= 1
                admission.leave()

        tasks = []
        for n in range(2000):
            tasks.append(asyncio.create_task(request(n)))
            if rng.random() < 0.3:
                tasks[rng.randrange(len(tasks))].cancel()
            if rng.random() < 0.2:
                await asyncio.sleep(0)
        await asyncio.gather(*tasks, return_exceptions=True)
        assert most == 5
        assert entered == sorted(entered)
        assert (admission.admitted, admission.queued) == (0, 0)

    asyncio.run(run())


def test_nobody_is_admitted_to_an_empty_fleet():
    async def run():
        with pytest.raises(NoWorkerError):
            await Admission(Fleet(), QueueLimits(1, 1, 1.0, 60.0)).enter(Claim(b"", 1, 1))

    asyncio.run(run())


async def test_every_connection_is_looked_at_once_a_period_and_none_that_is_closed():
    class Connection:
        def __init__(self):
            self.looks = []

        def check(self, now_s):
            self.looks.append(now_s)
            connections.discard(closed)

    closed, *rest = [Connection() for _ in range(50)]
    connections = {closed, *rest}
    watch = ConnectionWatch(connections)
    watch.PERIOD_S = 0.2
    watching = asyncio.create_task(watch.run())
    try:
        async with asyncio.timeout(10):
            while min(len(each.looks) for each in rest) < 2:
                await asyncio.sleep(0.01)
    finally:
        watching.cancel()
    assert {len(each.looks) for each in rest} <= {2, 3}
    assert len(closed.looks) <= 1
    assert len({each.looks[0] for each in rest}) >= watch.PARTS - 1
