"""A fake Kubernetes API server: lists and watches of pods and InferencePools, and ways to misbehave.

Its answers have the form of a real one's (`recorded_kubernetes.json`, written by tests/kubernetes/record.py).
"""

from __future__ import annotations

import asyncio
import json
import re
import ssl
from collections.abc import Awaitable, Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

RECORDED_FILE = Path(__file__).parent / "recorded_kubernetes.json"
RECORDED: dict[str, Any] = json.loads(RECORDED_FILE.read_text())
PODS, POOLS = "/api/v1/namespaces/{}/pods", "/apis/inference.networking.k8s.io/v1/namespaces/{}/inferencepools"
KINDS = {"pods": "Pod", "inferencepools": "InferencePool"}


@dataclass
class Asked:
    """One request as the server got it."""

    path: str
    query: dict[str, str]
    headers: dict[str, str]

    @property
    def watches(self) -> bool:
        return "watch" in self.query


Answer = Callable[["FakeApiserver", Asked, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class FakeApiserver:
    """An API server on a port of its own.

    tokens: those that it accepts; anybody if empty. forbidden: pairs of verb and resource that are answered with 403.
    instead: what to do with the next requests, in order, instead of answering; None answers.
    oldest: the first version from which it can still watch. lost: changes are kept from watches while it is set.
    """

    ssl_context: ssl.SSLContext | None = None
    tokens: set[str] = field(default_factory=set)
    forbidden: set[tuple[str, str]] = field(default_factory=set)
    instead: list[Answer | None] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    oldest: int = 0
    lost: bool = False

    def __post_init__(self) -> None:
        self._objects: dict[str, dict[str, dict[str, Any]]] = {}
        self._version = 1000
        # Version, resource's path, type and object, with what it was before.
        self._history: list[tuple[int, str, str, dict[str, Any], dict[str, Any] | None]] = []
        self._changed = asyncio.Condition()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._port = 0

    @property
    def url(self) -> str:
        return f"http{'s' if self.ssl_context else ''}://127.0.0.1:{self._port}"

    @property
    def version(self) -> int:
        """The version of the last change."""
        return self._version

    @property
    def lists(self) -> list[Asked]:
        return [asked for asked in self.asked if not asked.watches]

    @property
    def watches(self) -> list[Asked]:
        return [asked for asked in self.asked if asked.watches]

    async def start(self) -> FakeApiserver:
        self._server = await asyncio.start_server(self._connection, "127.0.0.1", self._port, ssl=self.ssl_context)
        self._port = self._server.sockets[0].getsockname()[1]
        return self

    async def stop(self) -> None:
        """Close the port, which another `start` opens again, and every connection."""
        if self._server is not None:
            self._server.close()
        await self.disconnect()

    async def disconnect(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # What happens in the cluster.

    async def put(self, path: str, found: dict[str, Any]) -> None:
        """Create or replace an object."""
        objects = self._objects.setdefault(path, {})
        name = found["metadata"]["name"]
        await self._note(path, "MODIFIED" if name in objects else "ADDED", found)
        objects[name] = found

    async def remove(self, path: str, name: str) -> None:
        found = deepcopy(self._objects[path][name])
        await self._note(path, "DELETED", found)
        del self._objects[path][name]

    def get(self, path: str, name: str) -> dict[str, Any]:
        """A copy of an object."""
        return deepcopy(self._objects[path][name])

    async def bookmark(self, path: str) -> None:
        """Let watches know of a version at which nothing happened to their objects."""
        found = {"kind": "", "apiVersion": "v1", "metadata": {"name": "", "creationTimestamp": None}, "spec": {}}
        await self._note(path, "BOOKMARK", found)

    async def _note(self, path: str, kind: str, found: dict[str, Any]) -> None:
        self._version += 1
        found["metadata"]["resourceVersion"] = str(self._version)
        before = self._objects.get(path, {}).get(found["metadata"]["name"])
        if not self.lost:
            self._history.append((self._version, path, kind, deepcopy(found), before))
        async with self._changed:
            self._changed.notify_all()

    def compact(self) -> None:
        """Forget what happened until now."""
        self.oldest = self._version + 1
        self._history.clear()

    # Answers.

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                target = urlsplit(head[0].split(" ")[1])
                query = {key: values[-1] for key, values in parse_qs(target.query).items()}
                headers = {key.lower(): value for key, value in (line.split(": ", 1) for line in head[1:] if line)}
                asked = Asked(target.path, query, headers)
                self.asked.append(asked)
                other = self.instead.pop(0) if self.instead else None
                await (other or FakeApiserver.answer)(self, asked, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def answer(self, asked: Asked, writer: asyncio.StreamWriter) -> None:
        resource = asked.path.rsplit("/", 1)[1]
        verb = "watch" if asked.watches else "list"
        if self.tokens and asked.headers.get("authorization", "").removeprefix("Bearer ") not in self.tokens:
            await self.refuse(writer, "unauthorized")
        elif (verb, resource) in self.forbidden:
            await self.refuse(writer, f"forbidden_{verb}")
        elif asked.watches:
            await self._watch(asked, writer)
        else:
            await self._list(asked, writer)

    async def refuse(self, writer: asyncio.StreamWriter, recorded: str, headers: str = "") -> None:
        status = RECORDED[recorded]
        await send(writer, status["code"], json.dumps(status).encode(), headers)

    async def _list(self, asked: Asked, writer: asyncio.StreamWriter) -> None:
        found = [each for each in self._objects.get(asked.path, {}).values() if _selected(each, asked.query)]
        begin, most = int(asked.query.get("continue", "0")), int(asked.query.get("limit", "0")) or len(found)
        body = deepcopy(RECORDED["list"])
        metadata: dict[str, Any] = {"resourceVersion": str(self._version)}
        if begin + most < len(found):
            metadata |= {"continue": str(begin + most), "remainingItemCount": len(found) - begin - most}
        body |= {
            "metadata": metadata,
            "kind": KINDS[asked.path.rsplit("/", 1)[1]] + "List",
            "items": found[begin : begin + most],
        }
        await send(writer, 200, json.dumps(body).encode())

    async def _watch(self, asked: Asked, writer: asyncio.StreamWriter) -> None:
        at = int(asked.query["resourceVersion"])
        await begin_lines(writer)
        if at < self.oldest - 1:
            await line(writer, {"type": "ERROR", "object": RECORDED["gone"]})
            await end_lines(writer)
            return
        try:
            async with asyncio.timeout(float(asked.query["timeoutSeconds"])):
                while True:
                    until = self._version
                    for version, path, kind, found, before in list(self._history):
                        event = _event(kind, found, before, asked.query) if path == asked.path else None
                        if at < version <= until and event is not None:
                            await line(writer, event)
                    at = until
                    async with self._changed:
                        while self._version == at:
                            await self._changed.wait()
        except TimeoutError:
            await end_lines(writer)


def _event(
    kind: str, found: dict[str, Any], before: dict[str, Any] | None, query: dict[str, str]
) -> dict[str, Any] | None:
    """What a watch of selected objects hears: an object that is selected no more is DELETED to it."""
    if kind == "BOOKMARK":
        return {"type": kind, "object": found}
    was, is_now = before is not None and _selected(before, query), kind != "DELETED" and _selected(found, query)
    if not was and not is_now:
        return None
    return {"type": "MODIFIED" if was and is_now else "ADDED" if is_now else "DELETED", "object": found}


def _selected(found: dict[str, Any], query: dict[str, str]) -> bool:
    """Selectors of the form KEY=VALUE,KEY=VALUE."""
    labels = found["metadata"].get("labels", {})
    wanted = [each.split("=") for each in re.findall("[^,]+", query.get("labelSelector", ""))]
    name = query.get("fieldSelector", "").removeprefix("metadata.name=")
    return all(labels.get(key) == value for key, value in wanted) and name in ("", found["metadata"]["name"])


async def send(writer: asyncio.StreamWriter, status: int, body: bytes, headers: str = "") -> None:
    head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n{headers}\r\n"
    writer.write(head.encode() + body)
    await writer.drain()


async def begin_lines(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n")
    await writer.drain()


async def line(writer: asyncio.StreamWriter, event: object) -> None:
    await piece(writer, json.dumps(event).encode() + b"\n")


async def piece(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(b"%x\r\n%b\r\n" % (len(data), data))
    await writer.drain()


async def end_lines(writer: asyncio.StreamWriter) -> None:
    writer.write(b"0\r\n\r\n")
    await writer.drain()


# Objects.


def pod(
    name: str, ip: str, labels: dict[str, str], ports: dict[str, int] | None = None, ready: bool = True
) -> dict[str, Any]:
    """A pod that runs on a node, in the recorded form. ports: those that its container declares, by name."""
    found = deepcopy(RECORDED["pod"])
    found["metadata"] |= {"name": name, "labels": labels}
    found["spec"]["containers"][0]["ports"] = [
        {"name": each, "containerPort": number, "protocol": "TCP"} for each, number in (ports or {}).items()
    ]
    found["status"] |= {"podIP": ip, "podIPs": [{"ip": ip}]}
    set_ready(found, ready)
    return found


def set_ready(found: dict[str, Any], ready: bool) -> None:
    for condition in found["status"]["conditions"]:
        if condition["type"] == "Ready":
            condition["status"] = str(ready)


class FakePods:
    """The pods of namespace moe, as tests/router/pods_under_load.py has them."""

    def __init__(self, server: FakeApiserver) -> None:
        self._server = server
        self._path = PODS.format("moe")
        self.url = server.url

    async def create(self, name: str, role: str, ip: str, port: int, ready: bool = True) -> None:
        await self._server.put(self._path, pod(name, ip, {"role": role}, {"http": port}, ready))

    async def set_ready(self, name: str, ready: bool) -> None:
        found = self._server.get(self._path, name)
        set_ready(found, ready)
        await self._server.put(self._path, found)

    async def delete(self, name: str) -> None:
        found = self._server.get(self._path, name)
        found["metadata"] |= RECORDED["ending"]
        await self._server.put(self._path, found)

    async def finish(self, name: str) -> None:
        await self._server.remove(self._path, name)


def pool(name: str, labels: dict[str, str], *ports: int) -> dict[str, Any]:
    found = deepcopy(RECORDED["pool"])
    found["metadata"]["name"] = name
    found["spec"] |= {"selector": {"matchLabels": labels}, "targetPorts": [{"number": port} for port in ports]}
    return found
