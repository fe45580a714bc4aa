"""How far a migration or a drain has come, told from what runs where and what was reported. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto

from sllm.controller import moves, progress
from sllm.controller.flights import Tally
from sllm.controller.jobs import Job
from sllm.core.ids import DeploymentName, RequestId
from sllm.core.migration import PlannedMove
from sllm.core.node import NodeState
from sllm.core.operation import Operation, OperationState
from sllm.core.request import RequestRow
from sllm.core.snapshot import ReplicaView, Snapshot
from sllm.errors import DeadlineExceeded, EngineFailed, OperationFailed, SllmError, Unavailable
from sllm.scheduler.destinations import Obstacle
from sllm.scheduler.migrations import ATTEMPTS, Decision
from sllm.scheduler.plan import Reason

NAMED = 20  # of the requests that are left, so many are named


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What a verdict is told from. `rows` are all open requests; `complete`: every gateway has had the time to report
    since this controller began, so that a request which nobody reports is over."""

    snapshot: Snapshot
    rows: Mapping[RequestId, RequestRow]
    reasons: Mapping[DeploymentName, Reason]
    complete: bool
    wall: float


def of_migration(job: Job, tally: Tally, decision: Decision, scene: Scene) -> Operation | SllmError:
    """The operation as it stands, or what ends it."""
    fates = {request: _fate(request, job, tally, scene) for request in job.requests}
    left = [request for request, fate in fates.items() if fate is _Fate.LEFT]
    moved = sum(fate is _Fate.MOVED for fate in fates.values())
    if not left:
        finished = len(fates) - moved
        parts = [f"{moved} moved"]
        if finished:
            parts.append(f"{finished} finished first")
        if tally.rounds:
            rounds = "1 round" if tally.rounds == 1 else f"{tally.rounds} rounds"
            parts += [rounds, f"{tally.sent_bytes:,} bytes sent"]
        return _done(job.operation, ", ".join(parts))
    stuck = [request for request in left if request in decision.refusals]
    if len(stuck) == len(left):
        return _stuck(job, tally, decision, stuck, scene)
    if tally.refused >= ATTEMPTS and tally.refusal is not None:
        return tally.refusal
    if tally.started and decision.start is not None:
        return _start_failed(decision.start.deployment, scene)
    if scene.wall >= job.deadline_at:
        return DeadlineExceeded(f"{_names(left)} did not move in time", hint="what was not moved goes on where it was")
    return replace(job.operation, phase=_phase_of_migration(job, moved, left, decision, scene), progress=None)


def of_drain(job: Job, tally: Tally, decision: Decision, scene: Scene) -> Operation | SllmError:
    """The operation as it stands, or what ends it."""
    node = job.nodes[0]
    view = scene.snapshot.nodes.get(node)
    if view is None or view.state is NodeState.DEAD:
        return Unavailable(f"node {node!r} died meanwhile", hint="what ran on it is resumed elsewhere")
    replicas = [r for r in scene.snapshot.replicas.values() if r.node == node]
    gone = len(tally.moved) + len(tally.finished)
    if not replicas and scene.snapshot.settled:
        return _done(job.operation, f"{len(tally.moved)} moved, {len(tally.finished)} finished")
    if scene.wall >= job.deadline_at:
        return _not_empty(job, tally, decision, replicas)
    total = gone + len(decision.moves)
    share = gone / total if total else None
    return replace(job.operation, phase=_phase_of_drain(tally, decision.moves, replicas), progress=share)


def of_displacement(job: Job, tally: Tally, decision: Decision, scene: Scene) -> Operation | SllmError:
    """The operation as it stands, or what ends it. It is done when its replica is told to end, or is gone."""
    source = scene.snapshot.replicas.get(job.replica) if job.replica else None
    moved, finished = len(tally.moved), len(tally.finished)
    if source is None or not source.displaced:
        return _done(job.operation, f"{moved} moved, {finished} finished; {job.why}")
    if scene.wall >= job.deadline_at:
        left = [_left(move, tally) for move in decision.moves]
        return DeadlineExceeded(
            f"{job.replica} is not empty in time; left are {'; '.join(left[:NAMED])}",
            hint="what was not moved goes on where it was",
        )
    total = moved + finished + len(decision.moves)
    phase = f"{moved} of {total} requests moved; {job.why}"
    return replace(job.operation, phase=phase, progress=(moved + finished) / total if total else None)


class _Fate(Enum):
    LEFT = auto()
    MOVED = auto()
    FINISHED = auto()


def _fate(request: RequestId, job: Job, tally: Tally, scene: Scene) -> _Fate:
    """What has become of a request that is to move. Only its gateway knows that one is over: what ended at its source
    may have gone on elsewhere, because its engine died."""
    if request in tally.moved:
        return _Fate.MOVED
    row = scene.rows.get(request)
    if row is None:
        return _Fate.FINISHED if request in tally.seen or scene.complete else _Fate.LEFT
    replica = scene.snapshot.replicas.get(row.replica) if row.replica else None
    return _Fate.MOVED if replica is not None and replica.node == job.nodes[0] else _Fate.LEFT


def _stuck(
    job: Job, tally: Tally, decision: Decision, stuck: Sequence[RequestId], scene: Scene
) -> Operation | SllmError:
    first = stuck[0]
    if error := tally.errors.get(first):
        return error
    refusal = decision.refusals[first]
    if tally.started and refusal.on is Obstacle.DEVICES:  # what failed holds them still
        return _start_failed(scene.rows[first].deployment, scene)
    return moves.error_of(refusal)


def _start_failed(deployment: DeploymentName, scene: Scene) -> SllmError:
    view = scene.snapshot.deployments.get(deployment)
    why = view.failures.error if view and view.failures else "it is gone"
    return EngineFailed(f"the replica that was started for it did not come: {why}", hint="see `sllm status`")


def _phase_of_migration(job: Job, moved: int, left: Sequence[RequestId], decision: Decision, scene: Scene) -> str:
    waiting = [move for move in decision.moves if move.target is None]
    if waiting and len(waiting) == len(decision.moves):
        source = scene.snapshot.replicas[waiting[0].source].spec
        there = [r for r in scene.snapshot.replicas.values() if r.node == job.nodes[0]]
        starting = [r for r in there if (r.spec.deployment, r.spec.revision) == (source.deployment, source.revision)]
        update = progress.waiting(source.deployment, starting, scene.reasons)
        share = f" {update.progress:.0%}" if update.progress else ""
        return f"starting a replica on {job.nodes[0]}: {update.phase}{share}"
    return f"{moved} of {len(job.requests)} requests moved; moving {len(left)}"


def _phase_of_drain(tally: Tally, planned: Sequence[PlannedMove], replicas: Sequence[ReplicaView]) -> str:
    if not planned:
        return f"nothing runs there; stopping {len(replicas)} replicas"
    finishing = sum(not move.move for move in planned)
    without = sum(move.move and move.target is None for move in planned)
    moving = len(planned) - finishing - without
    total = len(planned) + len(tally.moved) + len(tally.finished)
    parts = [f"{len(tally.moved)} of {total} requests moved"]
    if moving:
        parts.append(f"moving {moving}")
    if finishing:
        parts.append(f"waiting for {finishing} to finish")
    if without:
        parts.append(f"{without} wait for room elsewhere")
    return "; ".join(parts)


def _not_empty(job: Job, tally: Tally, decision: Decision, replicas: Sequence[ReplicaView]) -> SllmError:
    node = job.nodes[0]
    left = [_left(move, tally) for move in decision.moves]
    busy = {move.source for move in decision.moves}
    left += [f"{r.spec.id} of {r.spec.deployment}, {r.state.value}" for r in replicas if r.spec.id not in busy]
    more = f"; and {len(left) - NAMED} more" if len(left) > NAMED else ""
    return OperationFailed(
        f"node {node!r} is not empty in time; left are {'; '.join(left[:NAMED])}{more}",
        hint=f"it stays cordoned, and what is left goes on: `sllm drain {node}` again, or `sllm uncordon {node}`",
    )


def _left(move: PlannedMove, tally: Tally) -> str:
    error = tally.errors.get(move.request)
    return f"{move.request} on {move.source} ({error or move.why})"


def _names(requests: Sequence[RequestId]) -> str:
    more = f" and {len(requests) - NAMED} more" if len(requests) > NAMED else ""
    return ", ".join(requests[:NAMED]) + more


def _done(operation: Operation, phase: str) -> Operation:
    return replace(operation, state=OperationState.DONE, phase=phase, progress=1.0)
