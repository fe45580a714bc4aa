"""The warm process: imports an engine once, then forks an engine host whenever its agent asks.

    python -m sllm.engine.warm --fd N --engine vllm|fake

It speaks the protocol of `sllm.core.launch` on descriptor N and ends when the agent closes its end; where its engine
cannot be imported it says `error` instead of `ready`, with an empty nonce, and ends with status 1. It must never start
a thread that works, start gRPC, or touch CUDA: a fork copies none of these. A host is forked twice over, so that its
parent is gone at once and the agent (a subreaper) becomes its parent: the death of this process does not touch it.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from sllm.core.launch import Launch, WarmReady
from sllm.engine.base import EngineKind
from sllm.engine.exits import leave
from sllm.errors import SllmError

_KINDS = {"vllm": "sllm.engine.vllm_setup", "fake": "sllm.engine.fake"}
_PACKET_BYTES = 64 << 10
_FDS = 4  # launch, lease, feed, log
_PID_BYTES = 4

# Read by OpenMP and by libraries when they are loaded, so they must be set before anything is imported.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "KMP_BLOCKTIME": "0",
    "GOMP_SPINCOUNT": "0",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def main() -> None:
    """Import, say ready, fork on demand."""
    parser = argparse.ArgumentParser(prog="sllm.engine.warm")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--engine", choices=sorted(_KINDS), required=True)
    options = parser.parse_args()
    # The terminal's Ctrl-C reaches the whole foreground group; when to end is the agent's to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    control = socket.socket(fileno=options.fd)
    started_at = time.monotonic()
    try:
        kind = warm_up(options.engine)
    except SllmError as error:
        _send(control, {"error": error.message, "nonce": ""})
        leave(1)
    ready = WarmReady(
        engine=kind.name,
        version=kind.version,
        seconds=time.monotonic() - started_at,
        architectures=kind.architectures,
    )
    _send(control, {"ready": asdict(ready)})
    serve(control, kind)
    leave(0)


def warm_up(engine: str) -> EngineKind:
    """Import the engine and all that a host imports, and keep the collector off what every host will share."""
    os.environ.update(_ENVIRONMENT)
    kind: EngineKind = importlib.import_module(_KINDS[engine]).warm()
    importlib.import_module("sllm.engine.process")
    gc.collect()
    gc.freeze()
    return kind


def serve(control: socket.socket, kind: EngineKind) -> None:
    """Fork on each request until the agent closes its end."""
    while True:
        packet, fds, _, _ = socket.recv_fds(control, _PACKET_BYTES, _FDS, socket.MSG_CMSG_CLOEXEC)
        if not packet:
            return
        nonce = ""
        try:
            nonce = json.loads(packet)["fork"]
            _fork(control, kind, nonce, fds)
        except Exception as error:
            _send(control, {"error": f"{type(error).__name__}: {error}", "nonce": nonce})
        finally:
            for fd in fds:
                os.close(fd)


def _fork(control: socket.socket, kind: EngineKind, nonce: str, fds: Sequence[int]) -> None:
    if len(fds) != _FDS:
        raise ValueError(f"{len(fds)} descriptors came with the request, not {_FDS}")
    launch = Launch.from_json(os.pread(fds[0], os.fstat(fds[0]).st_size, 0).decode())
    for stream in (sys.stdout, sys.stderr):
        stream.flush()  # or each child would write it again
    reader, writer = os.pipe()
    try:
        middle = os.fork()
        if middle == 0:
            os.close(reader)
            _fork_again(control, kind, launch, fds, writer)
        _, status = os.waitpid(middle, 0)
        if status != 0:
            raise OSError(f"forking failed: status {os.waitstatus_to_exitcode(status)}")
        # The middle process is gone, so that the host is the agent's child: should it die at once, the agent sees how.
        _send(control, {"forked": nonce, "pid": int.from_bytes(os.read(reader, _PID_BYTES))})
    finally:
        os.close(reader)
        os.close(writer)


def _fork_again(control: socket.socket, kind: EngineKind, launch: Launch, fds: Sequence[int], writer: int) -> None:
    """In the middle process: fork the host, write its pid, and be gone."""
    from sllm.engine.process import become_host  # imported by `warm_up`, after the engine

    code = 1
    try:
        pid = os.fork()
        if pid == 0:
            control.close()
            os.close(writer)
            os.close(fds[0])
            code = become_host(launch, kind, lease_fd=fds[1], feed_fd=fds[2], log_fd=fds[3])
        else:
            os.write(writer, pid.to_bytes(_PID_BYTES))
            code = 0
    finally:
        leave(code)


def _send(control: socket.socket, message: dict[str, Any]) -> None:
    control.send(json.dumps(message).encode())


if __name__ == "__main__":
    main()
