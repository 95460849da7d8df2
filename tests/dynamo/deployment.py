"""A Dynamo deployment on this machine: real frontend, the component, fake workers as processes, discovery by files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from eldr.demo.ports import free_ports

MODEL = "tiny"
ROOT = Path(__file__).parents[2]


def wait_until(condition: Callable[[], bool], what: str, limit_s: float = 60.0) -> None:
    deadline_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.05)


class FakeWorker:
    """A fake worker's process, and what it has noted."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self.log = log

    def events(self, kind: str) -> list[dict[str, Any]]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [event for event in map(json.loads, lines) if event["event"] == kind]


class Deployment:
    """Starts the processes one by one. Their logs are in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []
        self._port, self._system_port = free_ports(2)
        self.url = f"http://127.0.0.1:{self._port}"
        self.frontend: subprocess.Popen[bytes] | None = None
        self.component: subprocess.Popen[bytes] | None = None

    def start(self, name: str, *command: str, **variables: str) -> subprocess.Popen[bytes]:
        discovery = {
            "DYN_DISCOVERY_BACKEND": "file",
            "DYN_FILE_KV": str(self.folder / "discovery"),
            "DYN_REQUEST_PLANE": "tcp",
            "DYN_EVENT_PLANE": "zmq",
            "DYN_LOGGING_DISABLE_ANSI_COLORS": "1",
            "HF_HUB_OFFLINE": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                stdout=log,
                stderr=log,
                env={**os.environ, **discovery, **variables},
            )
        self._processes.append(process)
        return process

    def worker(self, role: str, name: str, option: str = "") -> FakeWorker:
        log = self.folder / f"{name}.events"
        command = ("-m", "tests.dynamo.fake_worker", role, name, str(log), option)
        return FakeWorker(self.start(name, *command), log)

    def start_component(self, *flags: str) -> None:
        import eldr_small_moe

        model = Path(eldr_small_moe.__file__).parent
        named = ("--model-path", str(model), "--served-model-name", MODEL)
        self.component = self.start(
            "component", "-m", "eldr_dynamo", *named, *flags, DYN_SYSTEM_PORT=str(self._system_port)
        )

    def start_frontend(self) -> None:
        flags = ("--namespace", "eldr", "--migration-limit", "1", "--http-port", str(self._port))
        self.frontend = self.start("frontend", "-m", "dynamo.frontend", *flags)

    def wait_ready(self) -> None:
        def ready() -> bool:
            try:
                with urllib.request.urlopen(f"{self.url}/v1/models", timeout=5) as answer:
                    return bool(json.load(answer)["data"])
            except OSError:
                return False

        wait_until(ready, f"the frontend lists no model; see the logs in {self.folder}")

    def stop(self) -> None:
        for process in self._processes:
            process.send_signal(signal.SIGKILL)
        for process in self._processes:
            process.wait()

    # Requests.

    def complete(self, prompt: str, max_tokens: int, **more: Any) -> tuple[int, dict[str, Any]]:
        """(status, answer) of a completion that is not streamed."""
        try:
            with self.open(prompt, max_tokens, **more) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def open(self, prompt: str, max_tokens: int, **more: Any) -> Any:
        body = {"model": MODEL, "prompt": prompt, "max_tokens": max_tokens, **more}
        request = urllib.request.Request(
            f"{self.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        return urllib.request.urlopen(request, timeout=60)

    # Metrics.

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the component's samples of that name and those labels."""
        return sum(value for found, value in self.samples(name) if labels.items() <= found.items())

    def samples(self, name: str) -> Iterator[tuple[dict[str, str], float]]:
        """The component's samples of that name: labels and value."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self._system_port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        for family in text_string_to_metric_families(text):
            yield from ((sample.labels, sample.value) for sample in family.samples if sample.name == name)
