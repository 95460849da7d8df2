"""`eldr load` against a server in a thread."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from eldr.cli.main import main
from eldr.load.outcome import Outcome
from eldr.load.summary import summarise


class Server:
    """Streams as many tokens as are asked for; requests whose prompt holds `fails` get a 503."""

    def __init__(self, fails: int | None = None) -> None:
        self.bodies: list[Any] = []
        self.fails = fails
        self._ready, self._loop = threading.Event(), asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Server:
        self._thread.start()
        assert self._ready.wait(30)
        return self

    def __exit__(self, *_: Any) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        app = web.Application()
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/completions", self._complete)
        runner = web.AppRunner(app)
        self._loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", 0)
        self._loop.run_until_complete(site.start())
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        self._ready.set()
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())
        self._loop.close()

    async def _models(self, request: web.Request) -> Any:
        return web.json_response({"data": [{"id": "the-model"}]})

    async def _complete(self, request: web.Request) -> Any:
        body = await request.json()
        self.bodies.append(body)
        if self.fails is not None and len(self.bodies) % self.fails == 0:
            return web.json_response({"error": {"message": "no worker"}}, status=503)
        response = web.StreamResponse()
        await response.prepare(request)
        for token in range(body["max_tokens"]):
            choice = {"text": "x", "token_ids": [token]}
            await response.write(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        return response


@pytest.mark.parametrize("pace", [["--rate", "300"], ["--in-flight", "3"]])
def test_a_workload_is_streamed_and_reported(pace: list[str], tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    with Server() as server:
        arguments = ["load", server.url, "--workload", "task", *pace, "--requests", "20", "--max-tokens", "5"]
        assert main([*arguments, "--max-prompt-chars", "50", "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    assert (result["requests"], result["errors"], result["tokens"]) == (20, 0, 100)
    assert sum(kind["requests"] for kind in result["kinds"].values()) == 20
    assert result["tpot_ms"]["p50"] >= 0
    assert (result["sent_late_p99_ms"] is None) == (pace[0] == "--in-flight")
    assert {body["model"] for body in server.bodies} == {"the-model"}
    assert all(len(body["prompt"]) <= 50 and body["ignore_eos"] and body["max_tokens"] == 5 for body in server.bodies)
    assert len({body["cache_salt"] for body in server.bodies}) == 1


def test_failures_are_counted_and_make_the_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Server(fails=4) as server:
        arguments = ["load", server.url, "--requests", "12", "--max-tokens", "2", "--in-flight", "1", "--json", "-"]
        assert main(arguments) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["errors"] == 3
    assert result["error_examples"][0]["count"] == 3
    assert "503" in result["error_examples"][0]["error"]


@pytest.mark.parametrize("wrong", [["--rate", "-1"], ["--rate", "nan"], ["--requests", "0"], ["--workload", "chat"]])
def test_wrong_numbers_are_refused_before_anything_is_sent(
    wrong: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["load", "http://127.0.0.1:9", *wrong]) == 2
    assert "expected" in (error := capsys.readouterr().err) or "there is no" in error


def test_an_absent_server_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["load", "http://127.0.0.1:9", "--requests", "2"]) == 2
    assert "127.0.0.1:9" in capsys.readouterr().err


def test_figures_of_a_run() -> None:
    even = Outcome(0, "code", sent_s=10.0, token_times_s=[10.5, 10.6, 10.7])
    slow = Outcome(1, "math", sent_s=11.0, token_times_s=[12.0, 12.4])
    failed = Outcome(2, "math", sent_s=11.0, token_times_s=[19.0], error="status 503")
    result = summarise([even, slow, failed], duration_s=4.0)
    assert (result["requests"], result["errors"], result["tokens"]) == (3, 1, 5)
    assert (result["requests_per_s"], result["tokens_per_s"]) == (0.5, 1.25)
    assert result["ttft_ms"]["mean"] == pytest.approx(750)
    assert result["tpot_ms"]["p50"] == pytest.approx(250)  # of 100 and 400
    assert result["itl_ms"]["mean"] == pytest.approx(200)  # of 100, 100 and 400
    assert result["kinds"]["math"]["requests"] == 2
    assert result["kinds"]["math"]["ttft_ms"]["p99"] == pytest.approx(1000)
    nothing = summarise([failed], duration_s=1.0)
    assert nothing["ttft_ms"]["p50"] is None
    assert nothing["tokens"] == 0
