"""An engine host that stops answering while its connection stays up: its kernel goes on acknowledging."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from sllm.core.ids import NodeName, ReplicaId
from sllm.core.route import RouteTarget

COMPLETIONS = "/v1/completions"
NOTICED_WITHIN_S = 10

# Answers a request of one prompt token not at all, any other with a token that it says the first time it steps.
HOST_PROGRAM = """
import asyncio
from sllm.core.tokens import StepOutputs, TokenOutput, TokenRequest
from sllm.rpc import engine
from sllm.rpc.transport import serve
class Host:
    async def attach(self, request): yield
    async def stop(self, request): pass
    async def migrate(self, request): yield
    async def recompute(self, request): pass
    async def stream(self, frames):
        async for frame in frames:
            if isinstance(frame, TokenRequest):
                print("has", len(frame.token_ids), flush=True)
                if len(frame.token_ids) > 1:
                    output = TokenOutput(stream_id=frame.stream_id, position=0, token_ids=[ord("X") + 3])
                    yield StepOutputs(outputs=[output], timestamp=1.0)
async def main():
    server, port = await serve([engine.handlers(Host())], "127.0.0.1:0", None)
    print(port, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


@asynccontextmanager
async def host_process() -> AsyncIterator[tuple[asyncio.subprocess.Process, RouteTarget]]:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", HOST_PROGRAM, stdout=asyncio.subprocess.PIPE)
    try:
        assert process.stdout is not None
        port = int(await process.stdout.readline())
        yield (
            process,
            RouteTarget(
                replica=ReplicaId("rep-0"),
                node=NodeName("node-1"),
                address=f"127.0.0.1:{port}",
                generation=1,
                revision=1,
                capacity=8,
            ),
        )
    finally:
        process.kill()
        await process.wait()


@pytest.mark.e2e
async def test_a_stopped_host_costs_no_request(cluster: Any, a_route: Any) -> None:
    async with host_process() as (process, stopped):
        await cluster.publish(a_route("m", stopped))
        assert process.stdout is not None
        fresh = asyncio.create_task(cluster.http.post(COMPLETIONS, json={"model": "m", "prompt": "x"}))
        assert await process.stdout.readline() == b"has 1\n"
        begun = {"model": "m", "prompt": "xyz", "stream": True}
        async with cluster.raw_post(COMPLETIONS, begun, within_s=2 * NOTICED_WITHIN_S) as answer:
            await answer.readuntil(b'"X"')
            host, other = await cluster.host("rep-1")
            await cluster.publish(a_route("m", stopped, other))
            os.kill(process.pid, signal.SIGSTOP)
            async with asyncio.timeout(NOTICED_WITHIN_S):
                rest = await answer.readuntil(b"[DONE]")
                assert (await fresh).json()["text"] == "Hello there."
        events = [json.loads(line[6:]) for line in rest.splitlines() if line.startswith(b"data: {")]
        assert "".join(event["text"] for event in events) == "ello there."
        [resumed] = [request for request in host.requests if request.num_output_tokens]
        assert resumed.token_ids == [ord(c) + 3 for c in "xyzX"]
