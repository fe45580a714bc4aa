"""Simulation: one run of a cluster under one policy, from its first request to the end of its last."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from sllm.core.ids import DeploymentName, NodeName
from sllm.core.priority import Priority
from sllm.sim.controller import Controller, Decide
from sllm.sim.events import EventQueue
from sllm.sim.gateway import Gateway
from sllm.sim.node import Node
from sllm.sim.replica import Replica
from sllm.sim.request import Request
from sllm.sim.spec import Arrival, Cluster, Failure, ModelSpec


class Simulation:
    """`arrivals` are in the order of their time. The same arguments give the same run."""

    def __init__(
        self, cluster: Cluster, arrivals: Sequence[Arrival], decide: Decide, *, seed: int, thorough: bool = False
    ) -> None:
        self.cluster = cluster
        self.events = EventQueue()
        self.ended: list[Request] = []
        self.nodes = self._made_nodes(seed)
        self.gateway = Gateway(
            self.events,
            cluster.models,
            timeout_s=cluster.timeout_s,
            queue_length=cluster.queue_length,
            on_touched=self._touched,
            on_ended=self._ended,
        )
        self.controller = Controller(
            cluster,
            self.nodes,
            self.gateway,
            self.events,
            decide,
            rng=Random(f"{seed}: decisions"),
            thorough=thorough,
        )
        self._arrivals = arrivals
        self._came = 0
        self._begin_present(cluster)
        # What is open already is there before anything is decided.
        while self._came < len(arrivals) and arrivals[self._came].at <= 0:
            self._come()
        self._next_arrival()
        for failure in cluster.failures:
            self.events.at(failure.at, self._fail, failure)
        self.controller.settle()

    @property
    def done(self) -> float:
        """The share of requests that are over."""
        return len(self.ended) / len(self._arrivals) if self._arrivals else 1.0

    def advance(self) -> bool:
        """Go on to the next instant at which anything happens; False once every request has ended."""
        if len(self.ended) == len(self._arrivals) or not self.events.advance():
            return False
        self.controller.settle()
        return True

    def run(self) -> None:
        while self.advance():
            pass

    def device_s(self) -> float:
        """Device seconds that were leased until now."""
        return sum(node.leased_s(self.events.now) for node in self.nodes.values())

    def _begin_present(self, cluster: Cluster) -> None:
        """The controller finds these as one that was restarted does: in the nodes' first reports."""
        models = {model.deployment.name: model for model in cluster.models}
        for number, present in enumerate(cluster.present, 1):
            model, node = models[present.deployment], self.nodes[present.node]
            spec = model.replica(number, present.devices)
            if present.ready:
                node.adopt(spec, model)
            else:
                node.start(spec, model, Priority.REQUEST)

    # -- what happens

    def _next_arrival(self) -> None:
        if self._came < len(self._arrivals):
            self.events.at(self._arrivals[self._came].at, self._arrive)

    def _arrive(self) -> None:
        self._come()
        self._next_arrival()

    def _come(self) -> None:
        request = Request(number=self._came, arrival=self._arrivals[self._came])
        self._came += 1
        self.controller.asked(request.arrival.deployment)
        self.gateway.arrive(request)

    def _fail(self, failure: Failure) -> None:
        node = self.nodes[failure.node]
        self.controller.heartbeat_missing(failure.node)
        gone = node.fail()
        for replica in gone:
            self.gateway.fall_silent(replica)
        now = self.events.now
        away_s = self.cluster.silence_s if failure.for_s is None else min(self.cluster.silence_s, failure.for_s)
        self.events.at(now + away_s, self._notice, gone)
        if failure.for_s is not None:
            self.events.at(now + failure.for_s, node.come_back)

    def _notice(self, gone: Sequence[Replica]) -> None:
        for replica in gone:
            self.gateway.notice(replica)

    # -- what nodes and the gateway say

    def changed(self, node: Node) -> None:
        self.controller.changed(node)

    def lost(self, requests: Sequence[Request]) -> None:
        self.gateway.lose(requests)

    def _touched(self, deployment: DeploymentName) -> None:
        self.controller.touched(deployment)

    def _ended(self, request: Request, replica: Replica | None) -> None:
        self.ended.append(request)
        if replica is not None:
            self.nodes[replica.node].ended(replica, request)

    def _made_nodes(self, seed: int) -> dict[NodeName, Node]:
        held: dict[NodeName, list[ModelSpec]] = {spec.name: [] for spec in self.cluster.nodes}
        for model in self.cluster.models:
            for name in model.nodes:
                held[name].append(model)
        return {
            spec.name: Node(
                spec,
                held[spec.name],
                self.events,
                self,
                rng=Random(f"{seed}: loads of {spec.name}"),
                load_cv=self.cluster.load_cv,
            )
            for spec in self.cluster.nodes
        }
