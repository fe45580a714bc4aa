"""What moves where, and in which order: one request or one replica to a node, or all of a node away from it.

A request is in one order at most, and a source has one order at a time: what it does not hold waits for the next.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sllm.core.ids import NodeName, OperationId, ReplicaId, RequestId
from sllm.core.migration import Outlook, PlannedMove
from sllm.core.request import RequestRow
from sllm.core.snapshot import Intent, ReplicaView, Snapshot
from sllm.scheduler.destinations import Obstacle, Places, Refusal, Startable, at, elsewhere

ATTEMPTS = 3  # a failed migration is tried with two other destinations


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What runs, and what is on its way.

    `requests` are those that run, with their replicas; `moving` are in an order that is under way, to these targets;
    `busy` sources have an order, or rest after one that did not bring all away.
    """

    requests: Mapping[RequestId, RequestRow] = field(default_factory=dict)
    outlooks: Mapping[RequestId, Outlook] = field(default_factory=dict)
    moving: Mapping[RequestId, ReplicaId] = field(default_factory=dict)
    busy: frozenset[ReplicaId] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What somebody asked for: these `requests` to `node`, or (None) all that runs on `node` away from it, or of that
    only what runs on `replica`; for which `within_s` seconds are left. `tried` are the destinations at which a
    request's migration has failed."""

    operation: OperationId
    node: NodeName
    requests: tuple[RequestId, ...] | None = None
    replica: ReplicaId | None = None
    within_s: float = 0.0
    tried: Mapping[RequestId, tuple[ReplicaId, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """Requests that one source is to hand over to one target now."""

    source: ReplicaId
    target: ReplicaId
    requests: tuple[RequestId, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """For one wish: what becomes of each request, the first to move first, what is begun now, and what is in the way.

    One replica is started per answer to all wishes; when that is done, they are to be looked at again.
    """

    operation: OperationId
    moves: tuple[PlannedMove, ...] = ()
    orders: tuple[Order, ...] = ()
    start: Startable | None = None
    refusals: Mapping[RequestId, Refusal] = field(default_factory=dict)


def decide(snapshot: Snapshot, traffic: Traffic, wishes: Sequence[Wish]) -> tuple[Decision, ...]:
    """Answer each wish; who comes first has the first choice. The same values give the same answer."""
    mover = _Mover(snapshot, traffic, wishes)
    return tuple(mover.answer(wish) for wish in wishes)


class _Mover:
    def __init__(self, snapshot: Snapshot, traffic: Traffic, wishes: Sequence[Wish]) -> None:
        self._snapshot = snapshot
        self._traffic = traffic
        self._places = Places(snapshot, Counter(traffic.moving.values()))
        self._busy = set(traffic.busy)
        # Where somebody wants a request to be is not for a drain to say, nor for who came later.
        self._claimed = {request for wish in wishes for request in wish.requests or ()}
        self._taken: set[RequestId] = set()
        self._started = False

    def answer(self, wish: Wish) -> Decision:
        self._moves: list[PlannedMove] = []
        self._refusals: dict[RequestId, Refusal] = {}
        self._start: Startable | None = None
        if wish.requests is None:
            for row in self._on(wish):
                self._away(row, wish)
        else:
            self._to(wish.requests, wish)
        return Decision(
            operation=wish.operation,
            moves=tuple(self._moves),
            orders=self._orders(),
            start=self._start,
            refusals=self._refusals,
        )

    # -- to a node

    def _to(self, requests: Sequence[RequestId], wish: Wish) -> None:
        rows = [row for request in requests if (row := self._traffic.requests.get(request))]
        for row in sorted(rows, key=self._longest_first):
            source = self._source(row)
            if source is None or source.node == wish.node or row.id in self._taken:
                continue
            self._taken.add(row.id)
            if not self._under_way(row, source):
                stays_busy = self._snapshot.loads.get(source.spec.id, 0) > len(requests)
                self._to_node(row, source, wish, stays_busy=stays_busy)

    def _to_node(self, row: RequestRow, source: ReplicaView, wish: Wish, *, stays_busy: bool) -> None:
        tried, node = wish.tried.get(row.id, ()), wish.node
        if len(tried) >= ATTEMPTS:
            self._refusals[row.id] = Refusal(on=Obstacle.FAILED, text=f"it was tried {len(tried)} times")
            return
        found = at(self._snapshot, self._places, source, node, tried=frozenset(tried), stays_busy=stays_busy)
        if isinstance(found, Refusal):
            self._refusals[row.id] = found
        elif isinstance(found, Startable):
            if not self._started:
                self._start, self._started = found, True
            self._plan(row, source, node=node, why=f"a replica is started on {node}")
        elif not found.ready:
            self._plan(row, source, node=node, why=f"{found.spec.id} on {node} is starting")
        else:
            self._plan(row, source, target=found, why=f"asked for; {found.spec.id} on {node} has room")

    # -- away from a node

    def _away(self, row: RequestRow, wish: Wish) -> None:
        source = self._source(row)
        if source is None or row.id in self._claimed or row.id in self._taken:
            return
        self._taken.add(row.id)
        if self._under_way(row, source):
            return
        outlook, tried = self._outlook(row), wish.tried.get(row.id, ())
        if outlook.left_s is not None and outlook.left_s <= min(outlook.move_s, wish.within_s):
            why = f"it is expected to finish in {outlook.left_s:.1f} s, before it could be moved"
            self._plan(row, source, move=False, why=why)
        elif len(tried) >= ATTEMPTS:
            self._plan(row, source, move=False, why=f"its migration failed {len(tried)} times")
        elif target := elsewhere(self._snapshot, self._places, source, frozenset(tried)):
            left = "for how long is not known" if outlook.left_s is None else f"for {outlook.left_s:.1f} s or so"
            self._plan(row, source, target=target, why=f"it runs on, {left}; {target.spec.id} has the most room")
        else:
            why = f"no other replica of revision {source.spec.revision} of {row.deployment!r} has room"
            self._plan(row, source, why=why)

    def _on(self, wish: Wish) -> list[RequestRow]:
        """What runs on a node, or on one replica there, the longest first."""
        of_node = (r.spec.id for r in self._snapshot.replicas.values() if r.node == wish.node)
        there = {replica for replica in of_node if wish.replica in (None, replica)}
        return sorted((r for r in self._traffic.requests.values() if r.replica in there), key=self._longest_first)

    # -- both

    def _under_way(self, row: RequestRow, source: ReplicaView) -> bool:
        target = self._snapshot.replicas.get(self._traffic.moving.get(row.id, ReplicaId("")))
        if target is not None:
            self._plan(row, source, target=target, why=f"it is on its way to {target.spec.id}")
        return target is not None

    def _orders(self) -> tuple[Order, ...]:
        """For each source that has none, what goes to the target of the first that has one."""
        found: dict[ReplicaId, tuple[ReplicaId, list[RequestId]]] = {}
        for move in self._moves:
            if move.target is None or move.source in self._busy or move.request in self._traffic.moving:
                continue
            target, requests = found.setdefault(move.source, (move.target, []))
            if target == move.target:
                requests.append(move.request)
        self._busy.update(found)
        return tuple(
            Order(source=source, target=target, requests=tuple(requests))
            for source, (target, requests) in found.items()
        )

    def _plan(
        self,
        row: RequestRow,
        source: ReplicaView,
        *,
        why: str,
        target: ReplicaView | None = None,
        node: NodeName | None = None,
        move: bool = True,
    ) -> None:
        if target is not None:
            if row.id not in self._traffic.moving:
                self._places.take(target)
            node = target.node
        outlook = self._outlook(row)
        self._moves.append(
            PlannedMove(
                request=row.id,
                source=source.spec.id,
                source_node=source.node,
                target=target.spec.id if target else None,
                target_node=node,
                move=move,
                pause_s=outlook.pause_s if move else 0.0,
                left_s=outlook.left_s,
                why=why,
            )
        )

    def _source(self, row: RequestRow) -> ReplicaView | None:
        """The replica that a request can be moved away from: one that is being stopped only ends."""
        replica = self._snapshot.replicas.get(row.replica) if row.replica else None
        return replica if replica and replica.serves and replica.intent is not Intent.STOP else None

    def _outlook(self, row: RequestRow) -> Outlook:
        return self._traffic.outlooks.get(row.id, Outlook())

    def _longest_first(self, row: RequestRow) -> tuple[float, int, str]:
        left_s = self._outlook(row).left_s
        return (-left_s if left_s is not None else float("-inf"), -row.output_tokens, row.id)
