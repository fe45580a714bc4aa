"""All replicas of a node: which there are, what devices they have, and the engine hosts found again at a start."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Sequence

from sllm.agent.hosts import EngineHost
from sllm.agent.launching import Launcher
from sllm.agent.layouts import Layouts
from sllm.agent.leases import Leases
from sllm.agent.replica import Replica
from sllm.agent.warm.host import ForkedHost
from sllm.agent.weights import Weights
from sllm.core.checkpoint import Checkpoint
from sllm.core.device import Device
from sllm.core.ids import ReplicaId
from sllm.core.launch import LaunchRecord
from sllm.core.priority import Priority
from sllm.core.replica import ReplicaSpec, ReplicaState, ReplicaStatus
from sllm.errors import CapacityExceeded, Conflict, InvalidArgument, NotFound, SllmError, StaleGeneration, Unavailable
from sllm.loader.store import SsdStore

log = logging.getLogger(__name__)

ADOPT_S = 5.0  # a host that does not answer for so long is no use to anyone


class Replicas:
    """`devices` gives the node's devices as they were last seen; `on_change` is called whenever what the node has to
    report of its replicas changed."""

    def __init__(
        self,
        launcher: Launcher,
        weights: Weights,
        store: SsdStore,
        devices: Callable[[], tuple[Device, ...]],
        on_change: Callable[[], None],
    ) -> None:
        self.leases = Leases()
        self._launcher = launcher
        self._weights = weights
        self._store = store
        self._layouts = Layouts(store, weights, launcher.warm)
        self._devices = devices
        self._on_change = on_change
        self._replicas: dict[ReplicaId, Replica] = {}
        self._closing = False

    def statuses(self) -> tuple[ReplicaStatus, ...]:
        return tuple(replica.status for replica in self._replicas.values())

    def using(self, digest: str) -> tuple[ReplicaId, ...]:
        """Return the replicas that need a checkpoint."""
        living = (replica.spec for replica in self._replicas.values() if not replica.over)
        return tuple(spec.id for spec in living if spec.digest == digest)

    def start(self, spec: ReplicaSpec, priority: Priority = Priority.REQUEST) -> None:
        """Lease the devices and begin; the same command again is no error, and raises the `priority` if that is better.

        Raises Conflict, StaleGeneration, NotFound, CapacityExceeded, Unavailable.
        """
        if self._closing:
            raise Unavailable("the agent is stopping", hint="try again when it is back")
        if spec.id in self._replicas:
            _check_repeated(self._replicas[spec.id].spec, spec)
            self._replicas[spec.id].raise_to(priority)
            return
        entry = self._store.with_digest(spec.digest)
        devices = self.leases.take(spec.id, spec.devices, self._devices())
        try:
            _check_room(entry.checkpoint, devices)
        except CapacityExceeded:
            self.leases.release(spec.id)
            raise
        self._new(spec, devices, priority).start(entry)
        self._on_change()

    async def prefetch(self, spec: ReplicaSpec, instead_of: Sequence[str]) -> None:
        """Have in memory what a replica like this would read; of `instead_of`, what no replica needs goes for it.

        Raises NotFound, InvalidCheckpoint; InvalidArgument if its devices are not there.
        """
        entry = self._store.with_digest(spec.digest)
        known = {device.id: device for device in self._devices()}
        devices = [known[device] for device in spec.devices if device in known]
        if not devices or len(devices) < len(spec.devices):
            raise InvalidArgument(f"this node does not have the devices {', '.join(spec.devices)}")
        layout = await self._layouts.readable(entry, spec, devices)
        unused = [digest for digest in instead_of if digest != spec.digest and not self.using(digest)]
        log.info("%s is read ahead of requests", entry.checkpoint.name)
        self._weights.prefetch(layout, instead_of=unused)

    def host(self, id: ReplicaId, generation: int) -> EngineHost:  # noqa: A002 - it is one
        """Return the engine host of a replica. Raises NotFound, StaleGeneration; Unavailable if it has none."""
        replica = self._replicas.get(id)
        if replica is None:
            raise NotFound(f"there is no replica {id} on this node")
        if generation != replica.spec.generation:
            raise StaleGeneration(f"{id} has generation {replica.spec.generation}, the command {generation}")
        if replica.host is None:
            raise Unavailable(f"{id} is {replica.status.state}: it has no engine host")
        return replica.host

    def stop(self, id: ReplicaId, generation: int, drain_s: float) -> None:  # noqa: A002 - it is one
        """Stop a replica; one that is not there is no error. Raises StaleGeneration."""
        replica = self._replicas.get(id)
        if replica is None:
            return
        if generation < replica.spec.generation:
            raise StaleGeneration(f"{id} has generation {replica.spec.generation}, the command {generation}")
        replica.stop(drain_s)
        if replica.over:  # it had failed; this was what it waited for
            self._forget(replica)

    async def adopt(self) -> None:
        """Take back the engine hosts of an agent before this one; end those that cannot be."""
        for record in self._launcher.records.read_all():
            if not self._adopt(record):
                self._launcher.records.remove(record.replica)
        if not self._replicas:
            self._launcher.records.clear()
        await asyncio.to_thread(self._launcher.scratch.keep_only, tuple(self._replicas))
        waiting = [asyncio.create_task(replica.reported.wait()) for replica in self._replicas.values()]
        if waiting:
            _, silent = await asyncio.wait(waiting, timeout=ADOPT_S)
            for task in silent:
                task.cancel()
        for replica in tuple(self._replicas.values()):
            if not replica.reported.is_set():
                log.error("engine host of %s does not answer, it is ended", replica.spec.id)
                self.stop(replica.spec.id, replica.spec.generation, 0.0)

    async def end_strays(self) -> None:
        """For ever: end hosts that appear with a record nobody waits for (their agent died as they were forked)."""
        records = self._launcher.records
        while True:
            seen = records.changes.revision
            for record in records.read_all():
                known = self._replicas.get(record.replica)
                if known is None or known.nonce != record.nonce:
                    log.warning("ending stray engine host %d of %s", record.pid, record.replica)
                    _end(record)
                    records.remove(record.replica)
            await records.changes.wait_beyond(seen)

    async def stop_all(self) -> None:
        """Stop every replica at once, and return when all their processes are gone."""
        self._closing = True
        replicas = tuple(self._replicas.values())
        for replica in replicas:
            replica.stop(0.0)
        await asyncio.gather(*(replica.ended() for replica in replicas))

    async def detach_all(self) -> None:
        """Leave every engine host running."""
        self._closing = True
        await asyncio.gather(*(replica.detach() for replica in tuple(self._replicas.values())))

    def _new(self, spec: ReplicaSpec, devices: tuple[Device, ...], priority: Priority) -> Replica:
        replica = Replica(
            spec,
            devices,
            self._launcher,
            self._weights,
            self._layouts,
            priority=priority,
            on_change=self._on_change,
            gone=self._on_gone,
        )
        self._replicas[spec.id] = replica
        return replica

    def _adopt(self, record: LaunchRecord) -> bool:
        process = ForkedHost.open(record.pid, record.start_ticks)
        if process is None:
            return False
        try:
            devices = self.leases.take(record.replica, record.spec.devices, self._devices())
        except SllmError as error:
            log.error("engine host %d of %s is ended: %s", record.pid, record.replica, error)
            process.signal(signal.SIGKILL)
            return False
        log.info("engine host %d of %s is found again", record.pid, record.replica)
        host = self._launcher.reach(record, process)
        # What it was started for is not known. If a request waits, that is said again.
        self._new(record.spec, devices, Priority.PREWARM).adopt(host, record)
        return True

    def _on_gone(self, replica: Replica) -> None:
        self.leases.release(replica.spec.id)
        self._launcher.records.remove(replica.spec.id)
        self._launcher.scratch.remove(replica.spec.id)
        if replica.status.state is not ReplicaState.FAILED:
            self._forget(replica)
        self._on_change()

    def _forget(self, replica: Replica) -> None:
        self._replicas.pop(replica.spec.id, None)
        self._on_change()


def _check_repeated(known: ReplicaSpec, wanted: ReplicaSpec) -> None:
    if wanted.generation < known.generation:
        raise StaleGeneration(f"{known.id} has generation {known.generation}, the command {wanted.generation}")
    if wanted != known:
        raise Conflict(f"replica {known.id} is there already, with another specification")


def _check_room(checkpoint: Checkpoint, devices: tuple[Device, ...]) -> None:
    memory_bytes = sum(device.memory_bytes for device in devices)
    if checkpoint.size_bytes > memory_bytes:
        raise CapacityExceeded(
            f"checkpoint {checkpoint.name!r} has {checkpoint.size_bytes} bytes, its devices have {memory_bytes}",
            hint="use more devices, or devices with more memory",
        )


def _end(record: LaunchRecord) -> None:
    process = ForkedHost.open(record.pid, record.start_ticks)
    if process is not None:
        process.signal(signal.SIGKILL)
