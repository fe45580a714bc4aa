"""What the controller stores, and under which keys: JSON, read back into the same values."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from sllm.controller.jobs import Job
from sllm.controller.store.base import Delete, Put
from sllm.core.deployment import Deployment, DeploymentSpec
from sllm.core.ids import DeploymentName, DeviceId, NodeName, ReplicaId, RequestId
from sllm.core.node import Cordon
from sllm.core.operation import Operation, OperationState
from sllm.core.snapshot import DeploymentView, Revision

EPOCH = "controller/epoch"
GENERATION = "controller/generation"
DEPLOYMENTS = "deployments/"
OPERATIONS = "operations/"
NODES = "nodes/"


def number(value: bytes) -> int:
    return int(value)


def put_number(key: str, value: int) -> Put:
    return Put(key=key, value=str(value).encode())


def put_deployment(view: DeploymentView) -> Put:
    """Store all revisions of a deployment; the memory of its scaling is not stored."""
    revisions = [asdict(revision) for revision in view.revisions()]
    return Put(key=DEPLOYMENTS + view.name, value=_packed({"revisions": revisions}))


def read_deployment(value: bytes) -> DeploymentView:
    current, *earlier = [_revision(fields) for fields in json.loads(value)["revisions"]]
    return DeploymentView(current=current, earlier=tuple(earlier))


def delete_deployment(name: DeploymentName) -> Delete:
    return Delete(key=DEPLOYMENTS + name)


def put_job(job: Job) -> Put:
    """Store an operation, with the request ids that it must not be begun twice for."""
    fields: dict[str, Any] = {
        "operation": asdict(job.operation),
        "request_ids": job.request_ids,
        "revision": job.revision,
        "source": job.source,
        "nodes": job.nodes,
        "deep": job.deep,
        "replica": job.replica,
        "requests": job.requests,
        "deadline_at": job.deadline_at,
        "why": job.why,
    }
    return Put(key=OPERATIONS + job.id, value=_packed(fields))


def delete_job(job: Job) -> Delete:
    return Delete(key=OPERATIONS + job.id)


def read_job(value: bytes) -> Job:
    fields = json.loads(value)
    operation = fields.pop("operation")
    state = OperationState(operation.pop("state"))
    return Job(
        operation=Operation(state=state, **operation),
        request_ids=tuple(fields.get("request_ids", ())),
        revision=fields["revision"],
        source=fields["source"],
        nodes=tuple(fields["nodes"]),
        deep=bool(fields.get("deep", False)),
        replica=_replica(fields.get("replica")),
        requests=tuple(map(RequestId, fields.get("requests", ()))),
        deadline_at=float(fields.get("deadline_at", 0.0)),
        why=fields.get("why", ""),
    )


def _replica(value: str | None) -> ReplicaId | None:
    return None if value is None else ReplicaId(value)


def put_node(name: NodeName, cordon: Cordon) -> Put:
    """Store that a node belongs to the cluster (after a restart it is waited for), and what of it takes nothing new.

    That it drains is not said here: there is a job that says so.
    """
    return Put(key=NODES + name, value=_packed({"cordoned": cordon.node, "devices": sorted(cordon.devices)}))


def delete_node(name: NodeName) -> Delete:
    return Delete(key=NODES + name)


def read_cordon(value: bytes) -> Cordon:
    fields = json.loads(value)
    return Cordon(node=bool(fields["cordoned"]), devices=frozenset(map(DeviceId, fields.get("devices", ()))))


def _revision(fields: dict[str, Any]) -> Revision:
    deployment = fields["deployment"]
    spec = DeploymentSpec(**deployment.pop("spec"))
    return Revision(
        deployment=Deployment(spec=spec, **deployment),
        max_model_len=fields["max_model_len"],
        size_bytes=fields["size_bytes"],
    )


def _packed(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":"), sort_keys=True).encode()
