"""Jobs: operations under way and the last ones that ended, with what is needed to go on after a restart."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Final

from sllm.controller.latest import Latest
from sllm.core.ids import NodeName, OperationId, ReplicaId, RequestId, make_id
from sllm.core.operation import Operation, OperationState
from sllm.errors import NotFound

DEPLOY: Final = "deploy"
DELETE: Final = "delete"
SCALE: Final = "scale"
ADD: Final = "checkpoint.add"
REMOVE: Final = "checkpoint.remove"
VERIFY: Final = "checkpoint.verify"
ON_CHECKPOINTS: Final = (ADD, REMOVE, VERIFY)
MIGRATE: Final = "migrate"
DRAIN: Final = "drain"
DISPLACE: Final = "displace"
MOVING: Final = (MIGRATE, DRAIN, DISPLACE)

KEPT_ENDED = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """An operation and its parameters. `request_ids`, of all who asked for it, make asking twice harmless.

    `nodes` empty: any one that can (add). `deep` is how thoroughly a copy is verified. `done_on` is None while agents
    still work; then it has the nodes where they did, with the checkpoint's digest, whose reports must show it.

    A migration moves `requests` to the only one of `nodes`; `replica` is set if it was all of one. A drain empties that
    node, a displacement only `replica` there, because of `why`. All end at `deadline_at` (wall clock) at the latest.
    """

    operation: Operation
    request_ids: tuple[str, ...] = ()
    revision: int = 0
    source: str = ""
    nodes: tuple[NodeName, ...] = ()
    deep: bool = False
    started: bool = False
    done_on: tuple[tuple[NodeName, str], ...] | None = None
    replica: ReplicaId | None = None
    requests: tuple[RequestId, ...] = ()
    deadline_at: float = 0.0
    why: str = ""

    @property
    def id(self) -> OperationId:
        return self.operation.id

    @property
    def running(self) -> bool:
        return self.operation.state is OperationState.RUNNING


def new_job(kind: str, target: str, *, wall: float, request_id: str = "", phase: str = "", **fields: Any) -> Job:
    """A job that begins now, with an id of its own. `fields` are its parameters."""
    operation = Operation(
        id=OperationId(make_id("op", os.urandom(8))),
        kind=kind,
        target=target,
        state=OperationState.RUNNING,
        phase=phase,
        created_at=wall,
        updated_at=wall,
    )
    return Job(operation=operation, request_ids=(request_id,) if request_id else (), **fields)


class Jobs:
    """In memory; the writer stores what must survive."""

    def __init__(self) -> None:
        self._jobs: dict[OperationId, Job] = {}
        self._latest: dict[OperationId, Latest[Operation]] = {}
        self._by_request: dict[str, OperationId] = {}

    def put(self, job: Job) -> None:
        """Add a job, or replace it and tell those who follow it."""
        self._jobs[job.id] = job
        for request_id in job.request_ids:
            self._by_request[request_id] = job.id
        if job.id in self._latest:
            self._latest[job.id].set(job.operation)
        else:
            self._latest[job.id] = Latest(job.operation)

    def get(self, operation: OperationId) -> Job | None:
        return self._jobs.get(operation)

    def asked(self, request_id: str) -> Job | None:
        """The job that this request id began before, if any."""
        return self._jobs.get(self._by_request.get(request_id, OperationId("")))

    def running(self) -> list[Job]:
        return [job for job in self._jobs.values() if job.running]

    def copying(self, checkpoint: str) -> Job | None:
        """The job that works on the copies of this checkpoint now, if any."""
        found = (job for job in self.running() if job.operation.kind in ON_CHECKPOINTS)
        return next((job for job in found if job.operation.target == checkpoint), None)

    def moving(self) -> list[Job]:
        """Migrations and drains under way, the oldest first: who asked first moves first."""
        found = [job for job in self.running() if job.operation.kind in MOVING]
        return sorted(found, key=lambda job: (job.operation.created_at, job.id))

    def drain_of(self, node: NodeName) -> Job | None:
        """The drain of a node under way, if any."""
        return next((j for j in self.running() if j.operation.kind == DRAIN and j.nodes == (node,)), None)

    def excess(self) -> list[Job]:
        """Ended jobs beyond those that are kept, the oldest first."""
        ended = [job for job in self._jobs.values() if not job.running]
        ended.sort(key=lambda job: job.operation.created_at)
        return ended[: max(0, len(ended) - KEPT_ENDED)]

    def drop(self, job: Job) -> None:
        del self._jobs[job.id], self._latest[job.id]
        for request_id in job.request_ids:
            self._by_request.pop(request_id, None)

    async def follow(self, operation: OperationId) -> AsyncIterator[Operation]:
        """Yield an operation and its changes until it is over. Raises NotFound."""
        if operation not in self._latest:
            raise NotFound(f"no operation {operation!r}", hint=f"the last {KEPT_ENDED} that ended are kept")
        async for value in self._latest[operation].follow():
            yield value
            if value.state is not OperationState.RUNNING:
                return
