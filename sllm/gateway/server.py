"""The HTTP server: uvicorn in our event loop, on our socket, without its signal handlers."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn

from sllm.errors import Conflict

_BACKLOG = 2048
_KEEP_ALIVE_S = 75
_TICK_S = 1.0


def listen(address: str) -> socket.socket:
    """Return a listening socket for `HOST:PORT` (port 0: any). Raises Conflict if it is taken."""
    host, _, port = address.rpartition(":")
    with contextlib.ExitStack() as undo:
        try:
            family, kind, protocol, _, place = socket.getaddrinfo(
                host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            sock = undo.enter_context(socket.socket(family, kind, protocol))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(place)
            sock.listen(_BACKLOG)
        except OSError as error:
            raise Conflict(
                f"cannot listen on {address}: {error.strerror}", hint="choose another port; 0 picks a free one"
            ) from error
        undo.pop_all()
        return sock


def address_of(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class _Uvicorn(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = asyncio.Event()
        self._stop = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are handled by whoever runs this process; what they mean is not uvicorn's to say."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.up.set()

    async def main_loop(self) -> None:
        """Wait for the end without looking ten times a second whether it has come."""
        while not await self.on_tick(0):  # renews the date header
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), _TICK_S)

    def stop(self) -> None:
        self.should_exit = True
        self._stop.set()


class HttpServer:
    """Serves an ASGI application until stopped. `cancel_after_s`: requests still open then are cancelled."""

    def __init__(self, app: Any, sock: socket.socket, *, cancel_after_s: int) -> None:
        config = uvicorn.Config(
            app,
            http="auto",  # httptools where it is installed
            loop="none",
            lifespan="off",
            ws="none",
            access_log=False,
            log_config=None,
            log_level="critical",  # the application logs what matters; unfinished bodies are meant
            server_header=False,
            backlog=_BACKLOG,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=cancel_after_s,
        )
        self._sock = sock
        self._server = _Uvicorn(config)

    async def run(self) -> None:
        """Serve until `stop`, and until the requests that were open then are over."""
        await self._server.serve(sockets=[self._sock])

    async def up(self) -> None:
        """Return when it serves."""
        await self._server.up.wait()

    def stop(self) -> None:
        """Close the listening socket and idle connections; busy ones close when their answer is over."""
        self._server.stop()
