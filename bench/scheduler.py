"""How long does a decision take, and what does the index that it looks into cost? By size of the cluster.

A request comes for a deployment whose replicas are full: `reconcile` starts a replica, ends idle ones to make room for
it, or says what it waits for. Nodes have 8 devices and hold 200 checkpoints on SSD, 40 of them in memory too, drawn by
popularity (Zipf, 0.9), as are the requests. Of the devices 85 % or 99 % are leased, half by replicas that serve, half
by idle ones that are kept; a deployment has at most 4.

`decision`: `reconcile` alone, of a snapshot whose index is up to date. `upkeep`: all else that a decision costs whoever
makes it: remembering what is needed, the snapshot, the agenda, carrying the plan out in the cluster's state, and
taking in what nodes report then (240 copies, one in memory changed). A replica ends for each that starts.
`pass` is the sum. CPU time of one thread, each decision by itself; every object that was there before is kept from the
garbage collector.

    .venv/bin/python bench/scheduler.py [--quick] [--only 1000x10000]
"""

from __future__ import annotations

import argparse
import gc
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import accumulate
from random import Random
from typing import Any

from common import Prediction, console, save, table

from sllm.core.cluster import ClusterState
from sllm.core.deployment import Deployment, DeploymentSpec
from sllm.core.device import Device, DeviceKind, DeviceState
from sllm.core.node import NodeReport
from sllm.core.replica import ReplicaSpec, ReplicaState, ReplicaStatus
from sllm.core.residency import Residency, ResidencyState, Tier
from sllm.core.snapshot import Command, DeploymentView, Held, Intent, Policy, ReplicaView, Revision, Snapshot
from sllm.core.startup import Learnt, Level, StartTimes
from sllm.core.table import Table
from sllm.scheduler.agenda import Agenda
from sllm.scheduler.autoscale import demand, remember
from sllm.scheduler.plan import DrainReplica, Plan, StartReplica
from sllm.scheduler.reconcile import reconcile

PREDICTIONS = [
    Prediction("decision", "median below 50 us at every size: at most 32 nodes are compared, at 1 to 2 us each"),
    Prediction("growth", "from 100 to 10,000 nodes less than twice as long: sets of nodes are integers of 10,000 bits"),
    Prediction("p99", "100 to 200 us at the largest, 99 % use: where rare checkpoints lie nothing is free, and who is "
               "to make room is looked for among the 8 replicas of 20 nodes"),
    Prediction("upkeep", "100 us: two reports of 240 copies at 30 us each, and tables of 100,000"),
]  # fmt: skip
SIZES = ((100, 2_000), (1_000, 10_000), (10_000, 100_000))
USES = (0.85, 0.99)
DEVICES, ON_SSD, IN_DRAM = 8, 200, 40
MOST = 4  # replicas of a deployment
GB = 10**9
NOW = 1000.0


def digest_of(number: int) -> str:
    return f"digest-{number:06d}"


def name_of(number: int) -> str:
    return f"model-{number:06d}"


class Popularity:
    """Zipf."""

    def __init__(self, count: int) -> None:
        self._numbers = range(count)
        self._sums = list(accumulate((rank + 1) ** -0.9 for rank in range(count)))

    def draw(self, rng: Random, count: int) -> list[int]:
        return rng.choices(self._numbers, cum_weights=self._sums, k=count)


class World:
    """A cluster under load, and all that a controller keeps to decide about it."""

    def __init__(self, nodes: int, checkpoints: int, use: float, seed: int) -> None:
        self.rng = Random(seed)
        self.popularity = Popularity(checkpoints)
        self.state = ClusterState(Policy())
        self.agenda = Agenda()
        self.loads: Table[Any, int] = Table()
        self.held: Table[Any, Held] = Table()
        self.generation = 0
        self.outcomes: Counter[str] = Counter()
        self._copies: dict[tuple[int, Tier], Residency] = {}
        for number in range(checkpoints):
            self.state.deployments[name_of(number)] = _deployment(number)
        for number in range(nodes):
            self._add_node(f"node-{number:05d}", use)
        self.learnt = _learnt([f"node-{number:05d}" for number in range(nodes)], self.rng)
        # The first pass looks at all.
        snapshot = self.agenda.due(self.snapshot(), NOW)
        self.agenda.noted(self.state.touched())
        self.agenda.planned(snapshot, Plan())

    def snapshot(self) -> Snapshot:
        return self.state.snapshot(
            loads=self.loads.view(), held=self.held.view(), settled=True, loads_fresh=True, learnt=self.learnt
        )

    def _add_node(self, name: str, use: float) -> None:
        held = list(dict.fromkeys(self.popularity.draw(self.rng, 4 * ON_SSD)))[:ON_SSD]
        residencies = [self.copy(number, Tier.SSD) for number in held]
        residencies += [self.copy(number, Tier.DRAM) for number in held[:IN_DRAM]]
        report = NodeReport(
            name=name,
            incarnation=name,
            revision=1,
            address=name,
            version="",
            engine="",
            warm=True,
            devices=tuple(_device(number, leased=False) for number in range(DEVICES)),
            residencies=tuple(residencies),
        )
        self.state.observe(report, now=NOW, wall=NOW)
        for number in range(DEVICES):
            if self.rng.random() < use:
                view = self.start(self._small(lambda: self.rng.choice(held)), name, (f"cuda-{number}",))
                self.reported(view)
        self.state.observe(self.report(name), now=NOW, wall=NOW)

    def _small(self, draw: Callable[[], int]) -> int:
        """The first that is drawn of which there may be one more replica."""
        number = draw()
        while len(self.state.of(name_of(number))) >= MOST:
            number = draw()
        return number

    def copy(self, number: int, tier: Tier) -> Residency:
        return self._copies.setdefault((number, tier), _residency(number, tier))

    def start(self, number: int, node: str, devices: tuple[str, ...]) -> ReplicaView:
        self.generation += 1
        spec = ReplicaSpec(
            id=f"rep-{self.generation:08d}",
            deployment=name_of(number),
            revision=1,
            generation=self.generation,
            checkpoint=name_of(number),
            digest=digest_of(number),
            devices=devices,
            capacity=1,
            max_model_len=2048,
        )
        view = ReplicaView(spec=spec, node=node, command=Command.DONE)
        self.state.put(view)
        return view

    def reported(self, view: ReplicaView) -> None:
        """It is ready, and serves a request or is kept without one."""
        status = ReplicaStatus(spec=view.spec, state=ReplicaState.READY)
        self.state.put(replace(view, status=status, ready_at=NOW))
        deployment = self.state.deployments[view.spec.deployment]
        if self.rng.random() < 0.5:
            self.loads[view.spec.id] = 1
            deployment = replace(deployment, needed=deployment.needed + 1)
        ago = self.rng.uniform(0, 60)
        self.state.deployments[deployment.name] = replace(
            deployment, needed_at=tuple(sorted((*deployment.needed_at, NOW - ago), reverse=True))
        )

    def report(self, name: str, residencies: tuple[Residency, ...] | None = None) -> NodeReport:
        """What the node says when it has done what it was told."""
        there = [r for r in self.state.replicas_on(name) if r.intent is Intent.RUN]
        leased = {device for replica in there for device in replica.spec.devices}
        before = self.state.nodes[name].report
        return replace(
            before,
            revision=before.revision + 1,
            devices=tuple(_device(number, leased=f"cuda-{number}" in leased) for number in range(DEVICES)),
            replicas=tuple(r.status or ReplicaStatus(spec=r.spec, state=ReplicaState.STARTING) for r in there),
            residencies=residencies or before.residencies,
        )

    # -- one decision

    def decide(self) -> tuple[float, float]:
        """A request comes for a deployment that needs one more replica for it. CPU seconds (decision, upkeep)."""
        number = self._small(lambda: self.popularity.draw(self.rng, 1)[0])
        name = name_of(number)
        self.held[name] = Held(count=1, since=NOW)
        started = time.thread_time_ns()
        self._remember(name)
        snapshot = self.snapshot()
        self.agenda.noted(self.state.touched())
        self.agenda.touch(name)
        snapshot = self.agenda.due(snapshot, NOW)
        prepared = time.thread_time_ns()
        plan = reconcile(snapshot, NOW)
        decided = time.thread_time_ns()
        self.agenda.planned(snapshot, plan)
        upkeep = prepared - started + time.thread_time_ns() - decided
        assert name in (snapshot.due or ())
        for report, act in self._consequences(plan, number):
            started = time.thread_time_ns()
            act()
            if report is not None:
                self.state.observe(report, now=NOW, wall=NOW)
            upkeep += time.thread_time_ns() - started
        self._forget(name)
        return (decided - prepared) / 1e9, upkeep / 1e9

    def _remember(self, name: str) -> None:
        view = self.state.deployments[name]
        counting = Snapshot(
            policy=self.state.policy,
            nodes=self.state.nodes,
            replicas=self.state.replicas,
            deployments=self.state.deployments,
            loads=self.loads,
            held=self.held,
        )
        running = self.state.of(name)
        # What is idle is kept for others: it is full of requests that the gateways have not reported yet.
        needed = max(demand(counting, view, running), sum(r.live for r in running) + 1)
        self.state.deployments[name] = remember(view, needed, NOW)

    def _consequences(self, plan: Plan, number: int) -> Iterator[tuple[NodeReport | None, Callable[[], object]]]:
        """What carrying the plan out changes, in turn."""
        self.outcomes[_outcome(plan)] += 1
        for action in plan.actions:
            if isinstance(action, StartReplica):
                yield None, lambda a=action: self.start(number, a.node, a.devices)
                residencies = list(self.state.nodes[action.node].report.residencies)
                residencies[-1] = self.copy(number, Tier.DRAM)
                yield self.report(action.node, tuple(residencies)), lambda: None
                # Another one ends, so that the use of devices stays.
                yield from self._ended(self.rng.choice(list(self.state.replicas_on(action.node))))
            elif isinstance(action, DrainReplica) and action.replica in self.state.replicas:
                yield from self._ended(self.state.replicas[action.replica])

    def _ended(self, replica: ReplicaView) -> Iterator[tuple[NodeReport | None, Callable[[], object]]]:
        name = replica.spec.id
        yield None, lambda: self.state.intend(name, Intent.DRAIN, Command.DONE)
        yield self.report(replica.node), lambda: None
        self.loads.pop(name, None)
        self._count(replica.spec.deployment)

    def _count(self, name: str) -> None:
        """As many are needed as serve."""
        serving = sum(self.loads.get(r.spec.id, 0) for r in self.state.of(name))
        self.state.deployments[name] = replace(self.state.deployments[name], needed=serving)

    def _forget(self, name: str) -> None:
        """The request has found its replica, or has been given up."""
        del self.held[name]
        self._count(name)
        for replica in self.state.of(name):
            if replica.status is None or replica.status.state is ReplicaState.STARTING:
                self.reported(replica)
        self.agenda.reasons.pop(name, None)


def _outcome(plan: Plan) -> str:
    kinds = {type(action) for action in plan.actions}
    return "starts" if StartReplica in kinds else "makes room" if DrainReplica in kinds else "waits"


def _device(number: int, *, leased: bool) -> Device:
    state = DeviceState.LEASED if leased else DeviceState.FREE
    return Device(id=f"cuda-{number}", kind=DeviceKind.CUDA, state=state, memory_bytes=48 * GB)


def _residency(number: int, tier: Tier) -> Residency:
    return Residency(
        checkpoint=name_of(number),
        digest=digest_of(number),
        tier=tier,
        state=ResidencyState.READY,
        size_bytes=(5 + number % 20) * GB,
    )


def _deployment(number: int) -> DeploymentView:
    spec = DeploymentSpec(
        name=name_of(number),
        checkpoint=name_of(number),
        max_replicas=MOST,
        target_concurrency=1,
        keep_alive_s=600.0,
    )
    made = Deployment(spec=spec, revision=1, digest=digest_of(number), created_at=0, updated_at=0)
    return DeploymentView(current=Revision(deployment=made, max_model_len=2048, size_bytes=(5 + number % 20) * GB))


def _learnt(nodes: list[str], rng: Random) -> Learnt:
    def known(value: float) -> Level:
        return Level(value=value, observations=7)

    times = StartTimes(grant=known(0.01), fork=known(0.1), whole=known(1.0), rest=known(0.5))
    return Learnt(
        reading=Table({(name, Tier.SSD): known(rng.uniform(0.8, 1.2) / (5 * GB)) for name in nodes}).view(),
        reading_anywhere={Tier.SSD: known(1 / (5 * GB))},
        starts_of_kind={DeviceKind.CUDA: times},
    )


def quantiles(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {f"p{p}_us": round(1e6 * ordered[min(len(ordered) - 1, len(ordered) * p // 100)], 1) for p in (50, 90, 99)}


def measure(nodes: int, checkpoints: int, use: float, count: int) -> dict[str, Any]:
    world = World(nodes, checkpoints, use, seed=1)
    for _ in range(200):
        world.decide()
    world.outcomes.clear()
    gc.collect()
    gc.freeze()
    taken = [world.decide() for _ in range(count)]
    gc.unfreeze()
    return {
        "nodes": nodes,
        "checkpoints": checkpoints,
        "use": use,
        "decisions": count,
        "outcomes": dict(world.outcomes),
        "decision": quantiles([decision for decision, _ in taken]),
        "upkeep": quantiles([upkeep for _, upkeep in taken]),
        "pass": quantiles([decision + upkeep for decision, upkeep in taken]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="the two smaller sizes, fewer decisions, nothing is kept")
    parser.add_argument("--only", help="one size, such as 1000x10000; nothing is kept")
    options = parser.parse_args()
    sizes = SIZES[:2] if options.quick else SIZES
    if options.only:
        sizes = tuple(size for size in SIZES if f"{size[0]}x{size[1]}" == options.only)
    results = []
    for nodes, checkpoints in sizes:
        for use in USES:
            results.append(measure(nodes, checkpoints, use, 1_000 if options.quick else 5_000))
            console.print(results[-1])
    rows = [
        (
            r["nodes"],
            r["checkpoints"],
            f"{r['use']:.0%}",
            *[r[of][p] for of in ("decision", "upkeep", "pass") for p in ("p50_us", "p99_us")],
        )
        for r in results
    ]
    columns = ("nodes", "checkpoints", "use", "decision p50", "p99", "upkeep p50", "p99", "pass p50", "p99")
    table("Microseconds of CPU time", columns, rows)
    if not (options.quick or options.only):
        save("scheduler", PREDICTIONS, {"results": results})


if __name__ == "__main__":
    main()
