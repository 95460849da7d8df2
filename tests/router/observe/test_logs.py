"""What is written down: no secret, no prompt, no answer."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from pathlib import Path

import aiohttp
import pytest

from eldr.router.observe import logs
from tests.router.fake_worker import FakeWorker, Seen, begin_stream, chunk, reply
from tests.router.harness import ASK, CHAT, Setup, bearer, on_uvloop, running
from tests.router.wire import exchange

PROMPT = "the-prompt-is-private"
ANSWER = "the-answer-is-private"
SECRETS = ("the-client-key", "the-worker-key", "the-admin-key", PROMPT, ANSWER)


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
@on_uvloop
async def test_no_secret_no_prompt_and_no_answer_is_logged(
    level: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    files = {}
    for name in ("client", "worker", "admin"):
        (tmp_path / name).write_text(f"the-{name}-key\n")
        files[name] = tmp_path / name
    logs.set_up(level)
    try:
        async with running(
            prefill=2,
            decode=2,
            api_key_file=files["client"],
            worker_api_key_file=files["worker"],
            admin_key_file=files["admin"],
            prefill_timeout_s=1,
            decode_idle_timeout_s=1,
        ) as s:
            await _every_kind_of_failure(s)
    finally:
        logs.set_up("warning")
    written = capfd.readouterr()
    assert (written.err != "") == (level in ("debug", "info", "warning"))
    for secret in SECRETS:
        assert secret not in written.err + written.out


async def _every_kind_of_failure(s: Setup) -> None:
    headers = bearer("the-client-key")
    chat = {**CHAT, "messages": [{"role": "user", "content": PROMPT}]}
    ask = {**ASK, "prompt": PROMPT}

    async def garbage(
        worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        writer.write(f"HTTP/1.1 200 {ANSWER}\r\ncontent-length: {ANSWER}\r\n\r\n{ANSWER}".encode())
        await writer.drain()

    async def not_json(
        worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await reply(writer, 200, f'{{"choices": {ANSWER}'.encode())

    async def error(worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reply(writer, 500, json.dumps({"error": {"message": f"{PROMPT} {ANSWER}"}}).encode())

    async def closes(
        worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        writer.close()

    async def breaks_off(
        worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if worker.role == "prefill":
            await worker.answer(seen, writer)
            return
        await begin_stream(writer)
        await chunk(writer, f'data: {{"text": "{ANSWER}"}}\n\n'.encode())
        writer.close()

    async def bad_counts(
        worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        params = {"do_remote_prefill": True, "eldr_counts": {"v": 2, "data": ANSWER}}
        await reply(writer, 200, json.dumps({"choices": [{"text": ANSWER}], "kv_transfer_params": params}).encode())

    for behaviour in (None, garbage, not_json, error, closes, breaks_off, bad_counts):
        for workers in (s.prefill, s.decode, (*s.prefill, *s.decode)):
            for worker in (*s.prefill, *s.decode):
                worker.behaviour = behaviour if worker in workers else None
            for request in (
                s.post({**ask, "stream": True}, headers=headers),
                s.chat(chat, headers=headers),
                s.post(ask, headers={**bearer("the-admin-key"), "x-eldr-record": "1"}),
            ):
                with contextlib.suppress(aiohttp.ClientPayloadError):  # a stream that breaks off
                    await request
    await s.post(ask)
    await s.post(f'{{"prompt": "{PROMPT}'.encode(), headers=headers)
    await s.post({**ask, "model": PROMPT}, headers=headers)
    await s.post(ask, f"/v1/{PROMPT}", headers=headers)
    await exchange(s, f"GET /{PROMPT} HTTP/1.1\r\nauthorization: the-client-key\r\n{ANSWER}\r\n\r\n".encode())
    logging.getLogger("eldr.router").warning("the log is open")


def test_an_exception_is_logged_without_what_it_says(capfd: pytest.CaptureFixture[str]) -> None:
    logs.set_up("warning")
    try:
        int(PROMPT)
    except ValueError:
        logging.getLogger("eldr.router").exception("it failed")
    (line,) = capfd.readouterr().err.splitlines()
    fields = json.loads(line)
    assert fields["message"] == "it failed"
    assert fields["exception"].startswith("ValueError\n")
    assert "test_logs.py" in fields["exception"]
    assert "int(PROMPT)" in fields["exception"]
    assert PROMPT not in line
