"""OpenTelemetry traces of requests: one span each, with children for its queue, prefill and decode legs.

Spans are created after the work that they describe, from two clock readings each. A request that is not sampled never
gets here: its own trace context, if it has a valid one, goes on to the workers.
"""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, Any

import eldr
from eldr.router.config.settings import ConfigError
from eldr.router.http.message import Request
from eldr.router.http.trace_context import is_sampled, trace_context, trace_lines

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter


class Tracing:
    """Samples requests and sends their spans to a collector, from a thread of its own.

    endpoint: the address of an OTLP collector over HTTP, such as http://collector:4318/v1/traces.
    ratio: the share sampled among requests without a trace context. A request with one is sampled as it says.
    exporter: replaces the exporter to `endpoint`.
    Raises ConfigError if eldr[otel] is not installed.
    """

    def __init__(self, endpoint: str, ratio: float, exporter: SpanExporter | None = None) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.sdk.trace.sampling import ALWAYS_ON
        except ModuleNotFoundError as error:
            raise ConfigError(f"otel_endpoint needs the package {error.name}; install eldr[otel]") from None
        self._ratio = ratio
        resource = Resource.create({"service.name": "eldr", "service.version": eldr.__version__})
        self._provider = TracerProvider(resource=resource, sampler=ALWAYS_ON, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter(endpoint)))
        self._tracer = self._provider.get_tracer("eldr.router", eldr.__version__)

    def begin(self, request: Request, request_id: str, model: object) -> RequestTrace | None:
        """Return the trace of a request, or None if it is not sampled."""
        parent, state = trace_context(request)
        if random.random() >= self._ratio if parent is None else not is_sampled(parent):
            return None
        return RequestTrace(self._tracer, request, request_id, model, parent, state)

    def close(self) -> None:
        """Send what is left. This takes seconds if the collector does not answer."""
        self._provider.shutdown()


class RequestTrace:
    """The trace of one sampled request.

    headers: the header lines that make the workers' spans children of this one.
    """

    def __init__(
        self, tracer: Any, request: Request, request_id: str, model: object, parent: bytes | None, state: bytes | None
    ) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._trace = trace
        self._tracer = tracer
        self._unix_offset_ns = time.time_ns() - time.monotonic_ns()
        carrier = {} if parent is None else {"traceparent": parent.decode()}
        if state is not None:
            carrier["tracestate"] = state.decode()
        attributes = {
            "http.request.method": request.method.decode(),
            "url.path": request.path.decode(),
            "eldr.request_id": request_id,
        }
        if isinstance(model, str):
            attributes["gen_ai.request.model"] = model
        self._span = tracer.start_span(
            f"{request.method.decode()} {request.path.decode()}",
            TraceContextTextMapPropagator().extract(carrier),
            kind=trace.SpanKind.SERVER,
            attributes=attributes,
            start_time=self._unix_ns(request.received_s),
        )
        self._inside = trace.set_span_in_context(self._span)
        own = self._span.get_span_context()
        line = f"00-{trace.format_trace_id(own.trace_id)}-{trace.format_span_id(own.span_id)}-01"
        self.headers = trace_lines(line.encode(), state)

    def leg(self, name: str, began_s: float, worker: str | None = None, error: BaseException | None = None) -> None:
        """Add a part of the request that ends now, with `error` if it failed."""
        span = self._tracer.start_span(
            name,
            self._inside,
            kind=self._trace.SpanKind.INTERNAL if worker is None else self._trace.SpanKind.CLIENT,
            attributes={} if worker is None else {"server.address": worker},
            start_time=self._unix_ns(began_s),
        )
        if error is not None:
            # Only the type, because a worker's message may contain a part of a prompt.
            span.set_status(self._trace.StatusCode.ERROR, type(error).__name__)
        span.end()

    def end(self, notes: dict[str, Any]) -> None:
        """End the trace when the request is answered. notes: what the log line says too."""
        status = notes.get("status")
        self._span.set_attributes(
            {f"eldr.{key}": notes[key] for key in ("prefill", "decode", "reason", "passthrough") if key in notes}
        )
        if isinstance(status, int):
            self._span.set_attribute("http.response.status_code", status)
        if not isinstance(status, int) or status >= 500:
            self._span.set_status(self._trace.StatusCode.ERROR, str(status))
        self._span.end()

    def _unix_ns(self, monotonic_s: float) -> int:
        return int(monotonic_s * 1e9) + self._unix_offset_ns
