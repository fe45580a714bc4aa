"""The least total wait on a tiny simulated cluster, for one who knows every request before it comes: exact search.

What is searched: for each request, in any order, to join its model's replica or to start one on a device as soon as it
may. A start is made for a request that has come, not ahead of it, and what runs is neither moved nor stopped: under
these rules no schedule is better. For models of one replica at most, and devices that are free at once (`release_s` 0):
then a policy of the simulator that moves and stops nothing can do no better either (`tests/bench/test_optimum.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from sllm.core.ids import DeploymentName, NodeName
from sllm.sim.spec import Arrival, Cluster, ModelSpec, NodeSpec

Place = tuple[NodeName, int]


@dataclass(frozen=True, slots=True)
class Running:
    """The last replica on a device: it has been ready since `ready_at`, and its requests end at `ends`."""

    model: DeploymentName
    ready_at: float
    ends: tuple[float, ...] = ()

    def free_at(self, count: int) -> float:
        """When fewer than `count` of its requests run."""
        return self.ready_at if len(self.ends) < count else sorted(self.ends)[-count]


@dataclass(frozen=True, slots=True)
class State:
    """`last` on each device, when each node's SSD is free, and when each copy in memory is complete."""

    last: dict[Place, Running] = field(default_factory=dict)
    ssd_free_at: dict[NodeName, float] = field(default_factory=dict)
    copies: dict[tuple[NodeName, str], float] = field(default_factory=dict)
    granted_at: dict[DeploymentName, float] = field(default_factory=dict)


def optimum(cluster: Cluster, arrivals: Sequence[Arrival]) -> float:
    """Return the least sum of waits, in seconds. Exponential in the requests: for six of them."""
    if any(model.deployment.max_replicas != 1 or model.deployment.devices != 1 for model in cluster.models):
        raise ValueError("only models of one replica on one device are searched")
    if any(node.release_s for node in cluster.nodes):
        raise ValueError("only devices that are free at once are searched")
    return _Search(cluster).least(list(arrivals))


class _Search:
    def __init__(self, cluster: Cluster) -> None:
        self._models = {model.deployment.name: model for model in cluster.models}
        self._nodes = {node.name: node for node in cluster.nodes}
        self._places = [(node.name, number) for node in cluster.nodes for number in range(node.devices)]
        self._best = math.inf
        copies = {(node.name, digest): 0.0 for node in cluster.nodes for digest in node.in_memory}
        self._begin = State(copies=copies)

    def least(self, arrivals: list[Arrival]) -> float:
        lines: dict[DeploymentName, list[Arrival]] = {}
        for arrival in sorted(arrivals, key=lambda a: a.at):
            lines.setdefault(arrival.deployment, []).append(arrival)
        self._descend(self._begin, lines, 0.0)
        return self._best

    def _descend(self, state: State, lines: dict[DeploymentName, list[Arrival]], waited_s: float) -> None:
        """Serve one more request, the first of any line: a model's requests are served in the order of their time."""
        if waited_s + self._at_least(state, lines) >= self._best:
            return
        if not lines:
            self._best = waited_s
            return
        steps = [
            (wait_s, number, after, name)
            for name, line in lines.items()
            for number, (wait_s, after) in enumerate(self._served(state, line[0]))
        ]
        for wait_s, _, after, name in sorted(steps, key=lambda step: step[:2]):
            left = {n: line[n == name :] for n, line in lines.items()}
            self._descend(after, {n: line for n, line in left.items() if line}, waited_s + wait_s)

    def _at_least(self, state: State, lines: dict[DeploymentName, list[Arrival]]) -> float:
        """What the first requests of models that have no replica must wait: for a start that nothing delays."""
        running = {replica.model for replica in state.last.values()}
        return sum(self._quickest_s(state, name) for name in lines if name not in running)

    def _quickest_s(self, state: State, name: DeploymentName) -> float:
        model = self._models[name]
        held = [(n, (n, model.checkpoint.digest) in state.copies) for n in model.nodes]
        return min(_start_s(model, self._nodes[n], in_memory=in_memory) for n, in_memory in held)

    def _served(self, state: State, request: Arrival) -> Iterator[tuple[float, State]]:
        """Every way to serve a request: what it waits, and what is then."""
        name = request.deployment
        there = next((place for place, replica in state.last.items() if replica.model == name), None)
        if there is not None:
            yield self._granted(state, request, there)
            return
        for place in self._places:
            if place[0] in self._models[name].nodes:
                yield self._granted(self._started(state, request, place), request, place)

    def _started(self, state: State, request: Arrival, place: Place) -> State:
        """A replica for it, as soon as it has come and what runs there has ended."""
        model, (name, _) = self._models[request.deployment], place
        node, digest = self._nodes[name], model.checkpoint.digest
        before = state.last.get(place)
        begin = max(request.at, before.free_at(1) if before else 0.0)
        copies, ssd = state.copies, state.ssd_free_at
        copied_at = copies.get((name, digest))
        if copied_at is not None and copied_at <= begin:
            ready_at = begin + _start_s(model, node, in_memory=True)
        else:
            if copied_at is None:
                copied_at = max(begin, ssd.get(name, 0.0)) + _read_s(model, node)
                ssd, copies = {**ssd, name: copied_at}, {**copies, (name, digest): copied_at}
            # The fork begins with the read's turn.
            forked_at = max(begin, copied_at - _read_s(model, node)) + model.timing.fork_s
            ready_at = max(copied_at, forked_at) + model.timing.left_s(max(0.0, copied_at - forked_at))
        last = {**state.last, place: Running(request.deployment, ready_at)}
        return replace(state, last=last, ssd_free_at=ssd, copies=copies)

    def _granted(self, state: State, request: Arrival, place: Place) -> tuple[float, State]:
        replica, model = state.last[place], self._models[request.deployment]
        earlier = state.granted_at.get(request.deployment, 0.0)
        at = max(request.at, earlier, replica.free_at(model.deployment.capacity))
        service_s = request.prompt_tokens * model.timing.prefill_token_s + request.output_tokens * model.timing.token_s
        ends = (*replica.ends, at + service_s * request.pace)
        last = {**state.last, place: replace(replica, ends=ends)}
        return at - request.at, replace(state, last=last, granted_at={**state.granted_at, request.deployment: at})


def _read_s(model: ModelSpec, node: NodeSpec) -> float:
    return model.checkpoint.size_bytes / min(node.ssd_bandwidth_bps, node.dram_bandwidth_bps)


def _start_s(model: ModelSpec, node: NodeSpec, *, in_memory: bool) -> float:
    """A start that waits for nothing."""
    timing = model.timing
    if in_memory:
        return timing.fork_s + model.checkpoint.size_bytes / node.dram_bandwidth_bps + timing.build_s
    read_s = _read_s(model, node)
    return max(read_s, timing.fork_s) + timing.left_s(max(0.0, read_s - timing.fork_s))
