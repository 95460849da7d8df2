"""The demo leaves nothing behind, whenever it is stopped. Shell scripts stand in for the vLLM interpreter."""

import asyncio
import os
import socket
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest

from eldr.demo.ports import free_ports
from eldr.demo.processes import cores_of, running_workers
from eldr.demo.workers import WorkerError, WorkerProcess, WorkerSpec

HANG_S = 60  # a guard, not a measurement


def interpreter(tmp_path: Path, script: str) -> Path:
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def start(tmp_path: Path, script: str, decode_workers: int = 8) -> AbstractAsyncContextManager[Any]:
    python = interpreter(tmp_path, script)
    model, logs = tmp_path / "model", tmp_path / "logs"
    return running_workers(python, model, model, logs, decode_workers, lambda: None)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_workers_that_are_still_starting_are_stopped_at_once(tmp_path: Path) -> None:
    """More of them than asyncio's default pool has threads: a wait must not keep a stop from running."""

    async def run() -> None:
        async with start(tmp_path, 'echo $$ >> "$0.pids"; exec sleep 1000', decode_workers=40):
            pytest.fail("nothing became ready")

    task = asyncio.create_task(run())
    pids = tmp_path / "python.pids"
    async with asyncio.timeout(HANG_S):
        while not pids.exists() or len(pids.read_text().split()) < 42:
            await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert not any(is_alive(int(pid)) for pid in pids.read_text().split())


async def test_a_worker_that_dies_ends_the_start_and_the_others(tmp_path: Path) -> None:
    script = (
        'case "$*" in *decode*|*kv_consumer*) echo no such model; exit 3;; esac; echo $$ >> "$0.pids"; exec sleep 1000'
    )
    async with asyncio.timeout(HANG_S):
        with pytest.raises(WorkerError, match=r"exited with status 3(.|\n)*no such model"):
            async with start(tmp_path, script):
                pytest.fail("nothing became ready")
    assert not any(is_alive(int(pid)) for pid in (tmp_path / "python.pids").read_text().split())


def test_free_ports_are_different_and_not_listened_on() -> None:
    first = free_ports(1)[0]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", first))
        taken.listen()
        ports = free_ports(12)
    assert len(set(ports)) == 12
    assert first not in ports


def test_decode_workers_share_cores_evenly_or_run_anywhere() -> None:
    assert cores_of(4, [3, 5]) == [3, 5, 3, 5]
    assert cores_of(4, [0, 1, 2, 3]) == [0, 1, 2, 3]
    assert cores_of(4, [0, 1, 2]) == [None] * 4
    assert cores_of(2, list(range(16))) == [None] * 2


def test_a_worker_runs_on_its_core_alone(tmp_path: Path) -> None:
    core = min(os.sched_getaffinity(0))
    spec = WorkerSpec(
        "plain",
        free_ports(1)[0],
        1,
        tmp_path,
        "m",
        interpreter(tmp_path, "exec sleep 1000"),
        tmp_path / "log",
        cpu=core,
    )
    worker = WorkerProcess(spec)
    worker.start()
    try:
        assert worker.pid is not None
        assert os.sched_getaffinity(worker.pid) == {core}
    finally:
        worker.stop()
