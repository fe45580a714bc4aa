"""A gateway that only follows: reads tokens, checks their positions, and goes after requests that move."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from sllm.core.ids import NodeName
from sllm.core.replica import ReplicaSpec
from sllm.core.route import RouteTarget
from sllm.core.tokens import PROTOCOL_VERSION, Finish, Moved, OpenStream, TokenRequest
from sllm.errors import SllmError, Unavailable
from sllm.rpc.engine import EngineClient, TokenStream


@dataclass
class Followed:
    """One sequence: what its client would have been sent. `moves` are (position, node) of each move."""

    request: TokenRequest
    tokens: list[int] = field(default_factory=list)
    moves: list[tuple[int, str]] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    cached_tokens: list[int] = field(default_factory=list)
    finish: Finish | None = None

    def resumed(self, stream_id: int) -> TokenRequest:
        token_ids = [*self.request.token_ids, *self.tokens]
        return replace(self.request, stream_id=stream_id, token_ids=token_ids, num_output_tokens=len(self.tokens))


def target_of(spec: ReplicaSpec, address: str) -> RouteTarget:
    """Return what a gateway knows of a replica; its node is called as the replica is."""
    return RouteTarget(
        replica=spec.id,
        node=NodeName(spec.id.removeprefix("rep-")),
        address=address,
        generation=spec.generation,
        revision=spec.revision,
        capacity=spec.capacity,
    )


class Gateway:
    """Close it. A stream that breaks, or a frame that does not fit, fails every wait."""

    def __init__(self) -> None:
        self._streams: dict[str, TokenStream] = {}
        self._clients: list[EngineClient] = []
        self._readers: dict[str, asyncio.Task[None]] = {}
        self._live: dict[tuple[str, int], Followed] = {}
        self._ids = itertools.count(1)
        self._changed = asyncio.Event()

    def send(self, target: RouteTarget, request: TokenRequest) -> Followed:
        followed = Followed(request)
        self._send(target, followed)
        return followed

    async def until(self, true: Callable[[], Any], within_s: float = 20.0) -> None:
        async with asyncio.timeout(within_s):
            while not true():
                self._changed.clear()
                await self._changed.wait()
                for reader in self._readers.values():
                    if reader.done():
                        reader.result()

    async def finished(self, *sequences: Followed) -> None:
        await self.until(lambda: all(each.finish is not None for each in sequences))

    async def lost(self, target: RouteTarget) -> None:
        """Wait until the stream to a host is broken, and forget what was on it."""
        async with asyncio.timeout(20):
            await asyncio.wait([self._readers[target.address]])
        error = self._readers.pop(target.address).exception()
        if not isinstance(error, SllmError):
            raise error or AssertionError("it only ended")
        await self._streams.pop(target.address).close()
        self._live = {place: followed for place, followed in self._live.items() if place[0] != target.address}

    def resume(self, target: RouteTarget, followed: Followed) -> None:
        """Send a request, whose stream was lost, with all its tokens to another host."""
        if followed not in self._live.values():
            self._send(target, followed)

    def _send(self, target: RouteTarget, followed: Followed) -> None:
        stream_id = next(self._ids)
        self._live[(target.address, stream_id)] = followed
        self._stream(target).send(followed.resumed(stream_id))

    def _stream(self, target: RouteTarget) -> TokenStream:
        if target.address not in self._streams:
            client = EngineClient(target.address, None, peer=f"engine host of {target.replica}")
            opening = OpenStream(protocol_version=PROTOCOL_VERSION, gateway="follower", generation=target.generation)
            self._clients.append(client)
            self._streams[target.address] = client.open_stream(opening)
            self._readers[target.address] = asyncio.create_task(self._read(target.address))
        return self._streams[target.address]

    async def _read(self, address: str) -> None:
        try:
            async for step in self._streams[address].steps():
                for output in step.outputs:
                    followed = self._live[(address, output.stream_id)]
                    assert followed.finish is None
                    assert output.position == len(followed.tokens), "lost or repeated"
                    followed.tokens += output.token_ids
                    followed.steps.append(step.steps)
                    if output.prefill is not None:
                        followed.cached_tokens.append(output.prefill.num_cached_tokens)
                    followed.finish = output.finish
                    if output.finish is not None:
                        del self._live[(address, output.stream_id)]
                for moved in step.moves:
                    self._follow(address, moved)
                self._changed.set()
        except Unavailable:
            if any(where == address for where, _ in self._live):
                raise
        finally:
            self._changed.set()

    def _follow(self, address: str, moved: Moved) -> None:
        followed = self._live.pop((address, moved.stream_id))
        assert moved.position == len(followed.tokens), "lost or repeated"
        followed.moves.append((moved.position, moved.target.node))
        self._send(moved.target, followed)

    async def close(self) -> None:
        for reader in self._readers.values():
            reader.cancel()
        for stream in self._streams.values():
            await stream.close()
        for client in self._clients:
            await client.close()
