"""A fleet of real vLLM workers, shared by all tests of this folder, and routers in front of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import openai
import pytest

from eldr.demo.model import write_model
from eldr.demo.workers import Role
from tests.e2e.real_fleet import Fleet, Router, StartRouter, client_of, new_worker


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    base = tmp_path_factory.mktemp("fleet")
    model_dir = base / "model"
    write_model(model_dir)
    make: list[tuple[Role, int]] = [("prefill", 0), ("decode", 0), ("decode", 1), ("plain", 0)]
    workers = [new_worker(model_dir, base, role, number) for role, number in make]
    try:
        for worker in workers:  # from this thread: a worker dies with the thread that started it
            worker.start()
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda worker: worker.wait_ready(300), workers))
        yield Fleet(model_dir, base, workers[0], workers[1:3], workers[3])
    finally:
        for worker in workers:
            worker.stop()


@pytest.fixture(scope="session")
def start_router(fleet: Fleet) -> StartRouter:
    """Context manager: a ready router with the given flags."""

    @contextmanager
    def start(*flags: str, decode: list[str] | None = None, prefill: list[str] | None = None) -> Iterator[Router]:
        router = Router(fleet, fleet.logs / f"router-{time.time_ns()}.log", list(flags), decode, prefill)
        try:
            router.wait_ready()
            yield router
        finally:
            router.stop()

    return start


@pytest.fixture(scope="session")
def router(start_router: StartRouter) -> Iterator[Router]:
    with start_router("--policy", "jsq") as running:
        yield running


@pytest.fixture(scope="session")
def routed(router: Router) -> openai.OpenAI:
    return client_of(router.url)


@pytest.fixture(scope="session")
def plain(fleet: Fleet) -> openai.OpenAI:
    return client_of(fleet.plain.url)
