"""Makes NIXL gentle on machines with few cores: its progress threads sleep, and engines may run on every core."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def quiet_nixl(delay_us: int) -> Iterator[None]:
    """Make NIXL agents created inside sleep `delay_us` between polls, and undo vLLM's pinning of the thread.

    NIXL's Python API fixes the progress thread's delay at zero, so that it polls and occupies one core per engine. With
    a delay, UCX events still wake the thread. On CPU, vLLM's NIXL worker pins the calling thread to the last core of
    each NUMA node, which puts every engine of the machine on one core.
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
