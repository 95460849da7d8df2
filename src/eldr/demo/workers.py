"""Starts, watches, pauses and stops vLLM worker processes on this machine.

The settings make several CPU workers on few cores hand over KV caches at once instead of within seconds. docs/vllm.md
has the settings for GPU workers.
"""

from __future__ import annotations

import atexit
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from eldr.errors import EldrError
from eldr.lifeline import die_with

Role = Literal["prefill", "decode", "plain"]

CONNECTOR = "EldrConnector"
LOG_TAIL_LINES = 25
_KV_ROLES: dict[Role, str] = {"prefill": "kv_producer", "decode": "kv_consumer"}
# The last line of a traceback, after the prefix of vLLM's log lines.
_EXCEPTION = re.compile(r"(?:^|\]:? )([\w.]*(?:Error|Exception): .+)")


class WorkerError(EldrError):
    """A worker process that did not start, died, or never became ready. The message ends with the tail of its log."""


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """How to start one worker process.

    role: "prefill" and "decode" run the eldr connector. "plain" is a stock worker without a connector.
    port: for HTTP. side_channel_port: for NIXL's handshake, unique on the machine. "plain" does not use it.
    model_dir: a Hugging Face model directory. served_name: the model's name in requests.
    python: the interpreter of the environment that holds vLLM and eldr.
    log_path: the file for the worker's stdout and stderr, overwritten at the start.
    extra_args: further vLLM arguments. If one is given twice, vLLM takes the last.
    extra_config: further keys of kv_connector_extra_config, eldr's or NIXL's.
    extra_env: further environment variables.
    cpu: the only core that the worker may run on. None for all of this process.
    """

    role: Role
    port: int
    side_channel_port: int
    model_dir: Path
    served_name: str
    python: Path
    log_path: Path
    extra_args: tuple[str, ...] = ()
    extra_config: Mapping[str, Any] = field(default_factory=dict)
    extra_env: Mapping[str, str] = field(default_factory=dict)
    dtype: str = "float32"
    max_model_len: int = 2048
    kv_cache_bytes: int = 256 * 2**20
    cpu: int | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def command(self) -> list[str]:
        """The worker's command line."""
        arguments = {
            "model": self.model_dir,
            "served-model-name": self.served_name,
            "host": "127.0.0.1",
            "port": self.port,
            "dtype": self.dtype,
            "max-model-len": self.max_model_len,
            "kv-cache-memory-bytes": self.kv_cache_bytes,
            "distributed-executor-backend": "uni",
        }
        command = [str(self.python), "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
        command += [text for name, value in arguments.items() for text in (f"--{name}", str(value))]
        if self.role != "plain":
            command += ["--kv-transfer-config", json.dumps(self._kv_transfer_config())]
        return command + list(self.extra_args)

    def environment(self, base: Mapping[str, str]) -> dict[str, str]:
        """The worker's environment variables: those of `base`, and those that the worker needs."""
        # The first would override --kv-cache-memory-bytes. The others would mix Python environments.
        dropped = ("VLLM_CPU_KVCACHE_SPACE", "PYTHONPATH", "PYTHONHOME")
        kept = {name: value for name, value in base.items() if name not in dropped}
        return {
            **kept,
            # Otherwise vLLM's CPU platform replaces the executor "uni" by processes that spin on two cores.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(self.side_channel_port),
            **self.extra_env,
        }

    def _kv_transfer_config(self) -> dict[str, Any]:
        return {
            "kv_connector": CONNECTOR,
            "kv_role": _KV_ROLES[self.role],
            "kv_buffer_device": "cpu",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"num_threads": 0, **self.extra_config},
        }


class WorkerProcess:
    """One vLLM worker, which consists of several processes, in a process group of its own.

    It dies with the thread that started it (PR_SET_PDEATHSIG), so start it from a thread that outlives it. Ctrl-C in
    the terminal does not reach it: its owner stops it.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        self.spec = spec
        self._process: subprocess.Popen[bytes] | None = None
        self._watchdog: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return self.spec.url

    @property
    def pid(self) -> int | None:
        """The process id, which is also the id of the process group. None before `start` and after `stop`."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start the process and return at once. Raises WorkerError if it cannot be started."""
        if self._process is not None:
            raise WorkerError(f"{self._name} is already running")
        self._claim_port()
        self.spec.log_path.parent.mkdir(parents=True, exist_ok=True)
        try:
            environment = self.spec.environment(os.environ)
            self._process = start_logged(self.spec.command(), self.spec.log_path, environment, self.spec.cpu)
        except OSError as error:
            raise WorkerError(f"{self._name} cannot be started: {error}") from None
        self._watchdog = _watch(self._process.pid)
        _live.add(self)

    def wait_ready(self, timeout_s: float = 300.0) -> None:
        """Wait until /health answers 200. Raises WorkerError if the worker dies or `timeout_s` passes."""
        deadline = time.monotonic() + timeout_s
        while not self.healthy():
            process = self._process  # another thread may stop it in the meantime
            if process is None:
                raise WorkerError(f"{self._name} was not started, or was stopped")
            if (status := process.poll()) is not None:
                self.stop()
                raise WorkerError(f"{self._name} exited with status {status} while starting.{self._log_tail}")
            if time.monotonic() > deadline:
                raise WorkerError(f"{self._name} was not ready within {timeout_s:.0f} s.{self._log_tail}")
            time.sleep(0.2)

    def healthy(self, timeout_s: float = 2.0) -> bool:
        """Whether the process is alive and its /health answers 200 within `timeout_s`."""
        if self._process is None or self._process.poll() is not None:
            return False
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=timeout_s) as answer:
                return bool(answer.status == 200)
        except (OSError, http.client.HTTPException):
            return False

    def pause(self) -> None:
        """Suspend the whole process group (SIGSTOP)."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Resume a suspended process group (SIGCONT)."""
        self._signal(signal.SIGCONT)

    def stop(self, grace_s: float = 10.0) -> None:
        """End the process group with SIGTERM and, after `grace_s`, SIGKILL. Does nothing if it is not running."""
        process = self._process  # another thread may stop it at the same time
        if process is None:
            return
        self.resume()
        self._signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)
        self._signal(signal.SIGKILL)
        process.wait()
        if self._watchdog is not None:
            self._watchdog.kill()
            self._watchdog.wait()
        self._process = None
        _live.discard(self)

    @property
    def _name(self) -> str:
        return f"{self.spec.role} worker on port {self.spec.port}"

    @property
    def _log_tail(self) -> str:
        return log_tail(self.spec.log_path)

    def _claim_port(self) -> None:
        # A process that already has the port would answer in this worker's place until its start fails, seconds later.
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", self.spec.port))
            except OSError as error:
                raise WorkerError(f"{self._name} cannot use its port: {error.strerror}") from None

    def _signal(self, number: signal.Signals) -> None:
        process = self._process
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)


def start_logged(
    command: Sequence[str], log_path: Path, environment: Mapping[str, str] | None = None, cpu: int | None = None
) -> subprocess.Popen[bytes]:
    """Start a process, in a group of its own, that ends with this one and writes its output to a log. Raises OSError.

    environment: its variables. None for those of this process.
    cpu: the only core that it may run on. None for all of this process.
    """
    die = die_with(os.getpid())

    def prepare() -> None:
        die()
        if cpu is not None:
            os.sched_setaffinity(0, {cpu})

    with log_path.open("wb") as log:
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            process_group=0,
            preexec_fn=prepare,
        )


def log_tail(path: Path) -> str:
    """The first exception in a log and the log's last lines, to be appended to an error message."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    # An engine's own exception comes first. At the end, the log only says that the engine failed.
    cause = next((found[1] for line in lines if (found := _EXCEPTION.search(line))), None)
    tail = "\n".join(f"  | {line}" for line in lines[-LOG_TAIL_LINES:]) or "  | (empty)"
    return (f" {cause}" if cause else "") + f"\nThe end of its log {path}:\n{tail}"


def _watch(group: int) -> subprocess.Popen[bytes]:
    """Start a process that kills the process group when this process ends, for whatever reason.

    PR_SET_PDEATHSIG ends only the group's first process. The engine's process would survive.
    """
    script = 'read -r _; kill -s KILL -- "-$1"'  # the pipe closes when its writer, this process, ends
    return subprocess.Popen(
        ["/bin/sh", "-c", script, "eldr-watchdog", str(group)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        process_group=0,
    )


_live: set[WorkerProcess] = set()


@atexit.register
def _stop_all() -> None:
    # All get SIGTERM first, so that their grace periods overlap.
    workers = list(_live)
    for worker in workers:
        worker.resume()
        worker._signal(signal.SIGTERM)
    for worker in workers:
        worker.stop(grace_s=3.0)
