"""Launch: what an agent tells its warm process to start, and the record by which an engine host is found again.

Agent and warm process speak over a SOCK_SEQPACKET Unix socket pair, one JSON object per packet: the warm process says
`{"ready": WarmReady}` once; the agent asks `{"fork": NONCE}`, with four descriptors beside it (SCM_RIGHTS): a memfd
with the Launch as JSON (which need not fit in a packet), the lease and the feed of its grant (see `sllm.core.grant`),
and the log file; the warm process answers `{"forked": NONCE, "pid": PID}` or `{"error": TEXT, "nonce": NONCE}` (an
empty nonce: it cannot run its engine at all, and ends). This module only says what the messages hold; it opens
nothing.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from sllm.core.grant import Extent, Grant
from sllm.core.ids import DeviceId, ReplicaId
from sllm.core.replica import ReplicaSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One engine host to fork. `nonce` proves later that a found process is the one meant.

    `grant` is for the partition of rank `rank` of the checkpoint folder `weights_dir`, whose manifest says what lies
    where; its layout is "hf", or "runtime" if this deployment's parameters have been saved before. `save_runtime` is
    the folder to save them in ("": do not). `execution_dir` holds the checkpoint's execution files. `record_path` is
    where the host writes its LaunchRecord, `scratch_dir` where its temporary files go, which are its agent's to remove.
    An engine that has work and makes no step for `stall_s` is dead.
    """

    spec: ReplicaSpec
    nonce: str
    grant: Grant
    weights_dir: str
    execution_dir: str
    record_path: str
    scratch_dir: str
    bind_host: str
    device_kind: str
    device_ids: tuple[DeviceId, ...]
    threads: int
    memory_bytes: int
    kv_cache_bytes: int
    grace_s: float
    stall_s: float = 60.0
    rank: int = 0
    save_runtime: str = ""
    tls_ca: str = ""
    tls_certificate: str = ""
    tls_key: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Launch:
        values: dict[str, Any] = json.loads(text)
        values["spec"] = ReplicaSpec(**{**values["spec"], "devices": tuple(values["spec"]["devices"])})
        extents = tuple(Extent(*extent) for extent in values["grant"]["extents"])
        values["grant"] = Grant(**{**values["grant"], "extents": extents})
        values["device_ids"] = tuple(values["device_ids"])
        return cls(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchRecord:
    """Written by an engine host once it listens; read by its agent, at once or after a restart of the agent.

    `start_ticks` (field 22 of /proc/PID/stat) tells this process from a later one with the same pid. `save_runtime` is
    as in its Launch.
    """

    replica: ReplicaId
    nonce: str
    pid: int
    start_ticks: int
    address: str
    spec: ReplicaSpec
    save_runtime: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> LaunchRecord:
        values: dict[str, Any] = json.loads(text)
        values["spec"] = ReplicaSpec(**{**values["spec"], "devices": tuple(values["spec"]["devices"])})
        return cls(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmReady:
    """What a warm process says once, when it can fork."""

    engine: str
    version: str
    seconds: float
    architectures: tuple[str, ...] = field(default_factory=tuple)
