"""Waiting for an operation, and saying how it went."""

from __future__ import annotations

import asyncio
import sys
from contextlib import aclosing
from typing import TYPE_CHECKING

from sllm.cli.output import Format, emit_line
from sllm.cli.progress import Progress, open_progress
from sllm.cli.rows import operation_row
from sllm.core.operation import Operation, OperationState
from sllm.errors import DeadlineExceeded, SllmError, Unavailable, error_from

if TYPE_CHECKING:
    from sllm.rpc.control import ControlClient

_DONE = {
    "checkpoint.add": "checkpoint {} added",
    "checkpoint.remove": "checkpoint {} removed",
    "checkpoint.verify": "checkpoint {} verified",
    "deploy": "{} deployed",
    "delete": "{} deleted",
    "scale": "{} scaled",
    "migrate": "{} moved",
    "drain": "{} drained",
    "displace": "{} emptied",
}


async def follow(client: ControlClient, operation: Operation, *, timeout_s: float | None) -> Operation:
    """Show progress until the operation is over and return it. Raises its error, or DeadlineExceeded."""
    latest = [operation]
    try:
        async with asyncio.timeout(timeout_s):
            with open_progress(f"{operation.kind} {operation.target}") as progress:
                await _watch(client, latest, progress)
    except TimeoutError:
        raise DeadlineExceeded(
            f"{operation.kind} {operation.target} is not done after {timeout_s:g} s ({_phase(latest[-1])}); "
            f"operation {operation.id} goes on",
            hint="see `sllm status`",
        ) from None
    except asyncio.CancelledError:
        print(f"operation {operation.id} goes on; see `sllm status`", file=sys.stderr)
        raise
    _raise_failure(latest[-1])
    return latest[-1]


async def _watch(client: ControlClient, latest: list[Operation], progress: Progress) -> None:
    from sllm.rpc.control import WatchOperationRequest

    operation = latest[-1]
    if operation.state is not OperationState.RUNNING:
        return
    progress.update(operation.phase, operation.progress)
    try:
        async with aclosing(client.watch_operation(WatchOperationRequest(id=operation.id))) as changes:  # type: ignore[type-var]
            async for changed in changes:
                latest.append(changed)
                progress.update(changed.phase, changed.progress)
    except Unavailable as error:
        raise _lost(operation, str(error)) from error
    if latest[-1].state is OperationState.RUNNING:
        raise _lost(operation, "the controller stopped telling")


def _lost(operation: Operation, why: str) -> SllmError:
    return Unavailable(
        f"{operation.kind} {operation.target}: {why}", hint=f"operation {operation.id} may go on; see `sllm status`"
    )


def _phase(operation: Operation) -> str:
    share = "" if operation.progress is None else f" {operation.progress:.0%}"
    return f"{operation.phase or operation.state}{share}"


def _raise_failure(operation: Operation) -> None:
    if operation.state is OperationState.FAILED:
        reason = operation.error_reason or "OPERATION_FAILED"
        message = operation.error or f"{operation.kind} {operation.target} failed"
        raise error_from(reason, message, hint=operation.hint)


def show(form: Format, operation: Operation) -> None:
    """Print an operation that is over, or that nobody waited for."""
    _raise_failure(operation)
    done = _DONE.get(operation.kind, operation.kind + " {}: done").format(operation.target)
    under_way = f"{operation.kind} {operation.target} is under way as {operation.id}"
    line = done if operation.state is OperationState.DONE else under_way
    emit_line(form, line=line, data=operation_row(operation), name=operation.id)
