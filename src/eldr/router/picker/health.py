"""gRPC's health checks, as GAIE's endpoint-picker protocol names the services.

https://github.com/grpc/grpc/blob/master/doc/health-checking.md. `liveness` says that the process answers; `readiness`,
the name of the picker's own service and the empty name say that there are workers to pick.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from google.protobuf.message import DecodeError

from eldr.router.picker.grpc import Call, GrpcError, Status
from eldr.router.picker.messages_pb2 import HealthCheckRequest, HealthCheckResponse

CHECK: Final = b"/grpc.health.v1.Health/Check"
WATCH: Final = b"/grpc.health.v1.Health/Watch"
LIVENESS: Final = "liveness"
READY_SERVICES: Final = frozenset(("", "readiness", "envoy.service.ext_proc.v3.ExternalProcessor"))

_SERVING: Final = HealthCheckResponse(status=HealthCheckResponse.SERVING).SerializeToString()
_NOT_SERVING: Final = HealthCheckResponse(status=HealthCheckResponse.NOT_SERVING).SerializeToString()
_UNKNOWN: Final = HealthCheckResponse(status=HealthCheckResponse.SERVICE_UNKNOWN).SerializeToString()


class Health:
    """The health of the picker. is_ready: whether it can pick."""

    def __init__(self, is_ready: Callable[[], bool]) -> None:
        self._is_ready = is_ready
        self._watches: dict[HealthWatch, str] = {}

    def check(self, call: Call) -> HealthCheck:
        """A call of Check."""
        return HealthCheck(self, call)

    def watch(self, call: Call) -> HealthWatch:
        """A call of Watch."""
        return HealthWatch(self, call)

    def status(self, service: str) -> bytes:
        """What is sent about a service."""
        if service == LIVENESS:
            return _SERVING
        if service not in READY_SERVICES:
            return _UNKNOWN
        return _SERVING if self._is_ready() else _NOT_SERVING

    def follow(self, watch: HealthWatch, service: str) -> None:
        self._watches[watch] = service
        watch.tell(self.status(service))

    def forget(self, watch: HealthWatch) -> None:
        self._watches.pop(watch, None)

    def changed(self) -> None:
        """The fleet, or the state of the process, has changed."""
        for watch, service in list(self._watches.items()):
            watch.tell(self.status(service))

    def end(self) -> None:
        """End all watches, which would last for ever."""
        for watch in list(self._watches):
            watch.end()


class _Asked:
    """A call with one request."""

    def __init__(self, health: Health, call: Call) -> None:
        self._health = health
        self._call = call
        self._service: str | None = None

    def on_message(self, message: bytes) -> None:
        if self._service is not None:
            raise GrpcError(Status.INVALID_ARGUMENT, "a health check is one message")
        try:
            self._service = HealthCheckRequest.FromString(message).service
        except DecodeError:
            raise GrpcError(Status.INVALID_ARGUMENT, "no HealthCheckRequest can be read") from None

    def on_part(self, size: int) -> None:
        pass

    def on_too_long(self) -> None:
        pass

    def service(self) -> str:
        if self._service is None:
            raise GrpcError(Status.INVALID_ARGUMENT, "a health check is one message")
        return self._service

    def on_gone(self) -> None:
        pass


class HealthCheck(_Asked):
    """One call of Check."""

    def on_end(self) -> None:
        status = self._health.status(self.service())
        if status is _UNKNOWN:
            raise GrpcError(Status.NOT_FOUND, "no such service")
        self._call.send(status)
        self._call.end()


class HealthWatch(_Asked):
    """One call of Watch, which hears of every change."""

    def __init__(self, health: Health, call: Call) -> None:
        super().__init__(health, call)
        self._told = b""

    def on_end(self) -> None:
        self._health.follow(self, self.service())

    def tell(self, status: bytes) -> None:
        if status != self._told:
            self._told = status
            self._call.send(status)

    def end(self) -> None:
        self._health.forget(self)
        self._call.end(Status.UNAVAILABLE, "the picker is shutting down")

    def on_gone(self) -> None:
        self._health.forget(self)
