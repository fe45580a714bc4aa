"""The peer: vLLM's own OpenAI server, with the engine settings that sllm gives its engine hosts on a CPU."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

# The same environment for both sides: passive OpenMP waiting, no telemetry, no look-ups outside this machine.
ENVIRONMENT: Mapping[str, str] = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "KMP_BLOCKTIME": "0",
    "GOMP_SPINCOUNT": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
}


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextmanager
def vllm_server(model: Path, *, capacity: int, max_model_len: int, threads: int, log: Path) -> Iterator[str]:
    """Start the server and yield its base URL at once: whether it is up yet is for the caller to measure."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry"]
    command += ["--model", str(model), "--served-model-name", "demo", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--max-model-len", str(max_model_len), "--max-num-seqs", str(capacity)]
    command += ["--max-num-batched-tokens", str(max(2048, max_model_len)), "--kv-cache-memory-bytes", str(256 << 20)]
    command += ["--enforce-eager", "--disable-log-stats", "--uvicorn-log-level", "warning"]
    environment = {**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": str(threads)}
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        # Its engine core is a child in the same session: SIGTERM to the group ends both.
        os.killpg(process.pid, 15)
        process.wait(60)


def wait_until_up(base_url: str, timeout_s: float = 300) -> None:
    """Ask every 20 ms: the peer has no readiness event to wait for, and 20 ms are 0.1% of what is measured."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(base_url.removesuffix("/v1") + "/health", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.02)
    raise TimeoutError(f"the vLLM server was not up after {timeout_s} s")
