"""The controller's process: opens the store, serves agents, gateways and operators, drains, stops."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from sllm import lifecycle
from sllm.config import ControllerConfig
from sllm.controller.clock import Clock
from sllm.controller.executor import Executor
from sllm.controller.inbox import Inbox
from sllm.controller.node_service import ControllerNodes
from sllm.controller.recording import Recorder
from sllm.controller.route_service import ControllerRoutes
from sllm.controller.router import Router
from sllm.controller.service import ControllerControl
from sllm.controller.store.base import StateStore
from sllm.controller.store.sqlite import SqliteStore
from sllm.controller.world import World, next_epoch
from sllm.controller.writer import Writer
from sllm.core.snapshot import Policy
from sllm.log import LogTail
from sllm.rpc import control, nodes, routes
from sllm.rpc.identity import load_tls
from sllm.rpc.transport import Tls, serve

log = logging.getLogger(__name__)

STOP_GRACE_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A controller that serves. `writing` ends only if something is wrong that a restart may mend."""

    address: str
    world: World
    inbox: Inbox
    writing: asyncio.Task[None]


async def run(config: ControllerConfig, tail: LogTail) -> None:
    """Serve until a signal. Raises InvalidConfiguration, Conflict (state in use, port taken)."""
    del tail  # the controller's log is read where it runs
    stop = lifecycle.stop_on_signals()
    tls = load_tls(config.tls)
    store = await SqliteStore.open(config.state_dir / "store")
    try:
        async with running(config, store, Clock(), tls) as controller:
            log.info("controller listens on %s", controller.address)
            lifecycle.notify(READY="1", X_ADDRESS=controller.address)
            await _until_stopped(stop, controller.writing)
    finally:
        await store.close()


@asynccontextmanager
async def running(config: ControllerConfig, store: StateStore, clock: Clock, tls: Tls | None) -> AsyncIterator[Running]:
    """A controller over a store: all of it but the process. Used by `run` and by tests."""
    with Recorder(config.record) as recorder:
        async with _running(config, store, clock, tls, recorder) as controller:
            yield controller


@asynccontextmanager
async def _running(
    config: ControllerConfig, store: StateStore, clock: Clock, tls: Tls | None, recorder: Recorder
) -> AsyncIterator[Running]:
    inbox = Inbox()
    executor = Executor(tls=tls, epoch=await next_epoch(store), post=inbox.post)
    world = World(
        store=store,
        clock=clock,
        policy=_policy(config),
        router=Router(per_deployment=config.queue_per_deployment, per_gateway=config.queue_per_gateway),
        epoch=executor.epoch,
        executor=executor,
        recorder=recorder,
    )
    await world.restore()
    services = [
        control.handlers(ControllerControl(world, inbox)),
        nodes.handlers(ControllerNodes(inbox, tls)),
        routes.handlers(ControllerRoutes(world, inbox)),
    ]
    server, port = await serve(list(services), config.listen, tls)
    writing = asyncio.create_task(Writer(world, inbox).run())
    try:
        host = config.listen.rpartition(":")[0]
        yield Running(address=f"{host}:{port}", world=world, inbox=inbox, writing=writing)
    finally:
        writing.cancel()
        await asyncio.wait([writing])
        await server.stop(STOP_GRACE_S)
        await executor.close()


async def _until_stopped(stop: asyncio.Event, writing: asyncio.Task[None]) -> None:
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait([stopping, writing], return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if writing.done():
        writing.result()  # raises what ended it


def _policy(config: ControllerConfig) -> Policy:
    return Policy(
        heartbeat_s=config.heartbeat_s,
        suspect_s=config.heartbeat_s * config.suspect_after,
        dead_s=max(config.node_lease_s, config.heartbeat_s * config.suspect_after),
        drain_s=config.drain_s,
        start_backoff_s=config.start_backoff_s,
        displace=config.displace,
        max_start_failures=config.max_start_failures,
        stable_after_s=config.stable_after_s,
        min_loaded_s=config.min_loaded_s,
        swap_hold_s=config.swap_hold_s,
        prefetch=config.residency.prefetch,
        max_copies=config.residency.max_copies,
    )
