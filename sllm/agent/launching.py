"""From a grant of weights to an engine host that listens."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sllm.agent.hosts import EngineHost
from sllm.agent.layouts import Chosen
from sllm.agent.logs import prune, tail_lines
from sllm.agent.records import Records
from sllm.agent.scratch import Scratch
from sllm.agent.store.client import Granted
from sllm.agent.warm.base import HostFds, HostProcess, Warm
from sllm.config import AgentConfig
from sllm.core.device import Device, DeviceKind
from sllm.core.grant import Grant
from sllm.core.ids import ReplicaId
from sllm.core.launch import Launch, LaunchRecord
from sllm.core.replica import ReplicaSpec
from sllm.errors import EngineFailed
from sllm.rpc.engine import EngineClient
from sllm.rpc.transport import Tls

_LOG_LINES_IN_ERROR = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Launcher:
    """What all starts on a node have in common."""

    config: AgentConfig
    tls: Tls | None
    warm: Warm
    records: Records
    scratch: Scratch
    log_folder: Path

    def log_path(self, replica: ReplicaId) -> Path:
        return self.log_folder / f"{replica}.log"

    async def launch(
        self, spec: ReplicaSpec, nonce: str, devices: Sequence[Device], chosen: Chosen, granted: Granted
    ) -> EngineHost:
        """Fork an engine host and return it once it listens; if this is called off it is ended. Raises EngineFailed."""
        launch = self._launch(spec, nonce, devices, chosen, granted.grant)
        prune(self.log_folder)
        log_fd = os.open(self.log_path(spec.id), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            fds = HostFds(lease=granted.lease_fd, feed=granted.feed_fd, log=log_fd)
            process = await self.warm.fork(launch, fds)
        finally:
            os.close(log_fd)
        try:
            record = await self._listening(spec.id, nonce, process)
        except BaseException:
            process.signal(signal.SIGKILL)
            await process.ended()
            raise
        return self.reach(record, process)

    def reach(self, record: LaunchRecord, process: HostProcess) -> EngineHost:
        """Return the host of a record."""
        client = EngineClient(record.address, self.tls, peer=f"engine host of {record.replica}")
        return EngineHost(process, client, record.nonce)

    def died(self, replica: ReplicaId, how: str) -> EngineFailed:
        """Return the error for a host that ended unasked, with the last of what it said."""
        lines = [line.strip() for line in tail_lines(self.log_path(replica), _LOG_LINES_IN_ERROR)]
        last = " | ".join(line for line in lines if line)
        return EngineFailed(f"engine died: {how}" + (f"; its last words: {last}" if last else ""))

    async def _listening(self, replica: ReplicaId, nonce: str, process: HostProcess) -> LaunchRecord:
        record = asyncio.create_task(self.records.wait_for(replica, nonce))
        ended = asyncio.create_task(process.ended())
        try:
            await asyncio.wait({record, ended}, return_when=asyncio.FIRST_COMPLETED)
            if record.done():
                return record.result()
            raise self.died(replica, ended.result())
        finally:
            record.cancel()
            ended.cancel()

    def _launch(self, spec: ReplicaSpec, nonce: str, devices: Sequence[Device], chosen: Chosen, grant: Grant) -> Launch:
        engine, tls, kind = self.config.engine, self.config.tls, devices[0].kind
        return Launch(
            spec=spec,
            nonce=nonce,
            grant=grant,
            weights_dir=str(chosen.folder),
            execution_dir=str(chosen.execution_folder),
            save_runtime=chosen.save_to,
            record_path=str(self.records.path(spec.id)),
            scratch_dir=str(self.scratch.path(spec.id)),
            bind_host=engine.bind_host,
            device_kind=kind,
            device_ids=tuple(device.id for device in devices),
            threads=sum(device.threads for device in devices),
            # A GPU's memory is not the process' to be limited by.
            memory_bytes=sum(device.memory_bytes for device in devices) if kind is DeviceKind.CPU else 0,
            kv_cache_bytes=engine.kv_cache_bytes,
            grace_s=engine.grace_s,
            stall_s=engine.stall_s,
            tls_ca=str(tls.ca.absolute()) if tls else "",
            tls_certificate=str(tls.certificate.absolute()) if tls else "",
            tls_key=str(tls.key.absolute()) if tls else "",
        )
