"""The gRPC services of an endpoint picker: external processing, and health checks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from eldr.router.config.groups import ClientLimits
from eldr.router.config.picker import PickerSettings
from eldr.router.fleet.workers import Worker
from eldr.router.http.body_memory import BodyMemory
from eldr.router.picker.choice import Choosing
from eldr.router.picker.conversation import Conversation
from eldr.router.picker.grpc import Call, Method, open_call
from eldr.router.picker.health import CHECK, WATCH, Health
from eldr.router.picker.http2 import Headers, Http2Connection, Receiver, Stream
from eldr.router.request.services import Services

PROCESS: Final = b"/envoy.service.ext_proc.v3.ExternalProcessor/Process"
# A message has no more than a body, or headers, and what is said besides.
MORE_BYTES: Final = 256 * 1024
# How long requests may come that Envoy sent before it heard that there should be no more.
CROSSING_S: Final = 0.2
# How long conversations may take to end once they were told to.
END_S: Final = 1.0


class Picker:
    """Opens a call's service. It is what the connections of gRPC talk to.

    can_pick: whether there are workers.
    closing: whether the process is stopping. Requests still get workers, but the health checks say NOT_SERVING.
    """

    def __init__(
        self,
        services: Services,
        settings: PickerSettings,
        limits: ClientLimits,
        memory: BodyMemory,
        can_pick: Callable[[], bool],
    ) -> None:
        self._limits = limits
        self._memory = memory
        self._most_streams = services.config.queue.max_streams
        self._choosing = Choosing(services, settings)
        self._closing = False
        self._health = Health(lambda: can_pick() and not self._closing)
        self.connections: set[Http2Connection] = set()
        self._methods: dict[bytes, Method] = {
            PROCESS: self._process,
            CHECK: self._health.check,
            WATCH: self._health.watch,
        }

    @property
    def closing(self) -> bool:
        return self._closing

    @closing.setter
    def closing(self, closing: bool) -> None:
        self._closing = closing
        self._health.changed()

    @property
    def running(self) -> int:
        """The number of requests for which a worker is still looked for. Envoy can go on alone with all others."""
        return sum(not choice.told for choice in self._choosing.running.values())

    def connection(self) -> Http2Connection:
        """A protocol for a new connection."""
        return Http2Connection(self, self._limits, self._most_streams, self._memory)

    def open(self, stream: Stream, headers: Headers) -> Receiver:
        return open_call(stream, headers, self._methods, self._limits.max_body_bytes + MORE_BYTES)

    def _process(self, call: Call) -> Conversation:
        choosing = self._choosing
        return Conversation(call, choosing.choose, choosing.count, self._limits.max_body_bytes, self._memory)

    def fleet_changed(self, worker: Worker) -> None:
        """A listener of the fleet."""
        self._health.changed()

    def drain(self) -> None:
        """Ask Envoy to send no more requests on its connections. It opens others, to whoever listens now."""
        for connection in self.connections:
            connection.drain()

    async def end_all(self) -> None:
        """End what still runs. Envoy goes on alone with requests of which it knows the worker."""
        if self.connections:
            await asyncio.sleep(CROSSING_S)
        self._health.end()
        await asyncio.sleep(0)  # a task that never ran could not tell Envoy
        running = dict(self._choosing.running)
        for choice in running.values():
            choice.end_now()
        if running:
            await asyncio.wait(running, timeout=END_S)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
