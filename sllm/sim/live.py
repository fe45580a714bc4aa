"""Live: a cluster as its controller describes it, as one to simulate, with what is asked to be different about it.

What nobody has measured is assumed, and said. Pure.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from sllm.core.checkpoint import Checkpoint
from sllm.core.description import ClusterDescription, DescribedDeployment, DescribedReplica
from sllm.core.device import Device, DeviceKind, DeviceState
from sllm.core.ids import DeploymentName, DeviceId, NodeName, node_name
from sllm.core.node import Node, NodeState
from sllm.core.replica import ReplicaState
from sllm.core.residency import ResidencyState, Tier
from sllm.core.startup import Learnt, StartTimes
from sllm.errors import InvalidArgument, NotFound, Unavailable
from sllm.scheduler.displacement import RELEASE_S
from sllm.scheduler.estimate import GUESSED_BANDWIDTH_BPS, GUESSED_FORK_S, GUESSED_GRANT_S, GUESSED_WHOLE_S
from sllm.sim.spec import Arrival, Cluster, Failure, ModelSpec, NodeSpec, Present, Timing

ASSUMED_TOKEN_S = 0.03


@dataclass(frozen=True, slots=True, kw_only=True)
class WhatIf:
    """What is to be different: one more node like each of `added`, which has the same on its SSD and nothing in memory;
    `down` are lost as the simulation begins. `token_s`: what a token takes, whatever was seen."""

    added: tuple[NodeName, ...] = ()
    down: tuple[NodeName, ...] = ()
    token_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveCluster:
    """`notes` say what was left out and what was assumed."""

    cluster: Cluster
    notes: tuple[str, ...]


def live_cluster(told: ClusterDescription, what_if: WhatIf) -> LiveCluster:
    """Return the cluster to simulate. Raises NotFound (a node), InvalidArgument, Unavailable (nothing to simulate)."""
    return _Reader(told, what_if).read()


def open_requests(told: ClusterDescription, cluster: Cluster, arrivals: Sequence[Arrival]) -> list[Arrival]:
    """The requests that are open now, as ones that come at once: each is as long as `arrivals` are in the mean, less
    what it has had, and not longer than it may be."""
    known = {model.deployment.name for model in cluster.models}
    mean = round(statistics.fmean(a.output_tokens for a in arrivals)) if arrivals else 1
    found = []
    for row in told.requests:
        if row.deployment in known:
            most = min(mean, row.max_tokens) if row.max_tokens else mean
            left = max(1, most - row.output_tokens)
            found.append(_open(row.deployment, row.prompt_tokens + row.output_tokens, left))
    return found


def _open(deployment: DeploymentName, prompt_tokens: int, output_tokens: int) -> Arrival:
    return Arrival(
        at=0.0, deployment=deployment, prompt_tokens=prompt_tokens, output_tokens=output_tokens, counted=False
    )


class _Reader:
    def __init__(self, told: ClusterDescription, what_if: WhatIf) -> None:
        self._told = told
        self._what_if = what_if
        self._learnt = _learnt(told)
        self._notes: list[str] = []
        self._nodes = {node.report.name: node for node in told.nodes if node.state is NodeState.READY}

    def read(self) -> LiveCluster:
        self._check()
        specs = {name: self._node(node) for name, node in self._nodes.items()}
        added = self._added(specs)
        models = [self._model(deployment, added) for deployment in self._told.deployments]
        cluster = Cluster(
            nodes=(*specs.values(), *(replace(specs[like], name=name, in_memory=()) for name, like in added.items())),
            models=tuple(models),
            failures=tuple(Failure(node=name, at=0.0) for name in dict.fromkeys(self._what_if.down)),
            policy=self._told.policy,
            present=self._present(models),
            known=_with_added(self._learnt, added),
        )
        return LiveCluster(cluster=cluster, notes=tuple(self._notes))

    def _check(self) -> None:
        if left_out := [n for n in self._told.nodes if n.state is not NodeState.READY]:
            named = ", ".join(f"{node.report.name} ({node.state.value})" for node in left_out)
            self._note(f"left out, with what runs there: {named}")
        if not self._nodes:
            raise Unavailable("no node of the cluster is ready: there is nothing to simulate", hint="see `sllm nodes`")
        if not self._told.deployments:
            raise NotFound("the cluster has no deployment: there is nothing to simulate", hint="see `sllm deploy`")
        for name in (*self._what_if.added, *self._what_if.down):
            if name not in self._nodes:
                known = ", ".join(self._nodes)
                raise NotFound(f"the cluster has no ready node {name!r}", hint=f"there are {known}")
        if set(self._what_if.down) == set(self._nodes) and not self._what_if.added:
            raise InvalidArgument("every node is down: nothing would be served")

    # -- nodes

    def _node(self, node: Node) -> NodeSpec:
        report, devices = node.report, _usable(node)
        if not devices:
            raise Unavailable(
                f"node {report.name!r} has no usable device", hint="`sllm cordon` the node to leave it out"
            )
        deployed = {d.deployment.digest for d in self._told.deployments}
        held = {r.digest for r in report.residencies if r.tier is Tier.DRAM and r.state is ResidencyState.READY}
        on_ssd = set(_on_ssd(node))
        return NodeSpec(
            name=report.name,
            devices=len(devices),
            device_memory_bytes=min(device.memory_bytes for device in devices),
            dram_bytes=next((tier.capacity_bytes for tier in report.tiers if tier.tier is Tier.DRAM), 0),
            ssd_bandwidth_bps=self._ssd_bandwidth_bps(report.name),
            # What copying to a device takes is a part of the construction that was measured.
            dram_bandwidth_bps=math.inf,
            device_kind=devices[0].kind,
            release_s=RELEASE_S,
            in_memory=tuple(sorted(held & on_ssd & deployed)),
        )

    def _ssd_bandwidth_bps(self, node: NodeName) -> float:
        level = self._learnt.reading.get((node, Tier.SSD)) or self._learnt.reading_anywhere.get(Tier.SSD)
        if level is None or level.value <= 0:
            self._note(f"nothing was read on {node} yet: {GUESSED_BANDWIDTH_BPS / 1e9:.1f} GB/s is assumed of its SSD")
            return GUESSED_BANDWIDTH_BPS
        return 1.0 / level.value

    def _added(self, specs: dict[NodeName, NodeSpec]) -> dict[NodeName, NodeName]:
        """Names of the nodes to add, each with the one that it is like."""
        added: dict[NodeName, NodeName] = {}
        for like in self._what_if.added:
            number = 1
            while (name := node_name(f"{like}-added-{number}")) in specs or name in added:
                number += 1
            added[name] = like
        return added

    # -- models

    def _model(self, told: DescribedDeployment, added: dict[NodeName, NodeName]) -> ModelSpec:
        deployment, digest = told.deployment, told.deployment.digest
        holders = [name for name, node in self._nodes.items() if digest in _on_ssd(node)]
        if not holders:
            self._note(f"no node has a copy of {deployment.spec.name}'s checkpoint: its requests wait in vain")
        return ModelSpec(
            deployment=deployment.spec,
            checkpoint=Checkpoint(
                name=deployment.spec.checkpoint,
                digest=digest,
                size_bytes=told.size_bytes,
                architecture="",
                dtype="",
                tensor_count=0,
                max_model_len=told.max_model_len,
            ),
            nodes=(*holders, *(name for name, like in added.items() if like in holders)),
            timing=self._timing(told, self._kind(holders)),
            needed=told.needed,
            unneeded_s=told.unneeded_s,
        )

    def _kind(self, holders: Sequence[NodeName]) -> DeviceKind:
        node = self._nodes[holders[0]] if holders else next(iter(self._nodes.values()))
        return _usable(node)[0].kind

    def _timing(self, told: DescribedDeployment, kind: DeviceKind) -> Timing:
        digest, name = told.deployment.digest, told.deployment.spec.name
        of_kind = self._learnt.starts_of_kind.get(kind, StartTimes())
        times = self._learnt.starts.get((digest, kind), StartTimes()).over(of_kind)
        if times.whole is None:
            self._note(f"no start like those of {name} was seen yet: {GUESSED_WHOLE_S:.1f} s are assumed")
        grant_s = times.grant.value if times.grant else GUESSED_GRANT_S
        fork_s = times.fork.value if times.fork else GUESSED_FORK_S
        cost = next((r.cost for r in self._told.recomputes if (r.digest, r.kind) == (digest, kind)), None)
        recompute_token_s, recompute_s = (cost.per_token_s, cost.fixed_s) if cost and cost.observations else (0.0, 0.0)
        return Timing(
            fork_s=grant_s + fork_s,
            build_s=times.whole.value if times.whole else GUESSED_WHOLE_S,
            rest_s=times.rest.value if times.rest else None,
            prefill_token_s=recompute_token_s,
            token_s=self._token_s(name),
            recompute_token_s=recompute_token_s,
            recompute_s=recompute_s,
        )

    def _token_s(self, name: DeploymentName) -> float:
        if self._what_if.token_s is not None:
            return self._what_if.token_s
        seen = [row for row in self._told.requests if row.interval_s > 0]
        own = [row.interval_s for row in seen if row.deployment == name]
        if own or seen:
            return statistics.median(own or [row.interval_s for row in seen])
        self._note(f"no request of {name} runs: a token is assumed to take {ASSUMED_TOKEN_S} s (--token-time)")
        return ASSUMED_TOKEN_S

    # -- replicas

    def _present(self, models: Iterable[ModelSpec]) -> tuple[Present, ...]:
        """Those that serve or start, of the current revisions. What is ending has ended, for a simulation."""
        wanted = {model.deployment.name: model for model in models}
        revisions = {d.deployment.spec.name: d.deployment.revision for d in self._told.deployments}
        taken: set[tuple[NodeName, DeviceId]] = set()
        found = []
        for replica in self._told.replicas:
            spec = replica.status.spec
            devices = self._devices(replica)
            model = wanted.get(spec.deployment)
            fits = model is not None and revisions[spec.deployment] == spec.revision and replica.node in model.nodes
            places = {(replica.node, device) for device in devices}
            if fits and devices and not places & taken and replica.status.state in _KEPT:
                taken |= places
                ready = replica.status.state is ReplicaState.READY
                present = Present(deployment=spec.deployment, node=replica.node, devices=devices, ready=ready)
                found.append(present)
        return tuple(found)

    def _devices(self, replica: DescribedReplica) -> tuple[DeviceId, ...]:
        """Its devices by the names that they have in a simulation; none if one of them cannot be used."""
        node = self._nodes.get(replica.node)
        names = _device_names(_usable(node)) if node else {}
        devices = replica.status.spec.devices
        return tuple(names[device] for device in devices) if all(device in names for device in devices) else ()

    def _note(self, text: str) -> None:
        if text not in self._notes:
            self._notes.append(text)


_KEPT = (ReplicaState.READY, ReplicaState.STARTING)


def _learnt(told: ClusterDescription) -> Learnt:
    return Learnt(
        reading={(known.node, known.tier): known.level for known in told.reading if known.node is not None},
        reading_anywhere={known.tier: known.level for known in told.reading if known.node is None},
        starts={(known.digest, known.kind): known.times for known in told.starts if known.digest is not None},
        starts_of_kind={known.kind: known.times for known in told.starts if known.digest is None},
    )


def _with_added(learnt: Learnt, added: dict[NodeName, NodeName]) -> Learnt:
    """A node that is like another reads as fast."""
    reading = dict(learnt.reading)
    for name, like in added.items():
        reading |= {(name, tier): level for (node, tier), level in learnt.reading.items() if node == like}
    return replace(learnt, reading=reading)


def _usable(node: Node) -> list[Device]:
    closed = set(node.cordoned_devices)
    return [d for d in node.report.devices if d.state is not DeviceState.LOST and d.id not in closed]


def _device_names(devices: Sequence[Device]) -> dict[DeviceId, DeviceId]:
    return {device.id: DeviceId(f"{devices[0].kind.value}-{number}") for number, device in enumerate(devices)}


def _on_ssd(node: Node) -> list[str]:
    return [r.digest for r in node.report.residencies if r.tier is Tier.SSD and r.state is ResidencyState.READY]
