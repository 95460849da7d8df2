"""The connections to one worker, and the headers that each request to it carries."""

from __future__ import annotations

import asyncio
import ssl
from typing import Any, cast
from urllib.parse import urlsplit

from eldr.router.config.endpoint import rank_of
from eldr.router.http.body_memory import BodyMemory
from eldr.router.http.client import ConnectError, ConnectTimeoutError, WorkerConnection


class WorkerPool:
    """Keeps the connections to one worker and makes new ones."""

    def __init__(
        self,
        url: str,
        *,
        connect_timeout_s: float,
        memory: BodyMemory,
        authorization: bytes | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        parts = urlsplit(url)
        self.url = url
        self.memory = memory
        self.active: set[WorkerConnection] = set()
        self._host = cast(str, parts.hostname)
        self._ssl = ssl_context if parts.scheme == "https" else None
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._connect_timeout_s = connect_timeout_s
        # Last in, first out, so that connections in excess of the load grow old and are closed.
        self._idle: dict[WorkerConnection, None] = {}
        self._closed = False
        rank = rank_of(url)
        # Names the engine that is to run the request, where several share one URL.
        rank_line = b"" if rank is None else b"x-data-parallel-rank: %d\r\n" % rank
        self._base_path = parts.path.encode()
        self._address_lines = b"host: %b\r\n%b" % (parts.netloc.encode(), rank_line)
        self._authorization = None if authorization is None else b"authorization: Bearer " + authorization + b"\r\n"

    def request(
        self,
        method: bytes,
        path: bytes,
        headers: bytes = b"",
        body: bytes = b"",
        client_authorization: bytes | None = None,
    ) -> bytes:
        """The bytes of a request. The worker's key, if there is one, replaces `client_authorization`.

        path: of the API. The path in the worker's URL is put before it.
        headers: further header lines, each ending in CRLF.
        """
        authorization = self._authorization
        if authorization is None:
            authorization = b"" if client_authorization is None else b"authorization: %b\r\n" % client_authorization
        return b"%b %b%b HTTP/1.1\r\n%b%b%bcontent-length: %d\r\n\r\n%b" % (
            method, self._base_path, path, self._address_lines, authorization, headers, len(body), body,
        )  # fmt: skip

    async def connection(self) -> WorkerConnection:
        """A connection ready for an exchange. Raises ConnectError."""
        self._check_open()
        while self._idle:
            connection, _ = self._idle.popitem()
            if connection.usable:
                return connection
            connection.close()
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                _, made = await loop.create_connection(
                    lambda: cast(Any, WorkerConnection(self)), self._host, self._port, ssl=self._ssl
                )
        except TimeoutError:
            raise ConnectTimeoutError(f"{self.url}: no connection within {self._connect_timeout_s:g} s") from None
        except (OSError, ssl.CertificateError) as error:
            raise ConnectError(f"{self.url}: {error}") from None
        connection = cast(WorkerConnection, made)
        try:
            self._check_open()
        except ConnectError:
            connection.close()
            raise
        return connection

    def _check_open(self) -> None:
        if self._closed:
            raise ConnectError(f"{self.url}: the worker has left the fleet")

    def release(self, connection: WorkerConnection) -> None:
        if self._closed:
            connection.close()
        else:
            self._idle[connection] = None

    def forget(self, connection: WorkerConnection) -> None:
        self._idle.pop(connection, None)

    def close_idle(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    def check(self, now_s: float) -> None:
        """Fail exchanges whose worker is silent, and close connections that were idle for too long."""
        for connection in list(self.active):
            connection.check_silence(now_s)
        for connection in [connection for connection in self._idle if not connection.usable]:
            connection.close()

    def cut(self, reason: str) -> None:
        """Fail every exchange, and refuse new connections."""
        self._closed = True
        for connection in list(self.active):
            connection.fail(reason)

    def give_up_waiting(self, reason: str, most: int) -> int:
        """Fail up to `most` exchanges of whose answers nothing was passed on yet. Returns how many failed."""
        given_up = 0
        for connection in list(self.active):
            given_up += given_up < most and connection.give_up_waiting(reason)
        return given_up

    def reopen(self) -> None:
        """Allow new connections again after `cut`."""
        self._closed = False

    def close(self) -> None:
        self._closed = True
        self.close_idle()
        for connection in self.active:
            connection.close()
