"""Makes a freshly forked child an engine host: its own session, log, memory limit; then serves until it should end.

gRPC may start only here, after the fork. The order matters: the host listens and is on record before its engine is
built, so that an agent that comes back in the middle of a build finds it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import tempfile
from pathlib import Path

from sllm import log as logs
from sllm.config import TlsConfig
from sllm.core.device import DeviceKind
from sllm.core.launch import Launch, LaunchRecord
from sllm.engine.base import EngineCore, EngineKind, Hooks
from sllm.engine.host import Host
from sllm.engine.weights import Weights, open_weights
from sllm.errors import CapacityExceeded, SllmError
from sllm.linux import PR_SET_NAME, prctl, start_ticks, step_back
from sllm.rpc import transport
from sllm.rpc.engine import handlers
from sllm.rpc.identity import load_tls

log = logging.getLogger(__name__)

# Answers that are under way when the host ends get this long.
_GOODBYE_S = 1.0
_CLOSE_S = 2.0

# The kernel counts address space as data. The stacks of an engine's and gRPC's threads (about 50 of 8 MiB) take this
# much of it and hardly any memory; without it threads could not start, and gRPC waits for its own for ever.
_STACKS_BYTES = 512 << 20


# An engine that computes on the CPU takes all of it. Who brings its tokens to clients needs little, but at once.
CPU_NICE = 10


def become_host(launch: Launch, kind: EngineKind, *, lease_fd: int, feed_fd: int, log_fd: int) -> int:
    """Never returns to the warm process' code: the caller exits with the code returned."""
    try:
        _stand_alone(launch, log_fd)
        weights = _opened(launch, lease_fd, feed_fd)
        if launch.device_kind == DeviceKind.CPU:
            _limit_memory(launch.memory_bytes)
        asyncio.run(_serve(launch, kind, weights))
    except BaseException:
        log.exception("the engine host of %s ends with an error", launch.spec.id)
        return 1
    return 0


def _stand_alone(launch: Launch, log_fd: int) -> None:
    os.setsid()
    with open(os.devnull, "rb") as null:
        os.dup2(null.fileno(), 0)
    os.dup2(log_fd, 1)
    os.dup2(log_fd, 2)
    os.close(log_fd)
    logs.setup(level="info", json_lines=False)
    # An interrupt is for the foreground; a host ends by SIGTERM, by its agent or by its grace.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    name_process(launch.spec.id)
    # Engines leave files where `tempfile` says; what a killed one leaves, its agent removes.
    Path(launch.scratch_dir).mkdir(mode=0o700, parents=True, exist_ok=True)
    tempfile.tempdir = os.environ["TMPDIR"] = launch.scratch_dir
    os.environ["OMP_NUM_THREADS"] = str(launch.threads)
    if launch.device_kind == DeviceKind.CPU:
        step_back(CPU_NICE)
    if launch.device_kind == DeviceKind.CUDA:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(launch.device_ids)


def name_process(name: str) -> None:
    """Show `name` (its first 15 bytes) in ps and top instead of the warm process' name."""
    prctl(PR_SET_NAME, name.encode())


def _opened(launch: Launch, lease_fd: int, feed_fd: int) -> Weights | SllmError:
    """Return the weights, or why there are none: a host must be up to say so."""
    try:
        return open_weights(launch, lease_fd, feed_fd)
    except OSError as error:
        return CapacityExceeded(f"the weights cannot be mapped: {error.strerror}")
    except SllmError as error:
        return error


def _limit_memory(lease_bytes: int) -> None:
    """Let the process' data grow by its lease and no further, so that it fails alone instead of taking the node down.

    The weights are mapped already: they are the pool's memory, not the lease's.
    """
    if lease_bytes == 0:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = _status_bytes("VmData") + _STACKS_BYTES + lease_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def own_bytes() -> int:
    """Return the memory this process holds now, the part shared with the warm process included, that of the pool
    not."""
    _, resident, shared, *_ = Path("/proc/self/statm").read_text(encoding="ascii").split()
    return (int(resident) - int(shared)) * resource.getpagesize()


async def _serve(launch: Launch, kind: EngineKind, weights: Weights | SllmError) -> None:
    inherited = own_bytes()

    def build(hooks: Hooks) -> EngineCore:
        if isinstance(weights, SllmError):
            raise weights
        weights.feed.follow(hooks.arrived)
        return kind.build(launch, weights, hooks)

    tls = load_tls(_tls(launch))
    host = Host(launch, build, memory_bytes=lambda: max(0, own_bytes() - inherited), tls=tls)
    server, port = await transport.serve([handlers(host)], f"{launch.bind_host}:0", tls)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, host.drain, 0.0)
    _record(launch, f"{launch.bind_host}:{port}")
    host.start()
    log.info("engine host of %s (%s, %s) at port %s", launch.spec.id, launch.spec.deployment, kind.name, port)
    await host.finished.wait()
    await server.stop(_GOODBYE_S)
    await host.close(_CLOSE_S)
    log.info("engine host of %s ends", launch.spec.id)


def _tls(launch: Launch) -> TlsConfig | None:
    if not launch.tls_ca:
        return None
    return TlsConfig(ca=Path(launch.tls_ca), certificate=Path(launch.tls_certificate), key=Path(launch.tls_key))


def _record(launch: Launch, address: str) -> None:
    """Write the record whole or not at all: an agent may read it at any moment."""
    pid = os.getpid()
    ticks = start_ticks(pid)
    assert ticks is not None, "we are alive"
    record = LaunchRecord(
        replica=launch.spec.id,
        nonce=launch.nonce,
        pid=pid,
        start_ticks=ticks,
        address=address,
        spec=launch.spec,
        save_runtime=launch.save_runtime,
    )
    path = Path(launch.record_path)
    unfinished = path.with_name(f".{path.name}.{pid}")
    unfinished.touch(mode=0o600)  # it holds the nonce
    unfinished.write_text(record.to_json(), encoding="utf-8")
    unfinished.replace(path)
