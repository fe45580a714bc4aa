"""Node: a simulated GPU server with its agent. It does what it is told and reports; it decides nothing."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from random import Random
from typing import Protocol

from sllm.core.checkpoint import Checkpoint
from sllm.core.device import Device, DeviceKind, DeviceState
from sllm.core.ids import DeviceId, ReplicaId
from sllm.core.node import LoadReport, NodeReport
from sllm.core.priority import Priority
from sllm.core.replica import ReplicaSpec, ReplicaState, StartPhase
from sllm.core.residency import Residency, ResidencyState, Tier, TierUsage
from sllm.sim.events import EventQueue
from sllm.sim.loading import Load, LoadingQueue
from sllm.sim.noise import factor
from sllm.sim.pool import Copy, Pool
from sllm.sim.replica import Replica
from sllm.sim.request import Request
from sllm.sim.spec import ModelSpec, NodeSpec

_KEPT_LOADS = 32
_SERVING = (ReplicaState.READY, ReplicaState.DRAINING)


class Outside(Protocol):
    """Who hears of what happens on a node."""

    def changed(self, node: Node) -> None:
        """Its report is another one now."""

    def lost(self, requests: Sequence[Request]) -> None:
        """Their replica has been ended under them."""


class Told:
    """Parts of the last report: what has not changed is told again by the same value, which is quick to take in."""

    def __init__(self) -> None:
        self._leased: frozenset[DeviceId] | None = None
        self._held: tuple[object, ...] | None = None
        self._devices: tuple[Device, ...] = ()
        self._residencies: tuple[Residency, ...] = ()

    def devices(self, leased: frozenset[DeviceId], make: Callable[[], tuple[Device, ...]]) -> tuple[Device, ...]:
        if leased != self._leased:
            self._leased, self._devices = leased, make()
        return self._devices

    def residencies(self, held: tuple[object, ...], make: Callable[[], tuple[Residency, ...]]) -> tuple[Residency, ...]:
        if held != self._held:
            self._held, self._residencies = held, make()
        return self._residencies


class Node:
    def __init__(
        self,
        spec: NodeSpec,
        models: Sequence[ModelSpec],
        events: EventQueue,
        outside: Outside,
        *,
        rng: Random,
        load_cv: float,
    ) -> None:
        self.spec = spec
        self.up = True
        self.replicas: dict[ReplicaId, Replica] = {}
        self.copying = False  # a checkpoint is being written
        self.device_s = 0.0  # that devices have been leased, by replicas that are gone
        self._events = events
        self._outside = outside
        self._rng = rng
        self._load_cv = load_cv
        self._incarnation = 1
        self._revision = 0
        self._loads: deque[LoadReport] = deque(maxlen=_KEPT_LOADS)
        self._read = 0
        self._pool = Pool(spec.dram_bytes)
        self._queue = LoadingQueue(events, on_begun=self._begun, on_done=self._loaded)
        self._checkpoints = {model.checkpoint.digest: model.checkpoint for model in models}
        self._on_ssd = tuple(self._residency(digest, Tier.SSD) for digest in self._checkpoints)
        self._all_checkpoints = tuple(self._checkpoints.values())
        self._device_ids = tuple(map(self._device_id, range(spec.devices)))
        self._told = Told()
        for digest in spec.in_memory:
            self._keep(self._checkpoints[digest])
        self._prefetching: dict[str, Load] = {}

    # -- commands

    def start(self, spec: ReplicaSpec, model: ModelSpec, priority: Priority) -> None:
        """Lease the devices and begin to load. Raises ValueError if it could not be carried out."""
        leased = self._leased()
        known = set(self._device_ids)
        if spec.digest not in self._checkpoints or not known.issuperset(spec.devices) or leased & set(spec.devices):
            raise ValueError(f"{self.spec.name} cannot start {spec.deployment} on {', '.join(spec.devices)}")
        now = self._events.now
        replica = Replica(spec=spec, model=model, node=self.spec.name, priority=priority, began_at=now, phase_since=now)
        self.replicas[spec.id] = replica
        self._fetch(replica)
        self._outside.changed(self)

    def adopt(self, spec: ReplicaSpec, model: ModelSpec) -> None:
        """Have a replica that was ready before the simulation began."""
        replica = Replica(
            spec=spec,
            model=model,
            node=self.spec.name,
            priority=Priority.REQUEST,
            began_at=self._events.now,
            state=ReplicaState.READY,
            phase=StartPhase.READY,
            ready_at=-1.0,  # sooner than any request
        )
        self.replicas[spec.id] = replica
        if self.spec.device_kind is DeviceKind.CPU:
            self._pin(replica, self._pool.use(spec.digest, self._events.now))

    def prefetch(self, digest: str, instead_of: Sequence[str]) -> None:
        """Read a checkpoint into memory when nothing else is to be read, if it fits."""
        for other in instead_of:
            copy = self._pool.copies.get(other)
            if copy is not None and not copy.pins:
                self._pool.drop(copy)
        if digest in self._pool.copies or self._queue.of(digest) is not None:
            return
        load = self._new_load(self._checkpoints[digest], Priority.PREFETCH, self.spec.ssd_bandwidth_bps)
        if load.copy is not None:  # else nobody would take it out of the ring
            load.copy.pins += 1
            load.starts = 1
            self._prefetching[digest] = load
            self._queue.put(load)
            self._outside.changed(self)

    def copy(self, checkpoint: Checkpoint) -> None:
        """Put a copy of a checkpoint on SSD, beside everything else: it is written as fast as it could be read."""
        seconds = checkpoint.size_bytes / self.spec.ssd_bandwidth_bps * factor(self._rng, self._load_cv)
        self.copying = True
        self._events.at(self._events.now + seconds, self._copied, checkpoint, self._incarnation)

    def raise_priority(self, replica: ReplicaId, priority: Priority) -> None:
        found = self.replicas.get(replica)
        if found is None:
            return
        found.priority = min(found.priority, priority)
        if found.load is not None:
            self._queue.raise_to(found.load, priority)

    def drain(self, replica: ReplicaId, within_s: float) -> None:
        """End it when nothing runs on it any more, or when the time is over."""
        found = self.replicas.get(replica)
        if found is None or found.state is ReplicaState.STOPPING:
            return
        if not found.running:
            self.stop(replica)
        elif found.state is not ReplicaState.DRAINING:
            found.state = ReplicaState.DRAINING
            self._events.at(self._events.now + within_s, self.stop, replica)
            self._outside.changed(self)

    def stop(self, replica: ReplicaId) -> None:
        """End it; its requests lose it. Its devices are free when it has gone."""
        found = self.replicas.get(replica)
        if found is None or found.state is ReplicaState.STOPPING:
            return
        found.state = ReplicaState.STOPPING
        self._let_go(found)
        lost = list(found.running.values())
        found.running.clear()
        self._events.at(self._events.now + self.spec.release_s, self._released, found)
        self._outside.changed(self)
        self._outside.lost(lost)

    def ended(self, replica: Replica, request: Request) -> None:
        """A request on one of its replicas has ended."""
        del replica.running[request.number]
        if replica.state is ReplicaState.DRAINING and not replica.running:
            self.stop(replica.spec.id)

    # -- failing

    def fail(self) -> list[Replica]:
        """Be gone at once, with all that runs and all of memory; return the replicas that were there."""
        self.up = False
        gone = list(self.replicas.values())
        self.replicas.clear()
        self._queue.clear()
        self._prefetching.clear()
        self.copying = False
        for replica in gone:
            self._account(replica)
        self._pool = Pool(self.spec.dram_bytes)
        return gone

    def come_back(self) -> None:
        self.up = True
        self._incarnation += 1
        self._revision = 0
        self._loads.clear()
        self._outside.changed(self)

    def _keep(self, checkpoint: Checkpoint) -> None:
        """Have a copy in the pool, if there is room for it."""
        copy = self._pool.make(checkpoint.digest, checkpoint.size_bytes, self._events.now)
        if copy is not None:
            copy.ready, copy.reload_s = True, checkpoint.size_bytes / self.spec.ssd_bandwidth_bps

    # -- a start

    def _fetch(self, replica: Replica) -> None:
        """Bring the checkpoint to the devices: from memory, with a load that is under way, or by a new one."""
        now, digest = self._events.now, replica.spec.digest
        copy = self._pool.use(digest, now)
        load = self._queue.of(digest)
        if copy is not None and copy.ready:
            replica.tier = Tier.DRAM
            self._pin(replica, copy)
            size_bytes = copy.size_bytes / len(replica.spec.devices)
            replica.copy_s = size_bytes / self.spec.dram_bandwidth_bps * factor(self._rng, self._load_cv)
            self._granted(replica)
            return
        if load is None:
            # The slowest tier on the way says how fast it goes (paper §5.1): the others work at the same time.
            link_bps = self.spec.dram_bandwidth_bps * len(replica.spec.devices)
            bandwidth_bps = min(self.spec.ssd_bandwidth_bps, link_bps)
            load = self._new_load(replica.model.checkpoint, replica.priority, bandwidth_bps)
        self._pin(replica, load.copy)
        replica.load = load
        load.starts += 1
        if load.begun:
            self._granted(replica)
            self._queue.raise_to(load, replica.priority)
        elif load.starts == 1:
            self._queue.put(load)
        else:
            self._queue.raise_to(load, replica.priority)

    def _new_load(self, checkpoint: Checkpoint, priority: Priority, bandwidth_bps: float) -> Load:
        now, size_bytes = self._events.now, checkpoint.size_bytes
        return Load(
            digest=checkpoint.digest,
            size_bytes=size_bytes,
            priority=priority,
            copy=self._pool.make(checkpoint.digest, size_bytes, now),
            left_s=size_bytes / bandwidth_bps * factor(self._rng, self._load_cv),
            asked_at=now,
        )

    def _begun(self, load: Load) -> None:
        for replica in self._waiting_for(load):
            self._granted(replica)
        self._outside.changed(self)

    def _loaded(self, load: Load) -> None:
        now = self._events.now
        if load.copy is not None:
            load.copy.ready, load.copy.reload_s, load.copy.last_used = True, load.read_s, now
        if self._prefetching.pop(load.digest, None) is not None and load.copy is not None:
            load.copy.pins -= 1
        self._read += 1
        self._loads.append(
            LoadReport(
                number=self._read,
                digest=load.digest,
                size_bytes=load.size_bytes,
                tier=Tier.SSD,
                queue_s=now - load.asked_at - load.read_s,
                read_s=load.read_s,
            )
        )
        for replica in self._waiting_for(load):
            replica.load = None
            if replica.phase is StartPhase.LOADING:
                self._build(replica)
        self._outside.changed(self)

    def _copied(self, checkpoint: Checkpoint, incarnation: int) -> None:
        if not self.up or incarnation != self._incarnation:
            return  # its agent was gone meanwhile
        self.copying = False
        self._checkpoints[checkpoint.digest] = checkpoint
        self._on_ssd = (*self._on_ssd, self._residency(checkpoint.digest, Tier.SSD))
        self._all_checkpoints = tuple(self._checkpoints.values())
        self._outside.changed(self)

    def _granted(self, replica: Replica) -> None:
        """Its bytes are there, or on their way: an engine host is forked meanwhile."""
        replica.enter(StartPhase.FORKING, self._events.now)
        self._events.at(self._events.now + replica.model.timing.fork_s, self._forked, replica)

    def _forked(self, replica: Replica) -> None:
        if not self._starts(replica):
            return
        if replica.load is None:
            self._build(replica)
        else:
            replica.enter(StartPhase.LOADING, self._events.now)
        self._outside.changed(self)

    def _build(self, replica: Replica) -> None:
        now = self._events.now
        loaded_s = now - replica.phase_since if replica.phase is StartPhase.LOADING else 0.0
        replica.enter(StartPhase.BUILDING, now)
        self._events.at(now + replica.copy_s + replica.model.timing.left_s(loaded_s), self._ready, replica)

    def _starts(self, replica: Replica) -> bool:
        """True unless it was ended meanwhile, or its node was lost."""
        return replica.state is ReplicaState.STARTING and replica.spec.id in self.replicas

    def _ready(self, replica: Replica) -> None:
        if not self._starts(replica):
            return
        replica.enter(StartPhase.READY, self._events.now)
        replica.state, replica.ready_at = ReplicaState.READY, self._events.now
        if self.spec.device_kind is not DeviceKind.CPU:  # there the weights are the pool's own memory
            self._unpin(replica)
        self._outside.changed(self)

    def _waiting_for(self, load: Load) -> list[Replica]:
        return [replica for replica in self.replicas.values() if replica.load is load]

    # -- an end

    def _let_go(self, replica: Replica) -> None:
        """It needs nothing of the node any more but its devices."""
        load, replica.load = replica.load, None
        self._unpin(replica)
        if load is None:
            return
        load.starts -= 1
        if not load.starts:
            if load.copy is not None:
                self._pool.drop(load.copy)
            self._queue.remove(load)

    def _released(self, replica: Replica) -> None:
        if self.replicas.pop(replica.spec.id, None) is not None:
            self._account(replica)
            self._outside.changed(self)

    def _account(self, replica: Replica) -> None:
        self.device_s += (self._events.now - replica.began_at) * len(replica.spec.devices)

    def _pin(self, replica: Replica, copy: Copy | None) -> None:
        replica.copy = copy
        if copy is not None:
            copy.pins += 1

    def _unpin(self, replica: Replica) -> None:
        copy, replica.copy = replica.copy, None
        if copy is not None:
            copy.pins -= 1

    # -- telling

    def leased_s(self, now: float) -> float:
        """Device seconds that replicas have held devices, whether they served or not."""
        open_s = sum((now - replica.began_at) * len(replica.spec.devices) for replica in self.replicas.values())
        return self.device_s + open_s

    def report(self) -> NodeReport:
        """All of the node as it is now."""
        self._revision += 1
        return NodeReport(
            name=self.spec.name,
            incarnation=f"{self.spec.name}-{self._incarnation}",
            revision=self._revision,
            address=f"{self.spec.name}:7710",
            version="simulated",
            engine="simulated",
            warm=True,
            devices=self._told.devices(frozenset(self._leased()), self._devices),
            tiers=(
                TierUsage(
                    tier=Tier.SSD,
                    capacity_bytes=self.spec.ssd_bytes,
                    used_bytes=sum(checkpoint.size_bytes for checkpoint in self._checkpoints.values()),
                ),
                TierUsage(tier=Tier.DRAM, capacity_bytes=self._pool.capacity_bytes, used_bytes=self._pool.used_bytes),
            ),
            residencies=self._told.residencies(self._held(), self._residencies),
            checkpoints=self._all_checkpoints,
            replicas=tuple(replica.status() for replica in self.replicas.values()),
            loads=tuple(self._loads),
        )

    def _devices(self) -> tuple[Device, ...]:
        kind, size_bytes, leased = self.spec.device_kind, self.spec.device_memory_bytes, self._leased()
        return tuple(
            Device(
                id=name,
                kind=kind,
                state=DeviceState.LEASED if name in leased else DeviceState.FREE,
                memory_bytes=size_bytes,
            )
            for name in self._device_ids
        )

    def _held(self) -> tuple[object, ...]:
        """What residencies depend on."""
        in_memory = [(copy.digest, copy.ready) for copy in self._pool.copies.values()]
        return (len(self._on_ssd), *in_memory, *[(r.spec.digest, r.state in _SERVING) for r in self.replicas.values()])

    def _residencies(self) -> tuple[Residency, ...]:
        return (*self._on_ssd, *self._in_dram(), *self._serving())

    def _in_dram(self) -> list[Residency]:
        states = {True: ResidencyState.READY, False: ResidencyState.LOADING}
        return [self._residency(copy.digest, Tier.DRAM, states[copy.ready]) for copy in self._pool.copies.values()]

    def _serving(self) -> list[Residency]:
        return [self._residency(r.spec.digest, Tier.DEVICE) for r in self.replicas.values() if r.state in _SERVING]

    def _residency(self, digest: str, tier: Tier, state: ResidencyState = ResidencyState.READY) -> Residency:
        checkpoint = self._checkpoints[digest]
        return Residency(
            checkpoint=checkpoint.name, digest=digest, tier=tier, state=state, size_bytes=checkpoint.size_bytes
        )

    def _leased(self) -> set[DeviceId]:
        return {device for replica in self.replicas.values() for device in replica.spec.devices}

    def _device_id(self, number: int) -> DeviceId:
        return DeviceId(f"{self.spec.device_kind.value}-{number}")
