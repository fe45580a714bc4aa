"""The warm process' supervision: what does not start, what dies, what is asked of it meanwhile."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from sllm.agent.changes import Changes
from sllm.agent.children import Children
from sllm.agent.warm import process as warm_process
from sllm.agent.warm.base import HostFds
from sllm.agent.warm.process import WarmProcess
from sllm.core.grant import POOL_BLOCK_BYTES, Extent, Grant
from sllm.core.launch import Launch
from sllm.errors import EngineFailed, InvalidConfiguration
from sllm.linux import start_ticks

_READY = """
import json, os, socket, sys
control = socket.socket(fileno=int(sys.argv[1]))
about = {"engine": "stub", "version": "1", "seconds": 0.0, "architectures": ["X"]}
control.send(json.dumps({"ready": about}).encode())
"""
REFUSES = (
    _READY
    + """
while True:
    packet, fds, _, _ = socket.recv_fds(control, 65536, 4)
    if not packet:
        break
    launch = json.loads(os.pread(fds[0], os.fstat(fds[0]).st_size, 0))
    text = f"{len(fds)} descriptors, capacity {launch['spec']['capacity']}"
    control.send(json.dumps({"error": text, "nonce": json.loads(packet)["fork"]}).encode())
"""
)
DIES_WHEN_ASKED = _READY + "control.recv(65536); print('out of luck', flush=True); sys.exit(3)"
FORKS_LATE = (
    _READY.replace("{", "{{").replace("}", "}}")
    + """
import time
packet, fds, _, _ = socket.recv_fds(control, 65536, 4)
pid = os.fork()
if pid == 0:
    time.sleep(60)
with open({fifo!r}, "w") as file:
    file.write(str(pid))
open({fifo!r}).read()
control.send(json.dumps({{"forked": json.loads(packet)["fork"], "pid": pid}}).encode())
os.waitpid(pid, 0)
control.recv(1)
"""
)
CANNOT_RUN_ITS_ENGINE = """
import json, socket, sys
control = socket.socket(fileno=int(sys.argv[1]))
control.send(json.dumps({"error": "vllm 9.9 is not one of 0.32.0", "nonce": ""}).encode())
sys.exit(1)
"""
NEVER_READY = "import sys; print('No module named vllm', flush=True); sys.exit(1)"


@pytest.fixture
async def spawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Callable[..., Any]]:
    """Return a function that makes a WarmProcess of some code, with the Changes that it notifies. `failures` are
    raised by the first attempts to run it, one each."""
    monkeypatch.setattr(warm_process, "BACKOFF_S", (0.01, 0.05))
    made: list[WarmProcess] = []

    def make(code: str, failures: Sequence[Exception] = ()) -> tuple[WarmProcess, Changes]:
        changes, left = Changes(), list(failures)

        def command(fd: int) -> tuple[str, ...]:
            if left:
                raise left.pop(0)
            return (sys.executable, "-c", code, str(fd))

        made.append(
            WarmProcess(
                command,
                tmp_path / "warm.log",
                tmp_path,
                Children(),
                changes.notify,
            )
        )
        return made[-1], changes

    yield make
    for warm in made:
        await warm.close()


@pytest.fixture
def launch(make_spec: Callable[..., Any]) -> Launch:
    return Launch(
        spec=make_spec("sha256:0"),
        nonce="n1",
        grant=Grant(
            digest="sha256:0",
            partition=0,
            generation=1,
            size_bytes=4096,
            chunk_bytes=4096,
            extents=(Extent(0, POOL_BLOCK_BYTES),),
            slots=1,
            ready_chunks=1,
        ),
        weights_dir="",
        execution_dir="",
        record_path="",
        scratch_dir="",
        bind_host="",
        device_kind="cpu",
        device_ids=(),
        threads=1,
        memory_bytes=0,
        kv_cache_bytes=1,
        grace_s=1.0,
    )


async def fork(warm: WarmProcess, launch: Launch) -> Any:
    null = os.open(os.devnull, os.O_RDWR)
    try:
        async with asyncio.timeout(10):
            return await warm.fork(launch, HostFds(lease=null, feed=null, log=null))
    finally:
        os.close(null)


async def test_says_what_it_is_once_it_is_ready(spawn: Callable[[str], Any]) -> None:
    warm, changes = spawn(REFUSES)
    assert warm.about is None
    await changes.wait_beyond(0)
    assert (warm.about.engine, warm.about.architectures) == ("stub", ("X",))


async def test_a_refusal_reaches_who_asked(spawn: Callable[[str], Any], launch: Launch) -> None:
    warm, _ = spawn(REFUSES)
    with pytest.raises(EngineFailed, match="4 descriptors, capacity 4"):
        await fork(warm, launch)


async def test_one_that_never_gets_ready_fails_the_start_that_waits_with_its_last_words(
    spawn: Callable[[str], Any], launch: Launch
) -> None:
    warm, _ = spawn(NEVER_READY)
    for _ in range(2):  # it is tried again, and so may the start be
        with pytest.raises(EngineFailed, match="code 1: No module named vllm"):
            await fork(warm, launch)


async def test_one_that_cannot_be_spawned_fails_the_start_that_waits_and_is_tried_again(
    spawn: Callable[..., Any], launch: Launch
) -> None:
    warm, _ = spawn(REFUSES, failures=[OSError(12, "Cannot allocate memory")])
    with pytest.raises(EngineFailed, match="Cannot allocate memory"):
        await fork(warm, launch)
    async with asyncio.timeout(10):
        assert (await warm.ready()).engine == "stub"


async def test_one_that_cannot_run_its_engine_says_why(spawn: Callable[[str], Any], launch: Launch) -> None:
    warm, _ = spawn(CANNOT_RUN_ITS_ENGINE)
    with pytest.raises(InvalidConfiguration, match=r"vllm 9\.9 is not one of") as caught:
        await fork(warm, launch)
    assert caught.value.hint
    with pytest.raises(InvalidConfiguration):
        await warm.ready()


async def test_one_that_dies_fails_what_was_asked_of_it_and_is_replaced(
    spawn: Callable[[str], Any], launch: Launch
) -> None:
    warm, changes = spawn(DIES_WHEN_ASKED)
    with pytest.raises(EngineFailed, match="warm process died"):
        await fork(warm, launch)
    seen = 0
    async with asyncio.timeout(10):
        while seen < 3:  # ready, gone, ready again
            seen = await changes.wait_beyond(seen)


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    return path


async def line_from(fifo: Path) -> str:
    """Wait until a process writes a line into a pipe."""
    async with asyncio.timeout(10):
        with await asyncio.to_thread(fifo.open) as pipe:
            return await asyncio.to_thread(pipe.readline)


async def test_a_host_whose_start_is_called_off_while_it_is_forked_is_gone_when_the_call_ends(
    spawn: Callable[[str], Any], launch: Launch, fifo: Path
) -> None:
    warm, _ = spawn(FORKS_LATE.format(fifo=str(fifo)))
    call = asyncio.create_task(fork(warm, launch))
    pid = int(await line_from(fifo))  # it is forked, and nobody has been told
    call.cancel()
    await asyncio.sleep(0)
    assert not call.done()
    assert start_ticks(pid) is not None
    await asyncio.to_thread(fifo.write_text, "go on")
    with pytest.raises(asyncio.CancelledError):
        await call
    assert start_ticks(pid) is None


async def test_closing_it_ends_it_even_while_it_is_not_ready(spawn: Callable[[str], Any], fifo: Path) -> None:
    warm, _ = spawn(f"import time; open({str(fifo)!r}, 'w').write('here\\n'); time.sleep(60)")
    assert await line_from(fifo) == "here\n"
    async with asyncio.timeout(3):
        await warm.close()
