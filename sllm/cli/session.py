"""One conversation with the controller: connect, ask or change something, print, close."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, TypeVar

from sllm.cli import context as contexts
from sllm.cli.failures import reported
from sllm.cli.options import Patience, Where

if TYPE_CHECKING:
    from sllm.cli.context import Context
    from sllm.core.migration import MigrationPlan
    from sllm.core.operation import Operation
    from sllm.rpc.control import ControlClient
    from sllm.rpc.transport import Tls

T = TypeVar("T")


def ask(where: Where, question: Callable[[ControlClient], Awaitable[T]]) -> T:
    """Return the controller's answer; an error is printed and ends the command."""

    async def conversation() -> T:
        async with connected(where) as client:
            return await question(client)

    with reported(where.output):
        return asyncio.run(conversation())


def change(where: Where, patience: Patience, request: Callable[[ControlClient], Awaitable[Operation]]) -> None:
    """Ask for work, wait for it as the caller wished, and print how it went."""
    from sllm.cli.operations import follow, show

    async def conversation() -> Operation:
        timeout_s = patience.timeout_s  # a wrong duration must be refused before anything is changed
        async with connected(where) as client:
            operation = await request(client)
            return await follow(client, operation, timeout_s=timeout_s) if patience.wait else operation

    with reported(where.output):
        show(where.output, asyncio.run(conversation()))


def preview(where: Where, question: Callable[[ControlClient], Awaitable[MigrationPlan]]) -> None:
    """Print what would be moved, and why."""
    from sllm.cli import rows, tables
    from sllm.cli.output import emit

    plan = ask(where, question)
    names = [move.request for move in plan.moves if move.move]
    emit(where.output, tables=tables.migration_plan(plan), data=rows.plan_object(plan), names=names)


@asynccontextmanager
async def connected(where: Where) -> AsyncIterator[ControlClient]:
    """Yield a client of the controller that the command line, the environment and the contexts name."""
    # What goes wrong is told in one line of ours; the library's own lines would come before it.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from sllm.rpc.control import ControlClient

    known = contexts.load(contexts.config_path())
    chosen = contexts.resolve(known, context=where.context, controller=where.controller, env=os.environ)
    client = ControlClient(chosen.controller, _tls(chosen), peer="the controller")
    try:
        yield client
    finally:
        await client.close()


def new_request_id() -> str:
    """Return an id by which the controller knows a repeated request."""
    from sllm.core.ids import make_id

    return make_id("cli", os.urandom(8))


def _tls(context: Context) -> Tls | None:
    if context.ca is None or context.certificate is None or context.key is None:
        return None
    from sllm.config import TlsConfig, check
    from sllm.rpc.identity import load_tls

    paths = {"ca": context.ca, "certificate": context.certificate, "key": context.key}
    return load_tls(check(paths, TlsConfig, origin="the context"))
