"""Reads the experts of a share of the answers that stock engines give, and keeps them from the clients.

An answer may have megabytes of them. They are cut out where they stand, and decoded in a thread of their own, a few at
a time. What finds no room there is left out.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from eldr.counts import CountsError, ExpertCounts
from eldr.kernels import JsonNames, JsonObject, JsonTextError
from eldr.router.experts.base import AnswerExperts, MoeGeometry
from eldr.router.experts.expected import ExpectedReports
from eldr.router.protocols.openai import USAGE, generated_tokens, prompt_tokens

# Answers that wait for the thread. One takes some 10 ms.
MOST_WAITING: Final = 8


class ExpertAnswers:
    """The answers of all requests.

    share: of the answers that are neither streams nor of several choices, how many are read.
    """

    def __init__(self, engine: AnswerExperts, share: float, expected: ExpectedReports) -> None:
        self._engine = engine
        self._asked = JsonNames((engine.asks,))
        self._share = share
        self._expected = expected
        self._pool = ThreadPoolExecutor(1, "eldr-experts")
        self._waiting = 0

    def ask(self, body: bytes) -> bytes:
        """Return the body of a request whose experts are wanted."""
        return self._engine.asking(body)

    def drawn(self) -> bool:
        """Whether the experts of the next answer are wanted."""
        return random.random() < self._share

    def leaves(self, body: JsonObject) -> bool:
        """Whether the client asks for the experts itself, and so gets the answer as it is."""
        name = self._engine.asks
        if name.encode() not in body.text:
            return False
        try:
            return name in JsonObject(body.text, self._asked)
        except JsonTextError:  # it repeats itself a lot
            return True

    @property
    def unasked(self) -> bool:
        return self._engine.unasked

    def take(self, leg_name: str, model: str | None, wanted: bool, fields: JsonObject) -> bytes:
        """Return a whole answer without its experts, which are read if they are wanted.

        fields: the answer, with `choices` and `usage` among its members.
        """
        answer, texts = self._engine.take(fields.text, fields.span("choices"))
        if wanted:
            self._read(leg_name, model, texts, fields)
        return answer

    def _read(self, leg_name: str, model: str | None, texts: list[bytes], fields: JsonObject) -> None:
        source, expected = self._engine.source, self._expected
        geometry = expected.geometry(model)
        usage = fields.inner("usage", USAGE)
        of_prompt = 0 if usage is None else prompt_tokens(usage)
        generated = generated_tokens(usage) or 0
        reason = ""
        if len(texts) != 1:
            reason = "several_choices" if texts else "missing"
        elif geometry is None:
            reason = "no_geometry"
        elif not of_prompt or not generated:
            reason = "no_usage"
        elif self._waiting >= MOST_WAITING:
            reason = "busy"
        if reason or geometry is None:
            expected.forget(leg_name)
            expected.refused(source, reason)
            return
        self._waiting += 1
        loop = asyncio.get_running_loop()
        self._pool.submit(self._decode, loop, leg_name, texts[0], of_prompt, generated, geometry)

    def _decode(
        self,
        loop: asyncio.AbstractEventLoop,
        leg_name: str,
        text: bytes,
        prompt_tokens: int,
        generated_tokens: int,
        geometry: MoeGeometry,
    ) -> None:
        """Runs in the thread."""
        found: ExpertCounts | CountsError
        try:
            found = self._engine.decode(text, prompt_tokens, generated_tokens, geometry)
        except CountsError as error:
            found = error
        with contextlib.suppress(RuntimeError):  # the router has stopped
            loop.call_soon_threadsafe(self._decoded, leg_name, found)

    def _decoded(self, leg_name: str, found: ExpertCounts | CountsError) -> None:
        self._waiting -= 1
        if isinstance(found, CountsError):
            self._expected.forget(leg_name)
            self._expected.refused(self._engine.source, found.reason)
            return
        with contextlib.suppress(CountsError):  # counted there
            self._expected.take(self._engine.source, leg_name, found)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
