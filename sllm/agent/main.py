"""The agent process: start everything, serve, stop in order."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Coroutine
from typing import Any

from sllm import lifecycle
from sllm.agent.changes import Changes
from sllm.agent.children import Children
from sllm.agent.devices import open_devices
from sllm.agent.folders import Folders, lock, prepare
from sllm.agent.heartbeat import Heartbeat
from sllm.agent.node import LocalNode, pool_bytes
from sllm.agent.service import Agent
from sllm.agent.store.process import StoreOptions, StoreProcess, present_bytes
from sllm.agent.warm.process import WarmProcess, command
from sllm.config import AgentConfig
from sllm.linux import become_subreaper
from sllm.log import LogTail
from sllm.rpc import agents, transport
from sllm.rpc.identity import load_tls
from sllm.rpc.nodes import NodeClient
from sllm.rpc.transport import Tls

log = logging.getLogger(__name__)

_GOODBYE_S = 1.0  # for calls under way when the server stops


async def run(config: AgentConfig, tail: LogTail) -> None:
    """Serve until SIGTERM or SIGINT. Raises Conflict if another living agent has this node's name or state."""
    stop = lifecycle.stop_on_signals()
    tls = load_tls(config.tls)
    folders = prepare(config.state_dir)
    claim = lock(config.state_dir.absolute())
    try:
        become_subreaper()
        node = await _open(config, tls, folders)
        try:
            agent = Agent(
                checkpoints=node.checkpoints,
                replicas=node.replicas,
                store=node.store,
                weights=node.weights,
                tail=tail,
                log_folder=folders.log,
            )
            await _serve(node, tls, agent, stop)
        finally:
            await node.close(stop_hosts=config.engine.stop_with_agent)
    finally:
        os.close(claim)


async def _open(config: AgentConfig, tls: Tls | None, folders: Folders) -> LocalNode:
    """Put the node together. The warm process and the store process are spawned by tasks that begin here; gRPC's
    threads may be there by then, which is why nothing of ours runs between their fork and exec (see `tether`)."""
    changes, children = Changes(), Children()
    children.watch()
    options = _store_options(config)
    # What the pool has filled already, if the agent before this one left it, is not free anyhow.
    reserved_bytes = max(0, options.size_bytes - await present_bytes(folders.run))
    devices = open_devices(config.devices, reserved_bytes=reserved_bytes)
    store_process = StoreProcess(options, folders.run, folders.log / "store.log", folders.scratch / "shared", children)
    warm = WarmProcess(
        lambda fd: command(config.engine.kind, fd),
        folders.log / "warm.log",
        folders.scratch / "shared",
        children,
        changes.notify,
    )
    return LocalNode(config, tls, folders, store_process=store_process, devices=devices, warm=warm, changes=changes)


def _store_options(config: AgentConfig) -> StoreOptions:
    store = config.store
    return StoreOptions(
        size_bytes=pool_bytes(store),
        any_size=store.dram_bytes == 0,
        hugepages=store.hugepages == "auto",
        prefault=store.prefault,
        lock=store.lock,
        threads=store.read_threads,
        grace_s=config.engine.grace_s,
    )


async def _serve(node: LocalNode, tls: Tls | None, agent: Agent, stop: asyncio.Event) -> None:
    config = node.config
    await node.replicas.adopt()  # before anybody can ask for their devices
    server, port = await transport.serve([agents.handlers(agent)], config.listen, tls)
    address = config.advertise or f"{config.listen.rpartition(':')[0]}:{port}"
    controller = NodeClient(config.controller, tls, peer="the controller")
    heartbeat = Heartbeat(controller, node.changes, lambda: node.report(address), agent.learn_epoch, node.survey.look)
    measuring = asyncio.create_task(node.measure_disk())
    try:
        lifecycle.notify(READY="1", X_ADDRESS=address)
        log.info("agent %s serves at %s", config.name, address)
        await _until(stop, heartbeat.run(), node.replicas.end_strays())
    finally:
        log.info("agent %s stops", config.name)
        lifecycle.notify(STOPPING="1")
        measuring.cancel()
        await server.stop(_GOODBYE_S)
        await controller.close()


async def _until(stop: asyncio.Event, *work: Coroutine[Any, Any, None]) -> None:
    """Do endless work until `stop` is set. Raises what any of it raises."""
    stopped = asyncio.create_task(stop.wait())
    tasks = [asyncio.create_task(each) for each in work]
    try:
        done, _ = await asyncio.wait({stopped, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in (stopped, *tasks):
            task.cancel()
        await asyncio.wait({stopped, *tasks})
