"""Runs the demo's processes: its vLLM workers and a router for each policy, on free ports of this machine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from eldr.demo.ports import free_ports
from eldr.demo.workers import Role, WorkerError, WorkerProcess, WorkerSpec, log_tail, start_logged
from eldr.errors import EldrError

MODEL_NAME = "eldr-demo"
# Its sitecustomize.py says why.
INTERPRETER = Path(__file__).parent / "interpreter"
# The smallest size that vLLM's CPU attention allows, so that the openings that prompts share fill a few blocks.
BLOCK_SIZE_TOKENS = 32
# 32,768 tokens of the demo's model: far more than are ever in flight.
KV_CACHE_BYTES = 128 * 2**20
# It takes a minute on two idle cores, and far longer on busy ones.
WORKER_READY_TIMEOUT_S = 600.0
ROUTER_READY_TIMEOUT_S = 60.0
ROUTER_GRACE_S = 5.0


class RouterProcessError(EldrError):
    """The router did not start, or did not find its workers. The message ends with the tail of its log."""


@dataclass(frozen=True, slots=True)
class Workers:
    """The running workers: a plain one for reference, one for prefill, several for decode."""

    plain: WorkerProcess
    prefill: WorkerProcess
    decode: list[WorkerProcess]

    @property
    def decode_urls(self) -> list[str]:
        return [worker.url for worker in self.decode]


@contextlib.asynccontextmanager
async def running_workers(
    python: Path, model_dir: Path, decode_model_dir: Path, logs: Path, decode_workers: int, ready: Callable[[], None]
) -> AsyncIterator[Workers]:
    """Start all workers at once, wait until they are ready, and stop them at the end.

    decode_model_dir: the model of the decode workers, whose KV cache has to be that of the others' `model_dir`.
    ready: called once for each worker that becomes ready. Raises WorkerError if one does not.
    """
    roles: list[tuple[str, Role]] = [("plain", "plain"), ("prefill", "prefill")]
    roles += [(f"decode{number}", "decode") for number in range(decode_workers)]
    ports = free_ports(2 * len(roles))
    cores = cores_of(decode_workers, sorted(os.sched_getaffinity(0)))
    cpus: list[int | None] = [None, None, *cores]
    processes = [
        WorkerProcess(
            WorkerSpec(
                role=role,
                port=port,
                side_channel_port=side_channel_port,
                model_dir=decode_model_dir if role == "decode" else model_dir,
                served_name=MODEL_NAME,
                # Not resolved: a virtual environment is recognised by the path of its interpreter.
                python=python.absolute(),
                log_path=logs / f"{name}.log",
                extra_args=("--block-size", str(BLOCK_SIZE_TOKENS)),
                extra_env={"PYTHONPATH": str(INTERPRETER)},
                kv_cache_bytes=KV_CACHE_BYTES,
                cpu=cpu,
                # What vLLM compares includes the folders of the models, which differ here although their caches do not.
                extra_config={"enforce_handshake_compat": False},
            )
        )
        for (name, role), port, side_channel_port, cpu in zip(roles, ports[::2], ports[1::2], cpus, strict=True)
    ]
    # Each worker needs a second thread to be stopped while the first still waits for it. Stopping it ends the wait.
    with ThreadPoolExecutor(2 * len(processes)) as pool:
        try:
            # Not started from the pool: a worker dies with the thread that started it.
            for process in processes:
                process.start()
            await _all_ready(processes, pool, ready)
            yield Workers(processes[0], processes[1], processes[2:])
        finally:
            loop = asyncio.get_running_loop()
            await asyncio.gather(*(loop.run_in_executor(pool, process.stop) for process in processes))


def cores_of(decode_workers: int, cores: Sequence[int]) -> list[int | None]:
    """The core of each decode worker, if as many of them share every core. None for each if not.

    Linux lets three busy workers share a core while the fourth has the other for seconds. The workers of a fleet are
    equal, and policies take them to be.
    """
    if decode_workers % len(cores):
        return [None] * decode_workers
    return [cores[number % len(cores)] for number in range(decode_workers)]


async def _all_ready(processes: Sequence[WorkerProcess], pool: Executor, ready: Callable[[], None]) -> None:
    loop = asyncio.get_running_loop()

    async def one(process: WorkerProcess) -> None:
        await loop.run_in_executor(pool, process.wait_ready, WORKER_READY_TIMEOUT_S)
        ready()

    try:
        async with asyncio.TaskGroup() as group:
            for process in processes:
                group.create_task(one(process))
    except* WorkerError as errors:
        raise errors.exceptions[0] from None


@contextlib.asynccontextmanager
async def running_router(workers: Workers, flags: Sequence[str], log_path: Path) -> AsyncIterator[str]:
    """Run `eldr serve` in front of `workers`, with further `flags`. Yields its URL. Raises RouterProcessError."""
    async with running_eldr("serve", workers, flags, log_path) as url:
        yield url


@contextlib.asynccontextmanager
async def running_eldr(name: str, workers: Workers, flags: Sequence[str], log_path: Path) -> AsyncIterator[str]:
    """Run a command of eldr that uses `workers`, with further `flags`. Yields its URL. Raises RouterProcessError."""
    port = free_ports(1)[0]
    command = [sys.executable, "-m", "eldr", name, "--port", str(port), "--prefill", workers.prefill.url]
    for url in workers.decode_urls:
        command += ["--decode", url]
    process = start_logged([*command, *flags], log_path)
    try:
        url = f"http://127.0.0.1:{port}"
        await _router_ready(process, url, log_path)
        yield url
    finally:
        await asyncio.to_thread(end_process, process)


async def _router_ready(process: subprocess.Popen[bytes], url: str, log_path: Path) -> None:
    deadline = time.monotonic() + ROUTER_READY_TIMEOUT_S
    while not await asyncio.to_thread(answers, f"{url}/ready"):
        status = process.poll()
        if status is not None or time.monotonic() > deadline:
            problem = "was not ready in time" if status is None else f"exited with status {status}"
            raise RouterProcessError(f"the process behind {url} {problem}.{log_tail(log_path)}")
        await asyncio.sleep(0.1)


def answers(url: str) -> bool:
    """Whether a GET of `url` is answered with 200."""
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def end_process(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(ROUTER_GRACE_S)
    if process.poll() is None:
        process.kill()
        process.wait()
