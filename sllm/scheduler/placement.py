"""Where a replica is started: of the nodes with free devices that hold the checkpoint, on the one where it is expected
to be ready first (paper §5.1); where that is the same, where nothing has to be read, then on the one with the fewest
replicas, then by name.

A guess is no reason to prefer a node: where one of the candidates cannot be told from measurements yet, a rule decides
(docs/decisions/0014-estimated-startup-time.md): warm nodes first, then those that hold the checkpoint in DRAM.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import NamedTuple, overload

from sllm.core.decision import Candidate, WaitsOn
from sllm.core.device import Device, DeviceKind, DeviceState
from sllm.core.ids import DeviceId, NodeName
from sllm.core.index import NO_NODES, Index, NodeEntry
from sllm.core.node import NodeState
from sllm.core.priority import Priority
from sllm.core.residency import Tier
from sllm.core.snapshot import DeploymentView, NodeView
from sllm.core.startup import Estimate
from sllm.scheduler.estimate import Start, Starts, in_words
from sllm.scheduler.loading import Turn
from sllm.scheduler.room import Room

REFUSALS_TOLD = 4
TOLD = 16  # candidates
# Of more nodes that hold a checkpoint and have free devices, so many are looked at: those where it is in memory first,
# then those that read nothing else, each with the fewest replicas first.
LOOKED_AT = 32
ALIKE = 8  # that have it in memory, and differ in the number of their replicas only
# What differs by less than estimates are wrong by is no difference: replicas spread over nodes that are alike.
NEAR = 0.05
NEAR_S = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """`candidates` are the best and those that come next, by name, of so many `holders` of the checkpoint."""

    node: NodeName
    devices: tuple[DeviceId, ...]
    tier: Tier
    estimate: Estimate
    candidates: Sequence[Candidate]
    holders: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """Nothing can be started now."""

    on: WaitsOn
    text: str
    candidates: Sequence[Candidate]
    holders: int


class _Option(NamedTuple):
    """A node where a replica can be started now. `avoided`: the last start there failed."""

    entry: NodeEntry
    devices: tuple[Device, ...]
    turn: Turn
    total_s: float
    guessed: bool
    replicas: int
    avoided: bool

    @property
    def name(self) -> NodeName:
        return self.entry.name

    @property
    def reads(self) -> bool:
        """True if the checkpoint must come from the disk."""
        return self.turn.size_bytes > 0


def place(
    room: Room,
    view: DeploymentView,
    *,
    only: NodeName | None = None,
    priority: Priority = Priority.REQUEST,
    told: int = TOLD,
) -> Placement | Waiting:
    """Say where a replica of the deployment would be started, within the room left by what is planned already.

    `only`: the one node that is asked about; `priority`: that of its load; `told`: how many candidates are told of.
    """
    deployment, index = view.current.deployment, room.index
    holders = index.holders(deployment.digest)
    if only is not None:
        holders &= _bit(index, only)
    open_nodes = holders & room.open(deployment.spec.devices)
    search = _Search(room, view, priority)
    fit = search.options(_looked_at(index, deployment.digest, open_nodes, _avoided(index, view)))
    if not fit and open_nodes.bit_count() > LOOKED_AT:
        fit = search.options(index.those(open_nodes))  # devices of many nodes are too small
    if not fit:
        return _waiting(room, view, holders, told)
    best = _best(fit, deployment.digest)
    return Placement(
        node=best.name,
        devices=tuple([device.id for device in best.devices]),
        tier=best.entry.tier_of(deployment.digest) or Tier.SSD,
        estimate=search.estimate(best),
        candidates=Told(search, fit, best, (room.without(()), view, holders), told),
        holders=holders.bit_count(),
    )


class _Search:
    """Options for one start."""

    def __init__(self, room: Room, view: DeploymentView, priority: Priority) -> None:
        self._room = room
        self._priority = priority
        self._digest = view.current.deployment.digest
        self._wanted = view.current.deployment.spec.devices
        self._device_bytes = device_bytes(view)
        self._avoided = view.failures.nodes if view.failures is not None else frozenset()
        self._starts: dict[DeviceKind, Starts] = {}

    def options(self, entries: Iterable[NodeEntry]) -> list[_Option]:
        return [option for entry in entries if (option := self._option(entry)) is not None]

    def _option(self, entry: NodeEntry) -> _Option | None:
        room, needed = self._room, self._device_bytes
        usable = tuple([device for device in room.free_of(entry) if device.memory_bytes >= needed])
        if entry.view is None or len(usable) < self._wanted:
            return None
        devices = usable[: self._wanted]
        turn = room.queues.turn_at(entry, self._digest, self._priority)
        total_s, guessed = self._of(devices[0].kind).total_s(
            entry.name, warm=entry.view.report.warm, size_bytes=turn.size_bytes, ahead_bytes=turn.ahead_bytes
        )
        avoided = entry.name in self._avoided
        return _Option(entry, devices, turn, total_s, guessed, room.count_of(entry), avoided)

    def estimate(self, option: _Option) -> Estimate:
        kind, turn, view = option.devices[0].kind, option.turn, option.entry.view
        start = Start(
            node=option.name,
            warm=view is not None and view.report.warm,
            kind=kind,
            digest=self._digest,
            tier=Tier.SSD if turn.size_bytes else Tier.DRAM,
            size_bytes=turn.size_bytes,
            ahead_bytes=turn.ahead_bytes,
        )
        return self._of(kind).estimate(start)

    def _of(self, kind: DeviceKind) -> Starts:
        starts = self._starts.get(kind)
        if starts is None:
            starts = self._starts[kind] = Starts(self._room.learnt, self._digest, kind)
        return starts


def _looked_at(index: Index, digest: str, nodes: int, avoided: int) -> Iterable[NodeEntry]:
    if nodes.bit_count() <= LOOKED_AT:
        return index.those(nodes)
    good = nodes & ~avoided or nodes
    there = good & index.warm & index.in_memory.get(digest, NO_NODES)
    if there:
        return _fewest_first(index, (there,), ALIKE)
    return _fewest_first(index, (good & index.warm & ~index.starting, good & index.warm, good), LOOKED_AT)


def _fewest_first(index: Index, sets: Sequence[int], most: int) -> list[NodeEntry]:
    """So many nodes of the sets, of the first first, and of each those with the fewest replicas."""
    found: list[NodeEntry] = []
    for nodes in sets:
        for alike in index.with_replicas:
            found += islice(index.those(nodes & alike), most - len(found))
            nodes &= ~alike
            if len(found) >= most:
                return found
    return found


def _bit(index: Index, node: NodeName) -> int:
    entry = index.entries.get(node)
    return 1 << entry.slot if entry is not None else NO_NODES


def _avoided(index: Index, view: DeploymentView) -> int:
    nodes = NO_NODES
    for node in view.failures.nodes if view.failures is not None else ():
        nodes |= _bit(index, node)
    return nodes


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
    return Starts(room.learnt, digest, kind).estimate(start)


def avoided(node: NodeView, view: DeploymentView) -> bool:
    """True if the last start there failed."""
    return view.failures is not None and node.report.name in view.failures.nodes


def usable(room: Room, node: NodeView, view: DeploymentView) -> list[Device]:
    """Free devices that are large enough."""
    return [device for device in room.free(node) if device.memory_bytes >= device_bytes(view)]


def _best(options: Sequence[_Option], digest: str) -> _Option:
    pool = [option for option in options if not option.avoided] or options
    if any(option.guessed for option in pool):
        return min(pool, key=lambda option: _rule(option, digest))
    limit = near(min([option.total_s for option in pool]))
    close = [option for option in pool if option.total_s <= limit]
    # The disk is left to those that need it.
    return min(close, key=lambda option: (option.reads, option.replicas, option.name))


def _rule(option: _Option, digest: str) -> tuple[bool, int, int, str]:
    view, tier = option.entry.view, option.entry.tier_of(digest) or Tier.SSD
    return (view is None or not view.report.warm, -tier, option.replicas, option.name)


def near(seconds: float) -> float:
    """What is no more than this is as good as `seconds`."""
    return seconds * (1 + NEAR) + NEAR_S


class Told(Sequence[Candidate]):
    """The candidates that are told of, by name, worded when somebody looks at them: a plan is made far more often."""

    def __init__(
        self,
        search: _Search,
        fit: Sequence[_Option],
        best: _Option,
        rest: tuple[Room, DeploymentView, int],
        most: int,
    ) -> None:
        """`rest`: what those are told from that were not fit; nothing changes that room any more."""
        self._search = search
        self._fit = fit
        self._best = best
        self._rest = rest
        self._most = most
        self._made: tuple[Candidate, ...] | None = None

    @overload
    def __getitem__(self, which: int) -> Candidate: ...
    @overload
    def __getitem__(self, which: slice) -> Sequence[Candidate]: ...
    def __getitem__(self, which: int | slice) -> Candidate | Sequence[Candidate]:
        return self._all()[which]

    def __len__(self) -> int:
        return len(self._all())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self._all() == tuple(other)

    def __hash__(self) -> int:
        return hash(self._all())

    def _all(self) -> tuple[Candidate, ...]:
        if self._made is None:
            soonest = sorted(self._fit, key=lambda option: (option is not self._best, option.total_s, option.name))
            told = [self._candidate(option) for option in soonest[: self._most]]
            self._made = _by_name([*told, *_refused(*self._rest, self._most - len(told))])
        return self._made

    def _candidate(self, option: _Option) -> Candidate:
        estimate, best = self._search.estimate(option), self._best
        refused = "" if option is best else _why_not(option, best, estimate)
        return Candidate(node=option.name, refused=refused, estimate=estimate)


def _why_not(option: _Option, best: _Option, estimate: Estimate) -> str:
    if option.avoided and not best.avoided:
        return "the last start there failed"
    if option.guessed or best.guessed:
        return f"{best.name} is preferred"
    words = in_words(estimate)
    if option.total_s > near(best.total_s):
        return words
    if option.reads > best.reads:
        advantage = "has it in memory"
    else:
        advantage = "has fewer replicas" if option.replicas > best.replicas else "comes first by name"
    return f"{words}; {best.name} is as fast, and {advantage}"


def refusals(candidates: Sequence[Candidate], holders: int = 0) -> str:
    """Why nodes were not taken, in one line: of many nodes, the first. `holders`: how many there were in all."""
    lost = [candidate for candidate in candidates if candidate.refused]
    more = len(lost) + max(0, holders - len(candidates)) - REFUSALS_TOLD
    texts = [f"{candidate.node}: {candidate.refused}" for candidate in lost[:REFUSALS_TOLD]]
    if more > 0:
        texts.append(f"and {more} more")
    return "; ".join(texts)


def device_bytes(view: DeploymentView) -> int:
    """Bytes of weights that each device of a replica takes."""
    return -(-view.current.size_bytes // view.current.deployment.spec.devices)


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


def _refused(room: Room, view: DeploymentView, nodes: int, most: int) -> list[Candidate]:
    """So many of the nodes where nothing can be started now; ready ones first."""
    ready = room.index.ready
    entries = chain(room.index.those(nodes & ready), room.index.those(nodes & ~ready))
    found = (_refusal(room, entry.view, view) for entry in entries if entry.view is not None)
    return list(islice((refused for refused in found if refused is not None), max(0, most)))


def _waiting(room: Room, view: DeploymentView, holders: int, told: int) -> Waiting:
    ready = holders & room.index.ready
    refused = _refused(room, view, holders, told)
    reasons = {candidate.waits_on for candidate in refused}
    if WaitsOn.DEVICES not in reasons and ready.bit_count() > told:
        reasons = {candidate.waits_on for candidate in _refused(room, view, ready, ready.bit_count())}
    if WaitsOn.DEVICES in reasons:
        on, text = WaitsOn.DEVICES, "waiting for a free device"
    elif WaitsOn.MEMORY in reasons:
        on, text = WaitsOn.MEMORY, f"waiting for devices with {device_bytes(view)} bytes of memory"
    else:
        checkpoint = view.current.deployment.spec.checkpoint
        on, text = WaitsOn.NODES, f"waiting for a ready node that holds checkpoint {checkpoint!r}"
    return Waiting(on=on, text=text, candidates=_by_name(refused), holders=holders.bit_count())


def _by_name(candidates: Iterable[Candidate]) -> tuple[Candidate, ...]:
    return tuple(sorted(candidates, key=lambda candidate: candidate.node))
