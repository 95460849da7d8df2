"""Fake servers of SGLang in its prefill and decode modes, which wait for each other in a room as the real ones do.

What they say follows SGLang 0.5.23: answers named by `rid`, errors that are their own top level, and error events with
status 200 in a stream.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import uuid
from typing import Any

from tests.router.fake_worker import CHAT, RESPONSES, FakeWorker, Seen, compact, reply

_ports = itertools.count(20000)


class Room:
    """Where the two legs of one prompt meet. expected: the decode worker has come. sent: its blocks are there."""

    def __init__(self) -> None:
        self.expected = asyncio.Event()
        self.sent = asyncio.Event()


class FakeSglang(FakeWorker):
    """A server in one of the two modes. All servers that may meet share `bootstraps`.

    bootstraps: bootstrap port -> prefill server.
    bootstrap_port: its own, if it is a prefill server.
    rooms: the rooms of a prefill server. None is ever used twice.
    late_s: how long after the transfer a prefill server answers.
    """

    def __init__(self, role: str, bootstraps: dict[int, FakeSglang], **kwargs: Any) -> None:
        super().__init__(role, **kwargs)
        self._bootstraps = bootstraps
        self._names: set[str] = set()
        self.rooms: dict[int, Room] = {}
        self.late_s = 0.0
        self.bootstrap_port = next(_ports)
        if role == "prefill":
            bootstraps[self.bootstrap_port] = self
        info = {"disaggregation_mode": role, "disaggregation_bootstrap_port": self.bootstrap_port}
        self.info = (200, json.dumps(info).encode())

    async def answer(self, seen: Seen, writer: asyncio.StreamWriter) -> None:
        body = seen.body
        first, name = body.get("bootstrap_room"), str(body.get("rid", body.get("request_id")))
        if not isinstance(first, int):
            await refuse(writer, 400, "Invalid request: Disaggregated request received without bootstrap room id.")
            return
        if name in self._names:
            await refuse(writer, 400, f"Duplicate request ID detected: {name}")
            return
        self._names.add(name)
        try:
            if await self.transfer(body, writer):
                await self.say(seen, writer)
        finally:
            self._names.discard(name)

    async def transfer(self, body: dict[str, Any], writer: asyncio.StreamWriter, doors_away: int = 0) -> bool:
        """Meet the other server. False if that failed, which the client then knows. doors_away: from the right room."""
        first = body["bootstrap_room"] + doors_away
        numbers = range(first, first + (prompts_of(body) or 1))
        prefill = self if self.role == "prefill" else self._bootstraps.get(body["bootstrap_port"])
        if prefill is None or body["bootstrap_host"] != "127.0.0.1":
            await refuse(
                writer, 500, f"Decode handshake failed for request req.bootstrap_room={body['bootstrap_room']}"
            )
            return False
        for number in numbers:
            room = prefill.rooms.setdefault(number, Room())
            if self.role == "prefill":
                await room.expected.wait()
                room.sent.set()
            else:
                room.expected.set()
        if self.role == "decode":
            for number in numbers:
                await prefill.rooms[number].sent.wait()
        elif self.late_s:
            await asyncio.sleep(self.late_s)
        return True

    async def say(self, seen: Seen, writer: asyncio.StreamWriter) -> None:
        """The answer as such. A prefill server generates one token."""
        tokens = self.tokens[:1] if self.role == "prefill" else self.tokens[: seen.body.get("max_tokens", 16)]
        chat = seen.path == CHAT
        if seen.body.get("stream"):
            await self.stream(seen, writer, tokens, chat)
        else:
            await asyncio.sleep(self.token_gap_s * len(tokens))
            await reply(writer, 200, compact(self.whole(seen, tokens, chat)))

    def named(self, seen: Seen, index: int = 0) -> str:
        """The id of what is said for one of its prompts."""
        name = seen.body.get("rid") or uuid.uuid4().hex
        return name if prompts_of(seen.body) is None else f"{name}_{index}"

    def whole(self, seen: Seen, tokens: list[str], chat: bool) -> dict[str, Any]:
        fields = super().whole(seen, tokens, chat)
        del fields["kv_transfer_params"]
        if seen.path == RESPONSES:
            return fields
        fields["choices"] = [{**fields["choices"][0], "index": i} for i in range(prompts_of(seen.body) or 1)]
        return fields | {"id": self.named(seen)}

    def events(self, seen: Seen, tokens: list[str], chat: bool) -> list[bytes]:
        events = super().events(seen, tokens, chat)
        if seen.path == RESPONSES:
            return events
        said: list[bytes] = []
        for event in events[:-1]:
            fields = json.loads(event.removeprefix(b"data: "))
            for index in range((prompts_of(seen.body) or 1) if fields["choices"] else 1):
                for choice in fields["choices"]:
                    choice["index"] = index
                said.append(b"data: %b\n\n" % compact(fields | {"id": self.named(seen, index)}))
        return [*said, events[-1]]


def prompts_of(body: dict[str, Any]) -> int | None:
    """How many prompts a request has in an array. None if it has one that is not."""
    prompt = body.get("prompt")
    return len(prompt) if isinstance(prompt, list) and isinstance(prompt[0], str) else None


def error(status: int, message: str) -> dict[str, Any]:
    return {"object": "error", "message": message, "type": "BadRequest", "param": None, "code": status}


async def refuse(writer: asyncio.StreamWriter, status: int, message: str) -> None:
    await reply(writer, status, compact(error(status, message)))
