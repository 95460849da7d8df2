"""NIXL on machines with few cores: progress threads that sleep, engines free to run on every core."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def quiet_nixl(delay_us: int) -> Iterator[None]:
    """NIXL agents made inside sleep `delay_us` between polls, and vLLM's pinning of the thread is undone.

    NIXL's Python API fixes the progress thread's delay at zero, which polls and takes a core per engine; with a
    delay the events of UCX still wake the thread. vLLM's NIXL worker pins the calling thread to the last core of
    each NUMA node on CPU, which puts every engine of the machine on one core.
    """
    api: Any = importlib.import_module("nixl._api")
    bindings = importlib.import_module(api.nixl_agent.__module__).nixlBind
    original: Any = bindings.nixlAgentConfig

    class SleepingConfig(original):
        @property
        def pthrDelay(self) -> int:  # noqa: N802 (the binding's name)
            return int(original.pthrDelay.__get__(self))

        @pthrDelay.setter
        def pthrDelay(self, value: int) -> None:  # noqa: N802
            original.pthrDelay.__set__(self, value or delay_us)

    cores = os.sched_getaffinity(0)
    bindings.nixlAgentConfig = SleepingConfig
    try:
        yield
    finally:
        bindings.nixlAgentConfig = original
        os.sched_setaffinity(0, cores)
