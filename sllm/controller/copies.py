"""Adding, verifying and removing checkpoints on agents. Which nodes, in which order, are arguments."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, cast

from sllm.controller.events import CopyEnded, CopyProgressed
from sllm.controller.executor import outcome
from sllm.controller.jobs import Job
from sllm.core.ids import CheckpointName, NodeName
from sllm.errors import Conflict, NotFound, OperationFailed, SllmError, error_from
from sllm.rpc.agents import AddCheckpointCommand, AgentClient, RemoveCheckpointCommand, VerifyCheckpointCommand

# Another node may do better: the source is not there, or may not be read, or does not fit, or the node is gone.
_ASK_ANOTHER = frozenset(
    {"NOT_FOUND", "INVALID_ARGUMENT", "PERMISSION_DENIED", "CAPACITY_EXCEEDED", "UNAVAILABLE", "DEADLINE_EXCEEDED"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A node to work on."""

    node: NodeName
    client: AgentClient
    digest: str = ""


@dataclass(slots=True, kw_only=True)
class _Meter:
    """Bytes done over all nodes of one job."""

    job: Job
    post: Callable[[object], None]
    verb: str = "copying to"
    seen: dict[NodeName, tuple[int, int]] = field(default_factory=dict)

    def report(self, node: NodeName, done_bytes: int, total_bytes: int) -> None:
        self.seen[node] = (done_bytes, total_bytes)
        done, total = (sum(column) for column in zip(*self.seen.values(), strict=True))
        phase = f"{self.verb} {', '.join(sorted(self.seen))}"
        progress = done / total if total else None
        self.post(CopyProgressed(operation=self.job.id, phase=phase, progress=progress))


async def add_to_first(
    job: Job, holders: Sequence[Holder], digest: str, epoch: int, post: Callable[[object], None]
) -> None:
    """Try nodes in turn until one has the checkpoint; if none can, the last one's error is the answer."""
    error: SllmError | None = None
    for holder in holders:
        meter = _Meter(job=job, post=post)
        done: list[tuple[NodeName, str]] = []
        error = await outcome(_add(holder, job, digest, epoch, meter, done))
        if error is None:
            post(CopyEnded(operation=job.id, done_on=tuple(done)))
            return
        if error.reason not in _ASK_ANOTHER:
            break
    post(CopyEnded(operation=job.id, error=error))


async def add_to_all(
    job: Job, holders: Sequence[Holder], digest: str, epoch: int, post: Callable[[object], None]
) -> None:
    """Add to all nodes at once; a failure of one does not stop the others."""
    meter = _Meter(job=job, post=post)
    done: list[tuple[NodeName, str]] = []
    errors = await asyncio.gather(*(outcome(_add(h, job, digest, epoch, meter, done)) for h in holders))
    error = _first(holders, errors)
    if error is None and len({added for _, added in done}) > 1:
        error = Conflict(
            f"{job.source} is not the same on {', '.join(h.node for h in holders)}",
            hint=f"make it so, or remove checkpoint {job.operation.target!r} and use a name for each",
        )
    post(CopyEnded(operation=job.id, done_on=tuple(done), error=error))


async def remove(job: Job, holders: Sequence[Holder], epoch: int, post: Callable[[object], None]) -> None:
    name = CheckpointName(job.operation.target)
    calls = (h.client.remove_checkpoint(RemoveCheckpointCommand(epoch=epoch, name=name)) for h in holders)
    outcomes = await asyncio.gather(*(outcome(call) for call in calls))
    # What is not there was removed already, perhaps before a restart of the controller.
    errors = [None if isinstance(error, NotFound) else error for error in outcomes]
    done = tuple((h.node, h.digest) for h, error in zip(holders, errors, strict=True) if error is None)
    post(CopyEnded(operation=job.id, done_on=done, error=_first(holders, errors)))


async def verify(job: Job, holders: Sequence[Holder], epoch: int, post: Callable[[object], None]) -> None:
    """Verify all copies at once; the first that is damaged is the answer."""
    meter = _Meter(job=job, post=post, verb="reading on")
    errors = await asyncio.gather(*(outcome(_verify(h, job, epoch, meter)) for h in holders))
    done = tuple((h.node, h.digest) for h, error in zip(holders, errors, strict=True) if error is None)
    post(CopyEnded(operation=job.id, done_on=done, error=_first(holders, errors)))


async def _verify(holder: Holder, job: Job, epoch: int, meter: _Meter) -> None:
    command = VerifyCheckpointCommand(epoch=epoch, name=CheckpointName(job.operation.target), deep=job.deep)
    async with aclosing(cast(Any, holder.client.verify_checkpoint(command))) as stream:
        async for progress in stream:
            meter.report(holder.node, progress.done_bytes, progress.total_bytes)
            if progress.checkpoint is not None:
                return
    raise OperationFailed(f"node {holder.node!r} ended the verification without a result")


async def _add(
    holder: Holder, job: Job, digest: str, epoch: int, meter: _Meter, done: list[tuple[NodeName, str]]
) -> None:
    name = CheckpointName(job.operation.target)
    command = AddCheckpointCommand(epoch=epoch, operation=job.id, name=name, source=job.source)
    # The client's method is an async generator, which its Protocol does not say.
    async with aclosing(cast(Any, holder.client.add_checkpoint(command))) as stream:
        async for progress in stream:
            meter.report(holder.node, progress.done_bytes, progress.total_bytes)
            if progress.checkpoint is not None:
                added = progress.checkpoint.digest
                break
        else:
            raise OperationFailed(f"node {holder.node!r} ended the copy without a result")
    if digest and added != digest:
        await holder.client.remove_checkpoint(RemoveCheckpointCommand(epoch=epoch, name=name))
        raise Conflict(
            f"{job.source} on node {holder.node!r} is not what checkpoint {name!r} is on other nodes",
            hint="use another name, or remove the checkpoint first",
        )
    done.append((holder.node, added))


def _first(holders: Sequence[Holder], errors: Sequence[SllmError | None]) -> SllmError | None:
    for holder, error in zip(holders, errors, strict=True):
        if error is not None:
            return error_from(error.reason, f"node {holder.node!r}: {error.message}", hint=error.hint)
    return None
