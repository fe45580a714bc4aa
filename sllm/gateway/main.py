"""The gateway process: puts its parts together, says when it serves, and ends without cutting answers short."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable

from sllm import lifecycle
from sllm.config import GatewayConfig
from sllm.errors import SllmError
from sllm.gateway.app import App
from sllm.gateway.connections import Connections
from sllm.gateway.dispatch import Dispatcher
from sllm.gateway.execution_files import ExecutionFiles, make_folder
from sllm.gateway.front_end import Builder
from sllm.gateway.frontends import FrontEnds
from sllm.gateway.hold import Hold
from sllm.gateway.keys import Keys
from sllm.gateway.load_report import report_load
from sllm.gateway.routes import Routes
from sllm.gateway.server import HttpServer, address_of, listen
from sllm.log import LogTail
from sllm.rpc.agents import AgentClient
from sllm.rpc.identity import load_tls
from sllm.rpc.routes import ReportLoadRequest, RouteClient
from sllm.rpc.transport import Tls

log = logging.getLogger(__name__)

DRAIN_S = 10.0
# What has not ended within the drain gets an error, and this much longer to send it before it is cut off.
_CANCEL_AFTER_S = int(DRAIN_S) + 3


def new_event_loop() -> asyncio.AbstractEventLoop:
    """Return the event loop to run the gateway in: uvloop's where it is installed, for it costs less per token."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


async def run(config: GatewayConfig, tail: LogTail) -> None:
    """Serve until SIGTERM or SIGINT. To be run in `new_event_loop()`."""
    del tail  # nobody asks a gateway for its log over the network
    stop = lifecycle.stop_on_signals()
    # Both before vLLM's long import: a taken port, or a folder that cannot be used, should be told at once.
    sock = listen(config.listen)
    make_folder(config.state_dir)
    os.environ.update(lifecycle.scratch_environment(config.state_dir.absolute() / "scratch"))
    from sllm.gateway import vllm_frontend  # not before vLLM's environment is needed

    vllm_frontend.prepare()
    await Gateway(config, load_tls(config.tls), vllm_frontend.VllmBuilder).serve(sock, stop)


class Gateway:
    """All parts of a gateway. `make_builder` makes what makes front ends."""

    def __init__(
        self, config: GatewayConfig, tls: Tls | None, make_builder: Callable[[ExecutionFiles, Dispatcher], Builder]
    ) -> None:
        self._config = config
        self._incarnation = os.urandom(8).hex()  # tells this process from others of its name
        self._controller = RouteClient(config.controller, tls, peer="the controller")
        self._routes = Routes(self._controller, config.name)
        self._connections = Connections(
            gateway=config.name, tls=tls, silence_s=config.silence_s, stall_s=config.stall_s
        )
        hold = Hold(self._controller, self._routes, gateway=config.name)
        self.dispatcher = Dispatcher(
            routes=self._routes,
            connections=self._connections,
            hold=hold,
            recover_timeout_s=config.recover_timeout_s,
        )
        files = ExecutionFiles(
            config.state_dir / "execution", lambda address: AgentClient(address, tls, peer="the agent")
        )
        self._front_ends = FrontEnds(self._routes, make_builder(files, self.dispatcher), limit=config.front_ends)
        self._routes.subscribe(lambda: files.prune(self._front_ends.digests()))
        self._keys = Keys.of(config)
        self._app = App(
            config, keys=self._keys, routes=self._routes, front_ends=self._front_ends, dispatcher=self.dispatcher
        )

    async def serve(self, sock: socket.socket, stop: asyncio.Event) -> None:
        """Serve on a listening socket until `stop` is set and what runs is over, `DRAIN_S` at most."""
        self._keys.warn()
        try:
            await self._run(HttpServer(self._app, sock, cancel_after_s=_CANCEL_AFTER_S), address_of(sock), stop)
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
        finally:
            await self._close()

    async def _run(self, server: HttpServer, address: str, stop: asyncio.Event) -> None:
        async with asyncio.TaskGroup() as tasks:
            watching = tasks.create_task(self._routes.run())
            reporting = tasks.create_task(
                report_load(
                    self._controller,
                    self.dispatcher.requests,
                    gateway=self._config.name,
                    incarnation=self._incarnation,
                )
            )
            serving = tasks.create_task(server.run())
            await server.up()
            lifecycle.notify(READY="1", X_ADDRESS=address)
            log.info("serving on %s", address)
            await stop.wait()
            log.info("stopping")
            server.stop()
            await self.dispatcher.drain(within_s=DRAIN_S)
            await serving
            watching.cancel()
            reporting.cancel()

    async def _close(self) -> None:
        with contextlib.suppress(SllmError):  # the controller may be gone already
            last = ReportLoadRequest(gateway=self._config.name, incarnation=self._incarnation)
            await self._controller.report_load(last)
        await self._front_ends.close()
        await self._connections.close()
        await self._controller.close()
