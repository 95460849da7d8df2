"""Chooses the workers of one request that Envoy asks about, and counts it as theirs until it ends.

The steps are those of a request that the router sends itself: admit, place, and hear how it ended. What is chosen
depends on the phase that the request is in:

    decode   a decode worker by policy: by the counts of a hand-off in the body, else by the words of the prompt. Of a
             model with aggregated workers, one of those.
    prefill  a prefill worker by the start of the prompt.
    pair     both, decode first: llm-d's sidecar beside the decode worker asks the other for the prefill.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Final

from eldr.router.config.picker import PickerSettings
from eldr.router.experts.watch import LegWatch
from eldr.router.fleet.groups import Served
from eldr.router.fleet.workers import Worker
from eldr.router.http.errors import ApiError
from eldr.router.http.message import Request
from eldr.router.picker.conversation import Conversation
from eldr.router.picker.endpoints import endpoint_of, urls_in
from eldr.router.picker.prefill_times import PrefillTimes
from eldr.router.picker.replies import Destination
from eldr.router.placement.admission import RETRY_AFTER_S, NoWorkerError
from eldr.router.placement.decode import Placement
from eldr.router.protocols import openai
from eldr.router.request.choice import by_load, place, prefill_worker
from eldr.router.request.intake import Job
from eldr.router.request.intake import request_id as id_of
from eldr.router.request.legs import OVERLOADED, WORKERS_ERRORS
from eldr.router.request.passthrough import ENDPOINTS
from eldr.router.request.services import Services, admit

log = logging.getLogger("eldr.router")

# By it llm-d's coordinator says which of a request's phases it sends.
PROFILE: Final = b"epp-profile"
PHASES: Final = {b"prefill": "prefill", b"decode": "decode"}
# Paths of which nothing is known count under one name.
OTHER: Final = "other"


class Occupied:
    """One request at one worker, for the time of its `with` block."""

    __slots__ = ("_services", "worker")

    def __init__(self, services: Services, worker: Worker) -> None:
        self._services = services
        self.worker = worker

    def __enter__(self) -> Occupied:
        self._services.outcomes.began(self.worker)
        self._services.fleet.started(self.worker)
        return self

    def move(self, worker: Worker) -> None:
        """Another worker runs the request."""
        self.__exit__(None, None, None)
        self.worker = worker
        self.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._services.fleet.finished(self.worker)
        self._services.outcomes.ended(self.worker)


class Choosing:
    """Chooses for all requests."""

    def __init__(self, services: Services, settings: PickerSettings) -> None:
        self.services = services
        self.settings = settings
        self.running: dict[asyncio.Task[None], WorkerChoice] = {}
        self.prefill_times = PrefillTimes()

    def choose(self, conversation: Conversation, request: Request, subset: frozenset[str] | None) -> WorkerChoice:
        """Begin to choose for a request. subset: the endpoints among which to choose. None for all."""
        choice = WorkerChoice(self, conversation, request)
        task = asyncio.get_running_loop().create_task(choice.run(request, subset))
        choice.task = task
        self.running[task] = choice
        task.add_done_callback(self._done)
        return choice

    def _done(self, task: asyncio.Task[None]) -> None:
        del self.running[task]

    def count(self, path: bytes, status: int) -> None:
        """A request got its answer."""
        known = path in openai.ENDPOINTS or path in ENDPOINTS
        self.services.metrics.requests[path.decode() if known else OTHER, status] += 1


class WorkerChoice:
    """The choice for one request.

    task: runs it, until the request is over. told: whether Envoy knows the worker.

    It has more attributes than a class should: they say where the request is, and each of the events that may come at
    any time needs most of them.
    """

    def __init__(self, shared: Choosing, conversation: Conversation, request: Request) -> None:
        self._shared = shared
        self._services = shared.services
        self._conversation: Conversation | None = conversation
        self.told = False
        self._path = request.path
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._occupied: Occupied | None = None
        self._placement: Placement | None = None
        self._prefill = ExitStack()  # what ends when the prompt is computed
        self._prefill_of: tuple[int, float] | None = None  # of a streamed pair: bytes of its body, and since when
        self._notes: dict[str, Any] = {}  # for the log; nothing reads them back
        self._watch: LegWatch | None = None  # what failed if no answer begins
        self._received_s = request.received_s
        self.task: asyncio.Task[None] | None = None

    # The steps.

    async def run(self, request: Request, subset: frozenset[str] | None) -> None:
        """Choose, tell Envoy, and wait for the end of the request."""
        try:
            with self._prefill:
                await self._serve(request, subset)
        except ApiError as error:
            self._refuse(error)
        except asyncio.CancelledError:
            pass
        except Exception:
            log.exception("no worker was chosen because of an error inside the picker")
            self._refuse(ApiError(500, "internal error in the endpoint picker"))
        finally:
            self._conversation = self._placement = self._occupied = None
            if self._watch is not None:
                self._watch.failed()
            self._log()

    async def _serve(self, request: Request, subset: frozenset[str] | None) -> None:
        services = self._services
        only = None if subset is None else urls_in(services.fleet, subset)
        if only is not None and not only:
            raise ApiError(503, "none of the endpoints that the gateway allows is a worker of this pool")
        job = self._read(request)
        self._notes["id"] = id_of(request) if job is None else job.request_id
        phase = PHASES.get(request.headers.get(PROFILE, b"").lower(), self._shared.settings.phase)
        request.body = b""
        if job is None:
            await self._any(request, only)
        elif phase == "prefill":
            served = await services.lists.find(job.model)
            if served.group.aggregated:
                await self._for_decode(job, only, False)
            else:
                await self._for_prefill(job, served, only)
        else:
            await self._for_decode(job, only, phase == "pair")

    def _log(self) -> None:
        if log.isEnabledFor(logging.DEBUG):
            self._notes["seconds"] = round(time.monotonic() - self._received_s, 6)
            log.debug("request", extra={"fields": {"path": self._path.decode("latin-1"), **self._notes}})

    def _read(self, request: Request) -> Job | None:
        """The job of a request for text. None for any other, and for one that cannot be read: a worker will say why."""
        if request.path not in openai.ENDPOINTS or request.method != b"POST" or not request.body:
            return None
        try:
            return self._services.intake.take_leg(request, id_of(request))
        except ApiError:
            return None

    async def _for_decode(self, job: Job, only: Collection[str] | None, pair: bool) -> None:
        services = self._services
        handoff = services.protocol.handoff_in(job.body)
        if handoff is not None:
            services.legs.count(handoff)
        served = await admit(services, job.claim, job.model)
        try:
            self._check(served, only)
            placement = await place(services, job, served, handoff, (), only)
            if placement is None:
                raise ApiError(503, "no worker had room before the lease of the prompt's blocks ended")
            with placement, Occupied(services, placement.worker) as self._occupied:
                self._placement = placement
                self._notes["decode"] = placement.worker.url
                self._notes["reason"] = placement.decision.reason
                prefiller = ""
                if pair and not served.group.aggregated and job.why_whole is None:
                    prefiller = self._pair_with(job, served, only)
                body = None if handoff is None else services.protocol.passed_on(job.body, handoff)
                self._expect_experts(job, placement)
                self._tell(job, Destination(self._endpoints(served, placement.worker, only), prefiller, body))
                del body, handoff
                await self._over
        finally:
            services.admission.leave(served)

    def _pair_with(self, job: Job, served: Served, only: Collection[str] | None) -> str:
        """Choose the worker that computes the prompt: ip:port. Empty if none is there; the decode worker then does."""
        worker = prefill_worker(self._services, job, served, (), only)
        if worker is None:
            return ""
        self._prefill.enter_context(Occupied(self._services, worker))
        self._notes["prefill"] = worker.url
        size = len(job.body.text)
        if job.stream:
            self._prefill_of = size, time.monotonic()
        else:  # its answer begins when it ends
            most_s = self._shared.prefill_times.most_s(size)
            if most_s is not None:
                timer = asyncio.get_running_loop().call_later(most_s, self._prefill.close)
                self._prefill.callback(timer.cancel)
        return endpoint_of(worker.url)

    async def _for_prefill(self, job: Job, served: Served, only: Collection[str] | None) -> None:
        services = self._services
        while (worker := prefill_worker(services, job, served, (), only)) is None:
            if only is not None:
                raise _none_allowed()
            await services.admission.until_changed(served, "prefill")
        with Occupied(services, worker) as self._occupied:
            self._notes["prefill"] = worker.url
            endpoints = [endpoint_of(worker.url)]
            for _ in range(self._shared.settings.fallbacks):
                tried = [each.url for each in served.workers("prefill") if endpoint_of(each.url) in endpoints]
                other = prefill_worker(services, job, served, tried, only)
                if other is None or other.url in tried:
                    break
                endpoints.append(endpoint_of(other.url))
            self._tell(job, Destination(endpoints))
            await self._over

    async def _any(self, request: Request, only: Collection[str] | None) -> None:
        """Choose by load for a request that is not for text, or that nobody can read."""
        services = self._services
        endpoint = ENDPOINTS.get(request.path)
        engine = request.path in openai.ENDPOINTS or (endpoint is not None and endpoint.engine)
        served = services.fleet.any_served()
        if services.fleet.workers("decode"):
            worker = by_load(services, served, engine, (), only)
        else:  # a picker for the prefill phase alone, whose workers have queues of their own
            worker = by_load(services, served, False, (), only, "prefill")
        if worker is None and engine and by_load(services, served, False, (), only) is not None:
            raise ApiError(429, "all workers are busy; try again later", retry_after_s=RETRY_AFTER_S)
        if worker is None:
            raise _none_allowed() if only is not None else NoWorkerError("decode")
        with ExitStack() as stack:
            if engine:
                self._occupied = stack.enter_context(Occupied(services, worker))
            self._tell(None, Destination(self._endpoints(served, worker, only)))
            await self._over

    def _check(self, served: Served, only: Collection[str] | None) -> None:
        """Raise ApiError if none of the workers that a gateway allows can serve the request."""
        if only is not None and not any(worker.available for worker in served.workers("decode") if worker.url in only):
            raise _none_allowed()

    def _endpoints(self, served: Served, worker: Worker, only: Collection[str] | None) -> Sequence[str]:
        """The endpoint of the chosen worker, and those to try if it accepts no connection: the least loaded others."""
        endpoints = [endpoint_of(worker.url)]
        most = self._shared.settings.fallbacks
        if most:
            others = [
                other
                for other in served.workers(worker.leg)
                if other is not worker and other.available and (only is None or other.url in only)
            ]
            others.sort(key=lambda other: other.in_flight)
            endpoints += [endpoint_of(other.url) for other in others[:most]]
        return endpoints

    def _expect_experts(self, job: Job, placement: Placement) -> None:
        """Announce the request to the sources of experts. The worker knows it by its X-Request-Id."""
        experts = self._services.experts
        if experts is not None:
            self._watch = experts.watch(job.request_id, placement.request_id, job.model, job.max_tokens, None)

    def _tell(self, job: Job | None, destination: Destination) -> None:
        if job is not None:
            job.free_body()
        self.told = True
        if self._conversation is not None:
            self._conversation.picked(destination)

    def _refuse(self, error: ApiError) -> None:
        self._count(error.status)
        conversation, self._conversation = self._conversation, None
        self.task = None  # the request is over
        if conversation is not None:
            conversation.refuse(error)

    def end_now(self) -> None:
        """The picker is about to stop. Envoy goes on alone with a request of which it knows the worker."""
        if self._conversation is None:
            return
        if self.told:
            self._conversation.leave()
            return
        task = self.task
        self._refuse(ApiError(503, "the endpoint picker is shutting down", retry_after_s=RETRY_AFTER_S))
        if task is not None:
            task.cancel()

    def _count(self, status: int) -> None:
        self._notes["status"] = status
        self._shared.count(self._path, status)

    # Events of the request.

    def answered(self, status: int, endpoint: str, reached: bool) -> None:
        """The answer has begun. A gateway may say that another worker gives it, because the first accepted nothing, or
        that it has sent the request to none, which is no fault of theirs.
        """
        self._count(status)
        if status == 200:
            self._watch = None
            if self._prefill_of is not None:
                size, since_s = self._prefill_of
                self._shared.prefill_times.began(size, time.monotonic() - since_s)
        self._prefill.close()
        if self._placement is not None:
            self._placement.prompt_computed()
        if self._occupied is None or not reached:
            return
        worker, outcomes = self._occupied.worker, self._services.outcomes
        if endpoint and endpoint != endpoint_of(worker.url):
            outcomes.failed(worker, "refused")
            other = self._move(self._occupied, endpoint)
            if other is None:
                return
            worker = other
        if status in WORKERS_ERRORS:
            outcomes.failed(worker, "status")
        elif status != OVERLOADED:  # that is no fault of the worker, and says nothing else of it
            outcomes.succeeded(worker)

    def _move(self, occupied: Occupied, endpoint: str) -> Worker | None:
        """Count the request at the worker that a gateway has sent it to. None if that is no worker here."""
        workers = self._services.fleet.workers(occupied.worker.leg).values()
        worker = next((worker for worker in workers if endpoint_of(worker.url) == endpoint), None)
        if worker is None:
            return None
        self._notes["served"] = worker.url
        occupied.move(worker)
        if self._placement is not None:
            self._placement.move(worker)
        return worker

    def ended(self) -> None:
        """The request is over."""
        task = self.task
        if task is None or task.done():
            return
        self._conversation = self.task = None
        if not self.told:
            self._services.metrics.disconnects += 1
            task.cancel()
        elif not self._over.done():
            self._over.set_result(None)


def _none_allowed() -> ApiError:
    return ApiError(503, "none of the endpoints that the gateway allows is available", retry_after_s=RETRY_AFTER_S)
