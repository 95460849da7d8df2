"""Workers and clients that misbehave: what is repaired, what is reported, and that a hand-off is used once."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
from functools import partial

import pytest

from tests.router.failing import die_after_first_event, die_after_head, die_at_once, hang
from tests.router.fake_worker import Behaviour, FakeWorker, Seen, begin_stream, chunk, end_stream, reply
from tests.router.harness import ASK, CHAT, Scripted, Setup, on_uvloop, raw_stream, running, until


def handoffs_sent(setup: Setup) -> list[str]:
    """The hand-offs that decode workers got a byte of, by their request id at the prefill worker."""
    return [
        seen.body["kv_transfer_params"]["remote_request_id"]
        for worker in setup.decode
        for seen in worker.generated
        if "kv_transfer_params" in seen.body
    ]


async def garbage(worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")
    await writer.drain()


async def short_body(
    worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    writer.write(b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{"choices"')
    writer.transport.close()


async def no_length(worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n{"choices": []}')
    writer.transport.close()


async def not_json(worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reply(writer, 200, b"<html>")


@pytest.mark.parametrize("fault", [die_at_once, die_after_head, garbage, short_body, no_length])
@pytest.mark.parametrize("stream", [False, True])
@on_uvloop
async def test_a_decode_that_fails_before_its_first_byte_gets_a_new_prefill(fault: Behaviour, stream: bool) -> None:
    policy = Scripted()
    async with running(decode=2, policy=policy) as s:
        s.decode[0].behaviour = fault
        answer = await s.post({**ASK, "stream": stream})
        assert answer.status == 200
        text = "".join(e["choices"][0]["text"] for e in answer.events[:-1]) if stream else None
        assert (text or answer.json()["choices"][0]["text"]) == "abcd"
        sent = handoffs_sent(s)
        assert len(sent) == len(set(sent)) == 2
        assert len(s.prefill[0].generated) == 2
        first, second = (worker.url for worker in s.decode)
        assert policy.heard[2:] == [("started", first), ("finished", first), ("started", second), ("finished", second)]
        ids = [seen.headers["x-request-id"] for worker in (*s.prefill, *s.decode) for seen in worker.generated]
        assert len(ids) == len(set(ids)) == 4
        assert await s.metric("eldr_retries_total", leg="decode") == 1
        assert await s.metric("eldr_worker_failures_total", worker=first) == 1
        assert await s.metric("eldr_inflight") == 0


@on_uvloop
async def test_a_refused_connection_reuses_the_handoff_on_another_worker() -> None:
    policy = Scripted()
    async with running(decode=2, policy=policy, health_interval_s=60) as s:
        gone, there = (worker.url for worker in s.decode)
        await s.decode[0].stop()
        assert (await s.post()).status == 200
        assert len(s.prefill[0].generated) == 1
        assert len(handoffs_sent(s)) == 1
        assert policy.heard[2:] == [("started", gone), ("finished", gone), ("started", there), ("finished", there)]
        # Until a probe finds it again, nothing more goes there.
        assert await s.metric("eldr_worker_up", worker=gone) == 0
        await s.post()
        assert policy.asked[-1][1].keys() == {there}


@on_uvloop
async def test_when_every_decode_worker_fails_the_client_hears_it() -> None:
    async with running(decode=3) as s:
        for worker in s.decode:
            worker.behaviour = die_at_once
        answer = await s.post()
        assert answer.status == 502
        assert answer.error["code"] == 502
        sent = handoffs_sent(s)
        assert len(sent) == len(set(sent)) == 3
        assert s.router.services.admission.admitted == 0


@on_uvloop
async def test_a_decode_worker_without_another_is_asked_again_with_a_new_handoff() -> None:
    async with running() as s:
        s.decode[0].behaviour = die_at_once
        assert (await s.post()).status == 502
        sent = handoffs_sent(s)
        assert len(sent) == len(set(sent)) == 3


@pytest.mark.parametrize("everywhere", [False, True])
@on_uvloop
async def test_a_pull_that_failed_gets_a_new_prefill(everywhere: bool) -> None:
    """With kv_load_failure_policy "fail" vLLM answers 500."""
    error = b'{"error":{"message":"kv load failed","type":"InternalServerError","param":null,"code":500}}'

    async def fail(worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reply(writer, 500, error)

    async with running(decode=2, policy=Scripted()) as s:
        s.decode[0].behaviour = fail
        s.decode[1].behaviour = fail if everywhere else None
        answer = await s.post({**ASK, "stream": True})
        assert answer.status == (500 if everywhere else 200)
        assert (answer.body == error) == everywhere
        sent = handoffs_sent(s)
        assert len(sent) == len(set(sent)) == (3 if everywhere else 2)


@on_uvloop
async def test_a_broken_stream_ends_with_an_error_and_without_its_end() -> None:
    async with running(decode=2) as s:
        for worker in s.decode:
            worker.behaviour = die_after_first_event
        raw = await raw_stream(s)
        assert b'"text":"a"' in raw
        last = raw.rstrip().rsplit(b"data: ", 1)[1]
        assert json.loads(last)["error"]["code"] == 502
        assert b"[DONE]" not in raw
        assert not raw.endswith(b"0\r\n\r\n")
        assert len(handoffs_sent(s)) == 1
        assert await s.metric("eldr_broken_streams_total") == 1
        assert sum(w.in_flight for w in s.router.services.fleet.workers("decode").values()) == 0


@pytest.mark.parametrize("fault", [die_at_once, garbage, short_body])
@on_uvloop
async def test_a_prefill_that_fails_goes_to_another_worker(fault: Behaviour) -> None:
    async with running(prefill=2) as s:
        for n in range(6):
            for worker in s.prefill:
                worker.behaviour = None
            s.prefill[n % 2].behaviour = fault
            assert (await s.post({**ASK, "prompt": f"prompt {n}"})).status == 200
        assert len(handoffs_sent(s)) == 6


@on_uvloop
async def test_prefill_workers_gone() -> None:
    async with running(prefill=2, health_interval_s=60, worker_wait_s=0) as s:
        for worker in s.prefill:
            await worker.stop()
        assert (await s.post()).status == 503
        assert (await s.post()).status == 503
        assert s.decode[0].generated == []


@on_uvloop
async def test_a_prefill_answer_that_is_not_json_is_the_workers_fault() -> None:
    async with running() as s:
        s.prefill[0].behaviour = not_json
        assert (await s.post()).status == 502
        assert s.decode[0].generated == []


@pytest.mark.parametrize("leg", ["prefill", "decode"])
@on_uvloop
async def test_a_workers_error_is_relayed(leg: str) -> None:
    error = b'{"error":{"message":"max_tokens is too large","type":"BadRequestError","param":"max_tokens","code":400}}'

    async def refuse(
        worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await reply(writer, 400, error)

    async with running() as s:
        getattr(s, leg)[0].behaviour = refuse
        for stream in (False, True):
            answer = await s.post({**ASK, "stream": stream})
            assert (answer.status, answer.body) == (400, error)
        assert await s.metric("eldr_request_total", status="400", endpoint="/v1/completions") == 2


@on_uvloop
async def test_retry_after_is_relayed() -> None:
    async def busy(worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reply(writer, 429, b'{"error":{}}', "content-type: application/json\r\nretry-after: 7\r\nx-secret: a\r\n")

    async with running() as s:
        s.decode[0].behaviour = busy
        answer = await s.post()
        assert (answer.status, answer.headers["retry-after"]) == (429, "7")
        assert "x-secret" not in answer.headers


@on_uvloop
async def test_a_silent_worker_is_given_up() -> None:
    async with running(prefill=2, decode=2, policy=Scripted(), decode_answer_timeout_s=0.5, prefill_timeout_s=0.5) as s:
        s.decode[0].behaviour = hang
        assert (await s.post()).status == 200
        await until(lambda: s.decode[0].generated[0].aborted, "the connection to the silent worker is closed")
        for worker in s.prefill:
            worker.behaviour = hang
        answer = await s.post()
        assert (answer.status, answer.error["type"]) == (504, "GatewayTimeoutError")


@on_uvloop
async def test_a_lease_that_ended_in_the_prefill_answer_is_not_used() -> None:
    async with running() as s:
        s.prefill[0].lease = {"left_s": -1.0}
        assert (await s.post()).status == 502
        assert handoffs_sent(s) == []
        assert len(s.prefill[0].generated) == 3


@pytest.mark.parametrize("leg", ["prefill", "decode"])
@pytest.mark.parametrize("stream", [False, True])
@on_uvloop
async def test_a_client_that_goes_away_cancels_its_worker_at_once(leg: str, stream: bool) -> None:
    async with running() as s:
        worker = getattr(s, leg)[0]
        worker.behaviour = hang
        _, writer = await asyncio.open_connection("127.0.0.1", s.router.port)
        body = json.dumps({**ASK, "stream": stream}).encode()
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n")
        writer.write(b"content-length: %d\r\n\r\n%b" % (len(body), body))
        await until(lambda: len(worker.generated) == 1, "the worker has the request")
        writer.close()
        await until(lambda: worker.generated[0].aborted, "the worker hears of it")
        assert await s.metric("eldr_client_disconnects_total") == 1
        assert await s.metric("eldr_inflight") == 0
        worker.behaviour = None
        assert (await s.post()).status == 200


@on_uvloop
async def test_a_client_that_goes_away_in_mid_stream_cancels_its_worker() -> None:
    policy = Scripted()
    async with running(policy=policy) as s:
        s.decode[0].tokens = ["x"] * 16
        s.decode[0].token_gap_s = 0.1
        async with s.session.post(s.url + "/v1/completions", json={**ASK, "max_tokens": 16, "stream": True}) as answer:
            await answer.content.readany()
            answer.close()
        await until(lambda: s.decode[0].generated[0].aborted, "the worker hears of it")
        await until(lambda: policy.heard[-1][0] == "finished", "the policy hears of it")
        assert [what for what, _ in policy.heard] == ["joined", "started", "finished"]


@on_uvloop
async def test_a_client_that_closes_at_done_has_been_answered() -> None:
    async def end_late(
        worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await begin_stream(writer)
        for event in worker.events(seen, ["a"], False):
            await chunk(writer, event)
        await asyncio.sleep(3600)

    async with running() as s:
        s.decode[0].behaviour = end_late
        async with s.session.post(s.url + "/v1/completions", json={**ASK, "stream": True}) as answer:
            await answer.content.readuntil(b"[DONE]\n\n")
            answer.close()
        await until(lambda: s.router.running == 0, "the request ends")
        assert await s.metric("eldr_request_total", endpoint="/v1/completions", status="200") == 1
        assert await s.metric("eldr_client_disconnects_total") == 0
        assert await s.metric("eldr_inflight") == 0
        s.decode[0].behaviour = None
        assert (await s.post()).status == 200


@on_uvloop
async def test_a_stalled_reader_stops_its_worker_and_holds_little() -> None:
    sent = 0

    async def flood(worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await begin_stream(writer)
        event = b'data: {"choices":[{"text":"' + b"x" * 4000 + b'"}]}\n\n'
        for _ in range(10_000):  # 40 MB
            await chunk(writer, event)
            sent += len(event)
        await chunk(writer, b"data: [DONE]\n\n")
        await end_stream(writer)

    async with running() as s:
        s.decode[0].behaviour = flood
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 1024)
        client.connect(("127.0.0.1", s.router.port))
        body = json.dumps({**ASK, "stream": True}).encode()
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n"
            b"content-length: %d\r\n\r\n%b" % (len(body), body)
        )
        await until(lambda: sent > 0, "the worker has begun")
        before = -1
        while before != sent:  # until nothing moves any more
            before = sent
            await asyncio.sleep(0.3)
        # What fits into the sockets and buffers on the way, and no more.
        assert sent < 16_000_000
        # Another client is served meanwhile.
        s.decode[0].behaviour = None
        assert (await s.post()).status == 200

        received = await asyncio.to_thread(_read_answer, client)
        assert received.count(b"x" * 4000) == 10_000
        assert received.endswith(b"data: [DONE]\n\n")


def _read_answer(client: socket.socket) -> bytes:
    answer = http.client.HTTPResponse(client)
    answer.begin()
    body = answer.read()
    client.close()
    return body


def has(things: list[str], count: int) -> bool:
    return len(things) == count


@on_uvloop
async def test_a_full_fleet_queues_first_come_first_served_before_the_prefill() -> None:
    async with running(decode=2, max_inflight=2) as s:
        places = asyncio.Semaphore(0)
        running_now: list[str] = []

        async def held(
            worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
        ) -> None:
            running_now.append(seen.body["prompt"])
            await places.acquire()
            await worker.answer(seen, writer)

        for worker in s.decode:
            worker.behaviour = held
        tasks = []
        for n in range(8):
            tasks.append(asyncio.create_task(s.post({**ASK, "prompt": str(n)})))
            await until(lambda: len(running_now) + s.router.services.admission.queued == len(tasks), "it runs or waits")
        assert await s.metric("eldr_queued") == 4
        assert len(s.prefill[0].generated) == 4  # no lease ticks for those that wait
        assert [worker.most_running for worker in s.decode] == [2, 2]
        tasks[5].cancel()
        await until(lambda: s.router.services.admission.queued == 3, "a client that is gone waits no more")
        for released in range(1, 4):
            places.release()
            await until(partial(has, running_now, 4 + released), "the next one runs")
        assert running_now == ["0", "1", "2", "3", "4", "6", "7"]
        for _ in range(4):
            places.release()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert [answer.status for n, answer in enumerate(answers) if n != 5] == [200] * 7
        assert max(worker.most_running for worker in s.decode) == 2
        assert await s.metric("eldr_queue_seconds_count") == 3
        assert await s.metric("eldr_admitted") == 0


@on_uvloop
async def test_the_queue_is_told_when_the_last_worker_goes() -> None:
    async with running(max_inflight=1, worker_wait_s=0) as s:
        s.decode[0].behaviour = hang
        first = asyncio.create_task(s.post())
        await until(lambda: len(s.decode[0].generated) == 1, "it runs")
        second = asyncio.create_task(s.post())
        await until(lambda: s.router.services.admission.queued == 1, "it waits")
        await s.decode[0].stop()
        answer = await second
        assert answer.status == 503
        assert int(answer.headers["retry-after"]) > 0
        assert (await first).status in (502, 503)


@on_uvloop
async def test_workers_that_go_and_come_back() -> None:
    async with running(decode=1, worker_wait_s=0) as s:
        assert (await s.post()).status == 200
        await s.decode[0].stop()
        await until(lambda: not s.router.services.fleet.ready, "it is found out")
        assert (await s.post()).status == 503
        await s.decode[0].start()
        await until(lambda: s.router.services.fleet.ready, "it is found again")
        assert (await s.post()).status == 200


@on_uvloop
async def test_stopping_lets_running_requests_finish() -> None:
    async with running() as s:
        s.decode[0].tokens = ["x"] * 8
        s.decode[0].token_gap_s = 0.1
        port = s.router.port
        task = asyncio.create_task(s.chat({**CHAT, "max_tokens": 8, "stream": True}))
        await until(lambda: s.decode[0].running == 1, "it runs")
        await s.router.stop(20)
        answer = await task
        assert answer.events[-1] == "data: [DONE]"
        with pytest.raises(OSError):
            await asyncio.open_connection("127.0.0.1", port)


@on_uvloop
async def test_stopping_cuts_off_what_does_not_finish() -> None:
    async with running() as s:
        s.decode[0].behaviour = hang
        task = asyncio.create_task(s.post())
        await until(lambda: s.decode[0].running == 1, "it runs")
        async with asyncio.timeout(30):
            await s.router.stop(0.3)
        assert (await task).status == 503
        await until(lambda: s.decode[0].generated[0].aborted, "the worker hears of it")


@on_uvloop
async def test_stopping_sends_what_was_written_to_a_slow_reader() -> None:
    async def large(worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reply(writer, 200, b'{"choices":[],"text":"%b"}' % (b"x" * 20_000_000))

    async with running() as s:
        s.decode[0].behaviour = large
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 1024)
        client.connect(("127.0.0.1", s.router.port))
        body = json.dumps(ASK).encode()
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n%b" % (len(body), body)
        )
        await until(lambda: s.decode[0].generated and s.router.running == 0, "the answer is written")
        stopping = asyncio.create_task(s.router.stop(20))
        received = await asyncio.to_thread(_read_answer, client)
        assert len(received) == 20_000_024
        await stopping
