"""Moves of running requests in virtual time: what the scheduler's decisions on migrations come to (paper §5).

Orders are those of `sllm.scheduler.migrations`. A request goes on at its source until the rounds are over; then its
client waits for the pause. How long both take is what the model's recomputing is said to take.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sllm.core.ids import NodeName, OperationId, ReplicaId, RequestId
from sllm.core.replica import ReplicaState
from sllm.core.request import RequestRow, RequestState
from sllm.core.snapshot import ReplicaView, Snapshot
from sllm.scheduler.migrations import Order, Traffic, Wish, decide
from sllm.scheduler.refuge import CONCURRENCY
from sllm.sim.events import EventQueue
from sllm.sim.gateway import Gateway
from sllm.sim.node import Node
from sllm.sim.replica import Replica
from sllm.sim.request import Request

_WITHIN_S = 60.0


@dataclass(slots=True, eq=False)
class _Flight:
    """An order under way: requests that are still to be moved, and how many move."""

    source: Replica
    target: Replica
    left: deque[Request]
    moving: dict[RequestId, Request]


class Mover:
    """`on_moved` is told when an order has gone on, and when it is over. What is `displaced` is told by `snapshot`."""

    def __init__(
        self, nodes: Mapping[NodeName, Node], gateway: Gateway, events: EventQueue, on_moved: Callable[[], None]
    ) -> None:
        self.count = 0
        self._nodes = nodes
        self._gateway = gateway
        self._events = events
        self._on_moved = on_moved
        self._flights: dict[ReplicaId, _Flight] = {}

    def advance(self, snapshot: Snapshot) -> None:
        """Give the orders that the displacements under way call for."""
        sources = [r for r in snapshot.replicas.values() if r.displaced]
        for replica in self._flights.keys() - {source.spec.id for source in sources}:
            del self._flights[replica]  # what has not moved stays
        if not sources:
            return
        wishes = [_wish(source) for source in sources]
        for decision in decide(snapshot, self._traffic(sources), wishes):
            for order in decision.orders:
                self._begin(snapshot, order)

    def _traffic(self, sources: list[ReplicaView]) -> Traffic:
        there = [replica for source in sources if (replica := self._on(source)) is not None]
        running = [request for replica in there for request in replica.running.values()]
        return Traffic(
            requests={request.id: self._row(request) for request in running},
            outlooks={request.id: self._gateway.outlook(request) for request in running},
            moving={
                request.id: flight.target.spec.id
                for flight in self._flights.values()
                for request in (*flight.left, *flight.moving.values())
                if request.replica is flight.source
            },
            busy=frozenset(self._flights),
        )

    def _row(self, request: Request) -> RequestRow:
        assert request.replica is not None
        return RequestRow(
            id=request.id,
            deployment=request.arrival.deployment,
            state=RequestState.RUNNING,
            replica=request.replica.spec.id,
            prompt_tokens=request.arrival.prompt_tokens,
            output_tokens=request.output_tokens,
            moves=request.moves,
        )

    def _on(self, view: ReplicaView) -> Replica | None:
        """None: its node has failed, which the controller does not know yet."""
        return self._nodes[view.node].replicas.get(view.spec.id)

    def _begin(self, snapshot: Snapshot, order: Order) -> None:
        source, target = (self._on(snapshot.replicas[name]) for name in (order.source, order.target))
        if source is None or target is None:
            return
        by_id = {request.id: request for request in source.running.values()}
        flight = _Flight(
            source=source,
            target=target,
            left=deque(by_id[request] for request in order.requests),
            moving={},
        )
        self._flights[order.source] = flight
        for _ in range(CONCURRENCY):
            self._next(flight)

    def _next(self, flight: _Flight) -> None:
        while flight.left:
            request = flight.left.popleft()
            if request.replica is flight.source:
                flight.moving[request.id] = request
                move_s = self._gateway.outlook(request).move_s
                self._events.at(self._events.now + move_s, self._arrived, flight, request, request.attempt)
                return

    def _arrived(self, flight: _Flight, request: Request, attempt: int) -> None:
        """Its rounds are over."""
        del flight.moving[request.id]
        source, target = flight.source, flight.target
        if self._flights.get(source.spec.id) is not flight:
            return
        serves = target.state is ReplicaState.READY and not target.silent
        room = serves and len(target.running) < target.spec.capacity
        if attempt == request.attempt and request.replica is source and room:
            self.count += 1
            self._gateway.hand_over(request, target, self._gateway.outlook(request).pause_s)
            self._nodes[source.node].ended(source, request)
        self._next(flight)
        if not flight.moving:
            del self._flights[source.spec.id]
        self._on_moved()


def _wish(source: ReplicaView) -> Wish:
    return Wish(operation=OperationId(source.spec.id), node=source.node, replica=source.spec.id, within_s=_WITHIN_S)
