"""The token streams to engine hosts: one per host and gateway process."""

from __future__ import annotations

import asyncio

from sllm.core.ids import ReplicaId
from sllm.core.route import RouteTarget
from sllm.gateway.connection import Connection, Listener
from sllm.rpc.transport import Tls


class Connections:
    """The open connections, by replica. For `silence_s` and `stall_s` see Connection."""

    def __init__(self, *, gateway: str, tls: Tls | None, silence_s: float, stall_s: float) -> None:
        self._gateway = gateway
        self._tls = tls
        self._silence_s = silence_s
        self._stall_s = stall_s
        self._open: dict[ReplicaId, Connection] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def to(self, target: RouteTarget, listener: Listener) -> Connection:
        """Return the connection to a replica, opening it if there is none.

        There is no await in here: two first requests at once get the same one.
        """
        connection = self._open.get(target.replica)
        if connection is not None and not connection.broken and connection.target.generation == target.generation:
            return connection
        if connection is not None:
            self._close(connection)
        connection = Connection(
            target,
            gateway=self._gateway,
            tls=self._tls,
            listener=listener,
            silence_s=self._silence_s,
            stall_s=self._stall_s,
        )
        self._open[target.replica] = connection
        return connection

    def keep(self, replicas: set[ReplicaId]) -> None:
        """Close the connections that nothing runs on and that are to none of these."""
        for replica, connection in list(self._open.items()):
            if connection.broken or (replica not in replicas and connection.idle):
                del self._open[replica]
                self._close(connection)

    def _close(self, connection: Connection) -> None:
        task = asyncio.create_task(connection.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Close all."""
        for connection in self._open.values():
            self._close(connection)
        self._open.clear()
        if self._closing:
            await asyncio.wait(self._closing)
