"""Real vLLM workers, routers in front of them, and the little that tests need to talk to both."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

from eldr.demo.ports import free_ports
from eldr.demo.workers import Role, WorkerProcess, WorkerSpec

MODEL = "tiny"
LEASE_S = 8.0


def call(
    url: str, path: str, body: object = None, headers: dict[str, str] | None = None, timeout_s: float = 60.0
) -> Any:
    """(status, headers, raw body) of one HTTP exchange, error statuses included."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json", **(headers or {})})
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def metric(url: str, name: str, **labels: str) -> float:
    """The sum of the samples of a metric whose labels include `labels`; fails if there is no such metric."""
    total = 0.0
    text = call(url, "/metrics")[2].decode()
    assert f"# TYPE {name} " in text, f"{url} has no metric {name}"
    for line in text.splitlines():
        if line.startswith((name + "{", name + " ")) and all(f'{k}="{v}"' in line for k, v in labels.items()):
            total += float(line.rsplit(" ", 1)[1])
    return total


@dataclass
class Fleet:
    model_dir: Path
    logs: Path
    prefill: WorkerProcess
    decode: list[WorkerProcess]
    plain: WorkerProcess

    def worker(self, role: Role, number: int, *extra_args: str) -> WorkerProcess:
        return new_worker(self.model_dir, self.logs, role, number, extra_args)


def new_worker(model_dir: Path, logs: Path, role: Role, number: int, extra_args: tuple[str, ...] = ()) -> WorkerProcess:
    python = os.environ.get("ELDR_VLLM_PYTHON")
    if not python:
        pytest.fail("tests/e2e start real vLLM workers: set ELDR_VLLM_PYTHON, or run `make test`")
    port, side_channel_port = free_ports(2)
    spec = WorkerSpec(
        role=role,
        port=port,
        side_channel_port=side_channel_port,
        model_dir=model_dir,
        served_name=MODEL,
        # Not resolved: the path of a virtual environment's interpreter is what makes it one.
        python=Path(python).absolute(),
        log_path=logs / f"{role}{number}.log",
        kv_cache_bytes=64 * 2**20,
        extra_args=extra_args,
        extra_config={} if role == "plain" else {"kv_lease_duration": LEASE_S},
    )
    return WorkerProcess(spec)


class Router:
    """`eldr serve` as its own process."""

    def __init__(
        self,
        fleet: Fleet,
        log_path: Path,
        flags: list[str],
        decode: list[str] | None = None,
        prefill: list[str] | None = None,
    ) -> None:
        self.url = f"http://127.0.0.1:{free_ports(1)[0]}"
        self.log_path = log_path
        command = [sys.executable, "-m", "eldr", "serve", "--port", self.url.rsplit(":", 1)[1]]
        for url in prefill if prefill is not None else [fleet.prefill.url]:
            command += ["--prefill", url]
        for url in decode if decode is not None else [worker.url for worker in fleet.decode]:
            command += ["--decode", url]
        with log_path.open("wb") as log:
            self.process = subprocess.Popen([*command, *flags], stdout=log, stderr=log)

    def wait_ready(self, timeout_s: float = 30.0) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log_path.read_text()
            try:
                if call(self.url, "/ready", timeout_s=2)[0] == 200:
                    return
            except OSError:
                pass
            time.sleep(0.1)
        raise AssertionError(f"router not ready: {self.log_path.read_text()}")

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


# Flags, and as keywords the workers that the router gets: a context with the ready router.
StartRouter = Callable[..., AbstractContextManager[Router]]


def client_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=60)
