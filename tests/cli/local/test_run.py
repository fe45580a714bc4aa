"""A whole life of `sllm dev`, with stand-ins for the cluster's processes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import stat
import sys
import tomllib
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest

from sllm.cli.context import Context, Contexts, load, save

# A process of the cluster: says its name and where it listens. What it is told on its line, it does.
ROLE = """
import tomllib
role, _, path = sys.argv[1:]
config = tomllib.load(open(path, "rb"))
name = config.get("name", role)
if os.environ.get("FAILS") == name:
    sys.exit(f"error: {name} is broken\\nhint: mend it")
line = hello(name)
address = config["listen"].replace(":0", ":4711")
if os.environ.get("LEAVES_BEHIND") and name == "node-1" and os.fork() == 0:
    os.setsid()
    line = hello("left-behind")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
else:
    notify("READY=1", f"X_ADDRESS={address}")
while True:
    signal.pause()
"""


class Dev:
    """Starts `sllm dev` on a state folder, in a process of its own."""

    def __init__(self, tmp_path: Path, launcher: tuple[str, ...]) -> None:
        self.state = tmp_path / "state"
        self.launcher = launcher
        self.processes: list[Process] = []

    async def start(self, *, gateway_port: int = 0, nodes: int = 2, **env: str) -> Process:
        program = (
            "import sys\n"
            "from pathlib import Path\n"
            "from sllm.cli.failures import reported\n"
            "from sllm.cli.local.layout import Engine, Wish\n"
            "from sllm.cli.local.run import run\n"
            "from sllm.cli.output import Format\n"
            "from sllm.errors import SllmError\n"
            f"wish = Wish(nodes={nodes}, devices_per_node=1, gateway_port={gateway_port}, controller_port=0,\n"
            f"            engine=Engine.FAKE, state=Path({str(self.state)!r}))\n"
            "try:\n"
            "    with reported(Format.TABLE):\n"
            f"        run(wish, Format.JSON, {self.launcher!r})\n"
            "except BaseException as error:\n"
            "    sys.exit(getattr(error, 'exit_code', repr(error)))\n"
        )
        argv = (sys.executable, "-c", program)
        process = await asyncio.create_subprocess_exec(*argv, stdout=PIPE, stderr=PIPE, env={**os.environ, **env})
        self.processes.append(process)
        return process


async def announced(process: Process) -> dict[str, object]:
    """Return the JSON that it prints when it is ready."""
    assert process.stdout is not None
    text = ""
    async with asyncio.timeout(30):
        while not text.endswith("\n}\n"):
            line = (await process.stdout.readline()).decode()
            assert line, (await process.stderr.read()).decode()
            text += line
    return json.loads(text)


async def ended(process: Process) -> tuple[int, str]:
    async with asyncio.timeout(30):
        _, err = await process.communicate()
    return process.returncode, err.decode()


@pytest.fixture
async def dev(tmp_path: Path, meetings, stand_in: Callable[[str], tuple[str, ...]]) -> AsyncIterator[Dev]:
    dev = Dev(tmp_path, stand_in(ROLE))
    yield dev
    for process in dev.processes:
        if process.returncode is None:
            process.kill()
            await process.communicate()


async def test_starts_the_controller_first_and_tells_the_others_where_it_is(dev, meetings):
    told = await announced(await dev.start())
    names = [(await meetings.next()).name for _ in range(4)]
    assert names[0] == "controller"
    assert set(names) == {"controller", "gateway", "node-1", "node-2"}
    assert told["base_url"] == "http://127.0.0.1:4711/v1"
    assert told["nodes"] == ["node-1", "node-2"]
    for name in ("gateway", "node-1", "node-2"):
        assert tomllib.loads((dev.state / "etc" / f"{name}.toml").read_text())["controller"] == "127.0.0.1:4711"


async def test_a_process_started_again_listens_where_it_did(dev, meetings):
    await announced(await dev.start())
    for name in ("controller", "gateway"):
        assert tomllib.loads((dev.state / "etc" / f"{name}.toml").read_text())["listen"] == "127.0.0.1:4711"
    controller = await meetings.next()
    others = [await meetings.next() for _ in range(3)]
    os.kill(controller.pid, signal.SIGKILL)
    assert (await meetings.next()).name == "controller"
    assert all(not other.reader.at_eof() for other in others)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_a_signal_stops_the_gateway_then_the_nodes_then_the_controller(dev, meetings, number):
    process = await dev.start()
    await announced(process)
    met = {each.name: each for each in [await meetings.next() for _ in range(4)]}
    order: list[str] = []

    async def follow(name: str) -> None:
        assert await met[name].says() == "stopping"
        await met[name].ends()
        order.append(name)

    process.send_signal(number)
    await asyncio.gather(*(follow(name) for name in met))
    assert (order[0], set(order[1:3]), order[3]) == ("gateway", {"node-1", "node-2"}, "controller")
    code, err = await ended(process)
    assert code == 0
    assert "stopping" in err


async def test_stopped_while_it_starts_it_leaves_nothing(dev, meetings, tmp_path, stand_in):
    dev.launcher = stand_in("line = hello(sys.argv[1]); signal.pause()", "never_ready")
    process = await dev.start()
    controller = await meetings.next()
    process.send_signal(signal.SIGINT)
    assert (await ended(process))[0] == 0
    await controller.ends()


async def test_all_end_when_it_is_killed(dev, meetings):
    process = await dev.start()
    await announced(process)
    process.kill()
    for _ in range(4):
        async with asyncio.timeout(10):
            await (await meetings.next()).ends()


async def test_what_a_killed_node_left_behind_ends_with_it(dev, meetings):
    process = await dev.start(nodes=1, LEAVES_BEHIND="1")
    await announced(process)
    met = {each.name: each for each in [await meetings.next() for _ in range(4)]}
    os.kill(met["node-1"].pid, signal.SIGKILL)
    again = [await meetings.next(), await meetings.next()]
    assert {each.name for each in again} == {"node-1", "left-behind"}
    assert not met["left-behind"].reader.at_eof()  # the next agent may want it
    process.terminate()
    assert (await ended(process))[0] == 0
    async with asyncio.timeout(10):
        await met["left-behind"].ends()


async def test_orphans_that_end_are_reaped(dev, meetings):
    process = await dev.start(nodes=1, LEAVES_BEHIND="1")
    await announced(process)
    met = {each.name: each for each in [await meetings.next() for _ in range(4)]}
    os.kill(met["node-1"].pid, signal.SIGKILL)
    os.kill(met["left-behind"].pid, signal.SIGKILL)
    async with asyncio.timeout(10):
        # Being reaped is an event for the parent only.
        while psutil.pid_exists(met["left-behind"].pid):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("broken", ["controller", "gateway", "node-2"])
async def test_a_process_that_does_not_start_ends_all_with_its_reason(dev, meetings, broken):
    process = await dev.start(FAILS=broken)
    code, err = await ended(process)
    assert code == 8
    assert f"error: {broken} did not start: {broken} is broken\nhint: mend it\n" in err
    while not meetings.met.empty():
        await (await meetings.next()).ends()
    assert not (Path(os.environ["SLLM_HOME"]) / "config.toml").exists()


async def test_a_port_that_is_taken_is_told_before_anything_starts(dev, meetings):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, err = await ended(await dev.start(gateway_port=port))
    assert code == 4
    assert f"error: cannot listen on 127.0.0.1:{port}: Address already in use" in err
    assert "--gateway-port 0 takes any free one" in err
    assert meetings.all == []


async def test_a_second_one_on_the_same_state_is_refused(dev, meetings):
    first = await dev.start()
    await announced(first)
    code, err = await ended(await dev.start())
    assert code == 4
    assert f"error: a cluster already runs on {dev.state} (process {first.pid})" in err
    assert len(meetings.all) == 4


async def test_another_can_follow_on_the_same_state_with_the_same_authority(dev, meetings):
    for _ in range(2):
        process = await dev.start()
        await announced(process)
        authority = (dev.state / "pki" / "ca.pem").read_bytes()
        process.terminate()
        await ended(process)
    assert (dev.state / "pki" / "ca.pem").read_bytes() == authority


async def test_secrets_are_the_owners_alone(dev, meetings, home):
    os.umask(os.umask(0o022))
    await announced(await dev.start())
    assert stat.S_IMODE(dev.state.stat().st_mode) == 0o700
    written = [*dev.state.glob("pki/*"), *dev.state.glob("etc/*"), home / "config.toml"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in written} == {0o600}
    names = {"ca", "controller", "gateway", "operator", "node-1", "node-2"}
    assert {path.name for path in dev.state.glob("pki/*")} == {f"{n}.{end}" for n in names for end in ("pem", "key")}


async def test_the_context_is_there_while_it_runs_and_gone_afterwards(dev, meetings, home):
    process = await dev.start()
    told = await announced(process)
    contexts = load(home / "config.toml")
    assert told["current"] is True
    assert contexts.current == "dev"
    assert contexts.contexts["dev"] == Context(
        controller="127.0.0.1:4711",
        gateway="127.0.0.1:4711",
        ca=str(dev.state / "pki/ca.pem"),
        certificate=str(dev.state / "pki/operator.pem"),
        key=str(dev.state / "pki/operator.key"),
    )
    process.terminate()
    await ended(process)
    assert not home.exists()


async def test_a_context_that_is_current_stays_so(dev, meetings, home):
    mine = Contexts(current="mine", contexts={"mine": Context(controller="there:7700")})
    save(home / "config.toml", mine)
    process = await dev.start()
    told = await announced(process)
    assert told["current"] is False
    assert load(home / "config.toml").current == "mine"
    process.terminate()
    await ended(process)
    assert load(home / "config.toml") == mine
