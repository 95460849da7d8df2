"""A real worker that is stopped half of the time: the router learns that its steps take longer, and sends it less."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from eldr.demo.workers import WorkerProcess
from tests.e2e.real_fleet import MODEL, Fleet, StartRouter, call, client_of, metric

CLIENTS = 10
STOPPED_S = GOING_S = 0.1


@contextmanager
def throttled(worker: WorkerProcess) -> Iterator[None]:
    """Stop all processes of a worker for a moment, let them go for a moment, and so on."""
    group, end = worker.pid, threading.Event()
    assert group is not None

    def stop_and_go() -> None:
        while not end.is_set():
            os.killpg(group, signal.SIGSTOP)
            end.wait(STOPPED_S)
            os.killpg(group, signal.SIGCONT)
            end.wait(GOING_S)

    thread = threading.Thread(target=stop_and_go)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


@contextmanager
def loaded(url: str) -> Iterator[None]:
    """Clients that ask without a pause."""
    end = threading.Event()

    def ask(number: int) -> None:
        client = client_of(url)
        request: dict[str, Any] = {"model": MODEL, "prompt": f"Story {number}.", "max_tokens": 48, "temperature": 0}
        while not end.is_set():
            with suppress(Exception):
                client.completions.create(**request)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        end.set()
        for thread in threads:
            thread.join()


def relative(url: str, worker: WorkerProcess) -> float:
    """The time of its step over that of the median worker, as the router has learned. 0 while it does not know."""
    return metric(url, "eldr_worker_step_relative", worker=worker.url)


def test_a_throttled_worker_is_seen_and_gets_less(
    fleet: Fleet, start_router: StartRouter, record_property: Callable[[str, object], None]
) -> None:
    usual, slow = fleet.decode
    with start_router("--policy", "jsq-speed") as router, loaded(router.url):

        def until(ratio: float) -> float:
            """Seconds until the slow worker's steps take so many times as long as the other's."""
            began_s = time.monotonic()
            while not relative(router.url, usual) or relative(router.url, slow) < ratio * relative(router.url, usual):
                assert time.monotonic() - began_s < 120, call(router.url, "/metrics")[2].decode()
                time.sleep(0.2)
            return time.monotonic() - began_s

        until(0.5)
        with throttled(slow):
            record_property("seen_after_s", until(1.5))
            running = {slow.url: 0.0, usual.url: 0.0}
            for _ in range(20):
                for url in running:
                    running[url] += metric(router.url, "eldr_inflight", role="decode", worker=url)
                time.sleep(0.1)
            assert running[slow.url] < running[usual.url]
