"""A client of the Kubernetes API for what discovery needs of it: one GET, and one stream of lines.

It stands on aiohttp, as the demo's load client does. Libraries for Kubernetes (lightkube, kr8s, kubernetes-asyncio)
bring models of all objects, 31 to 71 MiB of memory, and bounds that are not ours to set.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import orjson

from eldr.errors import EldrError
from eldr.router.config.kubernetes import NAMESPACE
from eldr.router.config.settings import ConfigError, read_key

# Where every pod has its service account.
MOUNTED = Path("/var/run/secrets/kubernetes.io/serviceaccount")
CONNECT_TIMEOUT_S = 5.0
# How long an answer may take to begin, and a page of a list to arrive.
ANSWER_TIMEOUT_S = 15.0
PAGE_TIMEOUT_S = 30.0
# An object of etcd has at most 1.5 MB.
MOST_LINE_BYTES = 8 * 2**20
MOST_PAGE_BYTES = 64 * 2**20
MOST_ERROR_BYTES = 64 * 2**10
MOST_SHOWN = 300


class ApiError(EldrError):
    """The API did not answer, or not as it should.

    status: of the answer, 0 if there was none.
    retry_after_s: how long the server wants to be left alone.
    """

    def __init__(self, what: str, status: int = 0, retry_after_s: float = 0.0) -> None:
        super().__init__(what)
        self.status = status
        self.retry_after_s = retry_after_s


class DisconnectedError(ApiError):
    """There is no connection, or no more: the network's or the server's trouble, and no answer."""


class KubernetesApi:
    """Speaks with the API server.

    url: its address. None inside a cluster, which says it to each pod.
    account: the directory of a mounted service account: `token`, `ca.crt` and `namespace`. None for the usual one. The
        kubelet replaces them while the pod runs, so they are read for each request. Over plain HTTP, such as to
        `kubectl proxy`, no token is sent.
    Raises ConfigError if no address is known.
    """

    def __init__(self, url: str | None, account: Path | None) -> None:
        self.url = _cluster_url() if url is None else url
        self.account = MOUNTED if account is None else account
        self._tls: ssl.SSLContext | None = None
        self._tls_of: object = None

    @property
    def namespace(self) -> str:
        """The namespace of the service account. Raises ConfigError if it is not known."""
        try:
            namespace = (self.account / "namespace").read_text().strip()
        except (OSError, UnicodeDecodeError):
            namespace = ""
        if not NAMESPACE.fullmatch(namespace):
            raise ConfigError(
                f"an address without a namespace means the router's own, which {self.account}/namespace does not say; "
                "name one: k8s+http://NAMESPACE..."
            )
        return namespace

    def session(self) -> aiohttp.ClientSession:
        """Connections for `get` and `stream`. The caller closes them."""
        return aiohttp.ClientSession(
            # An answer that nobody asked to be compressed is not unpacked, however small it looks.
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
            headers={"accept": "application/json", "accept-encoding": "identity", "user-agent": "eldr"},
        )

    async def get(self, session: aiohttp.ClientSession, path: str, query: Mapping[str, str]) -> Any:
        """The JSON of an answer. Raises ApiError."""
        with _as_api_errors():
            async with self._asked(session, path, query) as answer, asyncio.timeout(PAGE_TIMEOUT_S):
                return from_json(await _read(answer, MOST_PAGE_BYTES))

    async def stream(
        self,
        session: aiohttp.ClientSession,
        path: str,
        query: Mapping[str, str],
        hear: Callable[[list[bytes]], None],
    ) -> None:
        """Hand the lines of an answer to `hear`, those together that arrive together. Returns when the answer ends.

        The first call has none: it says that the answer begins. A line that is cut off at the end is left out. Raises
        ApiError, and DisconnectedError if the answer breaks off.
        """
        with _as_api_errors():
            async with self._asked(session, path, query) as answer:
                hear([])
                rest = bytearray()
                async for data in answer.content.iter_any():
                    # Only what is new can end a line.
                    rest += data
                    if b"\n" in data:
                        *lines, rest = rest.split(b"\n")
                        hear([bytes(line) for line in lines if line])
                    if len(rest) > MOST_LINE_BYTES:
                        raise ApiError(f"it sends a line of more than {MOST_LINE_BYTES >> 20} MiB")

    @asynccontextmanager
    async def _asked(
        self, session: aiohttp.ClientSession, path: str, query: Mapping[str, str]
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        secure = self.url.startswith("https://")
        headers, tls = (self._authorization(), self._context()) if secure else ({}, True)
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            answer = await session.get(self.url + path, params=query, headers=headers, ssl=tls, allow_redirects=False)
        async with answer:
            if answer.status != 200:
                raise await _refusal(answer)
            yield answer

    def _authorization(self) -> dict[str, str]:
        file = self.account / "token"
        if not file.exists():
            return {}
        try:
            return {"authorization": f"Bearer {read_key(file).decode()}"}
        except ConfigError as error:
            raise ApiError(str(error)) from None

    def _context(self) -> ssl.SSLContext:
        """What the server's certificate is checked against: the cluster's CA, or the system's if there is none."""
        file = self.account / "ca.crt"
        try:
            status = file.stat()
            identity: object = (status.st_mtime_ns, status.st_size, status.st_ino)
        except OSError:
            identity = None
        if self._tls is None or identity != self._tls_of:
            try:
                self._tls = ssl.create_default_context(cafile=None if identity is None else str(file))
            except (OSError, ssl.SSLError) as error:
                raise ApiError(f"{file} is no certificate of a CA: {error}") from None
            self._tls_of = identity
        return self._tls


def _cluster_url() -> str:
    host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    if not host:
        raise ConfigError(
            "k8s+ addresses need the Kubernetes API, and this is no pod of a cluster; give its address as "
            "kubernetes_api, such as http://127.0.0.1:8001 of `kubectl proxy`"
        )
    return f"https://{f'[{host}]' if ':' in host else host}:{port}"


@contextmanager
def _as_api_errors() -> Iterator[None]:
    try:
        yield
    except TimeoutError:
        raise DisconnectedError("it does not answer in time") from None
    except (aiohttp.ClientError, OSError) as error:
        raise DisconnectedError(shown(str(error) or type(error).__name__)) from None


async def _refusal(answer: aiohttp.ClientResponse) -> ApiError:
    """What an answer other than 200 means. The API explains itself in a v1.Status."""
    what = ""
    try:
        async with asyncio.timeout(PAGE_TIMEOUT_S):
            status = from_json(await _read(answer, MOST_ERROR_BYTES))
        what = shown(status["message"]) if isinstance(status, dict) and isinstance(status.get("message"), str) else ""
    except (ApiError, TimeoutError, aiohttp.ClientError, OSError):
        pass  # the status is enough
    after = answer.headers.get("retry-after", "")
    wait_s = float(after) if after.isascii() and after.isdecimal() and len(after) < 9 else 0.0
    return ApiError(f"{answer.status} {shown(answer.reason or '')}{what and ': '}{what}", answer.status, wait_s)


async def _read(answer: aiohttp.ClientResponse, most_bytes: int) -> bytes:
    body = bytearray()
    async for data in answer.content.iter_any():
        body += data
        if len(body) > most_bytes:
            raise ApiError(f"it sends an answer of more than {most_bytes >> 10} KiB")
    return bytes(body)


def from_json(text: bytes) -> Any:
    """Parse an answer or a line. Raises ApiError."""
    try:
        return orjson.loads(text)
    except ValueError as error:  # nesting that is too deep included
        raise ApiError(f"what it sends is no JSON: {error}") from None


def shown(text: str) -> str:
    """Text of another machine, fit for one line of a log."""
    return "".join(letter if letter.isprintable() else " " for letter in text[:MOST_SHOWN])
