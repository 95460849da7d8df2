"""Runs the router as a process: start, signals, graceful end, handover to a successor."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import resource
import signal
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import uvloop

from eldr.router.app import Router
from eldr.router.config.picker import PickerConfig
from eldr.router.config.settings import ConfigError, RouterConfig
from eldr.router.handover import inherited_sockets, start_successor, tell_predecessor
from eldr.router.machine import CLIENT_SOCKETS, Machine, of_one_process, siblings_of_environment
from eldr.router.observe import logs
from eldr.router.peers.siblings import Siblings
from eldr.router.placement.making import policy_maker

log = logging.getLogger("eldr.router")

# How many new objects trigger a garbage collection. Python's default is 700, which a few streams create.
YOUNG_OBJECTS = 20_000
ENDING = (signal.SIGTERM, signal.SIGINT)


def serve(path: Path | None, flags: Mapping[str, Any], kind: type[RouterConfig] = RouterConfig) -> None:
    """Run a router until SIGTERM or SIGINT. A second such signal waits for nothing.

    Only SIGTERM is followed by `shutdown_delay_s`. SIGINT comes from a terminal, where no load balancer has to hear.

    SIGHUP reads the configuration file and the keys again. SIGUSR2 starts the program again on the same sockets. Once
    the new process serves, this one ends gracefully.

    path: the configuration file, or None. flags: settings that win over those of the file. kind: the settings that
        there are. Those of an endpoint picker make the process one.

    Raises EldrError, before anything starts, if the configuration, the calibration or the policy cannot be used.
    """
    siblings = siblings_of_environment()
    load = partial(_load, kind, path, flags, siblings)
    config = load()
    logs.set_up(config.observe.log_level)
    _raise_file_limit()
    inherited = inherited_sockets()
    if config.listen.processes > 1 and siblings is None:
        policy_maker(config.placement)  # what is wrong is said once
        uvloop.run(_run(Machine(config, inherited)))
        return
    if siblings is None and CLIENT_SOCKETS in os.environ:
        raise ConfigError("processes has changed to 1, which needs a restart")
    watched = None if path is None else (path, load)
    router = Router(config, policy_maker(config.placement), watched, inherited, siblings=siblings)
    uvloop.run(_serve(router, config, siblings))


def _load(
    kind: type[RouterConfig], path: Path | None, flags: Mapping[str, Any], siblings: Siblings | None
) -> RouterConfig:
    return of_one_process(kind.load(path, flags), siblings)


def _signals() -> asyncio.Queue[int]:
    """The signals that arrive from now on."""
    loop = asyncio.get_running_loop()
    signals: asyncio.Queue[int] = asyncio.Queue()
    for number in (*ENDING, signal.SIGHUP, signal.SIGUSR2):
        loop.add_signal_handler(number, signals.put_nowait, number)
    return signals


async def _run(machine: Machine) -> None:
    await machine.run(_signals())


def _spare_the_collector() -> None:
    """Exclude the objects of the start from garbage collection, and collect less often: requests leave no cycles."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS)


async def _serve(router: Router, config: RouterConfig, siblings: Siblings | None) -> None:
    loop = asyncio.get_running_loop()
    signals = _signals()
    if siblings is not None:
        siblings.gone = partial(signals.put_nowait, int(signal.SIGTERM))  # nobody else would end this process
    await router.start()
    _spare_the_collector()
    tell_predecessor()
    if siblings is None:
        _say(router, config)
    delayed = await _until_end(router, signals)
    timeouts = config.timeouts
    stopping = loop.create_task(router.stop(timeouts.grace_s, timeouts.shutdown_delay_s if delayed else 0.0))
    again = loop.create_task(_ending(signals))
    await asyncio.wait((stopping, again), return_when=asyncio.FIRST_COMPLETED)
    if not stopping.done():
        stopping.cancel()
        await asyncio.gather(stopping, return_exceptions=True)
        await router.stop(0)
    again.cancel()


def _say(router: Router, config: RouterConfig) -> None:
    scheme = "http" if config.listen.tls_cert is None else "https"
    host = config.listen.host
    host = f"[{host}]" if ":" in host else host
    if config.listen.admin_listen is not None:
        admin_host = config.listen.admin_listen.rpartition(":")[0]
        print(f"eldr: page and admin API on {scheme}://{admin_host}:{router.admin_port}/ui", file=sys.stderr)
    policy = config.placement.policy
    if isinstance(config, PickerConfig):
        grpc_host = config.picker.grpc_listen.rpartition(":")[0]
        print(f"eldr: metrics on {scheme}://{host}:{router.port}/metrics", file=sys.stderr)
        print(f"eldr: picking on {grpc_host}:{router.grpc_port}, policy {policy}", file=sys.stderr, flush=True)
    else:
        print(f"eldr: serving on {scheme}://{host}:{router.port}, policy {policy}", file=sys.stderr, flush=True)


async def _until_end(router: Router, signals: asyncio.Queue[int]) -> bool:
    """Return once the router has to end: whether others have to hear of it first. A successor serves already."""
    while (number := await signals.get()) not in ENDING:
        if number == signal.SIGHUP:
            router.reload()
        elif await start_successor(router.sockets):
            return False
    return number == signal.SIGTERM


async def _ending(signals: asyncio.Queue[int]) -> None:
    while await signals.get() not in ENDING:
        pass


def _raise_file_limit() -> None:
    """Raise the limit on open files to the maximum. A stream needs two, so the usual 1,024 allow 500 streams."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
