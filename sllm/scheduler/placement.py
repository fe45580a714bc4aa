"""Where a replica is started: of the nodes with free devices that hold the checkpoint, on the one where it is expected
to be ready first (paper §5.1); where that is the same, where nothing has to be read, then on the one with the fewest
replicas, then by name.

A guess is no reason to prefer a node: where one of the candidates cannot be told from measurements yet, a rule decides
(docs/decisions/0014-estimated-startup-time.md): warm nodes first, then those that hold the checkpoint in DRAM.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sllm.core.decision import Candidate, WaitsOn
from sllm.core.device import Device, DeviceKind, DeviceState
from sllm.core.ids import DeviceId, NodeName
from sllm.core.node import NodeState
from sllm.core.priority import Priority
from sllm.core.residency import Tier
from sllm.core.snapshot import DeploymentView, NodeView
from sllm.core.startup import Estimate
from sllm.scheduler.estimate import Start, estimate, in_words
from sllm.scheduler.room import Room

REFUSALS_TOLD = 4
# What differs by less than estimates are wrong by is no difference: replicas spread over nodes that are alike.
NEAR = 0.05
NEAR_S = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    node: NodeName
    devices: tuple[DeviceId, ...]
    tier: Tier
    estimate: Estimate
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """Nothing can be started now."""

    on: WaitsOn
    text: str
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Option:
    """A node where a replica can be started now. `avoided`: the last start there failed."""

    node: NodeView
    devices: tuple[Device, ...]
    estimate: Estimate
    count: int
    avoided: bool

    @property
    def name(self) -> NodeName:
        return self.node.report.name

    @property
    def reads(self) -> bool:
        """True if the checkpoint must come from the disk."""
        return self.estimate.size_bytes > 0


def place(
    room: Room, view: DeploymentView, *, only: NodeName | None = None, priority: Priority = Priority.REQUEST
) -> Placement | Waiting:
    """Say where a replica of the deployment would be started, within the room left by what is planned already.

    `only`: the one node that is asked about; `priority`: that of its load.
    """
    digest = view.current.deployment.digest
    holders = [node for node in room.holders(digest) if only in (None, node.report.name)]
    refused = {node.report.name: why for node in holders if (why := _refusal(room, node, view))}
    fit = [_option(room, node, view, priority) for node in holders if node.report.name not in refused]
    if not fit:
        return _waiting(view, _candidates(refused.values()))
    best = _best(fit, digest)
    return Placement(
        node=best.name,
        devices=tuple(device.id for device in best.devices),
        tier=best.node.tier_of(digest) or Tier.SSD,
        estimate=best.estimate,
        candidates=_candidates([*(_candidate(option, best) for option in fit), *refused.values()]),
    )


def _option(room: Room, node: NodeView, view: DeploymentView, priority: Priority) -> _Option:
    devices = tuple(usable(room, node, view)[: view.current.deployment.spec.devices])
    return _Option(
        node=node,
        devices=devices,
        estimate=startup(room, node, view, devices[0].kind, priority),
        count=room.count(node.report.name),
        avoided=avoided(node, view),
    )


def startup(
    room: Room, node: NodeView, view: DeploymentView, kind: DeviceKind, priority: Priority, *, behind_bytes: int = 0
) -> Estimate:
    """What a start on devices of this kind there is expected to take, whether any is free or not. `behind_bytes` are
    read first besides what the room knows of."""
    digest = view.current.deployment.digest
    turn = room.queues.turn(node, digest, priority)
    start = Start(
        node=node.report.name,
        warm=node.report.warm,
        kind=kind,
        digest=digest,
        tier=Tier.SSD if turn.size_bytes else Tier.DRAM,
        size_bytes=turn.size_bytes,
        ahead_bytes=turn.ahead_bytes + behind_bytes,
    )
    return estimate(room.learnt, start)


def avoided(node: NodeView, view: DeploymentView) -> bool:
    """True if the last start there failed."""
    return view.failures is not None and node.report.name in view.failures.nodes


def _best(options: Sequence[_Option], digest: str) -> _Option:
    pool = [option for option in options if not option.avoided] or options
    if any(option.estimate.guessed for option in pool):
        return min(pool, key=lambda option: _rule(option, digest))
    limit = near(min(option.estimate.total_s for option in pool))
    close = [option for option in pool if option.estimate.total_s <= limit]
    # The disk is left to those that need it.
    return min(close, key=lambda option: (option.reads, option.count, option.name))


def _rule(option: _Option, digest: str) -> tuple[bool, int, int, str]:
    return (not option.node.report.warm, -(option.node.tier_of(digest) or Tier.SSD), option.count, option.name)


def near(seconds: float) -> float:
    """What is no more than this is as good as `seconds`."""
    return seconds * (1 + NEAR) + NEAR_S


def _candidate(option: _Option, best: _Option) -> Candidate:
    refused = "" if option is best else _why_not(option, best)
    return Candidate(node=option.name, refused=refused, estimate=option.estimate)


def _why_not(option: _Option, best: _Option) -> str:
    if option.avoided and not best.avoided:
        return "the last start there failed"
    if option.estimate.guessed or best.estimate.guessed:
        return f"{best.name} is preferred"
    words = in_words(option.estimate)
    if option.estimate.total_s > near(best.estimate.total_s):
        return words
    if option.reads > best.reads:
        advantage = "has it in memory"
    else:
        advantage = "has fewer replicas" if option.count > best.count else "comes first by name"
    return f"{words}; {best.name} is as fast, and {advantage}"


def refusals(candidates: Sequence[Candidate]) -> str:
    """Why nodes were not taken, in one line: of many nodes, the first."""
    lost = [candidate for candidate in candidates if candidate.refused]
    texts = [f"{candidate.node}: {candidate.refused}" for candidate in lost[:REFUSALS_TOLD]]
    if len(lost) > REFUSALS_TOLD:
        texts.append(f"and {len(lost) - REFUSALS_TOLD} more")
    return "; ".join(texts)


def device_bytes(view: DeploymentView) -> int:
    """Bytes of weights that each device of a replica takes."""
    return -(-view.current.size_bytes // view.current.deployment.spec.devices)


def usable(room: Room, node: NodeView, view: DeploymentView) -> list[Device]:
    """Free devices that are large enough."""
    return [device for device in room.free(node) if device.memory_bytes >= device_bytes(view)]


def _refusal(room: Room, node: NodeView, view: DeploymentView) -> Candidate | None:
    """Why the node cannot be taken now, if so."""
    name = node.report.name
    if node.state is not NodeState.READY:
        return Candidate(node=name, refused=f"it is {node.state.value}", waits_on=WaitsOn.NODES)
    wanted, needed = view.current.deployment.spec.devices, device_bytes(view)
    fit, free = len(usable(room, node, view)), len(room.free(node))
    if fit >= wanted:
        return None
    sizes = [device.memory_bytes for device in node.report.devices if device.state is not DeviceState.LOST]
    large = sum(size >= needed for size in sizes)
    if large < min(wanted, len(sizes)):
        text = f"{large} of {wanted} devices have the {needed} bytes that are needed, the largest has {max(sizes)}"
        return Candidate(node=name, refused=text, waits_on=WaitsOn.MEMORY)
    too_small = f", and {free - fit} with less than the {needed} bytes that are needed" if free > fit else ""
    closed = f", {len(node.cordon.devices)} cordoned" if node.cordon.devices else ""
    text = f"{fit} of {wanted} devices are free{too_small}{closed}"
    return Candidate(node=name, refused=text, waits_on=WaitsOn.DEVICES)


def _waiting(view: DeploymentView, candidates: tuple[Candidate, ...]) -> Waiting:
    reasons = {candidate.waits_on for candidate in candidates}
    if WaitsOn.DEVICES in reasons:
        return Waiting(on=WaitsOn.DEVICES, text="waiting for a free device", candidates=candidates)
    if WaitsOn.MEMORY in reasons:
        text = f"waiting for devices with {device_bytes(view)} bytes of memory"
        return Waiting(on=WaitsOn.MEMORY, text=text, candidates=candidates)
    checkpoint = view.current.deployment.spec.checkpoint
    text = f"waiting for a ready node that holds checkpoint {checkpoint!r}"
    return Waiting(on=WaitsOn.NODES, text=text, candidates=candidates)


def _candidates(candidates: Iterable[Candidate]) -> tuple[Candidate, ...]:
    return tuple(sorted(candidates, key=lambda candidate: candidate.node))
