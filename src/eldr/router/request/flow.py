"""Drives one request through its life: admit, prefill, place, decode, relay.

Here, the legs run one after the other. `pair.py` has the flow for engines whose legs run at once.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any, cast

from eldr.kernels import JsonObject, JsonTextError
from eldr.router.experts.watch import ExpertSources, LegWatch
from eldr.router.fleet.groups import Served
from eldr.router.http.client import Answer
from eldr.router.http.errors import ApiError
from eldr.router.http.exchange import ClientExchange
from eldr.router.http.forwarding import answer_headers
from eldr.router.http.media_types import JSON, essence
from eldr.router.http.message import Request
from eldr.router.placement.decode import Placement
from eldr.router.protocols.base import SequentialLegs
from eldr.router.protocols.handoff import HandOff
from eldr.router.protocols.openai import USAGE, generated_tokens
from eldr.router.protocols.streams import FORMS
from eldr.router.request import intake
from eldr.router.request.answer import DecodeAnswer, TokenTimes
from eldr.router.request.attempts import Attempts
from eldr.router.request.choice import place, prefill_worker
from eldr.router.request.intake import Job
from eldr.router.request.legs import Leg, LegFailure, LegRefused, RelayedError
from eldr.router.request.quotas import Charge
from eldr.router.request.services import Services, admit
from eldr.router.request.verdict import worker_error

log = logging.getLogger("eldr.router")

# What keeps a silent stream alive (WHATWG HTML, section 9.2.7), and the head before it, as vLLM's.
KEEP_ALIVE = b": keep-alive\n\n"
STREAM_TYPE = b"text/event-stream; charset=utf-8"
# A shorter wait in the queue does not count as a wait.
NO_WAIT_S = 0.0005


class Flow:
    """Answers one request for text. It also listens to the events of its client.

    It has more attributes than a class should. They say where the request is, and each of the events that may come at
    any time (a deadline, silence, the client, the end of the router) needs most of them.
    """

    def __init__(self, services: Services, client: ClientExchange, request: Request) -> None:
        self._services = services
        self._client = client
        self._request = request
        self._id = intake.request_id(request)
        self._task: asyncio.Task[None] | None = None
        self._form = FORMS[request.path]
        self._timer: asyncio.TimerHandle | None = None
        self._silence: asyncio.TimerHandle | None = None  # only if the client gets comments
        self._heard_s = request.received_s  # since then, the client has heard nothing
        self._handoff: HandOff | None = None  # of the current attempt
        self._whole = False  # it runs on one decode worker
        self._leg: Leg | None = None  # the current decode leg, with its answer
        self._answer: DecodeAnswer | None = None
        self._charge: Charge | None = None  # None if the client has no name
        self._status = 0  # of the answer. 0 before there is one, and for a client that left before
        self._ended: ApiError | None = None  # why the router ended the request before it was answered
        self._notes: dict[str, Any] = {}  # for the log and the trace; nothing reads them back

    # The steps of the request.

    def start(self) -> asyncio.Task[None] | None:
        """Check the request. Answer a bad one at once; otherwise start the task that answers it."""
        services, request = self._services, self._request
        try:
            self._charge = services.quotas.admit(request, len(request.body) // intake.BYTES_PER_TOKEN)
            job = services.intake.take(request, self._id)
            request.body = b""  # free the memory while the answer streams
        except ApiError as error:
            self._respond_error(error)
            self._settle()
            return None
        self._id = job.request_id
        self._client.listener = self
        self._task = asyncio.get_running_loop().create_task(self._run(job))
        return self._task

    async def _run(self, job: Job) -> None:
        """Answer the request, and leave nothing of it behind."""
        self._wake_at(job, job.deadlines.first_byte_s)
        if job.stream and self._services.config.timeouts.stream_keepalive_s:
            self._on_silence()
        try:
            await self._respond(job)
        finally:
            self._cancel_timers()
            self._settle()
            if job.trace is not None:
                job.trace.end(self._notes)
            self._log()

    async def _respond(self, job: Job) -> None:
        """Give the client its one answer, if it stays for it. Raises RuntimeError for an error after the answer."""
        try:
            await self._serve(job)
        except ApiError as error:
            self._respond_error(error)
        except RelayedError as error:
            self._relay(error.answer)
        except asyncio.CancelledError:
            if self._ended is not None:
                self._respond_error(self._ended)
            else:
                self._notes["status"] = "cancelled"
        except Exception:
            log.exception("request %s failed inside the router", self._id)
            self._respond_error(ApiError(500, "internal error in the router"))

    async def _serve(self, job: Job) -> None:
        """Admit the request, then prefill, place and decode until one attempt succeeds, and relay its answer.

        Raises ApiError or RelayedError.
        """
        services = self._services
        served = await self._admit(job)
        attempts = Attempts(services.retries, self._id, served)
        try:
            while True:
                try:
                    answer, members = await self._attempt(job, served, attempts)
                    break
                except LegRefused as refused:
                    attempts.refused(refused)
                except LegFailure as failure:
                    attempts.failed(failure)
                    self._handoff = None  # it is spent, or its lease has ended
                except RelayedError as relayed:
                    if not await attempts.served_elsewhere(relayed):
                        raise
                    self._handoff = None
        finally:
            services.admission.leave(served)
        if answer.begun:
            self._count(200)
        else:
            self._relay(answer, members, record=job.record)

    async def _attempt(self, job: Job, served: Served, attempts: Attempts) -> tuple[DecodeAnswer, JsonObject | None]:
        """Prefill, place and decode, one after the other. A hand-off that was not sent yet spares the prefill.

        Returns the answer of the decode leg, with the members of a whole one as it is.
        Raises NoWorkerError, LegRefused, LegFailure or RelayedError.
        """
        if not self._whole:
            self._whole = served.group.aggregated or self._runs_whole(job.why_whole)
        if self._handoff is None and not self._whole:
            self._whole = self._runs_whole("prefill_lacks_model" if served.prefill == frozenset() else None)
        if self._handoff is None and not self._whole:
            self._handoff = await self._prefill(job, served, attempts)
            self._whole = self._runs_whole("no_handoff" if self._handoff is None else None)
        placement = await self._place(job, served, self._handoff, attempts)
        return await self._decode(job, self._handoff, placement, attempts)

    async def _admit(self, job: Job) -> Served:
        """Wait for a turn. Returns who serves the model. Raises ApiError."""
        entered_s = time.monotonic()
        served = await admit(self._services, job.claim, job.model)
        waited_s = time.monotonic() - entered_s
        if job.trace is not None:
            job.trace.leg("queue", entered_s)
        if waited_s > NO_WAIT_S:
            self._services.metrics.queue.observe(waited_s)
        return served

    def _runs_whole(self, why: str | None) -> bool:
        """Whether there is a reason to prefill and decode on the same decode worker."""
        if why is None:
            return False
        self._services.metrics.passthrough[why] += 1
        self._notes["passthrough"] = why
        return True

    async def _prefill(self, job: Job, served: Served, attempts: Attempts) -> HandOff | None:
        """Return a hand-off, or None if the worker gives none.

        Raises NoWorkerError, LegRefused, LegFailure or RelayedError.
        """
        services, timeouts = self._services, self._services.config.timeouts
        protocol = cast(SequentialLegs, services.protocol)
        while (worker := prefill_worker(services, job, served, attempts.tried("prefill"))) is None:
            await services.admission.until_changed(served, "prefill")
        with Leg(services.legs, job, worker) as leg:
            await leg.connect()
            name = attempts.next_name("prefill")
            body = protocol.prefill_body(job.endpoint, job.body, job.record, name)
            leg.send(name, body, Answer(), timeouts.prefill_timeout_s)
            del body  # a long one would stay until the prefill is done
            handoff = leg.read_handoff(await leg.answered())
        self._notes["prefill"] = worker.url
        if self._charge is not None and handoff is not None and handoff.prompt_tokens:
            self._charge.prompt_tokens = handoff.prompt_tokens
        return handoff

    async def _place(self, job: Job, served: Served, handoff: HandOff | None, attempts: Attempts) -> Placement:
        """Wait for a worker that is eligible before the lease ends.

        Raises LegFailure, or NoWorkerError if there is none.
        """
        placement = await place(self._services, job, served, handoff, attempts.tried("decode"))
        if placement is None:
            raise LegFailure("decode", "lease", "no worker had room before the lease ended")
        return placement

    async def _decode(
        self, job: Job, handoff: HandOff | None, placement: Placement, attempts: Attempts
    ) -> tuple[DecodeAnswer, JsonObject | None]:
        """Run the decode leg and forward a stream as it arrives.

        Returns its answer, with the members of a whole one as it is. Raises LegRefused, LegFailure or RelayedError.
        """
        services, timeouts, worker = self._services, self._services.config.timeouts, placement.worker
        source = None if handoff is None else handoff.source
        with placement, Leg(services.legs, job, worker, source, placement) as leg:
            await leg.connect()
            if handoff is not None and handoff.left_s(time.monotonic()) <= 0:
                raise LegFailure("decode", "lease", "the lease ended before the request was sent")
            answer = self._answer_of(job, leg)
            name = attempts.next_name("decode")
            watch = None if services.experts is None else self._watch(services.experts, job, handoff, placement, name)
            body = self._decode_body(job, handoff, name)
            leg.send(
                name,
                body if watch is None else watch.asking(body),
                answer,
                self._answer_limit_s(job, handoff),
                timeouts.decode_idle_timeout_s,
            )
            del body  # a long one would stay until the answer is there
            self._listen(leg, answer)
            try:
                fields = await leg.answered()
            except BaseException:
                if watch is not None:
                    watch.failed()
                raise
            finally:
                self._listened(answer)
            if placement.computes_prompt:
                placement.generated(answer.times.tokens or generated_tokens(fields.inner("usage", USAGE)))
            as_it_is = watch is None or not self._take_experts(watch, answer, fields)
            self._judge(leg, answer, fields)
        self._note_decode(placement, answer)
        return answer, fields if as_it_is else None

    # The parts of a decode leg.

    def _decode_body(self, job: Job, handoff: HandOff | None, name: str) -> bytes:
        protocol = self._services.protocol
        if handoff is None:
            return protocol.whole_body(job.endpoint, job.body, job.record, name)
        return cast(SequentialLegs, protocol).decode_body(job.endpoint, job.body, handoff, job.record, name)

    def _answer_of(self, job: Job, leg: Leg) -> DecodeAnswer:
        """What receives the answer of a decode leg, and forwards a stream to the client."""
        times = TokenTimes(self._services.metrics, self._request.received_s, self._form.opening + job.wants_usage)
        return DecodeAnswer(self._client, times, intake.id_line(self._id), self._form, leg.first_event, job.stream)

    def _listen(self, leg: Leg, answer: DecodeAnswer) -> None:
        """Let the events of the client and the deadlines reach this leg, until `_listened`."""
        self._leg, self._answer = leg, answer
        if self._client.stalled:
            leg.pause()

    def _listened(self, answer: DecodeAnswer) -> None:
        self._leg = self._answer = None
        if self._charge is not None:
            self._charge.generated_tokens = answer.times.tokens

    def _judge(self, leg: Leg, answer: DecodeAnswer, fields: JsonObject) -> None:
        """Record how an answer ended that was whole or, if it is a stream, had begun. fields: its members."""
        if self._charge is not None:
            self._charge.know(fields)
        if answer.broken is not None:
            leg.broke(answer.broken)
        elif not answer.cut:
            leg.succeeded()

    def _note_decode(self, placement: Placement, answer: DecodeAnswer) -> None:
        self._notes["decode"] = placement.worker.url
        self._notes["reason"] = placement.decision.reason
        if answer.begun:
            tpot_s = answer.times.observe(answer.whole)
            if tpot_s is not None:
                placement.worker.observe_tpot(tpot_s)

    def _watch(
        self, experts: ExpertSources, job: Job, handoff: HandOff | None, placement: Placement, name: str
    ) -> LegWatch | None:
        """Announce a decode leg to the sources of experts. Only whole answers state any."""
        whole = handoff is None and job.stream is False
        return experts.watch(name, placement.request_id, job.model, job.max_tokens, job.body if whole else None)

    def _take_experts(self, watch: LegWatch, answer: DecodeAnswer, fields: JsonObject) -> bool:
        """Take the experts out of a whole answer. Of a stream that broke, nothing that is reported counts.

        Returns whether the answer was changed.
        """
        if answer.broken is not None or answer.cut:
            watch.failed()
        elif not answer.begun:
            kept = watch.take(fields)
            if kept is not None:
                answer.replace_body(kept)
                return True
        return False

    def _answer_limit_s(self, job: Job, handoff: HandOff | None) -> float:
        """How long a decode worker may take to answer or, if the answer is streamed, to begin.

        Whoever computes the prompt has the time of a prefill for it. That is the decode worker if the request runs
        whole. It may also be for a hand-off, because a worker that has to refuse the pull computes the prompt itself.
        It then gets the time that this prompt took before: a prefill's whole time would let each worker that is stuck
        keep its requests for minutes.
        """
        timeouts = self._services.config.timeouts
        limit_s = timeouts.decode_first_byte_timeout_s if job.stream else timeouts.decode_answer_timeout_s
        return limit_s + (timeouts.prefill_timeout_s if handoff is None else handoff.prefill_s)

    # The answer.

    def _relay(
        self,
        answer: Answer,
        members: JsonObject | None = None,
        *,
        record: bool = False,
    ) -> None:
        """Give the client a worker's answer: a completion with its members, or an error."""
        if self._client.streaming:
            self._respond_error(worker_error(answer))
            return
        body = answer.body
        content_type, retry_after = answer_headers(answer.headers)
        if essence(content_type) == JSON:
            protocol = self._services.protocol
            try:
                if record and members is not None:
                    body = cast(SequentialLegs, protocol).recorded(members, self._handoff)
                else:
                    body = protocol.for_client(body, members)
            except JsonTextError:
                log.warning("request %s: a worker's answer is not JSON", self._id)
                self._respond_error(ApiError(502, "the worker's answer is not valid JSON"))
                return
        self._client.respond(answer.status, body, content_type, intake.id_line(self._id) + retry_after)
        self._count(answer.status)

    def _respond_error(self, error: ApiError) -> None:
        if self._client.streaming:  # comments have been sent, so the status is settled
            self._client.write(self._form.error_event(error))
            self._client.break_stream()
        else:
            self._client.respond_error(error, intake.id_line(self._id))
        self._count(error.status)

    def _settle(self) -> None:
        if self._charge is not None:
            self._charge.settle(failed=self._status >= 400)

    def _count(self, status: int) -> None:
        self._status = self._notes["status"] = status
        self._services.metrics.requests[self._request.path.decode(), status] += 1

    def _log(self) -> None:
        if log.isEnabledFor(logging.DEBUG):
            self._notes["seconds"] = round(time.monotonic() - self._request.received_s, 6)
            log.debug("request", extra={"fields": {"id": self._id, "path": self._request.path.decode(), **self._notes}})

    # Silence, while a streamed request waits and between tokens.

    def _on_silence(self) -> None:
        """Send a comment if the client has heard nothing for long enough, and look again when it could be due."""
        every_s = self._services.config.timeouts.stream_keepalive_s
        if not every_s:
            return  # a reload has turned it off
        answer, now_s = self._answer, time.monotonic()
        begun = answer is not None and answer.begun
        if answer is not None and begun:
            self._heard_s = max(self._heard_s, answer.times.first_s, answer.times.last_s)
        due_s = self._heard_s + every_s
        if now_s >= due_s:
            due_s = now_s + every_s
            if not self._client.stalled and (answer is None or not begun or answer.between):
                self._heard_s = now_s
                self._comment()
        self._silence = self._loop().call_later(due_s - now_s, self._on_silence)

    def _comment(self) -> None:
        if not self._client.streaming:
            self._client.begin_stream(STREAM_TYPE, intake.id_line(self._id))
        self._client.write(KEEP_ALIVE)

    # Ending early.

    def _wake_at(self, job: Job, deadline_s: float) -> None:
        """Set the timer for the request's deadlines. Its legs are watched by the fleet's sweep."""
        left_s = max(0.0, deadline_s - time.monotonic())
        self._timer = self._loop().call_later(left_s, self._on_deadline, job)

    def _loop(self) -> asyncio.AbstractEventLoop:
        """The event loop. Unlike get_running_loop, this makes no system call."""
        return cast("asyncio.Task[None]", self._task).get_loop()

    def _cancel_timers(self) -> None:
        cast(asyncio.TimerHandle, self._timer).cancel()
        if self._silence is not None:
            self._silence.cancel()

    def _on_deadline(self, job: Job) -> None:
        answer = self._answer
        if self._client.streaming and time.monotonic() < job.deadlines.total_s:
            self._wake_at(job, job.deadlines.total_s)
        elif answer is None or not answer.finished.done():
            self._services.metrics.timeouts["total"] += 1
            self.end_now(ApiError(504, "the request was not answered in the time that its client or the router allows"))

    def end_now(self, error: ApiError) -> None:
        """End the request with `error`, inside the stream if it has begun."""
        answer = self._answer
        if answer is None or not answer.begun:
            self._abort()  # the task ends only in the next turn of the event loop, and a stream must not begin before
            self._ended = error
            cast("asyncio.Task[None]", self._task).cancel()
        elif not answer.finished.done():
            self._abort()
            answer.cut_off(error)

    def _abort(self) -> None:
        """Hear no more of the current decode leg."""
        if self._leg is not None:
            self._leg.abort()

    # The client.

    def on_client_gone(self) -> None:
        self._abort()
        if self._answer is not None and self._answer.complete:
            self._answer.settle()
            return
        self._services.metrics.disconnects += 1
        if self._timer is not None:
            self._cancel_timers()
        if self._task is not None:
            self._task.cancel()

    def on_client_stalled(self) -> None:
        if self._leg is not None:
            self._leg.pause()

    def on_client_reading(self) -> None:
        if self._leg is not None:
            self._leg.resume()
