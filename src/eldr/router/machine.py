"""Runs several processes as one router on one machine (`--processes`): their sockets, signals, ends and restarts.

The parent serves nobody. It holds a listening socket for each process (SO_REUSEPORT), between which the kernel divides
the connections. As the parent keeps them open, a process that dies loses only the connections that it had accepted: its
successor takes the ones that wait. The processes tell each other what they run through the parent (`peers/hub.py`).
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from io import FileIO

from eldr.errors import EldrError
from eldr.router.config.settings import ConfigError, RouterConfig, host_and_port
from eldr.router.handover import FDS, READY_FD, first_byte, start_successor, tell_predecessor
from eldr.router.http.listeners import BACKLOG
from eldr.router.peers.hub import Hub
from eldr.router.peers.siblings import Siblings

log = logging.getLogger("eldr.router")

# How a child knows that it is one: its index, how many there are, and the descriptor of its channel.
PROCESS = "ELDR_PROCESS"
# How many of the inherited sockets are for clients. The rest is for the admin API.
CLIENT_SOCKETS = "ELDR_CLIENT_SOCKETS"
# A process that dies is started again after this time. It doubles as long as processes do not live LONG_S.
LEAST_WAIT_S = 0.5
MOST_WAIT_S = 30.0
LONG_S = 60.0
ENDING = (signal.SIGTERM, signal.SIGINT)


def siblings_of_environment() -> Siblings | None:
    """The other processes, if the parent of several has started this one."""
    said = os.environ.pop(PROCESS, "")
    if not said:
        return None
    index, count, fd = map(int, said.split(","))
    sock = socket.socket(fileno=fd)
    sock.set_inheritable(False)
    return Siblings(index, count, sock)


def of_one_process(config: RouterConfig, siblings: Siblings | None) -> RouterConfig:
    """The settings of one of several processes, which do not write into each other's files."""
    if siblings is None or config.observe.decision_log is None:
        return config
    path = config.observe.decision_log
    observe = replace(config.observe, decision_log=path.with_name(f"{path.name}.{siblings.index}"))
    return replace(config, observe=observe)


def _listen(host: str, port: int) -> socket.socket:
    """A socket beside others on the same port. Raises ConfigError."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error}") from None
    return sock


def _listen_often(host: str, port: int, count: int) -> list[socket.socket]:
    first = _listen(host, port)
    port = first.getsockname()[1]
    return [first, *(_listen(host, port) for _ in range(count - 1))]


class Machine:
    """The parent of a router's processes.

    inherited: sockets that already listen: of a predecessor with as many processes, or one for all, as of systemd.
    """

    def __init__(self, config: RouterConfig, inherited: Sequence[socket.socket]) -> None:
        self._config = config
        self._count = config.listen.processes
        given = os.environ.pop(CLIENT_SOCKETS, "")
        clients = int(given) if given else min(len(inherited), 1)
        if clients > 1 and clients != self._count:
            raise ConfigError(
                f"processes has changed from {clients} to {self._count}, which needs a restart: a handover passes the "
                "listening sockets on, one for each process"
            )
        self._clients, self._admin = list(inherited[:clients]), list(inherited[clients:])
        self._hub = Hub()
        self._running: dict[int, asyncio.subprocess.Process] = {}
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def port(self) -> int:
        return int(self._clients[0].getsockname()[1])

    @property
    def admin_port(self) -> int:
        return int(self._admin[0].getsockname()[1])

    async def run(self, signals: asyncio.Queue[int]) -> None:
        """Run until a signal says to end. Raises EldrError if a process cannot be started in the first place."""
        listen = self._config.listen
        if not self._clients:
            self._clients = _listen_often(listen.host, listen.port, self._count)
        if listen.admin_listen is not None and not self._admin:
            self._admin = _listen_often(*host_and_port("admin_listen", listen.admin_listen), self._count)
        first = [asyncio.create_task(self._start(index)) for index in range(self._count)]
        ready = await asyncio.gather(*first)
        if not all(ready):
            await self._end(signal.SIGTERM)
            raise EldrError("not every process serves; the first messages above say why")
        self._tasks = [asyncio.create_task(self._keep(index)) for index in range(self._count)]
        tell_predecessor()
        self._say()
        number = await self._until_end(signals)
        for task in self._tasks:  # none is started again
            task.cancel()
        # Each process closes its own when it no longer accepts. Connections would then wait here for nobody.
        for sock in (*self._clients, *self._admin):
            sock.close()
        ending = asyncio.create_task(self._end(number))
        while not ending.done():
            again = asyncio.create_task(signals.get())
            await asyncio.wait((ending, again), return_when=asyncio.FIRST_COMPLETED)
            if again.done() and again.result() in ENDING:
                self._pass_on(again.result())
            again.cancel()

    def _say(self) -> None:
        listen = self._config.listen
        scheme = "http" if listen.tls_cert is None else "https"
        host = f"[{listen.host}]" if ":" in listen.host else listen.host
        if listen.admin_listen is not None:
            admin_host = listen.admin_listen.rpartition(":")[0]
            print(f"eldr: page and admin API on {scheme}://{admin_host}:{self.admin_port}/ui", file=sys.stderr)
        policy = self._config.placement.policy
        print(
            f"eldr: serving on {scheme}://{host}:{self.port}, policy {policy}, {self._count} processes",
            file=sys.stderr,
            flush=True,
        )

    async def _until_end(self, signals: asyncio.Queue[int]) -> int:
        """Return the signal with which the processes have to end."""
        while (number := await signals.get()) not in ENDING:
            if number == signal.SIGHUP:
                self._pass_on(number)
            else:
                os.environ[CLIENT_SOCKETS] = str(len(self._clients))
                served = await start_successor([*self._clients, *self._admin])
                del os.environ[CLIENT_SOCKETS]
                if served:
                    return signal.SIGINT  # nobody has to hear of it first
        return number

    # Processes.

    async def _start(self, index: int) -> bool:
        """Start a process. Returns whether it serves."""
        try:
            ours, pipe = await self._spawn(index)
            with pipe:
                await self._hub.attach(ours)
                os.set_blocking(pipe.fileno(), False)
                return bool(await first_byte(pipe.fileno()))
        except OSError as error:
            log.error("process %d cannot be started: %s", index, error)
            return False

    async def _spawn(self, index: int) -> tuple[socket.socket, FileIO]:
        """Start a process. Returns this end of its channel, and the pipe by which it says that it serves.

        Raises OSError. Nothing stays open then.
        """
        with ExitStack() as our_ends, ExitStack() as its_ends:
            ours, theirs = socket.socketpair()
            our_ends.enter_context(ours)
            its_ends.enter_context(theirs)
            reading, writing = os.pipe()
            its_ends.callback(os.close, writing)
            pipe = our_ends.enter_context(FileIO(reading))
            sockets = [sockets[index % len(sockets)] for sockets in (self._clients, self._admin) if sockets]
            fds = [sock.fileno() for sock in sockets]
            environment = {
                **os.environ,
                FDS: ",".join(map(str, fds)),
                READY_FD: str(writing),
                PROCESS: f"{index},{self._count},{theirs.fileno()}",
            }
            # A session of its own: Ctrl-C reaches the parent alone, which passes it on.
            self._running[index] = await asyncio.create_subprocess_exec(
                sys.executable,
                *sys.orig_argv[1:],
                env=environment,
                pass_fds=(*fds, writing, theirs.fileno()),
                start_new_session=True,
                stdin=subprocess.DEVNULL,
            )
            our_ends.pop_all()
        return ours, pipe

    async def _keep(self, index: int) -> None:
        """Start a process again whenever it dies, or could not be started."""
        loop = asyncio.get_running_loop()
        wait_s = LEAST_WAIT_S
        while True:
            begun_s = loop.time()
            process = self._running.get(index)
            if process is not None:
                code = await process.wait()
                log.error("process %d (%d) ended with %d and is started again", index, process.pid, code)
            wait_s = LEAST_WAIT_S if loop.time() - begun_s > LONG_S else min(2 * wait_s, MOST_WAIT_S)
            if process is None:  # not even that was possible, for want of descriptors or memory
                log.error("process %d is tried again in %g s", index, wait_s)
            await asyncio.sleep(wait_s)
            self._running.pop(index, None)
            await self._start(index)

    def _pass_on(self, number: int) -> None:
        for process in self._running.values():
            if process.returncode is None:
                process.send_signal(number)

    async def _end(self, number: int) -> None:
        self._pass_on(number)
        await asyncio.gather(*(process.wait() for process in self._running.values()))
