"""The bus over NATS: https://docs.nats.io, with the client nats-py.

Two subjects: `eldr.FLEET.all` for the frames to everybody, and `eldr.FLEET.to.ORIGIN` for those to one replica. Nothing
is stored: core NATS delivers at most once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from eldr.errors import EldrError
from eldr.router.observe.logs import Throttle
from eldr.router.peers.bus import Bus, Hear

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg

log = logging.getLogger("eldr.router")

# Frames that wait to be sent take no more memory than this. Beyond it they are lost, and others ask for a snapshot.
MOST_WAITING_BYTES: Final = 64 * 2**20
# The same for frames that were received. The client drops what is beyond.
MOST_UNREAD_BYTES: Final = 64 * 2**20
RECONNECT_S: Final = 1
CONNECT_TIMEOUT_S: Final = 2
# A server that hangs is noticed after this time, twice.
PING_S: Final = 2
CLOSE_S: Final = 1.0


class NatsError(EldrError):
    """NATS cannot be used as configured."""


class NatsBus(Bus):
    """Frames as messages of NATS.

    servers: URLs. They may have a user and password, or a token.
    fleet: separates the replicas of different fleets that use the same servers.
    credentials: a .creds file. ca: a PEM file of the CAs that the servers are checked against.
    """

    def __init__(
        self, servers: tuple[str, ...], fleet: str, credentials: Path | None = None, ca: Path | None = None
    ) -> None:
        self.up = False
        self._servers = list(servers)
        self._subject = f"eldr.{fleet}"
        self._credentials = credentials
        self._ca = ca
        self._client: Client | None = None
        self._waiting: deque[tuple[str, bytes]] = deque()
        self._waiting_bytes = 0
        self._wake = asyncio.Event()
        self._connected: Callable[[], None] = lambda: None
        self._tasks: list[asyncio.Task[None]] = []
        self._throttle = Throttle()

    async def start(self, origin: int, hear: Hear, connected: Callable[[], None]) -> None:
        try:
            from nats.aio.client import Client
        except ImportError:
            raise NatsError("peers need nats-py: pip install 'eldr[peers]'") from None
        if self._credentials is not None and not self._credentials.is_file():
            raise NatsError(f"peers_credentials_file: {self._credentials} is not a file")
        tls = self._tls()
        self._connected = connected
        loop = asyncio.get_running_loop()
        self._tasks = [
            loop.create_task(self._stay_connected(Client, tls, origin, hear)),
            loop.create_task(self._send_all()),
        ]

    def _tls(self) -> ssl.SSLContext | None:
        if self._ca is None:
            return None
        try:
            return ssl.create_default_context(cafile=self._ca)
        except (OSError, ssl.SSLError) as error:
            raise NatsError(f"peers_ca: {self._ca} cannot be used: {error}") from None

    async def _stay_connected(
        self, make_client: Callable[[], Client], tls: ssl.SSLContext | None, origin: int, hear: Hear
    ) -> None:
        """Connect with one client after another.

        A client connects again by itself, unless the server has ended the connection with an error: for credentials
        that have expired, or because it was overrun. Then it is closed for good.
        """
        while True:
            self._client = client = make_client()
            closed = asyncio.Event()
            try:
                await self._connect(client, closed, tls, origin, hear)
                await self._reconnected()
                await closed.wait()
            except Exception as error:
                await self._failed(error)
                with contextlib.suppress(Exception):
                    await client.close()
            await asyncio.sleep(RECONNECT_S)

    async def _connect(
        self, client: Client, closed: asyncio.Event, tls: ssl.SSLContext | None, origin: int, hear: Hear
    ) -> None:
        """Connect and subscribe. closed: is set when the client will not connect again."""
        options: dict[str, Any] = {} if tls is None else {"tls": tls}
        if self._credentials is not None:
            options["user_credentials"] = str(self._credentials)

        async def heard(message: Msg) -> None:
            hear(message.data)

        async def ended() -> None:
            await self._down()
            closed.set()

        await client.connect(
            servers=self._servers,
            name="eldr",
            no_echo=True,
            allow_reconnect=True,
            max_reconnect_attempts=-1,
            reconnect_time_wait=RECONNECT_S,
            connect_timeout=CONNECT_TIMEOUT_S,
            ping_interval=PING_S,
            max_outstanding_pings=2,
            pending_size=MOST_WAITING_BYTES,
            error_cb=self._failed,
            disconnected_cb=self._down,
            reconnected_cb=self._reconnected,
            closed_cb=ended,
            **options,
        )
        for subject in (f"{self._subject}.all", f"{self._subject}.to.{origin:016x}"):
            await client.subscribe(subject, cb=heard, pending_bytes_limit=MOST_UNREAD_BYTES)

    async def _failed(self, error: Exception) -> None:
        if self._throttle.due(type(error).__name__):
            log.warning("NATS: %s", error or type(error).__name__)

    async def _down(self) -> None:
        self.up = False
        self._waiting.clear()
        self._waiting_bytes = 0

    async def _reconnected(self) -> None:
        self.up = True
        self._connected()

    @property
    def backlog_bytes(self) -> int:
        return self._waiting_bytes

    def publish(self, frame: bytes, to: int | None = None) -> bool:
        if not self.up or self._waiting_bytes + len(frame) > MOST_WAITING_BYTES:
            return False
        self._waiting.append((f"{self._subject}.all" if to is None else f"{self._subject}.to.{to:016x}", frame))
        self._waiting_bytes += len(frame)
        self._wake.set()
        return True

    async def _send_all(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting and (client := self._client) is not None:
                subject, frame = self._waiting.popleft()
                self._waiting_bytes -= len(frame)
                try:
                    await client.publish(subject, frame)
                    if client.pending_data_size > MOST_WAITING_BYTES // 4:
                        await client.flush()  # the server has read all of it
                except Exception as error:
                    await self._failed(error)

    async def close(self) -> None:
        client = self._client
        if client is not None and self.up:
            self.up = False
            try:
                async with asyncio.timeout(CLOSE_S):
                    while self._waiting:
                        await asyncio.sleep(0.01)
                    await client.flush()
            except Exception as error:
                log.debug("NATS: %s", error)
        self.up = False
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if client is not None:
            try:
                async with asyncio.timeout(CLOSE_S):
                    await client.close()
            except Exception as error:
                log.debug("NATS: %s", error)
