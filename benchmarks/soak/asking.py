"""One request of a client, and what became of it, every token checked."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from worker import MODEL, token

# Ends that no router may bring about, whatever its workers do: `truncated` looks like success and is none, `cut` is a
# connection that closed within the answer without a word.
NEVER = ("truncated", "cut", "wrong", "hung")


@dataclass(frozen=True, slots=True)
class Request:
    """leave_after: the client goes away after so many tokens."""

    prompt: str
    tokens: int
    stream: bool
    chat: bool = False
    leave_after: int | None = None

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.chat else "/v1/completions"

    @property
    def body(self) -> dict[str, Any]:
        asked = {"messages": [{"role": "user", "content": self.prompt}]} if self.chat else {"prompt": self.prompt}
        return {"model": MODEL, **asked, "max_tokens": self.tokens, "stream": self.stream}

    @property
    def text(self) -> str:
        """What a worker answers."""
        return "".join(token(self.prompt, number) for number in range(self.tokens))


@dataclass(slots=True)
class Reply:
    """ended: complete; left (by the client, on purpose); error_event (within a stream); status_NNN; refused (no
    connection to the router); or one of NEVER. first_s, total_s: from the request to the first token of a stream and
    to the end. port: of the worker, where the answer named it. message: the router's, with a status.
    """

    ended: str = ""
    first_s: float | None = None
    total_s: float = 0.0
    port: int = 0
    message: str = ""
    sent_s: float = field(default_factory=time.monotonic)


async def ask(session: aiohttp.ClientSession, url: str, request: Request, headers: dict[str, str]) -> Reply:
    """Send `request` and read the answer to its end; the session's total timeout says when it hangs."""
    reply = Reply()
    try:
        async with session.post(url + request.path, json=request.body, headers=headers) as answer:
            if answer.status != 200:
                reply.ended = f"status_{answer.status}"
                reply.message = _message(await answer.read())
            elif request.stream:
                reply.ended = await _stream(answer, request, reply)
            else:
                fields = await answer.json()
                reply.port = int(fields["system_fingerprint"])
                reply.ended = "complete" if _text(fields, "message") == request.text else "wrong"
    except TimeoutError:
        reply.ended = "hung"
    except aiohttp.ClientConnectorError:
        reply.ended = "refused"
    except (aiohttp.ClientError, ConnectionError):
        reply.ended = "cut"
    except (ValueError, LookupError, TypeError):
        reply.ended = "wrong"
    reply.total_s = time.monotonic() - reply.sent_s
    return reply


async def _stream(answer: aiohttp.ClientResponse, request: Request, reply: Reply) -> str:
    text, error, done = "", False, False
    seen = 0
    try:
        async for line in answer.content:
            if not line.startswith(b"data: "):
                continue
            if line == b"data: [DONE]\n":
                done = True
                continue
            event = json.loads(line[6:])
            if "error" in event:
                error = True
                continue
            reply.port = int(event["system_fingerprint"])
            reply.first_s = reply.first_s or time.monotonic() - reply.sent_s
            text += _text(event, "delta")
            seen += 1
            if seen == request.leave_after:
                answer.close()
                return "left"
    except aiohttp.ClientError:
        if not error:
            return "cut" if request.text.startswith(text) else "wrong"
    if error:
        # What came before the error must be right all the same.
        return "error_event" if request.text.startswith(text) and not done else "wrong"
    if text == request.text and done:
        return "complete"
    return "truncated" if request.text.startswith(text) else "wrong"


def _text(fields: dict[str, Any], kind: str) -> str:
    choice = fields["choices"][0]
    return str(choice["text"] if "text" in choice else choice[kind]["content"])


def _message(body: bytes) -> str:
    """The message of an error, or the body's beginning where it is no error as OpenAI's API has it."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return body[:80].decode(errors="replace")
