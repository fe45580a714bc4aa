"""What the writer is told, besides the requests of gateways and operators, which are events as they are."""

from __future__ import annotations

from dataclasses import dataclass

from sllm.controller.tickets import Ticket
from sllm.core.ids import MigrationId, NodeName, OperationId, ReplicaId
from sllm.core.migration import MigrationReport
from sllm.core.node import NodeReport
from sllm.core.snapshot import Intent
from sllm.errors import SllmError


@dataclass(frozen=True, slots=True, kw_only=True)
class Registered:
    """An agent introduces itself. `displaced`: the incarnation that was found dead when it was asked."""

    report: NodeReport
    displaced: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contested:
    """The answer to `Registered` where another agent has the name and was heard of lately: is it still there?"""

    incarnation: str
    address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request wants a replica."""

    ticket: Ticket


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """Nobody reads the ticket any more. `served`: it was granted, and the grant was taken."""

    ticket: int
    served: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """A gateway began to watch the routes, or its watch ended."""

    gateway: str
    begins: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandEnded:
    """An agent answered the command that carries out `intent`, or did not (`error`)."""

    replica: ReplicaId
    intent: Intent
    error: SllmError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyProgressed:
    operation: OperationId
    phase: str
    progress: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyEnded:
    """Agents added (or removed) a checkpoint on these nodes, each with its digest, or failed."""

    operation: OperationId
    done_on: tuple[tuple[NodeName, str], ...] = ()
    error: SllmError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationReported:
    """A source says how far one request has come."""

    report: MigrationReport


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationEnded:
    """An order is over: no more will be reported. `error`: it was not carried out, or not to its end."""

    migration: MigrationId
    error: SllmError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Woken:
    """The timer that the last plan asked for."""
