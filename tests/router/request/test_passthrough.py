"""Endpoints that one worker answers alone: what it gets, what the client gets, and what happens if it fails."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path
from typing import Any

import pytest

from eldr.router.request.passthrough import ENDPOINTS
from tests.router.admin import ask_admin
from tests.router.fake_worker import FakeWorker, Seen, reply
from tests.router.harness import Reply, Setup, bearer, on_uvloop, ours, running, until

COMPUTES = "/v1/embeddings"
TOKENIZES = "/tokenize"
BODY = b' {"model": "tiny", "input": [1e3, 18446744073709551617], "x": {"y": null} } '
ANSWER = b'{"data": [ 1.50 ]}'


def serving(*paths: str, answer: tuple[int, bytes, str] = (200, ANSWER, "application/json")) -> Any:
    def prepare(s: Setup) -> None:
        for worker in (*s.prefill, *s.decode):
            worker.others = dict.fromkeys(paths, answer)

    return prepare


@pytest.mark.parametrize("path", [path.decode() for path in ENDPOINTS])
@on_uvloop
async def test_body_and_answer_are_passed_on_byte_by_byte(path: str) -> None:
    method = ENDPOINTS[path.encode()].method.decode()
    async with running(prepare=serving(path)) as s:
        headers = {"content-type": "application/json", "x-request-id": "mine", "x-eldr-label": "l", "cookie": "c"}
        data = BODY if method == "POST" else None
        async with s.session.request(method, s.url + path, data=data, headers=headers) as answer:
            assert (answer.status, await answer.read()) == (200, ANSWER)
            assert answer.headers["x-request-id"] == "mine"
        (seen,) = [seen for seen in s.decode[0].seen if seen.path == path]
        assert (seen.method, seen.raw) == (method, data or b"")
        assert seen.headers["x-request-id"] == "mine"
        assert not {"cookie", "x-eldr-label"} & seen.headers.keys()
        assert s.prefill[0].asked(path) == 0
        assert await s.metric("eldr_request_total", endpoint=path, status="200") == 1
        other = "GET" if method == "POST" else "POST"
        async with s.session.request(other, s.url + path) as answer:
            assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD" if method == "GET" else method)


@pytest.mark.parametrize("path", ["/embeddings", "/v1/embeddings/x", "/server_info", "/reset_prefix_cache", "/sleep"])
@on_uvloop
async def test_a_path_that_is_not_known_reaches_no_worker(path: str) -> None:
    async with running(prepare=serving(path)) as s:
        assert (await s.post(path=path)).status == (await s.get(path)).status == 404
        assert s.decode[0].asked(path) == 0


@on_uvloop
async def test_a_worker_without_the_endpoint_says_so_itself() -> None:
    async with running() as s:
        answer = await s.post(path=COMPUTES)
        assert (answer.status, answer.json()) == (404, {"detail": "Not Found"})
        assert await s.metric("eldr_worker_failures_total") == 0


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"{", {}, 400),
        (b"[]", {}, 400),
        (b'{"kv_transfer_params": {}}', {}, 400),
        (b'{"eldr_record": 1}', {}, 400),
        (b'{"vllm_xargs": {"kv_transfer_params": 1}}', {}, 400),
        (b'{"model": 3}', {}, 400),
        (b'{"model": "other"}', {}, 404),
        (b"{}", {"content-type": "text/plain"}, 415),
        (b"{}", {"content-encoding": "br"}, 415),
        (b" " * 2000, {}, 413),
    ],
)
@pytest.mark.parametrize("path", [COMPUTES, TOKENIZES])
@on_uvloop
async def test_bad_requests_are_refused_by_the_router(
    path: str, body: bytes, headers: dict[str, str], status: int
) -> None:
    async with running(prepare=serving(path), max_body_bytes=1000) as s:
        assert (await s.post(body, path, headers)).status == status
        assert s.decode[0].asked(path) == 0


@on_uvloop
async def test_keys_hold_here_too(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("secret alice\n")
    async with running(prepare=serving(COMPUTES, "/version"), api_key_file=tmp_path / "keys") as s:
        assert (await s.post(path=COMPUTES)).status == (await s.get("/version")).status == 401
        assert (await s.post(path=COMPUTES, headers=bearer("secret"))).status == 200
        assert (await s.get("/version", headers=bearer("secret"))).status == 200
        assert not any("secret" in str(seen.headers) for seen in s.decode[0].seen)


@pytest.mark.parametrize("path", [COMPUTES, TOKENIZES])
@pytest.mark.parametrize(
    "answer",
    [
        (500, b'{"error": {}}', "application/json"),
        (503, b"", ""),
        (302, b"", ""),
        (200, b"<html>sick</html>", "text/html"),
        (200, b"{", "application/json"),
        (200, b'{"error": {"code": 500}}', "application/json"),
    ],
)
@on_uvloop
async def test_another_worker_is_asked_if_one_fails(path: str, answer: tuple[int, bytes, str]) -> None:
    async with running(decode=2, prepare=serving(path), eject_share=0) as s:
        s.decode[0].others[path] = answer
        for _ in range(40):
            assert (await s.post(BODY, path)).body == ANSWER
        failed = s.decode[0].asked(path)
        assert failed > 0
        # What only uses the tokenizer says nothing of the engine.
        assert await s.metric("eldr_worker_failures_total") == (failed if path == COMPUTES else 0)
        assert await s.metric("eldr_retries_total", leg="decode") == failed


@on_uvloop
async def test_the_last_workers_own_error_is_passed_on() -> None:
    answer = (500, b'{"error": {"message": "mine"}}', "application/json")
    async with running(prepare=serving(COMPUTES, answer=answer), retries=1) as s:
        last = await s.post(BODY, COMPUTES)
        assert (last.status, last.body) == (500, answer[1])
        assert s.decode[0].asked(COMPUTES) == 2
    wrong = (200, b"<html>", "text/html")
    async with running(prepare=serving(COMPUTES, answer=wrong), retries=0) as s:
        last = await s.post(BODY, COMPUTES)
        assert (last.status, last.error["type"]) == (502, "BadGatewayError")


@pytest.mark.parametrize(
    "answer",
    [
        (400, b'{"error": {"code": 400}}', "application/json"),
        (501, b"{}", "application/json"),
        (200, b"\x00\xff", "application/octet-stream"),
        (200, b"[1]", "Application/JSON; charset=utf-8"),
    ],
)
@on_uvloop
async def test_other_answers_are_passed_on_as_they_are(answer: tuple[int, bytes, str]) -> None:
    async with running(prepare=serving(COMPUTES, answer=answer)) as s:
        got = await s.post(BODY, COMPUTES)
        assert (got.status, got.body) == answer[:2]
        assert s.decode[0].asked(COMPUTES) == 1


@on_uvloop
async def test_bytes_come_with_the_header_that_tells_their_shapes(tmp_path: Path) -> None:
    # As vLLM 0.32 sends embeddings with "encoding_format": "bytes".
    shapes = (
        '{"id": "embd-1", "created": 1, "model": "tiny", "data": [{"index": 0, "embed_dtype": "float32", '
        '"endianness": "native", "start": 0, "end": 4, "shape": [1]}], "usage": {"prompt_tokens": 7, '
        '"total_tokens": 7, "completion_tokens": 0}}'
    )
    kind = f"application/octet-stream\r\nmetadata: {shapes}"
    (tmp_path / "keys").write_text("secret alice tokens_per_day=1000\n")
    async with running(
        prepare=serving(COMPUTES, answer=(200, b"\x00\x00\x80?", kind)), api_key_file=tmp_path / "keys"
    ) as s:
        got = await s.post(BODY, COMPUTES, bearer("secret"))
        assert (got.body, got.headers["content-type"]) == (b"\x00\x00\x80?", "application/octet-stream")
        assert got.headers["metadata"] == shapes
        assert s.router.services.quotas.clients["alice"].used["tokens"] == 7
        for worker in s.decode:
            worker.others[COMPUTES] = (200, ANSWER, f"application/json\r\nmetadata: {shapes}")
        assert "metadata" not in (await s.post(BODY, COMPUTES, bearer("secret"))).headers
        s.decode[0].others[COMPUTES] = (200, b"1", "application/octet-stream\r\nmetadata: {")
        assert (await s.post(BODY, COMPUTES, bearer("secret"))).status == 200


@on_uvloop
async def test_a_late_answer_is_not_blamed_on_the_worker() -> None:
    async def held(worker: FakeWorker, seen: Seen, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(3600)

    async with running(
        decode=4, prepare=serving(COMPUTES), decode_answer_timeout_s=0.1, eject_failures=1, retries=0
    ) as s:
        for worker in s.decode:
            worker.behaviour = held
        for _ in range(4):
            assert (await s.post(BODY, COMPUTES)).status == 504
        assert await s.metric("eldr_timeouts_total", leg="answer") == 4
        assert await s.metric("eldr_worker_failures_total") == await s.metric("eldr_ejections_total") == 0


@on_uvloop
async def test_the_version_belongs_to_no_model() -> None:
    def two_models(s: Setup) -> None:
        s.prefill[1].model = s.decode[1].model = "big"
        serving("/version", "/tokenizer_info")(s)

    async with running(2, 2, prepare=two_models, worker_wait_s=0.0) as s:
        assert (await s.get("/version")).body == ANSWER
        assert (await s.get("/tokenizer_info")).status == 400
        await s.decode[0].stop()
        decode = s.router.services.fleet.workers("decode")
        await until(lambda: not decode[s.decode[0].url].healthy, "it is found out")
        assert (await s.get("/version")).body == ANSWER
        await s.decode[1].stop()
        await until(lambda: not decode[s.decode[1].url].healthy, "it is found out")
        assert (await s.get("/version")).status == 503


@on_uvloop
async def test_a_refused_connection_leads_to_another_worker() -> None:
    async with running(decode=2, prepare=serving(COMPUTES), health_interval_s=30.0) as s:
        await s.decode[0].stop()
        for _ in range(4):
            assert (await s.post(BODY, COMPUTES)).status == 200


@on_uvloop
async def test_what_runs_the_model_takes_a_slot_and_the_rest_none() -> None:
    free = asyncio.Event()

    async def held(worker: FakeWorker, seen: Seen, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await free.wait()
        await reply(writer, 200, ANSWER)

    async with running(prepare=serving(COMPUTES, TOKENIZES), max_inflight=1) as s:
        worker = s.decode[0]
        worker.behaviour = held
        asked = [asyncio.create_task(s.post(BODY, COMPUTES)) for _ in range(3)]
        asked += [asyncio.create_task(s.post(BODY, TOKENIZES)) for _ in range(3)]
        await until(lambda: worker.asked(TOKENIZES) == 3, "tokenizing waits for no slot")
        assert worker.asked(COMPUTES) == 1
        assert await s.metric("eldr_inflight", role="decode") == 1
        assert await s.metric("eldr_queued") == 2
        free.set()
        assert [answer.status for answer in await asyncio.gather(*asked)] == [200] * 6
        assert worker.asked(COMPUTES) == 3
        assert await s.metric("eldr_inflight") == await s.metric("eldr_admitted") == 0


@on_uvloop
async def test_the_least_busy_worker_is_asked() -> None:
    async with running(decode=3, prepare=serving(COMPUTES, TOKENIZES)) as s:
        for worker in s.decode[:2]:
            worker.token_gap_s = 30.0
        streams = [asyncio.create_task(s.post()) for _ in range(12)]
        await until(lambda: s.decode[0].running and s.decode[1].running, "two are busy")
        busy = s.decode[:2]
        await until(
            lambda: sum(task.done() for task in streams) + sum(worker.running for worker in busy) == len(streams),
            "the third has answered all of its own",
        )
        before = s.decode[2].asked(TOKENIZES)
        for path in (COMPUTES, TOKENIZES):
            for _ in range(3):
                assert (await s.post(BODY, path)).status == 200
        assert s.decode[2].asked(TOKENIZES) == before + 3
        assert s.decode[2].asked(COMPUTES) == 3
        for stream in streams:
            stream.cancel()


@on_uvloop
async def test_a_deadline_ends_the_request() -> None:
    async with running(prepare=serving(TOKENIZES)) as s:
        s.decode[0].delay_s = 30.0
        answer = await s.post(BODY, TOKENIZES, {"x-request-timeout-ms": "50"})
        assert (answer.status, answer.error["type"]) == (504, "GatewayTimeoutError")
        assert await s.metric("eldr_timeouts_total", leg="total") == 1


@on_uvloop
async def test_a_client_that_leaves_ends_the_workers_request() -> None:
    async def held(worker: FakeWorker, seen: Seen, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(3600)

    async with running(prepare=serving(COMPUTES)) as s:
        s.decode[0].behaviour = held
        asked = asyncio.create_task(s.post(BODY, COMPUTES))
        await until(lambda: s.decode[0].asked(COMPUTES) == 1, "it is asked")
        asked.cancel()
        await until(lambda: any(seen.aborted for seen in s.decode[0].seen), "the worker is told")
        await until(lambda: s.router.running == 0, "nothing is left")
        assert await s.metric("eldr_inflight") == await s.metric("eldr_admitted") == 0
        assert await s.metric("eldr_client_disconnects_total") == 1


@on_uvloop
async def test_without_a_worker_it_waits_and_then_gives_up(admin: dict[str, Any]) -> None:
    async with running(prepare=serving(TOKENIZES), worker_wait_s=30.0, **admin) as s:
        gone = s.decode[0]
        await ask_admin(s, "DELETE", "/admin/workers", {"url": gone.url, "role": "decode"})
        asked = asyncio.create_task(s.post(BODY, TOKENIZES))
        await until(lambda: s.router.running == 1, "it waits")
        await ask_admin(s, "POST", "/admin/workers", {"url": gone.url, "role": "decode"})
        assert (await asked).status == 200
    async with running(prepare=serving(TOKENIZES), worker_wait_s=0, **admin) as s:
        await ask_admin(s, "DELETE", "/admin/workers", {"url": s.decode[0].url, "role": "decode"})
        refused: Reply = await s.post(BODY, TOKENIZES)
        assert (refused.status, "retry-after" in refused.headers) == (503, True)


@on_uvloop
async def test_a_router_that_stops_says_so() -> None:
    async with running(prepare=serving(COMPUTES)) as s:
        s.decode[0].delay_s = 30.0
        asked = asyncio.create_task(s.post(BODY, COMPUTES))
        await until(lambda: s.decode[0].asked(COMPUTES) == 1, "it is asked")
        await s.router.stop(0)
        assert (await asked).status == 503


@pytest.mark.parametrize("path", [COMPUTES, TOKENIZES])
@pytest.mark.usefixtures("collector")
@on_uvloop
async def test_no_cycle_is_left_by_clients_that_leave(path: str) -> None:
    async def held(worker: FakeWorker, seen: Seen, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(3600)

    async with running(prepare=serving(path), max_inflight=2) as s:
        s.decode[0].behaviour = held

        async def come_and_go(count: int) -> None:
            asked = [asyncio.create_task(s.post(BODY, path)) for _ in range(count)]
            await until(lambda: s.router.running == count, "they are there")
            await until(lambda: s.decode[0].running >= 2, "some are asked")
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
            await until(lambda: not s.router.connections, "their connections are closed")

        await come_and_go(3)  # if the endpoint has a queue, one of them waits there
        gc.collect()
        gc.garbage.clear()  # of the start
        await come_and_go(4)
        gc.collect()
        assert ours(gc.garbage) == []


@pytest.mark.parametrize(
    "answer", [(200, ANSWER, "application/json"), (500, b"", ""), (400, b"{}", "application/json")]
)
@pytest.mark.parametrize("path", [COMPUTES, TOKENIZES])
@pytest.mark.usefixtures("collector")
@on_uvloop
async def test_no_cycle_is_left(path: str, answer: tuple[int, bytes, str]) -> None:
    async with running(prepare=serving(path, answer=answer), eject_share=0) as s:
        await s.post(BODY, path)
        gc.collect()
        gc.garbage.clear()  # of the start
        for _ in range(5):
            await s.post(BODY, path)
        gc.collect()
        assert ours(gc.garbage) == []
