"""What nodes read into memory ahead of requests: the checkpoint whose next start would have to read it. Pure.

A node reads one at a time, at the lowest priority: every start goes first. What is evicted for it must be worth half as
much at most, so that two that are about as popular do not push each other out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from sllm.core.device import DeviceKind
from sllm.core.ids import DeviceId
from sllm.core.residency import Residency, ResidencyState, Tier
from sllm.core.snapshot import DeploymentView, NodeView, Snapshot
from sllm.scheduler.interest import Interest, by_worth, could_run, free_bytes, worth
from sllm.scheduler.loading import load_bytes
from sllm.scheduler.placement import Placement, device_bytes, place
from sllm.scheduler.residency_plan import Prefetch, Recent
from sllm.scheduler.room import Room

# Lately, faded: what was asked for once may never be asked for again.
LEAST_REQUESTS = 2.0
ADVANTAGE = 2.0


def prefetches(
    snapshot: Snapshot, interests: Mapping[str, Interest], recent: Recent, now: float
) -> tuple[Prefetch, ...]:
    """Return what is to be read ahead now, what is worth most first."""
    return _Prefetcher(snapshot, interests, recent, now).prefetches()


class _Prefetcher:
    def __init__(self, snapshot: Snapshot, interests: Mapping[str, Interest], recent: Recent, now: float) -> None:
        self._snapshot = snapshot
        self._interests = interests
        self._recent = recent
        self._now = now
        self._room = Room(snapshot)
        self._reading = {name for name, node in snapshot.nodes.items() if _is_reading(node)}

    def prefetches(self) -> tuple[Prefetch, ...]:
        found = []
        for interest in by_worth(self._interests.values()):
            if interest.requests < LEAST_REQUESTS or not self._may_start(interest.view):
                continue
            if prefetch := self._prefetch(interest):
                self._reading.add(prefetch.node)
                found.append(prefetch)
        return tuple(found)

    def _may_start(self, view: DeploymentView) -> bool:
        """True if a start of it may come, and none is under way or due that would read it anyway."""
        live = [replica for replica in self._room.index.of_deployment.get(view.name, ()) if replica.live]
        starting = any(replica.starting for replica in live)
        full = len(live) >= view.current.deployment.spec.max_replicas
        return not (starting or full or view.failures or view.name in self._snapshot.held)

    def _prefetch(self, interest: Interest) -> Prefetch | None:
        site = self._site(interest)
        if site is None:
            return None
        node, devices = site
        name, digest = node.report.name, interest.digest
        if name in self._reading or self._recent.prefetched(name, digest, self._now):
            return None
        instead_of = self._victims(node, interest)
        if instead_of is None:
            return None
        return Prefetch(
            deployment=interest.view.name,
            digest=digest,
            node=name,
            devices=devices,
            instead_of=instead_of,
            why=f"{interest.requests:.0f} requests lately, and its next start would read it from SSD",
        )

    def _site(self, interest: Interest) -> tuple[NodeView, tuple[DeviceId, ...]] | None:
        """Where its next start would have to read: the node that it would be made on now; or, while no device is free
        and no node has it in memory, the one with the most free memory. None: nowhere."""
        placement = place(self._room, interest.view)
        if isinstance(placement, Placement):
            node = self._snapshot.nodes[placement.node]
            return None if _in_dram(node, interest.digest) else (node, placement.devices)
        fit = [node for node in self._room.holders(interest.digest) if could_run(node, interest.view)]
        if not fit or any(_in_dram(node, interest.digest) for node in fit):
            return None
        node = max(fit, key=lambda n: (free_bytes(n, Tier.DRAM), n.report.name))
        large = [d.id for d in node.report.devices if d.memory_bytes >= device_bytes(interest.view)]
        return node, tuple(large[: interest.view.current.deployment.spec.devices])

    def _victims(self, node: NodeView, interest: Interest) -> tuple[str, ...] | None:
        """What gives its room, the least worthy per byte first; None: it does not fit, or is not worth it."""
        digest = interest.digest
        gain = worth(self._snapshot, node, interest, digest)
        needed_bytes = load_bytes(self._snapshot.learnt, node.report.name, digest, node.stored_bytes(digest))
        short = needed_bytes - free_bytes(node, Tier.DRAM)
        if not gain:
            return None
        chosen: list[str] = []
        lost = 0.0
        for value, residency in self._by_worth(node):
            if short <= 0:
                break
            chosen.append(residency.digest)
            lost += value
            short -= residency.size_bytes
        return tuple(chosen) if short <= 0 and gain >= ADVANTAGE * lost else None

    def _by_worth(self, node: NodeView) -> list[tuple[float, Residency]]:
        """What of a node's memory may go, with what it is worth."""
        used = self._in_use(node)
        held = [r for r in _dram(node) if r.state is ResidencyState.READY and r.digest not in used and r.size_bytes]
        valued = [(worth(self._snapshot, node, self._interests.get(r.digest), r.digest) or 0.0, r) for r in held]
        return sorted(valued, key=lambda entry: (entry[0] / entry[1].size_bytes, entry[1].digest))

    def _in_use(self, node: NodeView) -> set[str]:
        """What replicas need in memory: all that start; on a CPU the weights of those that serve are there too."""
        cpu = any(device.kind is DeviceKind.CPU for device in node.report.devices)
        there = self._room.index.entries[node.report.name].replicas
        return {replica.spec.digest for replica in there if cpu or replica.starting}


def _in_dram(node: NodeView, digest: str) -> bool:
    """True if it is there, or on its way."""
    return any(residency.digest == digest for residency in _dram(node))


def _is_reading(node: NodeView) -> bool:
    return any(residency.state is ResidencyState.LOADING for residency in _dram(node))


def _dram(node: NodeView) -> Iterable[Residency]:
    return (residency for residency in node.report.residencies if residency.tier is Tier.DRAM)
