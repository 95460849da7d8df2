"""The model of a request decides which workers it may use: LoRA adapters, and several base models."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eldr.calibration import fit_calibration
from eldr.cli.main import main
from eldr.policies import PolicyError
from eldr.router.config.endpoint import LEGS, LegName
from eldr.router.config.settings import RouterConfig
from eldr.router.placement.making import policy_maker
from tests.router.admin import ask_admin, until_state
from tests.router.fake_worker import EXPERTS, LAYERS, TOP_K, FakeWorker, Seen, counts_wire, reply
from tests.router.harness import ASK, Setup, on_uvloop, running, until
from tests.synthetic import make_trace

ADAPTED = {**ASK, "model": "sql"}


def adapters(*names: str, on: Callable[[Setup], list[FakeWorker]]) -> Callable[[Setup], None]:
    """Prepare a fleet whose workers `on` have these adapters."""

    def prepare(s: Setup) -> None:
        for worker in on(s):
            worker.adapters = list(names)

    return prepare


def two_models(s: Setup) -> None:
    """The second half of each role serves the base model "big", whose counts have another shape."""
    for workers in (s.prefill, s.decode):
        for worker in workers[len(workers) // 2 :]:
            worker.model = "big"
            worker.counts = counts_wire(4, layers=3, experts=16)


async def fail(worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reply(writer, 500, b"{}")


# Adapters.


@pytest.mark.parametrize("policy", ["rr", "jsq", "expected-union"])
@on_uvloop
async def test_only_workers_with_the_adapter_get_its_requests_in_both_roles(policy: str) -> None:
    async with running(3, 3, policy, adapters("sql", on=lambda s: [s.prefill[0], s.decode[1]])) as s:
        for number in range(6):
            body = {**ADAPTED, "prompt": f"prompt {number}", "stream": number % 2 == 0}
            assert (await s.post(body)).status == 200
        assert [len(worker.generated) for worker in (*s.prefill, *s.decode)] == [6, 0, 0, 0, 6, 0]
        for number in range(30):
            assert (await s.post({**ASK, "prompt": f"prompt {number}"})).status == 200
        assert all(len(worker.generated) > 2 for worker in s.prefill[1:])
        if policy != "expected-union":  # which keeps like with like
            assert all(len(worker.generated) > 2 for worker in (s.decode[0], s.decode[2]))


@on_uvloop
async def test_an_adapter_that_was_loaded_a_moment_ago_is_found() -> None:
    async with running(health_interval_s=60) as s:
        for _ in range(2):
            assert (await s.post(ADAPTED)).status == 404
            for worker in (*s.prefill, *s.decode):
                worker.adapters = ["sql"]
            assert (await s.post(ADAPTED)).status == 200
            for worker in (*s.prefill, *s.decode):
                worker.adapters = []


@on_uvloop
async def test_clients_who_ask_for_nonsense_do_not_flood_the_workers() -> None:
    async with running(prefill=1, decode=2, health_interval_s=60) as s:
        before = [worker.asked("/v1/models") for worker in (*s.prefill, *s.decode)]
        answers = await asyncio.gather(*(s.post({**ASK, "model": f"nonsense {n}"}) for n in range(40)))
        assert {answer.status for answer in answers} == {404}
        assert answers[7].error == {
            "message": "The model `nonsense 7` does not exist. Valid aliases: tiny.",
            "type": "NotFoundError", "param": "model", "code": 404,
        }  # fmt: skip
        # One look for those that came first, and one for those that came while it was under way.
        assert all(w.asked("/v1/models") - b <= 2 for w, b in zip((*s.prefill, *s.decode), before, strict=True))
        assert s.router.services.admission.admitted == 0
        assert [served.name for served in s.router.services.fleet.listed()] == ["tiny"]


@on_uvloop
async def test_a_worker_that_hangs_does_not_keep_an_answer_waiting() -> None:
    async with running(decode=2, health_interval_s=60) as s:
        s.decode[0].silent = True
        async with asyncio.timeout(10):
            assert (await s.post(ADAPTED)).status == 404


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("role", ["prefill", "decode"])
@on_uvloop
async def test_a_worker_that_has_just_unloaded_the_adapter_is_passed_over(role: LegName, stream: bool) -> None:
    both = adapters("sql", on=lambda s: [*s.prefill, *s.decode])
    async with running(2, 2, "rr", both, health_interval_s=60) as s:
        assert (await s.post(ADAPTED)).status == 200
        lost = next(worker for worker in getattr(s, role) if worker.generated)
        if role == "decode":  # whose turn is next
            lost = next(worker for worker in s.decode if worker is not lost)
        lost.adapters = []
        for _ in range(4):
            answer = await s.post({**ADAPTED, "stream": stream})
            assert answer.status == 200
        assert answer.body.endswith(b"data: [DONE]\n\n") if stream else answer.json()["choices"][0]["text"] == "abcd"
        assert await s.metric("eldr_retries_total", leg=role, reason="unserved") == 1
        assert await s.metric("eldr_worker_failures_total") == 0
        spent = [seen.body["kv_transfer_params"]["remote_request_id"] for w in s.decode for seen in w.generated]
        assert len(set(spent)) == len(spent)
        assert s.router.services.admission.admitted == 0


@on_uvloop
async def test_an_adapter_that_nobody_has_any_more_is_not_found() -> None:
    async with running(2, 2, "rr", adapters("sql", on=lambda s: [*s.prefill, *s.decode]), health_interval_s=60) as s:
        assert (await s.post(ADAPTED)).status == 200
        for worker in (*s.prefill, *s.decode):
            worker.adapters = []
        for _ in range(2):
            answer = await s.post(ADAPTED)
            assert (answer.status, answer.error["param"]) == (404, "model")
        assert (await s.post()).status == 200
        assert s.router.services.admission.admitted == 0


@on_uvloop
async def test_a_404_for_another_reason_is_passed_on() -> None:
    async def nothing(
        worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await reply(writer, 404, b'{"detail":"Not Found"}')

    async with running(decode=2, health_interval_s=60) as s:
        for worker in s.decode:
            worker.behaviour = nothing
        answer = await s.post()
        assert (answer.status, answer.body) == (404, b'{"detail":"Not Found"}')
        assert sum(len(worker.generated) for worker in s.decode) == 1


@on_uvloop
async def test_an_adapter_that_no_prefill_worker_has_runs_whole() -> None:
    async with running(2, 2, "jsq", adapters("sql", on=lambda s: s.decode[:1])) as s:
        assert (await s.post(ADAPTED)).status == 200
        assert [len(worker.generated) for worker in (*s.prefill, *s.decode)] == [0, 0, 1, 0]
        assert "kv_transfer_params" not in s.decode[0].generated[0].body
        assert await s.metric("eldr_passthrough_total", reason="prefill_lacks_model") == 1


@on_uvloop
async def test_a_model_whose_workers_are_down_is_not_unknown() -> None:
    only = adapters("sql", on=lambda s: [*s.prefill, s.decode[1]])
    async with running(1, 2, "jsq", only, worker_wait_s=0.3) as s:
        await s.decode[1].stop()
        up = s.router.services.fleet.workers("decode")[s.decode[1].url]
        await until(lambda: not up.healthy, "it is found out")
        answer = await s.post(ADAPTED)
        assert (answer.status, answer.error["message"]) == (503, "no decode worker that serves `sql` is available")
        assert int(answer.headers["retry-after"]) > 0
        assert (await s.post()).status == 200
        await s.decode[1].start()
        await until(lambda: up.healthy, "it is back")
        assert (await s.post(ADAPTED)).status == 200


@on_uvloop
async def test_requests_wait_for_the_worker_with_the_adapter_alone() -> None:
    only = adapters("sql", on=lambda s: [*s.prefill, s.decode[1]])
    async with running(1, 2, "jsq", only, max_inflight=1) as s:
        admission = s.router.services.admission
        s.decode[1].token_gap_s = 0.1
        first = asyncio.create_task(s.post(ADAPTED))
        await until(lambda: s.decode[1].running == 1, "it runs")
        second = asyncio.create_task(s.post(ADAPTED))
        await until(lambda: admission.queued == 1, "it waits, although another worker is free")
        assert len(s.prefill[0].generated) == 1
        for _ in range(3):  # nobody waits behind it who can start
            assert (await s.post()).status == 200
        assert not first.done()
        assert [(await task).status for task in (first, second)] == [200, 200]
        assert (admission.queued, admission.admitted) == (0, 0)


@on_uvloop
async def test_a_slot_that_was_promised_to_an_adapter_is_left_for_it() -> None:
    """The base model's requests are ready first, and the policy alone would send some to the adapter's only worker."""
    released = asyncio.Event()

    async def hold_adapted(
        worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if seen.body["model"] == "sql":
            await released.wait()
        await worker.answer(seen, writer)

    only = adapters("sql", on=lambda s: [*s.prefill, s.decode[0]])
    async with running(1, 2, "rr", only, max_inflight=1) as s:
        s.prefill[0].behaviour = hold_adapted
        adapted = asyncio.create_task(s.post(ADAPTED))
        await until(lambda: s.prefill[0].running == 1, "its prefill runs")
        plain = [asyncio.create_task(s.post({**ASK, "prompt": f"{n}"})) for n in range(6)]
        assert {(await task).status for task in plain} == {200}
        assert [len(worker.generated) for worker in s.decode] == [0, 6]
        released.set()
        assert (await adapted).status == 200
        assert [len(worker.generated) for worker in s.decode] == [1, 6]


# Several base models.


@on_uvloop
async def test_each_base_model_has_its_own_workers_policy_and_picture() -> None:
    async with running(4, 4, "expected-union", two_models) as s:
        for number in range(12):
            for model in ("tiny", "big"):
                answer = await s.post({**ASK, "model": model, "prompt": f"prompt {number}"})
                assert (answer.status, answer.json()["model"]) == (200, model)
        for workers in (s.prefill, s.decode):
            assert sum(len(worker.generated) for worker in workers[:2]) == 12
            assert sum(len(worker.generated) for worker in workers[2:]) == 12
            assert {seen.body["model"] for worker in workers[2:] for seen in worker.generated} == {"big"}
        # Counts of two shapes: neither policy saw the other's.
        reasons = {reason for _, reason in s.router.services.metrics.decisions}
        assert reasons <= {"expected_union", "no_signature"}
        assert await s.metric("eldr_decisions_total", reason="expected_union") == 24
        pictures = {group.name: picture for group, picture in s.router.services.lanes.pictures()}
        assert {name: len(next(iter(p.rows.values()))) for name, p in pictures.items()} == {"tiny": 2, "big": 3}
        assert pictures["big"].rows.keys() == {worker.url for worker in s.decode[2:]}
        assert await s.metric("eldr_model_workers", model="big", role="decode") == 2
        assert await s.metric("eldr_model_policy", model="big", policy="expected-union") == 1


@on_uvloop
async def test_a_request_must_say_which_of_several_models_it_wants() -> None:
    unnamed = {key: value for key, value in ASK.items() if key != "model"}
    async with running(2, 2, prepare=two_models) as s:
        for body in (unnamed, {**ASK, "model": None}, {**ASK, "model": ""}):
            answer = await s.post(body)
            assert (answer.status, answer.error["param"]) == (400, "model")
            assert answer.error["message"] == "model must be given: this router serves big, tiny"
    async with running() as s:
        assert (await s.post(unnamed)).status == 200


@on_uvloop
async def test_one_model_without_room_or_workers_does_not_hold_up_the_other() -> None:
    async with running(2, 2, prepare=two_models, max_inflight=1, worker_wait_s=0.0) as s:
        s.decode[0].token_gap_s = 0.5
        slow = [asyncio.create_task(s.post()) for _ in range(3)]
        await until(lambda: s.router.services.admission.queued == 2, "they wait")
        for _ in range(3):
            assert (await s.post({**ASK, "model": "big"})).status == 200
        assert not any(task.done() for task in slow)
        for task in slow:
            task.cancel()
        await s.prefill[0].stop()
        await s.decode[0].stop()
        workers = s.router.services.fleet.workers
        await until(lambda: not workers("decode")[s.decode[0].url].healthy, "it is found out")
        await until(lambda: not workers("prefill")[s.prefill[0].url].healthy, "it is found out")
        assert (await s.post()).status == 503
        assert (await s.post({**ASK, "model": "big"})).status == 200
        assert (await s.get("/ready")).status == 200
        await s.prefill[1].stop()
        await s.prefill[0].start()
        await until(lambda: not workers("prefill")[s.prefill[1].url].healthy, "it is found out")
        await until(lambda: workers("prefill")[s.prefill[0].url].healthy, "it is back")
        answer = await s.get("/ready")
        assert (answer.status, answer.error["message"]) == (503, "no model has both a prefill and a decode worker")


@on_uvloop
async def test_the_last_worker_of_a_model_is_never_ejected() -> None:
    async with running(2, 4, prepare=two_models, eject_failures=2, retries=0) as s:
        s.decode[2].behaviour = s.decode[3].behaviour = fail
        for _ in range(20):
            assert (await s.post({**ASK, "model": "big"})).status == 500
        ejected = [worker.url for worker in s.router.services.fleet.workers("decode").values() if worker.ejected]
        assert len(ejected) == 1
        assert ejected[0] in {worker.url for worker in s.decode[2:]}


@on_uvloop
async def test_a_worker_of_another_model_joins_as_a_model_of_its_own(admin: dict[str, Any]) -> None:
    new = [await FakeWorker(role, model="big").start() for role in ("prefill", "decode")]
    async with running(**admin) as s:
        try:
            assert (await s.post({**ASK, "model": "big"})).status == 404
            for worker in new:
                await ask_admin(s, "POST", "/admin/workers", {"url": worker.url, "role": worker.role})
            await until_state(s, "prefill", new[0].url, "up")
            await until_state(s, "decode", new[1].url, "up")
            assert (await s.post({**ASK, "model": "big"})).status == 200
            assert (await s.post()).status == 200
            assert [len(worker.generated) for worker in (*new, *s.prefill, *s.decode)] == [1, 1, 1, 1]
            for worker in new:
                await ask_admin(s, "DELETE", "/admin/workers", {"url": worker.url})
            await until_state(s, "decode", new[1].url, "gone")
            assert (await s.post({**ASK, "model": "big"})).status == 404
            unnamed = {key: value for key, value in ASK.items() if key != "model"}
            await until(lambda: len(s.router.services.fleet.groups) == 1, "the model is gone")
            assert (await s.post(unnamed)).status == 200
        finally:
            for worker in new:
                await worker.stop()


@on_uvloop
async def test_a_request_outlives_all_workers_of_its_model(admin: dict[str, Any]) -> None:
    async def held(worker: FakeWorker, seen: Seen, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(3600)

    new = [await FakeWorker(role, model="big").start() for role in ("prefill", "decode")]
    async with running(2, 2, prepare=two_models, worker_wait_s=30.0, **admin) as s:
        try:
            s.prefill[1].behaviour = held
            asked = asyncio.create_task(s.post({**ASK, "model": "big"}))
            await until(lambda: s.prefill[1].generated, "its prefill runs")
            for worker in (s.decode[1], s.prefill[1]):
                await ask_admin(s, "DELETE", "/admin/workers", {"url": worker.url})
                await until_state(s, "decode", worker.url, "gone")
                await until_state(s, "prefill", worker.url, "gone")
            assert len(s.router.services.fleet.groups) == 1
            await asyncio.sleep(0.1)
            assert not asked.done()
            for worker in new:
                await ask_admin(s, "POST", "/admin/workers", {"url": worker.url, "role": worker.role})
            assert (await asked).status == 200
            assert [len(worker.generated) for worker in new] == [1, 1]
            assert await s.metric("eldr_admitted") == await s.metric("eldr_inflight") == 0
        finally:
            for worker in new:
                await worker.stop()


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/embeddings"])
@on_uvloop
async def test_who_waits_without_any_worker_gets_one_of_its_own_model(path: str, admin: dict[str, Any]) -> None:
    def prepare(s: Setup) -> None:
        two_models(s)
        for worker in s.decode:
            worker.others = {"/v1/embeddings": (200, b"{}", "application/json")}

    async with running(2, 2, prepare=prepare, worker_wait_s=30.0, **admin) as s:
        everybody = [(role, worker) for role in LEGS for worker in (s.prefill if role == "prefill" else s.decode)]
        for role, worker in everybody:
            await ask_admin(s, "DELETE", "/admin/workers", {"url": worker.url})
            await until_state(s, role, worker.url, "gone")
        asked = asyncio.create_task(s.post({**ASK, "model": "big"}, path))
        nobodys = asyncio.create_task(s.post({**ASK, "model": "nobody's"}, path))
        await until(lambda: s.router.services.admission.queued == 2, "they wait")
        assert (await s.get("/v1/models")).status == 503  # the next look is a second away
        for role, worker in everybody[2:]:  # both decode workers, that of the other model first
            await ask_admin(s, "POST", "/admin/workers", {"url": worker.url, "role": role})
        await until_state(s, "decode", s.decode[1].url, "up")
        await ask_admin(s, "POST", "/admin/workers", {"url": s.prefill[1].url, "role": "prefill"})
        assert (await asked).status == 200
        assert s.decode[1].asked(path) == 1
        assert (await nobodys).status == 404
        assert s.decode[0].asked(path) == 0
        assert await s.metric("eldr_admitted") == await s.metric("eldr_inflight") == 0


@on_uvloop
async def test_names_of_one_model_on_different_workers_make_one_group() -> None:
    def alias(s: Setup) -> None:
        s.prefill[0].aliases = ["mini"]
        s.decode[1].model = "mini"

    async with running(1, 2, "rr", alias) as s:
        assert len(s.router.services.fleet.groups) == 1
        for _ in range(2):
            assert (await s.post()).status == 200
            assert (await s.post({**ASK, "model": "mini"})).status == 200
        asked = [{seen.body["model"] for seen in worker.generated} for worker in s.decode]
        assert asked == [{"tiny"}, {"mini"}]


def make_calibration(path: Path, layers: int, experts: int) -> Path:
    trace = make_trace(requests=60, layers=layers, experts=experts, top_k=TOP_K, kinds=4)
    fit_calibration(trace, 2).save(path)
    return path


@pytest.mark.parametrize("alone", [False, True])
@on_uvloop
async def test_each_base_model_is_placed_with_its_own_calibration(tmp_path: Path, alone: bool) -> None:
    files = {
        "tiny": make_calibration(tmp_path / "tiny.npz", LAYERS, EXPERTS),
        "alias of big": make_calibration(tmp_path / "big.npz", 3, 16),
    }

    def prepare(s: Setup) -> None:
        two_models(s)
        for worker in (*s.prefill[1:], *s.decode[2:]):
            worker.aliases = ["alias of big"]

    async with running(2, 4, "locality-band", prepare, calibration=files["tiny"] if alone else files) as s:
        for model in ("tiny", "big"):
            assert (await s.post({**ASK, "model": model})).status == 200
        assert await s.metric("eldr_decisions_total", reason="locality") == (1 if alone else 2)
        assert await s.metric("eldr_decisions_total", reason="wrong_geometry") == (1 if alone else 0)


@on_uvloop
async def test_a_model_without_a_calibration_is_placed_by_load_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = {"tiny": make_calibration(tmp_path / "tiny.npz", LAYERS, EXPERTS)}
    log = tmp_path / "decisions.jsonl"
    async with running(2, 4, "locality-band", two_models, calibration=files, decision_log=log) as s:
        for model in ("tiny", "big"):
            assert (await s.post({**ASK, "model": model})).status == 200
        assert await s.metric("eldr_model_policy", model="tiny", policy="locality-band") == 1
        assert await s.metric("eldr_model_policy", model="big", policy="jsq") == 1
        assert await s.metric("eldr_policy_errors_total") == 0
    assert "the requests for big are placed by jsq" in caplog.text
    assert main(["decisions", str(log)]) == 0


@on_uvloop
async def test_a_model_joins_although_its_calibration_was_replaced(tmp_path: Path, admin: dict[str, Any]) -> None:
    file = make_calibration(tmp_path / "all.npz", LAYERS, EXPERTS)
    used = hashlib.sha256(file.read_bytes()).hexdigest()
    path = tmp_path / "decisions.jsonl"
    new = [await FakeWorker(role, model="big").start() for role in LEGS]
    async with running(policy="locality-band", calibration=file, decision_log=path, **admin) as s:
        file.unlink()
        for role, worker in zip(LEGS, new, strict=True):
            await ask_admin(s, "POST", "/admin/workers", {"url": worker.url, "role": role})
            await until_state(s, role, worker.url, "up")
        assert (await s.post({**ASK, "model": "big"})).status == 200
    for worker in new:
        await worker.stop()
    headers = [line for line in map(json.loads, path.read_text().splitlines()) if line["event"] == "log"]
    assert [(header["model"], header["calibration_sha256"]) for header in headers] == [("tiny", used), ("big", used)]


def test_a_policy_that_needs_a_calibration_is_refused_without_any() -> None:
    config = RouterConfig.of(prefill=("http://p:1",), decode=("http://d:1",), policy="locality-band")
    with pytest.raises(PolicyError, match="calibration"):
        policy_maker(config.placement)


def test_decisions_for_several_models_are_repeated_exactly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "decisions.jsonl"

    @on_uvloop
    async def serve() -> None:
        async with running(2, 6, "expected-union", two_models, decision_log=path) as s:
            for worker in s.decode:
                worker.token_gap_s = 0.01
            bodies = [{**ASK, "model": ("tiny", "big")[n % 2], "prompt": f"prompt {n}"} for n in range(40)]
            assert {(await task).status for task in [asyncio.create_task(s.post(body)) for body in bodies]} == {200}

    serve()
    headers = [line for line in map(json.loads, path.read_text().splitlines()) if line["event"] == "log"]
    assert {header["model"] for header in headers} == {"tiny", "big"}
    assert len({header["run"] for header in headers}) == 2
    assert main(["decisions", str(path), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["decisions"], result["differing"], len(result["workers"])) == (40, 0, 6)
