"""Channels and servers: options, TLS, and the two generic halves (client, handlers) of every service.

The keepalive options were measured: a stopped peer's kernel still acknowledges, so only `ping_timeout_ms` notices
it, and a server with default options drops a client that pings. They are set on both sides.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar

import grpc
from google.protobuf.message import Message

from sllm.errors import Conflict, SllmError
from sllm.rpc.convert import from_proto, pack
from sllm.rpc.errors import from_rpc_error, status_of, trailer_of

log = logging.getLogger(__name__)

Req = TypeVar("Req")
Resp = TypeVar("Resp")

# Certificates name a role, not a host: nodes have no stable DNS names. Whom we talk to is checked by this name and
# by the cluster's own CA.
TLS_SERVER_NAME = "sllm.internal"
MAX_MESSAGE_BYTES = 16 << 20

_KEEPALIVE: list[tuple[str, Any]] = [
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.http2.ping_timeout_ms", 3_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
]
_SERVER_ONLY: list[tuple[str, Any]] = [
    ("grpc.http2.min_ping_interval_without_data_ms", 4_000),
    # Without this, two servers may listen on one port and each gets half of the calls.
    ("grpc.so_reuseport", 0),
]
_CLIENT_ONLY: list[tuple[str, Any]] = [
    ("grpc.ssl_target_name_override", TLS_SERVER_NAME),
    ("grpc.initial_reconnect_backoff_ms", 100),
    # How long one attempt may take, in spite of its name. A peer that computes on all cores is slow to answer.
    ("grpc.min_reconnect_backoff_ms", 5_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """This process' certificate and key, and the CA that peers must be signed by; all PEM."""

    ca: bytes
    certificate: bytes
    key: bytes

    def __repr__(self) -> str:
        return "Tls(…)"  # a key must never reach a log


@dataclass(frozen=True, slots=True)
class Method(Generic[Req, Resp]):
    """One RPC: its wire name, its attribute name on client and implementation, and its types on both sides."""

    name: str
    request: type[Req]
    request_message: type[Message]
    response: type[Resp]
    response_message: type[Message]
    kind: Literal["unary", "stream"] = "unary"
    deadline_s: float | None = 10.0

    @property
    def attribute(self) -> str:
        return "".join("_" + c.lower() if c.isupper() else c for c in self.name).lstrip("_")


def dial(address: str, tls: Tls | None) -> grpc.aio.Channel:
    """Open a channel to `HOST:PORT`; it connects, and reconnects, by itself."""
    options = _KEEPALIVE + _CLIENT_ONLY
    if tls is None:
        return grpc.aio.insecure_channel(address, options=options)
    credentials = grpc.ssl_channel_credentials(tls.ca, tls.key, tls.certificate)
    return grpc.aio.secure_channel(address, credentials, options=options)


class Service(Protocol):
    """What `serve` needs: a full service name and its handlers."""

    @property
    def name(self) -> str: ...

    @property
    def handlers(self) -> dict[str, grpc.RpcMethodHandler]: ...


async def serve(services: list[Service], address: str, tls: Tls | None) -> tuple[grpc.aio.Server, int]:
    """Start a server at `HOST:PORT` (port 0: any) and return it with its port. Raises Conflict if it is taken."""
    server = grpc.aio.server(options=_KEEPALIVE + _SERVER_ONLY)
    for service in services:
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.name, service.handlers),))
    port = _bind(server, address, tls)
    await server.start()
    return server, port


def _bind(server: grpc.aio.Server, address: str, tls: Tls | None) -> int:
    try:
        if tls is None:
            return int(server.add_insecure_port(address))
        credentials = grpc.ssl_server_credentials(
            [(tls.key, tls.certificate)], root_certificates=tls.ca, require_client_auth=True
        )
        return int(server.add_secure_port(address, credentials))
    except RuntimeError as error:
        raise Conflict(
            f"cannot listen on {address}: the port is taken or the address is not of this machine",
            hint="choose another port; 0 picks a free one",
        ) from error


class Handlers:
    """The server half: wraps an implementation whose methods take and return dataclasses."""

    def __init__(self, name: str, methods: tuple[Method[Any, Any], ...], implementation: object) -> None:
        self.name = name
        self.handlers = {m.name: _handler(m, getattr(implementation, m.attribute)) for m in methods}


def _handler(method: Method[Any, Any], function: Callable[..., Any]) -> grpc.RpcMethodHandler:
    def parse(data: bytes) -> Any:
        return method.request_message.FromString(data)

    if method.kind == "unary":
        return grpc.unary_unary_rpc_method_handler(_unary(method, function), parse)
    return grpc.unary_stream_rpc_method_handler(_stream(method, function), parse)


def _unary(
    method: Method[Any, Any], function: Callable[[Any], Awaitable[Any]]
) -> Callable[[Message, grpc.aio.ServicerContext], Awaitable[bytes | None]]:
    async def call(message: Message, context: grpc.aio.ServicerContext) -> bytes | None:
        try:
            return pack(await function(from_proto(message, method.request)), method.response_message)
        except Exception as error:
            await abort(context, error, method.name)
            return None  # not reached: abort raises

    return call


def _stream(
    method: Method[Any, Any], function: Callable[[Any], AsyncIterator[Any]]
) -> Callable[[Message, grpc.aio.ServicerContext], AsyncIterator[bytes]]:
    async def call(message: Message, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        try:
            async for item in function(from_proto(message, method.request)):
                yield pack(item, method.response_message)
        except Exception as error:
            await abort(context, error, method.name)

    return call


async def abort(context: grpc.aio.ServicerContext, error: Exception, what: str) -> None:
    """End a call with the status of `error`. What is not ours is logged here and told to the peer without its text."""
    if not isinstance(error, SllmError):
        if isinstance(error, grpc.aio.AbortError):
            raise error
        log.error("%s failed", what, exc_info=error)
        error = SllmError(f"{what} failed with an internal error", hint="see the log of the process that served it")
    await context.abort(status_of(error), error.message, trailer_of(error))


class Client:
    """The client half. `peer` is how errors name the other side. Closing it closes its channel."""

    service: str

    def __init__(self, address: str, tls: Tls | None, *, peer: str) -> None:
        self.address = address
        self.peer = f"{peer} at {address}"
        self._channel = dial(address, tls)

    async def close(self) -> None:
        await self._channel.close()

    async def _unary(self, method: Method[Req, Resp], request: Req, *, timeout_s: float | None = None) -> Resp:
        data = pack(request, method.request_message)
        call = self._channel.unary_unary(
            f"/{self.service}/{method.name}", response_deserializer=method.response_message.FromString
        )
        try:
            message = await call(data, timeout=timeout_s or method.deadline_s)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, self.peer) from error
        return from_proto(message, method.response)

    async def _stream(
        self, method: Method[Req, Resp], request: Req, *, timeout_s: float | None = None
    ) -> AsyncGenerator[Resp, None]:
        data = pack(request, method.request_message)
        open_call = self._channel.unary_stream(
            f"/{self.service}/{method.name}", response_deserializer=method.response_message.FromString
        )
        call = open_call(data, timeout=timeout_s)
        try:
            async for message in call:
                yield from_proto(message, method.response)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, self.peer) from error
        except asyncio.CancelledError:
            call.cancel()
            raise
        finally:
            call.cancel()  # a consumer that leaves early must not leave the call open
