"""The flow of a request whose two legs run at once: place, choose a prefill worker, send both, relay.

The workers wait for each other, so none of them answers before the other has got its leg. What ends the attempt ends
both legs: a partner that is not given up waits for minutes, with its blocks.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Final, cast

from eldr.kernels import JsonObject
from eldr.router.fleet.groups import Served
from eldr.router.fleet.workers import Worker
from eldr.router.http.client import Answer
from eldr.router.http.errors import ApiError
from eldr.router.protocols.base import ConcurrentLegs
from eldr.router.protocols.openai import USAGE, prompt_tokens
from eldr.router.request.answer import DecodeAnswer
from eldr.router.request.attempts import Attempts
from eldr.router.request.choice import prefill_worker
from eldr.router.request.flow import Flow
from eldr.router.request.intake import Job
from eldr.router.request.legs import Leg, LegFailure, RelayedError

log = logging.getLogger("eldr.router")

# A prefill worker answers once the blocks are transferred, which is before the decode worker has computed anything. If
# the whole answer is one token, they may still cross.
PREFILL_GRACE_S: Final = 1.0


class PairFlow(Flow):
    """Answers one request for text by a prefill and a decode worker that run at the same time."""

    async def _attempt(self, job: Job, served: Served, attempts: Attempts) -> tuple[DecodeAnswer, JsonObject | None]:
        """Send both legs to a new pair of workers, with a new rendezvous.

        Raises NoWorkerError, LegRefused, LegFailure or RelayedError, of the leg that failed first.
        """
        if served.group.aggregated:
            return await super()._attempt(job, served, attempts)
        placement = await self._place(job, served, None, attempts)
        with placement:
            services = self._services
            while (worker := prefill_worker(services, job, served, attempts.tried("prefill"))) is None:
                await services.admission.until_changed(served, "prefill")
            answer, members = await self._run_pair(job, worker, placement.worker, attempts)
        self._note_decode(placement, answer)
        return answer, members

    async def _run_pair(
        self, job: Job, source: Worker, target: Worker, attempts: Attempts
    ) -> tuple[DecodeAnswer, JsonObject]:
        legs, timeouts = self._services.legs, self._services.config.timeouts
        with Leg(legs, job, source, target) as prefill, Leg(legs, job, target, source) as decode:
            await prefill.connect()
            await decode.connect()
            protocol = cast(ConcurrentLegs, self._services.protocol)
            rendezvous = protocol.rendezvous(source)
            name = attempts.next_name("prefill")
            body = protocol.leg_body(job.endpoint, job.body, "prefill", rendezvous, name)
            prefill.send(name, body, Answer(), timeouts.prefill_timeout_s)
            name = attempts.next_name("decode")
            body = protocol.leg_body(job.endpoint, job.body, "decode", rendezvous, name)
            answer = self._answer_of(job, decode)
            decode.send(name, body, answer, self._answer_limit_s(job, None), timeouts.decode_idle_timeout_s)
            del body  # a long one would stay until the answer is done
            self._notes["prefill"] = source.url
            self._listen(decode, answer)
            try:
                fields = await self._answers(prefill, decode, answer)
            finally:
                self._listened(answer)
            self._judge(decode, answer, fields)
        return answer, fields

    async def _answers(self, prefill: Leg, decode: Leg, answer: DecodeAnswer) -> JsonObject:
        """Wait for both legs, or for the failure of one. Returns the members of the decode worker's answer."""
        await asyncio.wait((prefill.over, decode.over), return_when=asyncio.FIRST_COMPLETED)
        if prefill.over.done():
            await self._prefilled(prefill, answer)
            return await decode.answered()
        fields = await decode.answered()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PREFILL_GRACE_S):
                await self._prefilled(prefill, answer)
        return fields

    async def _prefilled(self, prefill: Leg, answer: DecodeAnswer) -> None:
        """Judge the prefill worker's answer. If it failed, the decode leg cannot succeed unless it already does.

        Raises LegFailure, RelayedError or ApiError.
        """
        try:
            fields = await prefill.answered()
        except (LegFailure, RelayedError, ApiError) as failure:
            if not answer.begun and not answer.finished.done():
                raise
            log.debug("request %s goes on: %s", self._id, failure)
            return
        prefill.transferred()
        usage = fields.inner("usage", USAGE)
        if self._charge is not None and usage is not None:
            self._charge.prompt_tokens = prompt_tokens(usage) or self._charge.prompt_tokens
