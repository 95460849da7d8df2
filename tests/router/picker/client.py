"""A gateway's side of external processing, over grpcio: an HTTP/2 stack and a gRPC that nobody here wrote."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio

from eldr.router.config.picker import PickerConfig
from eldr.router.picker.messages_pb2 import (
    HeaderMap,
    HeaderValue,
    HealthCheckRequest,
    HealthCheckResponse,
    HttpBody,
    HttpHeaders,
    HttpTrailers,
    ProcessingMode,
    ProcessingRequest,
    ProcessingResponse,
    ProtocolConfiguration,
)
from tests.router.harness import Setup, running

PROCESS = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"
HEALTH = "/grpc.health.v1.Health/"
DESTINATION = "x-gateway-destination-endpoint"
DUPLEX, BUFFERED, NONE = ProcessingMode.FULL_DUPLEX_STREAMED, ProcessingMode.BUFFERED, ProcessingMode.NONE
STREAMED = ProcessingMode.STREAMED
ASK: dict[str, Any] = {"model": "tiny", "prompt": "hello", "max_tokens": 4}


def header_map(fields: dict[str, str]) -> HeaderMap:
    return HeaderMap(headers=[HeaderValue(key=name, raw_value=value.encode()) for name, value in fields.items()])


class Exchange:
    """One call of Process. seen: what the picker has sent."""

    def __init__(self, gateway: Caller) -> None:
        self.call = gateway.channel.stream_stream(
            PROCESS,
            request_serializer=ProcessingRequest.SerializeToString,
            response_deserializer=ProcessingResponse.FromString,
        )()
        self.seen: list[ProcessingResponse] = []

    async def send(self, message: ProcessingRequest) -> None:
        await self.call.write(message)

    async def headers(
        self,
        path: str = "/v1/completions",
        mode: ProcessingMode.BodySendMode = DUPLEX,
        response_mode: ProcessingMode.BodySendMode = NONE,
        subset: Sequence[str] | str | None = None,
        end: bool = False,
        method: str = "POST",
        **fields: str,
    ) -> None:
        """The headers of a request. fields: more of them, with _ for -."""
        given = {":method": method, ":path": path, ":authority": "x", "content-type": "application/json"}
        given |= {name.replace("_", "-"): value for name, value in fields.items()}
        message = ProcessingRequest(
            request_headers=HttpHeaders(headers=header_map(given), end_of_stream=end),
            protocol_config=ProtocolConfiguration(request_body_mode=mode, response_body_mode=response_mode),
        )
        if subset is not None:
            value = message.metadata_context.filter_metadata["envoy.lb.subset_hint"].fields[DESTINATION + "-subset"]
            if isinstance(subset, str):
                value.string_value = subset
            else:
                value.list_value.extend(list(subset))
        await self.send(message)

    async def body(self, body: bytes, end: bool = True) -> None:
        await self.send(ProcessingRequest(request_body=HttpBody(body=body, end_of_stream=end)))

    async def request_trailers(self) -> None:
        await self.send(ProcessingRequest(request_trailers=HttpTrailers()))

    async def answer(self, status: int = 200, end: bool = False, served: str = "", **fields: str) -> None:
        """The headers of the worker's answer, and the picker's answer to them. fields: more of them, with _ for -."""
        given = {":status": str(status)} | {name.replace("_", "-"): value for name, value in fields.items()}
        headers = HttpHeaders(headers=header_map(given), end_of_stream=end)
        message = ProcessingRequest(response_headers=headers)
        if served:
            namespace = message.metadata_context.filter_metadata["envoy.lb"]
            namespace.fields[DESTINATION + "-served"].string_value = served
        await self.send(message)
        assert (await self.next()).WhichOneof("response") == "response_headers"

    async def response_body(self, body: bytes, end: bool) -> None:
        await self.send(ProcessingRequest(response_body=HttpBody(body=body, end_of_stream=end)))

    async def trailers(self) -> None:
        """The end of the worker's answer."""
        await self.send(ProcessingRequest(response_trailers=HttpTrailers()))
        assert (await self.next()).WhichOneof("response") == "response_trailers"

    async def next(self) -> ProcessingResponse:
        async with asyncio.timeout(20):
            message = await self.call.read()
        assert isinstance(message, ProcessingResponse), f"the call ended: {await self.call.code()}"
        self.seen.append(message)
        return message

    async def end(self) -> grpc.StatusCode:
        """Send nothing more, and return how the picker ends the call."""
        await self.call.done_writing()
        return await self.status()

    async def status(self) -> grpc.StatusCode:
        async with asyncio.timeout(20):
            with contextlib.suppress(grpc.aio.AioRpcError):
                while await self.call.read() is not grpc.aio.EOF:
                    pass
            return await self.call.code()

    def cancel(self) -> None:
        self.call.cancel()


class Picked:
    """What a gateway learned: where the request goes, with which headers and which body. status: of a refusal."""

    def __init__(self) -> None:
        self.endpoints: list[str] = []
        self.headers: dict[str, str] = {}
        self.removed: list[str] = []
        self.body: bytes | None = None
        self.status = 0
        self.metadata = ""
        self.override: ProcessingMode | None = None

    @property
    def error(self) -> dict[str, Any]:
        return json.loads(self.body or b"{}")["error"]

    def take(self, message: ProcessingResponse) -> None:
        kind = message.WhichOneof("response")
        if kind == "immediate_response":
            self.status = message.immediate_response.status.code
            self.body = message.immediate_response.body
            mutation = message.immediate_response.headers
        else:
            common = getattr(message, kind).response
            mutation = common.header_mutation
            if common.body_mutation.HasField("body"):
                self.body = common.body_mutation.body
        for option in mutation.set_headers:
            self.headers[option.header.key] = option.header.raw_value.decode()
        self.removed += mutation.remove_headers
        if message.HasField("mode_override"):
            self.override = message.mode_override
        fields = message.dynamic_metadata.fields
        if "envoy.lb" in fields:
            self.metadata = fields["envoy.lb"].struct_value.fields[DESTINATION].string_value
        self.endpoints = self.headers.get(DESTINATION, "").split(",")


class Caller:
    """What a gateway does. channel: to the picker."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel

    def exchange(self) -> Exchange:
        return Exchange(self)

    async def ask(
        self, body: object = ASK, exchange: Exchange | None = None, **headers: Any
    ) -> tuple[Exchange, Picked]:
        """Ask where a request goes, with a body in one piece that is streamed."""
        exchange, picked = exchange or self.exchange(), Picked()
        await exchange.headers(**headers)
        await exchange.body(body if isinstance(body, bytes) else json.dumps(body).encode())
        picked.take(await exchange.next())
        if not picked.status:
            picked.body = await self.streamed(exchange)
        return exchange, picked

    async def streamed(self, exchange: Exchange) -> bytes:
        """The body of a request that the picker sends back."""
        body = b""
        while True:
            streamed = (await exchange.next()).request_body.response.body_mutation.streamed_response
            body += streamed.body
            if streamed.end_of_stream:
                return body

    async def check(self, service: str) -> HealthCheckResponse.ServingStatus:
        call = self.channel.unary_unary(
            HEALTH + "Check",
            request_serializer=HealthCheckRequest.SerializeToString,
            response_deserializer=HealthCheckResponse.FromString,
        )
        return (await call(HealthCheckRequest(service=service), timeout=20)).status

    def watch(self, service: str) -> Any:
        call = self.channel.unary_stream(
            HEALTH + "Watch",
            request_serializer=HealthCheckRequest.SerializeToString,
            response_deserializer=HealthCheckResponse.FromString,
        )
        return call(HealthCheckRequest(service=service), timeout=20)


class Gateway(Caller):
    """The same, of a picker in this process. setup: the picker and its workers."""

    def __init__(self, setup: Setup, channel: grpc.aio.Channel) -> None:
        super().__init__(channel)
        self.setup = setup


def endpoint(worker: Any) -> str:
    """How a gateway names a fake worker."""
    return worker.url.removeprefix("http://")


@asynccontextmanager
async def picking(
    prefill: int = 0,
    decode: int = 0,
    aggregated: int = 0,
    prepare: Callable[[Setup], None] | None = None,
    **settings: Any,
) -> AsyncIterator[Gateway]:
    """A picker with fake workers, and a gateway that asks it."""
    settings = {"grpc_listen": "127.0.0.1:0", **settings}
    async with running(prefill, decode, aggregated=aggregated, kind=PickerConfig, prepare=prepare, **settings) as setup:
        address = f"127.0.0.1:{setup.router.grpc_port}"
        async with grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            yield Gateway(setup, channel)
