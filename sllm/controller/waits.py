"""Waits: when the last requests came to wait for a replica, and when they were granted one. In memory, bounded."""

from __future__ import annotations

from dataclasses import dataclass

from sllm.core.ids import DeploymentName, ReplicaId, RequestId

KEPT = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """Both are dates. A request that went on elsewhere may have waited again: this is the last time."""

    deployment: DeploymentName
    replica: ReplicaId
    held_at: float
    granted_at: float


class Waits:
    def __init__(self) -> None:
        self._by_request: dict[RequestId, Wait] = {}

    def granted(self, request: RequestId, wait: Wait) -> None:
        self._by_request.pop(request, None)
        self._by_request[request] = wait
        if len(self._by_request) > KEPT:
            del self._by_request[next(iter(self._by_request))]

    def get(self, request: RequestId) -> Wait | None:
        return self._by_request.get(request)
